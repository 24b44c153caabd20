"""Fused kernels of neurons on a GPU: checked against the neurons, timed against a copy of the same bytes.

    python benchmarks/gpu_encoders.py [--out FILE] [--before FILE] [--seconds 90] [--only REGEX] [--sweep]

What matters most is timed first, beside the figures of ``--before`` (default: the file in results/). When ``--seconds``
are spent, what is left is named and not measured, and the file is called ``.partial.json``; so it is with ``--only``,
which picks operators.

A figure is the time of one call in a CUDA graph of many, each on buffers of its own, so that no cache holds them; the
best of several replays. The copy is a ``clone()`` of half as many bytes as the operator reads and writes. ``call_us``
is what one eager call costs the host. ``--sweep`` prints the fastest sizes of tiles; ``--quick`` is a dry run on small
shapes (on a CPU with TRITON_INTERPRET=1).
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from spikeform.layers.norm import SpikingNorm
from spikeform.neurons import GIF, OAT, FewSpikeHG
from spikeform.neurons.hg import FixedPointHG
from spikeform.neurons.oat import ROUNDINGS
from spikeform.neurons.triton import few_spike, gif, hg, norm, oat, tiles
from spikeform.spikes import Radix2
from spikeform.synapses import hadamard

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROTATED = 256 * 2**20  # bytes of inputs, several times the last cache
STEPS, BANK = 8, (-32, 32)
WIDTHS = 4096, 11008
CHANGED = "gif", "hg_norm"  # these are timed first


class Case(NamedTuple):
    """An operator and the neuron that it stands for; both take what ``inputs`` gives."""

    inputs: Callable[[int, int], tuple[Tensor, ...]]
    run: Callable[..., Tensor | tuple[Tensor, ...]]
    reference: Callable[..., Tensor | tuple[Tensor, ...]]
    bits: int | None = None  # transcendental: codes of so many bits may differ by one


def real(rows: int, width: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return (torch.randn(rows, width, device=DEVICE) * 2).to(dtype)


def one(rows: int, width: int) -> tuple[Tensor, ...]:
    return (real(rows, width),)


def cases(width: int) -> dict[str, Case]:
    neuron = OAT(Radix2(STEPS), (1.5, 9.7)).to(DEVICE)
    given = neuron.threshold, neuron.coding.limit, neuron.coding.resolution, ROUNDINGS.index(neuron.rounding)
    found = {
        "oat_values": Case(
            one,
            lambda x: oat.oat_values(x, given[0], None, *given[1:], True),
            lambda x: neuron.encode(x).decode().to(x.dtype),
        ),
        "oat_pack": Case(one, lambda x: oat.oat_pack(x, *given), lambda x: neuron.pack(neuron.encode(x))),
    }
    shift = (torch.arange(width, device=DEVICE) % 5 - 2).to(torch.int8)
    shifted = OAT(Radix2(STEPS), (1.5, 9.7)).to(DEVICE)
    shifted.channel_shift, shifted.folded = shift, True
    found["oat_values, shifted, fp32 out"] = Case(
        one,
        lambda x: oat.oat_values(x, given[0], shift, *given[1:], False),
        lambda x: shifted.encode(x).decode(),
    )
    for name in ("silu", "gelu", "gelu_tanh", "relu"):
        found[f"hg_values {name}"] = _function(name)
    act = FixedPointHG("silu", Radix2(STEPS), low=BANK[0], high=BANK[1])
    found["hg_gated silu"] = Case(
        lambda rows, width: (real(rows, width), real(rows, width)),
        lambda gate, up: hg.hg_gated(gate, up, "silu", STEPS, True, *BANK, *given),
        lambda gate, up: hadamard(act(gate), neuron(up)).to(gate.dtype),
        STEPS,
    )
    weight, bias = (torch.nn.Parameter(torch.randn(width, device=DEVICE).bfloat16()) for _ in range(2))
    for name, centred in (("hg_norm (RMS)", False), ("hg_norm (layer)", True)):
        found[name] = _norm(neuron, weight, bias if centred else None, centred, given)
    bank = FewSpikeHG("silu", torch.linspace(-8, 8, 34), *(torch.randn(33, STEPS) for _ in range(3))).to(DEVICE)
    found["few_spike_values"] = Case(
        one,
        lambda x: few_spike.few_spike_values(x, bank.gates, bank.theta, bank.h, bank.d),
        lambda x: bank.encode(x).decode().to(x.dtype),
    )
    for steps in (1, 2):
        found[f"gif_integers T={steps}"] = _gif(width, steps)
    found["gif_pack, heads of 128"] = _pack()
    return found


def _function(name: str) -> Case:
    neuron = FixedPointHG(name, Radix2(STEPS), low=BANK[0], high=BANK[1])
    return Case(
        one,
        lambda x: hg.hg_values(x, name, STEPS, True, *BANK),
        lambda x: neuron.encode(x).decode().to(x.dtype),
        STEPS,
    )


def _norm(neuron: OAT, weight: torch.nn.Parameter, bias: torch.nn.Parameter | None, centred: bool, given) -> Case:
    hgs = (FixedPointHG(name, Radix2(16), low=BANK[0], high=BANK[1]) for name in ("square", "inverse_sqrt"))
    layer = SpikingNorm(weight, bias, 1e-5, centred, 0.0, neuron, *hgs)
    # A sum in another order may move a code that lies on a tie by one, or the scale of a row: 16 bits.
    return Case(
        one,
        lambda x: norm.hg_norm(x, weight, bias, 1e-5, centred, 0.0, *given, 16, True, *BANK),
        layer,
        STEPS,
    )


def _gif(width: int, steps: int) -> Case:
    neuron = GIF(4, (width,), steps=steps).to(DEVICE)
    neuron.set_times(torch.randint(0, steps, (width,), device=DEVICE) + 1)
    tables = neuron.tables()
    return Case(
        one,
        lambda x: gif.gif_integers(x, tables.top, tables.multiple, neuron.levels, steps),
        lambda x: neuron.encode(x).integers(),
    )


def _pack() -> Case:
    size = 128
    neurons: dict[int, GIF] = {}

    def tables(x: Tensor) -> GIF:
        heads = x.shape[1]
        if heads not in neurons:
            neurons[heads] = GIF(4, (heads, 1, size), steps=2).to(DEVICE)
            neurons[heads].set_times(torch.randint(0, 2, (heads, 1, size), device=DEVICE) + 1)
        return neurons[heads]

    def run(x: Tensor) -> Tensor:
        neuron = tables(x)
        return gif.gif_pack(x, neuron.tables().top, neuron.tables().multiple, neuron.levels, 2)

    return Case(
        lambda rows, width: (real(rows, width).view(1, rows, -1, size).transpose(1, 2),),
        run,
        lambda x: tables(x).pack(tables(x).encode(x)),
    )


def difference(values: Tensor, expected: Tensor, bits: int | None) -> dict[str, float | bool]:
    """Whether two results are equal; else how many elements are, and the largest difference in units of a code."""
    if torch.equal(values, expected):
        return {"equal": True}
    a, b = values.double(), expected.double()
    unit = b.abs().clamp(min=1e-4) * 2.0 ** (1 - (bits or 1))
    return {
        "equal": False,
        "share": float((a == b).double().mean()),
        "worst_units": float(((a - b).abs() / unit).max()),
    }


@torch.no_grad()
def check(case: Case, rows: int, width: int) -> dict[str, float | bool]:
    inputs = case.inputs(rows, width)
    found, expected = case.run(*inputs), case.reference(*inputs)
    pairs = zip(found, expected, strict=True) if isinstance(found, tuple) else [(found, expected)]
    results = [difference(a, b, case.bits) for a, b in pairs]
    return next((r for r in results if not r["equal"]), {"equal": True})


def bytes_of(tensors: Tensor | tuple[Tensor, ...]) -> int:
    return sum(t.numel() * t.element_size() for t in (tensors if isinstance(tensors, tuple) else (tensors,)))


def in_graph(run: Callable, sets: list[tuple[Tensor, ...]], rounds: int) -> float:
    """Microseconds of one call."""
    if DEVICE == "cpu":
        start = time.perf_counter()
        run(*sets[0])
        return (time.perf_counter() - start) * 1e6
    run(*sets[0])
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = [run(*inputs) for inputs in sets]
    graph.replay()
    best = float("inf")
    for _ in range(rounds):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        best = min(best, start.elapsed_time(end) * 1e3 / len(sets))
    del kept, graph
    return best


def on_host(run: Callable, inputs: tuple[Tensor, ...], calls: int) -> float:
    """Microseconds that one call keeps the host."""
    run(*inputs)
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        run(*inputs)
    return (time.perf_counter() - start) / calls * 1e6


@torch.no_grad()
def measure(case: Case, rows: int, width: int, rounds: int) -> dict[str, float]:
    first = case.inputs(rows, width)
    size = bytes_of(first) + bytes_of(case.run(*first))
    copies = max(2, min(ROTATED // size, 64)) if DEVICE == "cuda" else 1
    sets = [first, *(case.inputs(rows, width) for _ in range(copies - 1))]
    ours = in_graph(case.run, sets, rounds)
    half = max(size // 2 // 16 * 16, 16)
    buffers = [(torch.zeros(half, dtype=torch.uint8, device=DEVICE),) for _ in range(copies)]
    copy = in_graph(torch.clone, buffers, rounds)
    host = on_host(case.run, first, 100 if DEVICE == "cuda" else 1)
    return {"bytes": size, "us": ours, "copy_us": copy, "ratio": ours / copy, "call_us": host}


def sweep(width: int, rows: int, rounds: int) -> None:
    """Print the time of each size of tile, the fastest first."""
    found = cases(width)

    def over(name: str, module, **choices) -> None:
        names, before = list(choices), {c: getattr(module, c) for c in choices}
        times = []
        for values in itertools.product(*choices.values()):
            for item, value in zip(names, values, strict=True):
                setattr(module, item, value)
            times.append((measure(found[name], rows, width, rounds)["us"], dict(zip(names, values, strict=True))))
        for item, value in before.items():
            setattr(module, item, value)
        print(f"sweep [{rows}, {width}] {name}:", *(f"{t:.2f} {c}" for t, c in sorted(times, key=lambda p: p[0])[:4]))

    for name in ("gif_integers T=2", "hg_norm (RMS)"):
        over(name, tiles, LONGEST_CHUNK=(1024, 2048, 4096), HELD=(8, 16, 24, 32))
    if width != WIDTHS[0]:  # the others see one long row
        return
    for name in ("oat_values", "hg_values gelu", "hg_gated silu"):
        over(name, tiles, LARGE_TILE=(1024, 2048, 4096, 8192), WARPS=(4, 8))
    over("oat_values, shifted, fp32 out", tiles, LARGE_TILE=(1024, 2048, 4096))
    over("gif_pack, heads of 128", gif, BAND=(512, 1024, 2048, 4096, 8192))
    over("few_spike_values", few_spike, ELEMENTS=(256, 512, 1024))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    results = Path(__file__).parent / "results"
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", results)) / "gpu-encoders.json")
    parser.add_argument("--before", type=Path, default=results / "gpu-encoders.json")
    parser.add_argument("--seconds", type=float, default=90)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--only", default="", help="operators whose names this expression finds")
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    torch.manual_seed(0)
    began = time.perf_counter()
    shapes = [(r, w) for r in (2048, 1, 64) for w in reversed(WIDTHS)]
    if args.quick:
        shapes, args.rounds = [(r, 256) for r in (1, 3)], 1
    earlier = json.loads(args.before.read_text())["rows"] if args.before.exists() else []
    before = {(row["operator"], row["rows"], row["width"]): row for row in earlier}
    table, left_out = [], []
    for rows, width in shapes:
        made = cases(width)
        for name in sorted(made, key=lambda name: not name.startswith(CHANGED)):
            if time.perf_counter() - began > args.seconds or not re.search(args.only, name):
                left_out.append((name, rows, width))
                continue
            row = {"operator": name, "rows": rows, "width": width, **check(made[name], rows, width)}
            row |= measure(made[name], rows, width, args.rounds)
            table.append(row)
            old = before.get((name, rows, width))
            was = f"was {old['us']:.2f} ({old['ratio']:.2f})" if old else ""
            equal = "equal" if row["equal"] else f"NOT EQUAL: {row['share']:.5f}, {row['worst_units']:.3f} units"
            print(f"{name} [{rows}, {width}]: {row['us']:.2f} us ({row['ratio']:.2f}) {was} {equal}", flush=True)
    if args.sweep:
        for rows, width in shapes[-1:] if args.quick else [(2048, w) for w in WIDTHS]:
            sweep(width, rows, 5)
    print("left out:", left_out or "nothing", flush=True)
    result = {
        "protocol": "bf16 input; a call in a CUDA graph over rotating buffers, best replay; copy: clone of equal bytes",
        "hardware": torch.cuda.get_device_name() if DEVICE == "cuda" else f"CPU {platform.machine()}, interpreted",
        "versions": {"torch": torch.__version__, "triton": triton.__version__},
        "rows": sorted(table, key=lambda row: (row["width"], row["rows"])),
    }
    out = args.out.with_suffix(".partial.json") if left_out else args.out
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
