"""Products of one decoded token, one after the other, as in a LLaMA-7B: which way of launching them is the fastest?

    python benchmarks/gpu_chain.py [--out FILE] [--layers 8] [--limit 285] [--quick]

A chain is q, k, v, o, gate, up and down of ``--layers`` layers, each product the input of the next where widths allow,
every layer with weights of its own, in one CUDA graph; times are medians of replays. Four kinds: ``bf16`` (OAT,
T = 16), ``int8-t7`` and ``int8-t15`` (one limb and two), ``gif4`` (packed weights). Each is timed with its row encoded
by every program and once, without and with programmatic dependent launch ("overlapped"), and, with ``joined``, where
q, k, v are one product and gate, up another: of one matrix, or, encoded once, of three and of two in one launch, as
compiled models have them. Cuts are chosen before, shape by shape, among a few. All ways of a kind
of integers must end in the same bits. ``--quick`` runs everything once on tiny shapes; without a GPU on Triton's
interpreter. ``--package``: no search, but the cuts that the package chooses, and the row encoded once.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path

import torch
import torch.nn.functional as F

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

import triton
from gpu_chain_cuts import KINDS, Way, cuts_of, ways
from gpu_products import copy_rate, keep_apart, let_loops_run, overlapped
from gpu_products_check import CUDA, DEVICE, errors, failed, guarded

from spikeform.synapses import rows
from spikeform.synapses.fused import pack_nibbles
from spikeform.synapses.triton import products, shapes
from spikeform.synapses.triton.launch import Strip

REPLAYS = 15
STEPS = {"bf16": 16, "int8-t7": 7, "int8-t15": 15, "gif4": 2}
WARM_ROWS = 512  # output features of a weight that a kernel is compiled with: no kernel knows how many there are
Table = dict[tuple[int, int], Strip]  # by output features and inputs
Product = Callable[[torch.Tensor], torch.Tensor]


class Layer:
    """Weights of one layer, of one kind: three matrices of q, k, v and o, two of gate and up, one of down.

    Args:
        kind: One of :data:`KINDS`, or ``dense``.
        hidden: Channels of the model.
        inner: Channels between gate, up and down.
        seed: Of the weights.
    """

    def __init__(self, kind: str, hidden: int, inner: int, seed: int) -> None:
        self.kind = kind
        generator = torch.Generator(DEVICE).manual_seed(seed)
        # q, k, v and gate, up lie in one piece: taken apart, they are the rows of a larger matrix.
        self.pieces = [
            ([hidden] * 3, self._weight(3 * hidden, hidden, generator)),
            ([hidden], self._weight(hidden, hidden, generator)),
            ([inner] * 2, self._weight(2 * inner, hidden, generator)),
            ([hidden], self._weight(hidden, inner, generator)),
        ]

    def _weight(self, rows: int, columns: int, generator: torch.Generator) -> torch.Tensor:
        if self.kind in ("bf16", "dense"):
            w = torch.empty(rows, columns, dtype=torch.bfloat16, device=DEVICE)
            return w.normal_(0, columns**-0.5, generator=generator)
        low, high = (0, 16) if self.kind == "gif4" else (-127, 128)
        w = torch.randint(low, high, (rows, columns), generator=generator, device=DEVICE, dtype=torch.int8)
        return pack_nibbles(w) if self.kind == "gif4" else w

    def products(self, joined: bool) -> list[tuple[tuple[int, int], Product]]:
        """Products in their order: (output features, inputs), and the call."""
        found = []
        for heights, weight in self.pieces:
            for part in [weight] if joined else weight.split(heights):
                columns = part.shape[1] * (2 if self.kind == "gif4" else 1)
                call = product(self.kind, part, columns)
                if self.kind != "dense" and len(heights) > 1 and joined:
                    call = once_together(self.kind, weight.split(heights), columns, call)
                found.append(((part.shape[0], columns), call))
        return found


def once_together(kind: str, weights: Sequence[torch.Tensor], inner: int, whole: Product) -> Product:
    """One launch for several matrices where the row is encoded once, as compiled models have it; else ``whole``.

    Gives the last result. Each matrix has codes of its own.
    """
    steps, count = STEPS[kind], len(weights)
    threshold = torch.tensor([3.3, 50.1], device=DEVICE)
    multiple = 1.0 + (torch.arange(inner, device=DEVICE) % 8 > 0)
    scales = [torch.full((w.shape[0],), scale_of(kind, inner), device=DEVICE) for w in weights]
    zeros = [torch.full((w.shape[0],), 8, dtype=torch.int16, device=DEVICE) for w in weights]
    integers = kind.startswith("int8")

    def run(x: torch.Tensor) -> torch.Tensor:
        last = None, x.dtype, x.shape[:-1]
        if kind == "gif4":
            if not shapes.encode_once["gif"]:
                return whole(x)
            codes = rows.row_gif(x, [multiple] * count, 15, steps, True)
            return rows.row_product(codes, weights, scales, zeros, (), *last, 1, 1)[-1]
        if not shapes.encode_once["oat_int" if integers else "oat"]:
            return whole(x)
        codes = rows.row_oat(x, [threshold] * count, (), 2**steps - 1, 2**steps, 0, 4 if integers else 2)
        sums = (2, rows.limbs_of(2**steps - 1)) if integers else (1, 1)
        return rows.row_product(codes, weights, scales if integers else (), (), (), *last, *sums)[-1]

    return run


def scale_of(kind: str, inner: int) -> float:
    """What keeps results as large as inputs: weights' codes have a spread."""
    return inner**-0.5 / (4.6 if kind == "gif4" else 73.3)


def product(kind: str, weight: torch.Tensor, inner: int) -> Product:
    """The operator of a kind, without a bias."""
    outer = weight.shape[0]
    if kind == "dense":
        return lambda x: F.linear(x, weight)
    steps = STEPS[kind]
    threshold = torch.tensor([3.3, 50.1], device=DEVICE)
    scale = torch.full((outer,), scale_of(kind, inner), device=DEVICE)
    if kind == "bf16":
        return lambda x: products.oat_linear(x, weight, None, threshold, None, 2**steps - 1, 2**steps, 0, False)
    if kind.startswith("int8"):
        return lambda x: products.oat_linear_int(x, weight, scale, None, threshold, 2**steps - 1, 2**steps, 0)
    top = torch.full((inner,), 15.0 * steps, device=DEVICE)
    multiple = 1.0 + (torch.arange(inner, device=DEVICE) % 8 > 0)  # one channel of eight has two steps
    zero = torch.full((outer,), 8, dtype=torch.int16, device=DEVICE)
    codes = torch.zeros(1, 1, dtype=torch.int8, device=DEVICE).expand(outer, inner)  # never read: they are packed
    return lambda x: products.gif_linear(x, codes, scale, weight, zero, None, top, multiple, 15, steps)


@contextmanager
def going(way: Way, table: Table) -> Iterator[None]:
    """Has products run one way, cut as ``table`` says; shapes that it lacks as the package does."""
    name = KINDS[way.kind].table
    kept = dict(shapes.encode_once), shapes.stream_strip, getattr(shapes, name)
    words = KINDS[way.kind].inputs  # of a word of weights

    def streamed(kind: str, columns: int, width: int, planes: int) -> Strip:
        return table.get((columns, width * words)) or kept[1](kind, columns, width, planes)

    def other(columns: int, inner: int, *more: bool) -> Strip:
        return table.get((columns, inner)) or kept[2](columns, inner, *more)

    shapes.encode_once.update(dict.fromkeys(shapes.encode_once, way.once))
    shapes.stream_strip = streamed
    setattr(shapes, name, other)
    try:
        with overlapped(way.overlapped):
            yield
    finally:
        shapes.encode_once.update(kept[0])
        shapes.stream_strip = kept[1]
        setattr(shapes, name, kept[2])


def input_of(inner: int) -> torch.Tensor:
    generator = torch.Generator(DEVICE).manual_seed(7)
    x = torch.randn(1, inner, generator=generator, device=DEVICE)
    return (x * (1 + 20 * (torch.arange(inner, device=DEVICE) % 97 == 0))).bfloat16()


def chained(calls: list[tuple[tuple[int, int], Product]]) -> Callable[[], torch.Tensor]:
    """All products; each has the last result of its width for an input, at first a given one."""
    first = {inner: input_of(inner) for (_, inner), _ in calls}

    def run() -> torch.Tensor:
        x, y = dict(first), torch.empty(0)
        for (_, inner), call in calls:
            y = call(x[inner])
            for width in x:
                if y.shape[-1] % width == 0:  # of a joined product the last part
                    x[width] = y[..., -width:]
        return y

    return run


def in_turn(calls: list[tuple[tuple[int, int], Product]], x: torch.Tensor) -> Callable[[], torch.Tensor]:
    """All products of one input; the result is that of the first."""

    def run() -> torch.Tensor:
        first, *_ = [call(x) for _, call in calls]
        return first

    return run


def milliseconds(run: Callable[[], torch.Tensor]) -> tuple[float, torch.Tensor]:
    """The median over replays of a graph, and the result."""
    if not CUDA:
        begin = time.perf_counter()
        y = run()
        return (time.perf_counter() - begin) * 1e3, y
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = run()
    graph.replay()
    graph.replay()
    times = []
    for _ in range(REPLAYS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times), y.clone()


def warm(job: tuple[Way, list[tuple[int, int]], list[Strip]]) -> int:
    """Compiles the kernels of some cuts, in a process of its own; Triton's cache on disk keeps them."""
    way, sizes, cuts = job
    for inner in sorted({inner for _, inner in sizes}):
        x, words = input_of(inner), inner // KINDS[way.kind].inputs
        dtype = {"bf16": torch.bfloat16, "gif4": torch.uint8}.get(way.kind, torch.int8)
        weight = torch.zeros(WARM_ROWS, words * 4 // dtype.itemsize, dtype=dtype, device=DEVICE)
        call = product(way.kind, weight, inner)
        for cut in cuts:
            with going(way, {(WARM_ROWS, inner): cut}):
                guarded(f"compile {way} {tuple(cut)}", lambda c=call, v=x: c(v))
    return len(cuts)


def compile_all(jobs: list, seconds: float) -> None:
    """All jobs, in as many processes as there are processors; what is not done in time is compiled when it is met."""
    pool = ProcessPoolExecutor(min(15, os.cpu_count() or 1), mp_context=get_context("spawn"))
    waiting = [pool.submit(warm, job) for job in jobs]
    try:
        for done, future in enumerate(as_completed(waiting, timeout=seconds), 1):
            guarded("compile", future.result)
            if done % 16 == 0:
                print(f"  compiled {done}/{len(jobs)}", flush=True)
    except TimeoutError:
        print("  compiling took too long: going on", flush=True)
    pool.shutdown(wait=False, cancel_futures=True)


class Report:
    """What is known, on the screen and in a file, as it becomes known."""

    def __init__(self, where: Path | None) -> None:
        self.where, self.begin = where, time.perf_counter()
        self.data: dict = {"cuts": [], "chains": []}

    def say(self, text: str) -> None:
        """A line with the time."""
        print(f"{time.perf_counter() - self.begin:5.0f} s  {text}", flush=True)

    def save(self) -> None:
        """Writes the file anew."""
        self.data.update(failed=dict(failed), errors=errors, seconds=time.perf_counter() - self.begin)
        if self.where:
            self.where.parent.mkdir(parents=True, exist_ok=True)
            self.where.write_text(json.dumps(self.data, indent=1) + "\n", encoding="utf-8")


def best_cuts(way: Way, layers: list[Layer], sizes: list[tuple[int, int]], few: int, report: Report) -> Table:
    """The best cut of each shape, apart and joined: products of one shape one after the other, with one input."""
    table: Table = {}
    calls = [p for layer in layers for joined in (False, True) for p in layer.products(joined)]
    for size in sizes:
        own = [p for p in calls if p[0] == size]
        x, found, reference = input_of(size[1]), [], None
        for cut in cuts_of(way)[:few]:
            label = f"{way} {size[0]}x{size[1]} {tuple(cut)}"
            with going(way, {size: cut}):
                got = guarded(label, lambda o=own, v=x: milliseconds(in_turn(o, v)))
            if got is None:
                continue
            reference = got[1] if reference is None else reference
            if not alike(way, got[1], reference):
                failed[f"{label}: wrong"] += 1
                continue
            found.append((got[0] / len(own) * 1e3, cut))
        if not found:
            continue
        found.sort()
        table[size] = found[0][1]
        report.data["cuts"] += [
            {"way": way._asdict(), "n": size[0], "k": size[1], "cut": tuple(cut), "us": us} for us, cut in found
        ]
        text = "  ".join(f"{us:.1f} {tuple(cut)}" for us, cut in found[:3])
        report.say(f"{way} {size[0]}x{size[1]}: {text} .. {found[-1][0]:.1f}")
    return table


def alike(way: Way, y: torch.Tensor, reference: torch.Tensor) -> bool:
    """Sums of integers are the same bits whatever the way; real ones differ by their order."""
    if way.kind != "bf16":
        return torch.equal(y, reference)
    return bool((y - reference).float().norm() < 0.05 * reference.float().norm())


def time_chains(kind: str, layers: list[Layer], tables: dict[Way, Table], report: Report) -> None:
    """One token's products, each way."""
    for joined in (False, True):
        calls = [p for layer in layers for p in layer.products(joined)]
        bytes_ = sum(n * k for (n, k), _ in calls) * (0.5 if kind == "gif4" else 2 if kind in ("bf16", "dense") else 1)
        reference = None
        for way, table in tables.items():
            with going(way, table) if kind in KINDS else overlapped(False):
                got = guarded(f"chain {way}", lambda c=calls: milliseconds(chained(c)))
            if got is None:
                continue
            took, y = got
            reference = y if reference is None else reference
            right = alike(way, y, reference) if kind in KINDS else True
            if not right:
                failed[f"chain {way}: another result"] += 1
            row = {"way": way._asdict(), "joined": joined, "ms_a_layer": took / len(layers), "right": right}
            row |= {"TB_s": bytes_ / took / 1e9, "of_copy": bytes_ / took * 1e3 / report.data["copy_bytes_s"]}
            report.data["chains"].append(row)
            dense = next(r for r in report.data["chains"] if r["joined"] == joined)
            row |= {"of_dense": took / len(layers) / dense["ms_a_layer"]}
            name = f"{way}{' joined' if joined else ''}"
            text = f"{row['ms_a_layer'] * 1e3:7.1f} us a layer ({row['of_dense']:.2f} of dense), "
            text += f"{row['TB_s']:.2f} TB/s ({row['of_copy']:.0%} of a copy)"
            report.say(f"CHAIN {name:34s} {text}{'' if right else ' WRONG'}")
        report.save()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--limit", type=float, default=285, help="seconds, then what is known is written")
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--package", action="store_true")
    args = parser.parse_args()
    quick = args.quick or not CUDA
    kinds = args.kinds.split(",")
    if unknown := set(kinds) - set(KINDS):
        parser.error(f"no kinds {sorted(unknown)}: choose among {', '.join(KINDS)}")
    if not CUDA:
        let_loops_run()
    if CUDA and args.out:
        keep_apart(args.out.with_suffix(".log"))
    hidden, inner = (64, 128) if quick else (4096, 11008)
    layers, few = (1, 1) if quick else (args.layers, 8)
    sizes = [(hidden, hidden), (inner, hidden), (hidden, inner), (3 * hidden, hidden), (2 * inner, hidden)]
    report = Report(args.out)
    name = torch.cuda.get_device_name() if CUDA else platform.processor()
    report.data |= {"hardware": name, "torch": torch.__version__, "triton": triton.__version__, "layers": layers}

    def end(code: int) -> None:
        report.save()
        for label, count in list(failed.items())[:12]:
            print("failed:", label, count)
        print("\n".join(errors[:4]), flush=True)
        os._exit(code)  # whatever still runs

    watch = threading.Timer(args.limit, lambda: (report.say("TOOK TOO LONG"), end(3)))
    watch.daemon = True
    watch.start()
    if CUDA and not args.package:
        jobs = [(way, sizes, [cut]) for kind in kinds for way in ways(kind) for cut in cuts_of(way)[:few]]
        compile_all(jobs, args.limit / 2)
        report.say(f"compiled {len(jobs)} jobs")
    report.data["copy_bytes_s"] = copy_rate()
    report.say(f"{name}: a copy reads and writes {report.data['copy_bytes_s'] / 1e12:.2f} TB/s")
    for kind in ["dense", *kinds]:
        weights = [Layer(kind, hidden, inner, seed) for seed in range(layers)]
        tables: dict[Way, Table] = {}
        for way in ways(kind):
            if kind not in KINDS or (args.package and way.once):
                tables[way] = {}
            elif not args.package:
                tables[way] = best_cuts(way, weights, sizes, few, report)
        time_chains(kind, weights, tables, report)
        del weights
        if CUDA:
            torch.cuda.empty_cache()
    end(1 if failed else 0)


if __name__ == "__main__":
    try:
        main()
    except Exception:
        traceback.print_exc(file=sys.stdout)
        sys.exit(1)
