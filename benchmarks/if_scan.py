"""Integrate-and-fire over folded time: how fast it is, and how far its rate is from QCFS.

    python benchmarks/if_scan.py --out benchmarks/results/if-scan-cpu.json [--device cuda]

Times: ``[B T, L, C]`` inputs, per-channel thresholds, forward without gradients (int8 codes) and forward with backward,
of the scan as the library runs it, of its PyTorch loop, and of the same recursion as a graph of single operations. The
best of several rounds is kept. Gigabytes count what has to move: forward reads x and writes int8 codes; forward with
backward reads x and writes codes, then reads x and the codes' gradient and writes the gradient of x. A copy of x (read
and write) is the yardstick.

Temporal error: the share of neurons whose rate over T steps differs from QCFS of the mean input, which is uniform on
[-1, 3] at threshold 2, while the steps scatter about it with a normal deviation sigma (their mean taken out).
"""

from __future__ import annotations

import argparse
import json
import platform
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from spikeform.neurons import scan as core
from spikeform.neurons.if_ import scan
from spikeform.neurons.qcfs import qcfs_codes
from spikeform.neurons.surrogate import spike

SIZES = {  # (B, T, L, C)
    "cpu": [(1, 8, 1, 3072), (1, 8, 128, 768), (2, 8, 128, 3072)],
    "cuda": [(1, 8, 1, 3072), (1, 8, 1024, 3072), (8, 8, 1024, 3072), (8, 4, 1024, 11008), (4, 16, 1024, 3072)],
}
NEURONS = 1_000_000
SIGMAS = (0.0, 0.25, 0.5, 1.0, 2.0)


def best(run: Callable[[], object], device: str, rounds: int) -> float:
    """Seconds of the fastest round, after a warm-up; on CUDA by events."""
    for _ in range(3):
        run()
    seconds = []
    for _ in range(rounds):
        if device == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            end.record()
            end.synchronize()
            seconds.append(start.elapsed_time(end) / 1e3)
        else:
            begin = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - begin)
    return min(seconds)


def single_operations(x: Tensor, theta: Tensor, initial: Tensor, steps: int) -> Tensor:
    """The recursion as autograd would keep it."""
    v, spikes = initial, []
    for current in x.view(-1, steps, *x.shape[1:]).unbind(1):
        u = v + current
        s = spike(u - theta)
        v = u - theta * s
        spikes.append(s)
    return torch.stack(spikes, 1).flatten(0, 1)


def timings(device: str, rounds: int) -> list[dict]:
    rows = []
    for B, T, L, C in SIZES[device]:
        for dtype in (torch.float32, torch.bfloat16):
            x = (torch.randn(B * T, L, C, device=device) + 0.3).to(dtype)
            theta, grad = torch.rand(C, device=device) + 0.5, torch.randn(B * T, L, C, device=device)
            leaves = [leaf.clone().requires_grad_() for leaf in (x, theta)]

            def forward(x=x, theta=theta, T=T):
                return scan(x, theta, 0.5 * theta, steps=T)

            def both(leaves=leaves, grad=grad, T=T):
                x, theta = leaves
                return torch.autograd.grad(scan(x, theta, 0.5 * theta, steps=T, surrogate=1.0), leaves, grad)

            def graph(leaves=leaves, grad=grad, T=T):
                x, theta = leaves
                return torch.autograd.grad(single_operations(x, theta, 0.5 * theta, T), leaves, grad)

            runs = {"copy": x.clone, "forward": forward, "forward_backward": both, "graph_forward_backward": graph}
            seconds = {name: best(run, device, rounds) for name, run in runs.items()}
            if device == "cuda":
                fused, core._kernels = core._kernels, lambda x, rule: None
                for name in ("forward", "forward_backward"):
                    seconds[f"loop_{name}"] = best(runs[name], device, rounds)
                core._kernels = fused
            n, size = x.numel(), x.element_size()
            moved = {"copy": 2 * size * n, "forward": (size + 1) * n, "forward_backward": (3 * size + 8) * n}
            row = {"B": B, "T": T, "L": L, "C": C, "dtype": str(dtype).removeprefix("torch.")}
            row["us"] = {name: round(s * 1e6, 1) for name, s in seconds.items()}
            row["GB_per_s"] = {name: round(moved[name] / seconds[name] / 1e9, 1) for name in moved}
            rows.append(row)
            print(row, flush=True)
    return rows


def temporal_error(device: str) -> list[dict]:
    rows, theta = [], 2.0
    generator = torch.Generator().manual_seed(0)
    for signed in (False, True):
        for T in (4, 8, 16):
            for sigma in SIGMAS:
                mean = torch.rand(NEURONS, generator=generator, dtype=torch.float64) * 4 - 1
                scatter = torch.randn(1, T, NEURONS, generator=generator, dtype=torch.float64) * sigma
                x = (mean + scatter - scatter.mean(1, keepdim=True))[0].to(device)
                level, initial = (0.5, 0.0) if signed else (1.0, 0.5 * theta)
                counts = scan(x, theta, initial, level, steps=T, signed=signed).sum(0)
                wanted = qcfs_codes(mean.to(device), theta, T, signed=signed)
                differs = (counts - wanted).abs()
                row = {"signed": signed, "T": T, "levels": T, "sigma": sigma}
                row |= {"differ": round(float((differs > 0).double().mean()), 4)}
                row |= {"mean_steps_off": round(float(differs.mean()), 4)}
                rows.append(row)
                print(row, flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--rounds", type=int, default=20)
    args = parser.parse_args()
    warnings.simplefilter("error")  # without triton there is nothing to measure on a GPU
    torch.set_num_threads(1)
    torch.manual_seed(0)
    versions = {"torch": torch.__version__}
    if args.device == "cuda":
        import triton

        versions["triton"] = triton.__version__
    hardware = torch.cuda.get_device_name() if args.device == "cuda" else f"CPU {platform.machine()}, one thread"
    result = {
        "protocol": " ".join(__doc__.split("\n\n", 2)[2].split()) + f" Rounds: {args.rounds}.",
        "hardware": hardware,
        "versions": versions,
        "timings": timings(args.device, args.rounds),
        "temporal_error": temporal_error(args.device),
    }
    args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
