"""Products on a GPU: are the fused kernels right, how fast are they, and how are they best cut?

    python benchmarks/gpu_products.py [--out FILE] [--quick] [--only decode,skinny,gemm,library]

Each kernel is compared with the executors in PyTorch (integer sums bit for bit). Times are of launches in a CUDA graph
that goes round weight copies of more than 256 MB, so that none is found in the cache; the least of several replays
counts. Searches run over small sets of cuts and print the best of each shape, for ``spikeform/synapses/triton/shapes``.
Bandwidth counts weights alone; a copy of a large tensor (read and write) is the yardstick.
``--quick`` runs everything once on tiny shapes; without a GPU on Triton's interpreter.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path

import torch
import torch.nn.functional as F

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

import triton
from gpu_products_check import DEVICE, check_size, errors, failed, guarded, input_of
from gpu_products_cuts import CUDA, plans

from spikeform.neurons import GIF
from spikeform.synapses.fused import pack_nibbles
from spikeform.synapses.triton import launch, products, shapes
from spikeform.synapses.triton.shapes import Strip

SHAPES = [(4096, 4096), (11008, 4096), (4096, 11008), (32000, 4096), (16384, 4096), (4096, 16384)]  # N, K
CHECKED = (
    [(1, 96, 512), (4, 200, 512), (16, 128, 640), (64, 264, 512), (200, 264, 512)]
    if CUDA
    else [(1, 24, 128), (5, 40, 128)]
)
PATIENCE, LIMIT = 120, 400  # seconds for compiling, and for everything: then what is known is shown
AHEAD = 2048  # bytes of each row of a weight
ROTATED, MOST_COPIES, LEAST_LAUNCHES = 256e6, 64, 8


@contextmanager
def cut(name: str, value: tuple | None) -> Iterator[None]:
    """Has a table of shapes give ``value``; None: what it says."""
    kept = getattr(shapes, name) if name else None
    if name and value is not None:
        setattr(shapes, name, lambda *_: value)
    try:
        yield
    finally:
        if name:
            setattr(shapes, name, kept)


def copies_of(make: Callable[[int], torch.Tensor]) -> list[torch.Tensor]:
    first = make(0)
    size = first.numel() * first.element_size()
    count = min(MOST_COPIES, max(2, int(ROTATED / size) + 1)) if CUDA else 1
    return [first, *(first.clone() for _ in range(count - 1))]


class Case:
    """One operator on one shape: calls (one for each copy of the weight), and what they cost at least.

    Args:
        kind: ``oat`` (two planes of 16-bit codes), ``single``, ``oat_int8``, ``oat_int16`` (8 or 16 steps), ``gif8``,
            ``gif4``; or ``bf16``, ``int8``, ``fp8``, ``stacked`` of the libraries.
        rows: M.
        columns: N.
        inner: K.
    """

    def __init__(self, kind: str, rows: int, columns: int, inner: int) -> None:
        self.kind, self.rows, self.columns, self.inner = kind, rows, columns, inner
        self.ops = 2 * rows * columns * inner
        self.calls: list[Callable[[], torch.Tensor]] = []
        x = input_of(rows, inner)
        generator = torch.Generator(DEVICE).manual_seed(1)

        def real(_: int) -> torch.Tensor:
            w = torch.empty(columns, inner, dtype=torch.bfloat16, device=DEVICE)
            return w.normal_(0, 0.02, generator=generator)

        def integer(_: int) -> torch.Tensor:
            low, high = (-8, 8) if kind == "gif4" else (-127, 128)
            return torch.randint(low, high, (columns, inner), generator=generator, device=DEVICE, dtype=torch.int8)

        scale = torch.rand(columns, generator=generator, device=DEVICE) * 1e-3
        if kind in ("oat", "single"):
            steps = 16 if kind == "oat" else 8
            threshold = torch.tensor([4.0, 64.0], device=DEVICE)
            weights = copies_of(real)
            self.calls = [
                lambda w=w: products.oat_linear(
                    x, w, None, threshold, None, 2**steps - 1, 2**steps, 0, kind == "single"
                )
                for w in weights
            ]
        elif kind.startswith("oat_int"):
            steps = int(kind[7:])
            threshold = torch.tensor([4.0, 64.0], device=DEVICE)
            weights = copies_of(integer)
            self.calls = [
                lambda w=w: products.oat_linear_int(x, w, scale, None, threshold, 2**steps - 1, 2**steps, 0)
                for w in weights
            ]
        elif kind in ("gif4", "gif8"):
            neuron = GIF(4, (inner,), steps=2).to(DEVICE)
            neuron.set_times(1 + (torch.arange(inner, device=DEVICE) % 8 == 0).to(torch.uint8))
            top, multiple = neuron.tables().top, neuron.tables().multiple
            zero = torch.full((columns,), 8, dtype=torch.int16, device=DEVICE)
            codes = integer(0)
            weights = copies_of(lambda _: pack_nibbles(codes + 8) if kind == "gif4" else codes)
            if kind == "gif4":
                self.calls = [
                    lambda w=w: products.gif_linear(x, codes, scale, w, zero, None, top, multiple, 15, 2)
                    for w in weights
                ]
            else:
                self.calls = [
                    lambda w=w: products.gif_linear(x, w, scale, None, None, None, top, multiple, 15, 2)
                    for w in weights
                ]
        elif kind == "bf16":
            weights = copies_of(real)
            self.calls = [lambda w=w: F.linear(x, w) for w in weights]
        elif kind == "stacked":
            weights = copies_of(real)
            both = torch.cat([x, x * 0.004])

            def stacked(w: torch.Tensor) -> torch.Tensor:
                y = torch.mm(both, w.t(), out_dtype=torch.float32)
                return (y[:rows] + y[rows:]).to(torch.bfloat16)

            self.calls = [lambda w=w: stacked(w) for w in weights]
        elif kind == "int8":
            weights = copies_of(integer)
            codes = torch.randint(-127, 128, (max(rows, 32), inner), device=DEVICE).to(torch.int8)
            self.calls = [lambda w=w: torch._int_mm(codes, w.t()) for w in weights]
        else:
            weights = copies_of(lambda _: real(0).to(torch.float8_e4m3fn))
            codes = input_of(max(rows, 16), inner).to(torch.float8_e4m3fn)
            one = torch.ones((), device=DEVICE)
            self.calls = [
                lambda w=w: torch._scaled_mm(codes, w.t(), one, one, out_dtype=torch.bfloat16) for w in weights
            ]
        self.bytes = weights[0].numel() * weights[0].element_size()


def seconds(calls: list[Callable[[], object]], rounds: int = 4) -> float:
    """Of one call, the least over replays of a graph that goes round all of them."""
    if not CUDA:
        begin = time.perf_counter()
        calls[0]()
        return time.perf_counter() - begin
    order = calls * (-(-LEAST_LAUNCHES // len(calls)))
    order[0]()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in order:
            call()
    best = float("inf")
    graph.replay()
    for _ in range(rounds):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        best = min(best, start.elapsed_time(end) / 1e3 / len(order))
    return best


def same(label: str, y: torch.Tensor, reference: torch.Tensor, exact: bool) -> bool:
    """Whether a cut changes nothing; real sums may differ by their order."""
    fine = (
        torch.equal(y, reference)
        if exact
        else torch.allclose(y.float(), reference.float(), rtol=2e-2, atol=2e-2 * float(reference.abs().max()))
    )
    if not fine:
        failed[f"{label}: wrong"] += 1
    return fine


def search(case: Case, table: str, cuts: list, label: str) -> tuple[float, tuple] | None:
    """The best cut of a case, and its time."""
    reference = guarded(label, case.calls[0])
    best = None
    for value in cuts:
        with cut(table, value):
            y = guarded(f"{label} {tuple(value)}", case.calls[0])
            if y is None or (
                reference is not None
                and not same(f"{label} {tuple(value)}", y, reference, case.kind not in ("oat", "single"))
            ):
                continue
            took = guarded(f"{label} {tuple(value)}", lambda: seconds(case.calls))
        if took is not None and (best is None or took < best[0]):
            best = (took, value)
    return best


def overlap_time(case: Case, table: str, value: tuple) -> float | None:
    """The time of a cut where each launch overlaps the one before."""
    with overlapped(True), cut(table, hasty(value)):
        took = guarded("overlapped", lambda: seconds(case.calls))
    return took * 1e6 if took else None


@contextmanager
def reaching(table: str, rows: int) -> Iterator[None]:
    """Has ``rows`` rows run on the kernels of ``table``."""
    kept = products.SKINNY, products.LIMB_ROWS
    if table == "skinny_shape":
        products.SKINNY = max(rows, kept[0])
    elif table.endswith("tile"):
        products.SKINNY = products.LIMB_ROWS = 4
    try:
        yield
    finally:
        products.SKINNY, products.LIMB_ROWS = kept


@contextmanager
def overlapped(on: bool) -> Iterator[None]:
    """Kernels that begin before the one before them has ended."""
    kept, launch.overlapped = launch.overlapped, on
    try:
        yield
    finally:
        launch.overlapped = kept


def hasty(value: tuple) -> tuple:
    """A cut that asks for its weights before it waits, where there is a choice."""
    return value._replace(ahead=AHEAD) if isinstance(value, Strip) else value


def warm(job: tuple[str, str, int, list, int, bool]) -> int:
    """Compiles the kernels of some cuts, in a process of its own; the cache on disk keeps them."""
    global ROTATED
    ROTATED = 0
    kind, table, rows, cuts, inner, early = job
    case = Case(kind, rows, 512, inner)
    cuts = [*dict.fromkeys(map(hasty, cuts))] if early else cuts
    with reaching(table, rows), overlapped(early):
        for value in cuts:
            with cut(table, value):
                guarded("warm", case.calls[0])
    return len(cuts)


def libraries(rows_of: tuple[int, ...], sizes: list[tuple[int, int]]) -> list[dict]:
    found = []
    for columns, inner in sizes:
        for rows in rows_of:
            for kind in ("bf16", "int8", "fp8", *(("stacked",) if rows > 16 else ())):
                case = guarded(kind, lambda k=kind, m=rows, n=columns, i=inner: Case(k, m, n, i))
                took = case and guarded(kind, lambda c=case: seconds(c.calls))
                if took:
                    rate = case.ops / took / 1e12
                    found.append({"kind": kind, "m": rows, "n": columns, "k": inner, "us": took * 1e6, "tops": rate})
    return found


def kernel_names() -> dict[str, str]:
    """What the libraries launch."""
    from torch.profiler import ProfilerActivity, profile

    names = {}
    for kind in ("bf16", "int8", "fp8"):
        for rows in (1, 2048):
            case = Case(kind, rows, 4096, 4096)
            with profile(activities=[ProfilerActivity.CUDA]) as seen:
                case.calls[0]()
                torch.cuda.synchronize()
            names[f"{kind} M={rows}"] = "; ".join(e.key[:70] for e in seen.key_averages())
    return names


def copy_rate() -> float:
    """Bytes a second of a copy, read and written."""
    source = torch.empty(int(1e9 if CUDA else 1e6), dtype=torch.uint8, device=DEVICE)
    other = torch.empty_like(source)
    return 2 * source.numel() / seconds([lambda: other.copy_(source)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", default="decode,skinny,gemm,library")
    args = parser.parse_args()
    sections = set(args.only.split(","))
    quick = args.quick or not CUDA
    if not CUDA:
        let_loops_run()
    where = args.out or Path(os.environ.get("OUT", "benchmarks/results")) / "gpu-products.json"
    if CUDA:
        keep_apart(where.with_suffix(".log"))
    begin = time.perf_counter()
    sizes = [(128, 256)] if quick else SHAPES
    chosen = [p for p in plans() if p[4] in sections and (CUDA or p[2] <= 64)]
    wrong = precompile(chosen) if CUDA else [name for size in CHECKED for name in check_size(*size)]
    print("checked:", wrong[:12] or "all right", f"{time.perf_counter() - begin:.0f} s", flush=True)
    rate = copy_rate()
    result = {
        "hardware": torch.cuda.get_device_name() if CUDA else platform.processor(),
        "versions": {"torch": torch.__version__, "triton": triton.__version__, "python": platform.python_version()},
        "copy_TB_s": rate / 1e12,
        "wrong": wrong,
        "library": [],
        "own": [],
    }

    def end(code: int) -> None:
        result.update(failed=dict(failed), errors=errors, seconds=time.perf_counter() - begin)
        if not quick or args.out:
            where.parent.mkdir(parents=True, exist_ok=True)
            where.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        show(result)
        sys.stdout.flush()
        os._exit(code)  # whatever still runs

    watch = threading.Timer(LIMIT - (time.perf_counter() - begin), lambda: (print("TOOK TOO LONG"), end(3)))
    watch.daemon = True
    watch.start()
    if "library" in sections and CUDA:
        result["kernels"] = guarded("profile", kernel_names)
        result["library"] = libraries((1, 16) if quick else (1, 4, 16, 64, 512, 2048), sizes[:3] if quick else sizes)
        print(f"libraries: {time.perf_counter() - begin:.0f} s", flush=True)
    for kind, table, rows, cuts, _ in chosen:
        for columns, inner in sizes:
            case = guarded(kind, lambda k=kind, m=rows, n=columns, i=inner: Case(k, m, n, i))
            if case is None:
                continue
            with reaching(table, rows):
                default = guarded(kind, lambda c=case: seconds(c.calls))
                best = search(case, table, cuts, f"{kind} {table} M={rows}")
                early = best and rows <= 16 and overlap_time(case, table, best[1])
            if best and default:
                took, shape = best
                row = {"kind": kind, "table": table, "m": rows, "n": columns, "k": inner, "us": took * 1e6}
                row |= {"default_us": default * 1e6, "TB_s": case.bytes / took / 1e12, "tops": case.ops / took / 1e12}
                row |= {"overlapped_us": early, "cut": tuple(shape), "of_copy": case.bytes / took / rate}
                result["own"].append(row)
    print(f"own: {time.perf_counter() - begin:.0f} s", flush=True)
    end(1 if wrong else 0)


def check_apart(size: tuple[int, int, int]) -> list[str]:
    """A check in a process of its own, with its errors."""
    return check_size(*size) + errors


def precompile(chosen: list) -> list[str]:
    """Compiles all kernels, side by side, and checks them meanwhile; what is wrong."""
    jobs = []
    for kind, table, rows, cuts, _ in chosen:
        for inner in (4096, 11008) if table.endswith("strip") else (4096,):  # the rest compiles the same for all
            for early in (False, True) if rows <= 16 else (False,):
                jobs += [(kind, table, rows, cuts[i : i + 3], inner, early) for i in range(0, len(cuts), 3)]
    pool = ProcessPoolExecutor(min(15, os.cpu_count() or 1), mp_context=get_context("spawn"))
    wrong = pool.map(check_apart, CHECKED)
    done = pool.map(warm, jobs, timeout=PATIENCE)
    found = guarded("check", lambda: [name for names in wrong for name in names])
    guarded("precompile", lambda: list(done))
    pool.shutdown(wait=False, cancel_futures=True)
    return ["the check did not end"] if found is None else found


def keep_apart(errors: Path) -> None:
    """Has compilers, here and in processes started later, complain into a file: failed cuts print whole programs."""
    errors.parent.mkdir(parents=True, exist_ok=True)
    with errors.open("w") as file:
        os.dup2(file.fileno(), 2)


def let_loops_run() -> None:
    """Lets the interpreter loop to a bound that is a kernel's argument: NumPy takes no array of one for an integer."""
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patched(tensor, scope) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patched


def letter(row: dict) -> str:
    """The short name of a shape."""
    shape = (row["n"], row["k"])
    return chr(97 + SHAPES.index(shape)) if shape in SHAPES else "x".join(map(str, shape))


def show(result: dict) -> None:
    """The table, short."""
    print(f"{result['hardware']} {result['versions']} copy {result['copy_TB_s']:.2f} TB/s; {result['seconds']:.0f} s")
    for name, kernels in (result.get("kernels") or {}).items():
        print(f"  {name}: {kernels[:100]}")
    table: dict[tuple, dict[str, str]] = {}
    for r in result["library"]:
        table.setdefault((r["n"], r["k"]), {}).setdefault(f"{r['kind']}", "")
        table[r["n"], r["k"]][r["kind"]] += f" {r['m']}:{r['us']:.1f}"
    for (n, k), kinds in table.items():
        print(f"library {n}x{k}, M:us |", " | ".join(f"{kind}{text}" for kind, text in kinds.items()))
    print("shapes:", *(f"{chr(97 + i)}={n}x{k}" for i, (n, k) in enumerate(SHAPES)))
    print("own: NxK best us (the table's us; overlapped) share of copy bandwidth, or TOP/s where M > 16 [cut]")
    plans_: dict[tuple, list[str]] = {}
    for r in result["own"]:
        mark = f"{r['of_copy']:.0%}" if r["m"] <= 16 else f"{r['tops']:.0f}"
        shape = ",".join(str(int(c)) for c in r["cut"])
        early = f" {r['overlapped_us']:.1f}" if r["overlapped_us"] else ""
        text = f"{letter(r)} {r['us']:.1f}({r['default_us']:.1f}{early}) {mark} [{shape}]"
        plans_.setdefault((r["kind"], r["table"], r["m"]), []).append(text)
    for (kind, name, m), texts in plans_.items():
        print(f"{kind} {name} M={m}:", "; ".join(texts))
    if result["failed"]:
        print("failed:", sum(result["failed"].values()), list(result["failed"].items())[:8])
        print("\n".join(result["errors"][:6]))


if __name__ == "__main__":
    try:
        main()
    except Exception:
        traceback.print_exc(file=sys.stdout)
        sys.exit(1)
