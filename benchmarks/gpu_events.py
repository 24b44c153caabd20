"""The event executor's products on a GPU, beside the collapsed product of the same weights, by the share of zeros.

    python benchmarks/gpu_events.py [--out FILE] [--quick] [--kinds bf16,int8,int4] [--zeros 0.5,0.9]

One row, weights in copies of more than 400 MB that take turns, so that none is found in the cache; launches in a CUDA
graph, the least of several replays. A few cuts are tried beside the one that ``spikeform/synapses/triton/shapes`` has;
each result is compared with fp64 (integers: bit for bit) before it is timed. The collapsed product is that of decoding,
a row encoded by one kernel and multiplied by another; ``us`` and ``dense_us`` are of products alone, ``encoded_us`` and
``dense_encoded_us`` of encoders and products. ``--quick`` runs everything once on tiny shapes, without a GPU on
Triton's interpreter.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

import triton
from gpu_products import CUDA, cut, keep_apart, let_loops_run, seconds
from gpu_products_check import DEVICE, errors, failed, guarded
from torch import Tensor

from spikeform.neurons import GIF
from spikeform.neurons.triton.gif import gif_integers
from spikeform.neurons.triton.oat import oat_values
from spikeform.synapses.fused import pack_nibbles, unpack_nibbles
from spikeform.synapses.triton import products, shapes
from spikeform.synapses.triton.event import Share
from spikeform.synapses.triton.row import row_gif, row_oat
from spikeform.synapses.triton.stream import row_product

SHAPES = [(4096, 16384), (4096, 11008), (16384, 4096)]  # N, K
ZEROS = (0.0, 0.5, 0.7, 0.8, 0.9, 0.95, 0.97, 1.0)
BYTES = {"bf16": 2.0, "int8": 1.0, "int4": 0.5}
ELEMENTS = {"bf16": "real", "int8": "int8", "int4": "int4"}
ROTATED, LAUNCHES = 400e6, 16
THRESHOLD, STEPS = 8.0, 8
PATIENCE, LIMIT = 60, 150  # seconds for compiling, and for everything: then what is known is shown


class Case(NamedTuple):
    """What is multiplied: copies of the weights in both orders, and inputs ``[1, K]``.

    Attributes:
        kind: ``bf16``, ``int8``, ``int4``.
        weights: Output-major, as the collapsed product has them.
        rows: Input-major.
        inputs: Real, bf16.
        scale: fp32 ``[N]``.
        neuron: Of integers.
    """

    kind: str
    weights: list[Tensor]
    rows: list[Tensor]
    inputs: list[Tensor]
    scale: Tensor
    neuron: GIF

    def encoded(self, x: Tensor) -> Tensor:
        """Values as the event executor has them."""
        if self.kind == "bf16":
            threshold = torch.tensor([THRESHOLD], device=DEVICE)
            return oat_values(x, threshold, None, 2**STEPS - 1, 2**STEPS, 0, False)
        tables = self.neuron.tables()
        return gif_integers(x, tables.top, tables.multiple, self.neuron.levels, self.neuron.steps)[0]

    def row_of(self, x: Tensor, threshold: Tensor) -> Tensor:
        """Codes as the collapsed product has them."""
        if self.kind == "bf16":
            return row_oat(x, [threshold], [], 2**STEPS - 1, 2**STEPS, 0, 2)
        tables = self.neuron.tables()
        return row_gif(x, [tables.multiple], self.neuron.levels, self.neuron.steps, self.kind == "int4")


def case_of(kind: str, columns: int, inner: int, zeros: float, copies: int | None = None) -> Case:
    generator = torch.Generator(DEVICE).manual_seed(2)
    count = copies or (max(2, int(ROTATED / (BYTES[kind] * columns * inner)) + 1) if CUDA else 1)
    low, high = (-8, 8) if kind == "int4" else (-127, 128)
    codes = torch.randint(low, high, (columns, inner), generator=generator, device=DEVICE, dtype=torch.int8)

    def stored(w: Tensor) -> Tensor:
        w = w.contiguous()
        return w.bfloat16() / 64 if kind == "bf16" else w if kind == "int8" else pack_nibbles(w + 8)

    weight, rows = stored(codes), stored(codes.t())
    inputs = []
    for _ in range(max(count, LAUNCHES if CUDA else 1)):
        x = torch.rand(1, inner, generator=generator, device=DEVICE) * 4 + 2  # far from the least that is sent
        x *= torch.rand(1, inner, generator=generator, device=DEVICE) >= zeros
        inputs.append(x.bfloat16())
    neuron = GIF(4, (inner,), steps=1).to(DEVICE)
    neuron.set_times(torch.ones(inner, dtype=torch.uint8, device=DEVICE))
    scale = torch.rand(columns, generator=generator, device=DEVICE)
    weights = [weight, *(weight.clone() for _ in range(count - 1))]
    return Case(kind, weights, [rows, *(rows.clone() for _ in range(count - 1))], inputs, scale, neuron)


def events_of(case: Case, columns: int, encode: bool) -> list[Callable[[], Tensor]]:
    scale = None if case.kind == "bf16" else case.scale
    values = [case.encoded(x) for x in case.inputs]
    threshold = torch.tensor([THRESHOLD], device=DEVICE)
    tables = case.neuron.tables()

    def of(x: Tensor) -> Tensor:
        if case.kind == "bf16":
            return oat_values(x, threshold, None, 2**STEPS - 1, 2**STEPS, 0, False)
        return gif_integers(x, tables.top, tables.multiple, case.neuron.levels, case.neuron.steps)[0]

    turns = [case.rows[i % len(case.rows)] for i in range(len(values))]
    if encode:
        return [
            lambda x=x, w=w: products.event_product(of(x), w, scale, columns)
            for x, w in zip(case.inputs, turns, strict=True)
        ]
    return [lambda v=v, w=w: products.event_product(v, w, scale, columns) for v, w in zip(values, turns, strict=True)]


def collapsed_of(case: Case, columns: int, encode: bool) -> list[Callable[[], list[Tensor]]]:
    threshold = torch.tensor([THRESHOLD], device=DEVICE)
    scales = () if case.kind == "bf16" else (case.scale,)
    zero = torch.full((columns,), 8, dtype=torch.int16, device=DEVICE)
    zeros = (zero,) if case.kind == "int4" else ()

    def product(codes: Tensor, w: Tensor) -> list[Tensor]:
        return row_product(codes, [w], scales, zeros, (), None, torch.bfloat16, (1,), 1, 1)

    turns = [case.weights[i % len(case.weights)] for i in range(len(case.inputs))]
    if encode:
        return [lambda x=x, w=w: product(case.row_of(x, threshold), w) for x, w in zip(case.inputs, turns, strict=True)]
    codes = [case.row_of(x, threshold) for x in case.inputs]
    return [lambda c=c, w=w: product(c, w) for c, w in zip(codes, turns, strict=True)]


def cuts(kind: str, columns: int, inner: int) -> dict[str, Share]:
    """What is tried, by a short name: bytes of a row and warps of a program, rows of a slot on their way."""
    if not CUDA:
        return {"one": Share(32, 16, 2), "words": Share(128, 2, 4)}
    piece = int(BYTES[kind] * columns) // 128
    tried = [(piece, 16, 4), (piece, 16, 6), (piece, 8, 8), (piece, 8, 16)]
    tried += [(2 * piece, 16, 8)] if kind == "int4" else [(piece, 32, 4)]  # int4: too many registers
    return {f"{size}/{warps}/{depth}": Share(size, warps * 512 // size, depth) for size, warps, depth in tried}


def right(case: Case, y: Tensor) -> bool:
    """Whether it is the product of the first input and the first rows."""
    values, rows = case.encoded(case.inputs[0]).double(), case.rows[0]
    if case.kind == "int4":
        rows = unpack_nibbles(rows).double() - 8
    expected = values @ rows.double()
    if case.kind == "bf16":
        return float((y - expected).abs().max() / expected.abs().max().clamp(min=1e-9)) < 1e-5
    return torch.equal(y, expected.float() * case.scale)


def measure(kind: str, columns: int, inner: int, zeros: float) -> dict | None:
    """A row of the result."""
    case = case_of(kind, columns, inner, zeros)
    calls = events_of(case, columns, False)
    share = float((case.encoded(torch.cat(case.inputs)) == 0).float().mean())
    times: dict[str, float] = {}
    named: dict[str, Share | None] = {"default": None, **cuts(kind, columns, inner)}
    for name, share_ in named.items():
        label = f"{kind} {columns}x{inner} {zeros} {name}"
        with cut("event_share", share_):
            y = guarded(label, calls[0])
            if y is None or not right(case, y) or not torch.equal(y, calls[0]()):
                failed[f"{label}: wrong"] += y is not None
                continue
            took = guarded(label, lambda: seconds(calls))
            if took:
                times[name] = took * 1e6
    if not times:
        return None
    best = min(times, key=lambda name: times[name])
    with cut("event_share", named[best]):
        encoded = guarded("encoded", lambda: seconds(events_of(case, columns, True)))
    dense, both = (guarded("collapsed", lambda e=e: seconds(collapsed_of(case, columns, e))) for e in (False, True))
    row = {"kind": kind, "n": columns, "k": inner, "zeros": zeros, "share": share, "us": times[best], "best": best}
    chosen = named[best] or shapes.event_share(ELEMENTS[kind], int(BYTES[kind] * columns), inner, 1)
    row |= {"cut": tuple(chosen), "cuts_us": times, "encoded_us": encoded and encoded * 1e6}
    row |= {"dense_us": dense and dense * 1e6, "dense_encoded_us": both and both * 1e6}
    if dense:
        row |= {"faster": dense * 1e6 / times[best]}
    if both and encoded:
        row |= {"faster_encoded": both / encoded}
    return row | {"TB_s": BYTES[kind] * columns * inner * (1 - share) / times[best] / 1e6}


def compiled(job: tuple[str, int, int, Share | None]) -> int:
    """Compiles the kernels of a cut, in a process of its own; the cache on disk keeps them."""
    kind, columns, inner, share = job
    case = case_of(kind, columns, inner, 0.9, 1)
    with cut("event_share", share):
        guarded("compile", events_of(case, columns, True)[0])
    if share is None:
        guarded("compile", collapsed_of(case, columns, True)[0])
    return 1


def precompile(sizes: list[tuple[int, int]], kinds: list[str]) -> None:
    jobs = [(k, n, i, share) for n, i in sizes for k in kinds for share in (None, *cuts(k, n, i).values())]
    pool = ProcessPoolExecutor(min(15, os.cpu_count() or 1), mp_context=get_context("spawn"))
    guarded("precompile", lambda: list(pool.map(compiled, jobs, timeout=PATIENCE)))
    pool.shutdown(wait=False, cancel_futures=True)


def show(row: dict) -> None:
    """A line."""
    ratio = row.get("faster", 0.0)
    print(
        f"{row['kind']} {row['k']}->{row['n']} z={row['share']:.3f}: {row['us']:.1f} us ({row['best']}),"
        f" collapsed {row['dense_us'] or 0:.1f}, {ratio:.2f}x = {ratio * (1 - row['share']):.2f}/(1-z);"
        f" encoded {row['encoded_us'] or 0:.1f} / {row['dense_encoded_us'] or 0:.1f}; {row['TB_s']:.2f} TB/s |",
        " ".join(f"{name.replace(' ', '-')} {us:.1f}" for name, us in row["cuts_us"].items()),
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--kinds", default="bf16,int8,int4")
    parser.add_argument("--zeros", default=",".join(map(str, ZEROS)))
    args = parser.parse_args()
    where = args.out or Path(os.environ.get("OUT", "benchmarks/results")) / "gpu-events.json"
    begin, quick = time.perf_counter(), args.quick or not CUDA
    kinds, zeros = args.kinds.split(","), [float(z) for z in args.zeros.split(",")]
    sizes = [(128, 256)] if quick else SHAPES
    if CUDA:
        keep_apart(where.with_suffix(".log"))
        precompile(sizes, kinds)
        print(f"compiled: {time.perf_counter() - begin:.0f} s", flush=True)
    else:
        let_loops_run()
    result = {
        "hardware": torch.cuda.get_device_name() if CUDA else platform.processor(),
        "versions": {"torch": torch.__version__, "triton": triton.__version__, "python": platform.python_version()},
        "event": [],
    }

    def end(code: int) -> None:
        result.update(failed=dict(failed), errors=errors, seconds=time.perf_counter() - begin)
        if not quick or args.out:
            where.parent.mkdir(parents=True, exist_ok=True)
            where.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        print(f"failed: {dict(failed)} {errors[:4]}; {time.perf_counter() - begin:.0f} s", flush=True)
        os._exit(code)  # whatever still runs

    watch = threading.Timer(LIMIT, lambda: (print("TOOK TOO LONG"), end(3)))
    watch.daemon = True
    watch.start()
    for columns, inner in sizes:
        for kind in kinds:
            for z in zeros:
                row = guarded(f"{kind} {z}", lambda n=columns, i=inner, k=kind, z=z: measure(k, n, i, z))
                if row:
                    result["event"].append(row)
                    show(row)
    end(1 if failed else 0)


if __name__ == "__main__":
    sys.exit(main())
