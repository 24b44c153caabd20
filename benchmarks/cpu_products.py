"""Products on the CPU beside PyTorch's own: rows against weights that come from memory, events, a 1.1B LLaMA's shapes.

    OMP_WAIT_POLICY=passive python benchmarks/cpu_products.py --out benchmarks/results/cpu-products.json

Weights rotate through more memory than any cache holds, and so do the patterns of zeros. Rounds go through all cases in
turn, so that a busy neighbour slows each alike; the least time of a case's rounds counts. Times are of the whole call,
Python included, in milliseconds: wall time, and where there is one thread its own processor time, which a neighbour on
the same cores does not lengthen. Compare within one run only.
"""

import argparse
import json
import platform
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from spikeform.native import library
from spikeform.native.library import level
from spikeform.synapses import fused

COLD = 320 << 20  # bytes of weights that a case rotates through
PATTERNS = 7
ROUNDS = 4
ZEROS = (0.0, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.97)
LLAMA = {"q, o": (2048, 2048, 44), "k, v": (256, 2048, 44), "gate, up": (5632, 2048, 44), "down": (2048, 5632, 22)}
HEAD = (32000, 2048, 1)


class Weights:
    """A block of memory, seen as as many weights [N, K] of a dtype as it holds."""

    def __init__(self) -> None:
        self.block = torch.randint(0, 255, (COLD,), dtype=torch.uint8)
        self.block[1::2] &= 0x3F  # no NaN and no infinity, as bf16 or fp32

    def of(self, dtype, *shape):
        """Weights of this dtype and shape, as many as there is room for, at least one."""
        size = torch.empty((), dtype=dtype).element_size()
        count = shape[0] * shape[1] * size
        return [
            self.block[i * count : (i + 1) * count].view(dtype).view(shape)
            for i in range(max(self.block.numel() // count, 1))
        ]


def timed(cases):
    """Least time of each case, ms; a case is a function of the index of its weight, and their number."""
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    best = dict.fromkeys(cases, float("inf"))
    for _ in range(ROUNDS):
        for name, (run, count) in cases.items():
            began = clock()
            for i in range(count):
                run(i)
            best[name] = min(best[name], (clock() - began) / count * 1e3)
    return {name: round(value, 4) for name, value in best.items()}


def own(weights, M, N, K):
    """The library's products and PyTorch's, on the same rotating weights."""
    x, bias = torch.randn(M, K), torch.zeros(N)
    threshold, scale = torch.tensor([5.0, 40.0]), torch.ones(N)
    zero, top, multiple = torch.full((N,), 8, dtype=torch.int16), torch.full((K,), 15.0), torch.ones(K)
    int8, fp32, bf16 = (weights.of(d, N, K) for d in (torch.int8, torch.float32, torch.bfloat16))
    nibbles = weights.of(torch.uint8, N, K // 2)
    codes, half = torch.randint(-127, 128, (M, K), dtype=torch.int8), x.bfloat16()
    gif = (top, multiple, 15, 1)
    most = 64 if M == 1 else 12
    cases = {
        "gif int8": (lambda i: fused.gif_linear(x, int8[i], scale, None, None, bias, *gif), min(len(int8), most)),
        "gif int4": (
            lambda i: fused.gif_linear(x, int8[0], scale, nibbles[i], zero, bias, *gif),
            min(len(nibbles), most),
        ),
        "oat T=7 int8": (
            lambda i: fused.oat_linear_int(x, int8[i], scale, bias, threshold, 127, 128, 0),
            min(len(int8), most),
        ),
        "oat T=14 int8": (
            lambda i: fused.oat_linear_int(x, int8[i], scale, bias, threshold, 2**14 - 1, 2**14, 0),
            min(len(int8), most),
        ),
        "oat T=16 bf16": (
            lambda i: fused.oat_linear(x, bf16[i], bias, threshold, None, 2**16 - 1, 2**16, 0, False),
            min(len(bf16), most),
        ),
        "oat T=16 fp32": (
            lambda i: fused.oat_linear(x, fp32[i], bias, threshold, None, 2**16 - 1, 2**16, 0, False),
            min(len(fp32), most),
        ),
        "torch F.linear fp32": (lambda i: F.linear(x, fp32[i], bias), min(len(fp32), most)),
        "torch F.linear bf16": (lambda i: F.linear(half, bf16[i]), min(len(bf16), most)),
        "torch _int_mm": (lambda i: torch._int_mm(codes, int8[i].t()), min(len(int8), most)),
    }
    if M > 8:
        del cases["gif int4"]  # many rows take the int8 weights
    return cases


def dynamic(M, N, K, copies):
    """torch.ao's quantised linear layer, whose weights are packed beforehand."""
    layers = torch.ao.quantization.quantize_dynamic(
        torch.nn.ModuleList(torch.nn.Linear(K, N) for _ in range(copies)), {torch.nn.Linear}, torch.qint8
    )
    x = torch.randn(M, K)
    return {"torch quantize_dynamic": (lambda i: layers[i](x), copies)}


def events(weights, K, N):
    """Milliseconds, and speed-up over the dense product of the same weights, by the zeros among the codes."""
    x, scale = torch.randn(1, K), torch.ones(N)
    zero, top, multiple = torch.full((N,), 8, dtype=torch.int16), torch.full((K,), 15.0), torch.ones(K)
    gif = (top, multiple, 15, 1)
    dense8, dense4, dense16 = (
        weights.of(torch.int8, N, K),
        weights.of(torch.uint8, N, K // 2),
        weights.of(torch.bfloat16, N, K),
    )
    rows8, rows4, rows16 = (
        weights.of(torch.int8, K, N),
        weights.of(torch.uint8, K, N // 2),
        weights.of(torch.bfloat16, K, N),
    )
    threshold = torch.tensor([5.0])
    cases = {
        "int8": (lambda i: fused.gif_linear(x, dense8[i], scale, None, None, None, *gif), len(dense8)),
        "int4": (lambda i: fused.gif_linear(x, dense8[0], scale, dense4[i], zero, None, *gif), len(dense4)),
        "bf16": (
            lambda i: fused.oat_linear(x, dense16[i], None, threshold, None, 2**16 - 1, 2**16, 0, False),
            len(dense16),
        ),
    }
    for z in ZEROS:
        codes = [torch.randint(1, 100, (1, K)).to(torch.int8) * (torch.rand(1, K) >= z) for _ in range(PATTERNS)]
        reals = [c.float() for c in codes]
        cases[f"int8 {z}"] = (
            lambda i, c=codes: fused.event_product(c[i % PATTERNS], rows8[i], scale, N),
            len(rows8),
        )
        cases[f"int4 {z}"] = (
            lambda i, c=codes: fused.event_product(c[i % PATTERNS], rows4[i], scale, N),
            len(rows4),
        )
        cases[f"bf16 {z}"] = (
            lambda i, c=reals: fused.event_product(c[i % PATTERNS], rows16[i], scale, N),
            len(rows16),
        )
    found = timed(cases)
    return {
        kind: {"dense": found[kind]}
        | {
            str(z): {
                "ms": found[f"{kind} {z}"],
                "times as fast": round(found[kind] / found[f"{kind} {z}"], 2),
                "of 1/(1-z)": round(found[kind] / found[f"{kind} {z}"] * (1 - z), 2),
            }
            for z in ZEROS
        }
        for kind in ("int8", "int4", "bf16")
    }


def llama(weights, M):
    """All products of a 1.1B LLaMA (the head for the last position alone): ms, and tokens a second by them alone."""
    total: dict[str, float] = {}
    for N, K, count in [*LLAMA.values(), HEAD]:
        rows = 1 if (N, K, count) == HEAD else M
        cases = own(weights, rows, N, K)
        cases |= dynamic(rows, N, K, 2 if N * K > 2**24 else 8)
        found = timed(cases)
        found.setdefault("gif int4", found["gif int8"])
        for name, ms in found.items():
            total[name] = total.get(name, 0.0) + count * ms
    return {name: {"ms": round(ms, 2), "tokens/s": round(M * 1e3 / ms, 1)} for name, ms in total.items()}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    given = parser.parse_args()
    torch.manual_seed(0)
    weights, result = Weights(), {"machine": platform.processor() or platform.machine(), "torch": torch.__version__}
    result |= {"library": library() is not None, "level": level(), "unit": "ms"}
    with torch.inference_mode():
        for threads in given.threads:
            torch.set_num_threads(threads)
            part = result[f"{threads} threads"] = {"rows": {}, "events": {}, "llama 1.1B": {}}
            for M in (1, 4, 16, 128):
                cases = own(weights, M, 4096, 4096) | dynamic(M, 4096, 4096, 8)
                part["rows"][f"{M} x 4096 -> 4096"] = show(f"{M} rows", timed(cases))
            for K, N in ((4096, 4096), (16384, 4096)):
                part["events"][f"{K} -> {N}"] = show(f"events {K} -> {N}", events(weights, K, N))
            for M in (1, 128):
                part["llama 1.1B"][f"{M} tokens"] = show(f"llama, {M} tokens", llama(weights, M))
    if given.out:
        given.out.write_text(json.dumps(result, indent=1) + "\n")


def show(name, found):
    print(name, json.dumps(found), flush=True)
    return found


if __name__ == "__main__":
    main()
