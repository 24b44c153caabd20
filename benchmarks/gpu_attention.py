"""Attention on codes on a GPU: checked against SpikingAttention, timed beside PyTorch's attention in bf16.

    python benchmarks/gpu_attention.py [--out FILE] [--before FILE] [--seconds 90] [--sweep short|decode|prefill|all]

What matters most is timed first, beside the figures of ``--before`` (default: the file in results/). When ``--seconds``
are spent, what is left is named and not measured, and the file is called ``.partial.json``. ``--sweep`` prints the
fastest sizes of programs; ``--quick`` is a dry run on small shapes (on a CPU with TRITON_INTERPRET=1).

A figure is the time of one call in a CUDA graph of several, each on a cache of its own, so that no cache of the
processor holds it; the best of several replays. Shapes are those of LLaMA-7B (32 heads of 128), and with 8 key/value
heads. ``oat`` has two free thresholds, ``oat2`` two that are powers of two, ``gif`` 4 bits, rotated; ``sdpa`` is
PyTorch's attention. ``parts`` are the kernels of one call, by PyTorch's profiler.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from spikeform.layers import SpikingAttention
from spikeform.layers.triton import attention, decode, prefill, short
from spikeform.layers.triton.operands import Counts, Mask, Populations, dense, padded, train
from spikeform.layers.triton.query import encode_gif
from spikeform.neurons import GIF, OAT, Dynamic, FixedPointHG
from spikeform.neurons.oat import ROUNDINGS
from spikeform.spikes import Radix2

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROTATED = 200 * 2**20  # bytes of caches, several times the last level
STEPS = 8
KINDS = "oat", "oat2", "gif"


def layer(kind: str, groups: int, size: int) -> SpikingAttention:
    """A layer of random populations."""
    if kind != "gif":
        pairs = [(1.0, 8.0)] * 3 if kind == "oat2" else [(1.1, 7.3), (0.9, 6.1), (1.2, 8.9)]
        neurons = [OAT(Radix2(STEPS), pair) for pair in [*pairs, (0.13, 1.004)]]
        hgs = [FixedPointHG(name, Radix2(STEPS)) for name in ("exp", "reciprocal")]
        return SpikingAttention(*neurons, *hgs).to(DEVICE)
    generator = torch.Generator().manual_seed(0)

    def neuron(channels: tuple[int, ...], steps: int) -> GIF:
        gif = GIF(4, channels, steps=steps)
        gif.set_times(1 + (torch.rand(channels, generator=generator) < 0.1) * (steps - 1))
        return gif

    channels = (groups, 1, size)
    made = neuron((size,), 1), neuron(channels, 2), neuron(channels, 2)
    spiking = SpikingAttention(*made, Dynamic(), None, None)
    spiking.signs = (torch.randint(0, 2, (size,), generator=generator) * 2 - 1).to(torch.int8)
    return spiking.to(DEVICE)


class Case:
    """A layer, queries, as many caches as shall take turns, and a mask."""

    def __init__(self, kind: str, length: int, seen: int, slots: int, heads: int, groups: int, size: int = 128) -> None:
        self.layer, self.kind, self.size = layer(kind, groups, size), kind, size
        copies = max(1, min(8, ROTATED // (4 * slots * groups * size)))
        self.q = torch.randn(1, length, heads, size, device=DEVICE, dtype=torch.bfloat16).transpose(1, 2)
        self.real, self.caches = [], []
        for _ in range(copies):
            k, v = torch.randn(2, 1, groups, slots, size, device=DEVICE, dtype=torch.bfloat16).unbind()
            codes = self.layer.encode(k, v)
            self.real.append((k, v))
            self.caches.append((self.layer.key.pack(codes[0]), self.layer.value.pack(codes[1])))
        late = torch.arange(slots)[None] > torch.arange(length)[:, None] + seen - length
        mask = torch.zeros(1, 1, length, slots).masked_fill_(late, torch.finfo(torch.bfloat16).min)
        self.mask = mask.to(DEVICE, torch.bfloat16)

    def rule(self) -> Populations | Counts:
        """The layer's parameters as the kernels take them."""
        spiking = self.layer
        if self.kind == "gif":
            query, key, value = (n.tables().multiple for n in (spiking.query, spiking.key, spiking.value))
            return Counts(
                query, key, value, spiking.probability.coding.limit, spiking.query.levels, spiking.query.steps
            )
        neurons = spiking.query, spiking.key, spiking.value, spiking.probability
        coding, bank = spiking.query.coding, (spiking.exp.coding.steps, True, spiking.exp.low, spiking.exp.high)
        rest = coding.limit, coding.limit, coding.resolution, ROUNDINGS.index("nearest"), *bank
        return Populations(*(neuron.threshold for neuron in neurons), *rest)

    def run(self, i: int, form: object = None) -> Tensor:
        """One call on the i-th cache, by the kernels for so many queries, with given sizes or those of the table."""
        k, v = self.caches[i % len(self.caches)]
        q, spiking = self.q, self.layer
        batch, heads, length, size = q.shape
        out = torch.empty((batch, length, heads, size), dtype=q.dtype, device=q.device)
        rows, units = dense(q), None
        if self.kind == "gif" and (spiking.signs is not None or length > attention.FEW):
            tables = spiking.query.tables()
            rows, units = encode_gif(rows, spiking.signs, tables.multiple, spiking.query.levels, spiking.query.steps)
        groups, keys, _ = k.shape[1:]
        suits = short.suits(batch, groups, heads // groups * length, keys, size, k.element_size())
        few = short.attend if isinstance(form, short.Form) or (form is None and suits) else decode.attend
        attend = few if length <= attention.FEW else prefill.attend
        seen = Mask.of(self.mask, batch, heads, length, k.shape[2])
        attend(rows, units, train(k, size), train(v, size), seen, size**-0.5, self.rule(), size, out, form)
        return out

    def reference(self) -> Tensor:
        """The layer itself, in fp32, on the first cache."""
        self.layer._fused = lambda *_: None
        return self.layer(self.q.float(), *self.caches[0], self.mask.float(), self.size**-0.5)

    def dense(self, i: int) -> Tensor:
        """PyTorch's attention on real keys and values; without a mask where it is causal, which is faster."""
        k, v = self.real[i % len(self.real)]
        length, slots = self.q.shape[2], k.shape[2]
        grouped = {"enable_gqa": k.shape[1] != self.q.shape[1]}
        if length == slots:
            return F.scaled_dot_product_attention(self.q, k, v, is_causal=True, **grouped)
        return F.scaled_dot_product_attention(self.q, k, v, self.mask, **grouped)


def microseconds(call: Callable[[int], object], calls: int = 8, rounds: int = 20) -> float:
    """Of one call in a graph of several."""
    if DEVICE == "cpu":
        call(0)
        return 0.0
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for i in range(3):
            call(i)
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(calls):
            call(i)
    times = []
    for _ in range(rounds):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / calls)
    return min(times)


class Clock:
    """Seconds since the start, of those that there are."""

    def __init__(self, seconds: float) -> None:
        self.start, self.seconds, self.left_out = time.perf_counter(), seconds, []

    def allows(self, what: object) -> bool:
        """Whether there is time for one more thing; else it is noted as left out."""
        if time.perf_counter() - self.start < self.seconds:
            return True
        self.left_out.append(str(what))
        return False


def check(quick: bool, clock: Clock) -> list[dict]:
    """How far the kernels are from the layer in fp32, in probability units times the largest value."""
    found = []
    shapes = [(1, 60, 70), (9, 60, 70)] if quick else [(1, 900, 1024), (3, 1024, 1024), (700, 700, 700)]
    for kind, (length, seen, slots), groups in itertools.product(KINDS, shapes, (2,)):
        row = {"kind": kind, "L": length, "S": seen, "slots": slots, "G": groups}
        if not clock.allows(row):
            continue
        case = Case(kind, length, seen, slots, 4, groups, 32 if quick else 128)
        case.q = case.q.float()  # bf16 results would hide what differs
        expected = case.reference()
        error = (case.run(0) - expected).abs()
        unit = 1 / 65535 if kind == "gif" else float(case.layer.probability.quantum().max())
        scale, size = unit * float(case.real[0][1].abs().max()), float(expected.abs().max())
        row |= {"max_units": float(error.max()) / scale}
        row |= {"mean_units": float(error.mean()) / scale, "max_relative": float(error.max()) / size}
        found.append({key: round(x, 5) if isinstance(x, float) else x for key, x in row.items()})
        print("check", found[-1], flush=True)
    return found


# Queries, keys seen, slots of the cache, key/value heads of 32: what matters most comes first.
SHAPES = [
    (2048, 2048, 2048, 32), (1, 1024, 1024, 8), (1, 4096, 4096, 8), (1, 1024, 1024, 32), (2048, 2048, 2048, 8),
    (1, 512, 4096, 8), (1, 256, 256, 8), (1, 4096, 4096, 32), (512, 512, 512, 32), (1, 256, 256, 32),
    (1, 512, 4096, 32), (4, 1024, 1024, 8), (4, 1024, 1024, 32), (512, 512, 512, 8),
]  # fmt: skip


def times(quick: bool, before: list[dict], clock: Clock) -> list[dict]:
    """Each kind at each shape; printed with the earlier time, and the new one over it."""
    found = []
    for length, seen, slots, groups in SHAPES[1:2] if quick else SHAPES:
        row = {"L": length, "S": seen, "slots": slots, "H": 32, "G": groups}
        if quick:
            row |= {"S": 70, "slots": 70, "H": 2, "G": 1}
        earlier = next((old for old in before if all(old.get(key) == row[key] for key in row)), {})
        if not clock.allows(row):
            continue
        for kind in ("gif", "oat2", "oat"):
            case = Case(kind, length, row["S"], row["slots"], row["H"], row["G"])
            row[f"{kind}_us"] = round(microseconds(case.run, rounds=10 if length > 4 else 30), 1)
            print(dict(list(row.items())[:5]), kind, *_against(row, earlier, f"{kind}_us"), flush=True)
        row["sdpa_us"] = round(microseconds(case.dense), 1)
        print("    PyTorch", *_against(row, earlier, "sdpa_us"), flush=True)
        found.append(row)
    return found


def _against(row: dict, earlier: dict, name: str) -> tuple:
    """A time, and where there is an earlier one that, and the ratio."""
    if not earlier.get(name) or not row[name]:
        return (row[name],)
    return row[name], "was", earlier[name], "ratio", round(row[name] / earlier[name], 2)


def parts(clock: Clock) -> list[dict]:
    """Microseconds of each kernel of a call, prefill and decoding."""
    found = []
    for kind, (length, _, slots, groups) in itertools.product(("gif", "oat2"), SHAPES[:2]):
        row: dict = {"kind": kind, "L": length, "S": slots, "G": groups}
        if not clock.allows(("parts", row)):
            continue
        case = Case(kind, length, slots, slots, 32, groups)
        case.run(0)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            for i in range(4):
                case.run(i)
            torch.cuda.synchronize()
        events = [e for e in profile.key_averages() if e.device_time_total > 0]
        row["kernels_us"] = {e.key[:40]: round(e.device_time_total / 4, 1) for e in events}
        found.append(row)
        print("parts", row, flush=True)
    return found


def decode_forms(case: Case) -> list[decode.Form]:
    rows = case.q.shape[1] // case.caches[0][0].shape[1] * case.q.shape[2]
    codes = case.caches[0][0]
    usual = decode.form_of(codes.shape[2], rows, case.size, codes.element_size(), codes.shape[1])
    forms = [usual]
    for block, warps in itertools.product((32, 64, 128), (4, 8)):
        forms.append(usual._replace(block=block, warps=warps))
    for count in (1, 2, 4, 8, 16, 32):
        forms.append(usual._replace(parts=count))
    for channels, step, stages, warps in itertools.product((16, 32, 64), (64, 128), (1, 3), (4, 8)):
        forms.append(usual._replace(channels=channels, step=step, stages=stages, warps=warps))
    return forms


def short_forms(case: Case) -> list[short.Form]:
    codes = case.caches[0][0]
    groups, slots = codes.shape[1:3]
    usual = short.form_of(slots, case.q.shape[1] // groups * case.q.shape[2], case.size, codes.element_size(), groups)
    sizes = itertools.product((64, 128), (32, 64, 128), (64, short.span_of(slots)), (1, 3), (4, 8, 16))
    return [usual, *[usual._replace(block=b, channels=c, step=s, stages=n, warps=w) for b, c, s, n, w in sizes]]


def prefill_forms(case: Case) -> list[prefill.Form]:
    usual = prefill.form_of(case.q.shape[2], padded(case.size), case.kind == "oat")
    sizes = itertools.product(((64, 4), (128, 8)), (32, 64, 128), (2, 3))
    forms = [prefill.Form(rows, keys, stages, warps) for (rows, warps), keys, stages in sizes]
    return [usual, *[form for form in forms if form != usual]]


def sweep(which: str) -> list[dict]:
    """The fastest sizes of programs for each shape, beside those of the table."""
    found = []
    few = [(1, 256, 32), (1, 1024, 32), (1, 1024, 8)]
    shapes = {"short": few, "decode": [*few, (1, 4096, 8)], "prefill": [(2048, 2048, 32)]}[which]
    forms = {"short": short_forms, "decode": decode_forms, "prefill": prefill_forms}[which]
    for kind, (length, slots, groups) in itertools.product(KINDS, shapes):
        case, timed = Case(kind, length, slots, slots, 32, groups), []
        for form in forms(case):
            try:
                timed.append((microseconds(lambda i, case=case, form=form: case.run(i, form), 4, 8), form))
            except (triton.runtime.errors.OutOfResources, RuntimeError) as error:
                print(kind, form, type(error).__name__, flush=True)
        row = {"kind": kind, "L": length, "S": slots, "G": groups, "usual_us": round(timed[0][0], 1)}
        row["best"] = [(round(us, 1), *form) for us, form in sorted(timed, key=lambda pair: pair[0])[:5]]
        found.append(row)
        print(row, flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    out = os.environ.get("OUT")
    default = Path(out) if out else Path(__file__).parent / "results"
    parser.add_argument("--out", type=Path, default=default / "gpu-attention.json")
    parser.add_argument("--before", type=Path, default=Path(__file__).parent / "results" / "gpu-attention.json")
    parser.add_argument("--seconds", type=float, default=90)
    parser.add_argument("--sweep", choices=("short", "decode", "prefill", "all"))
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_grad_enabled(False)
    before = json.loads(args.before.read_text())["times"] if args.before.exists() else []
    clock = Clock(args.seconds)
    result = {
        "protocol": " ".join(("A figure" + str(__doc__).partition("A figure")[2]).split()),
        "hardware": torch.cuda.get_device_name() if DEVICE == "cuda" else f"CPU {platform.machine()}, interpreted",
        "versions": {"torch": torch.__version__, "triton": triton.__version__},
    }
    result["times"] = times(args.quick, before, clock)
    result["parts"] = parts(clock) if DEVICE == "cuda" else []
    result["check"] = check(args.quick, clock)
    for which in ("short", "decode", "prefill"):
        if args.sweep in (which, "all") and not args.quick:
            result[f"{which}_sweep"] = sweep(which)
    print("left out:", clock.left_out or "nothing", flush=True)
    if not args.quick:
        out = args.out.with_suffix(".partial.json") if clock.left_out else args.out
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
