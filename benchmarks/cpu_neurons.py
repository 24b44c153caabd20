"""CPU operators of neurons and attention beside the modules that they stand for, at the shape of a 1.1B LLaMA.

    OMP_WAIT_POLICY=passive python benchmarks/cpu_neurons.py --out benchmarks/results/cpu-neurons.json

Rounds go through all cases in turn, so that a busy neighbour slows each alike; the least time of a case's rounds
counts. Times are of the whole call, Python included, in microseconds: CPU time with one thread, wall time with two.
Compare within one run only; on a shared machine the wall times are as good as its idle moments.
"""

import argparse
import json
import platform
import sys
import time
from pathlib import Path

import torch

from spikeform.layers import SpikingActivation, SpikingAttention, SpikingGatedMLP, SpikingNorm
from spikeform.native.library import level
from spikeform.neurons import GIF, OAT, Dynamic, FixedPointHG, few_spike_bank, fused
from spikeform.spikes import Radix2
from spikeform.synapses import dispatch

HIDDEN, FEATURES, HEADS, GROUPS, SIZE = 2048, 5632, 32, 4, 64
STEPS = 16


def oat(threshold=(2.0, 20.0)):
    return OAT(Radix2(STEPS), threshold)


def hg(function):
    return FixedPointHG(function, Radix2(STEPS))


def burst(*channels, steps=2):
    neuron = GIF(4, channels, steps=steps)
    neuron.set_times(2 ** (torch.rand(channels) < 0.1) if steps > 1 else torch.ones(channels))
    return neuron


def cases(rows, context, dtype):
    """Name, and a module with its inputs, or the calls of the operator and of the neuron that it stands for."""
    x = torch.randn(1, rows, HIDDEN).to(dtype)
    wide, other = (torch.randn(1, rows, FEATURES).to(dtype) for _ in range(2))
    keys = torch.randn(1, GROUPS, rows, SIZE).to(dtype)
    neuron, channel = oat(), burst(HIDDEN)
    form = neuron.closed_form()
    thresholds = form.threshold, *form[2:]
    yield (
        "oat_values 2048",
        lambda: fused.oat_values(x, form.threshold, None, *form[2:], False),
        lambda: neuron(x).decode(),
    )
    yield "oat_pack 4x64", lambda: fused.oat_pack(keys, *thresholds), lambda: neuron.pack(neuron(keys))
    norm = SpikingNorm(
        torch.nn.Parameter(torch.ones(HIDDEN)), None, 1e-5, False, 0.0, neuron, hg("square"), hg("inverse_sqrt")
    )
    yield "hg_norm 2048", norm, x
    for name in ("silu", "gelu"):
        yield f"hg_values {name} 5632", SpikingActivation(hg(name)), wide
    bank = few_spike_bank("silu", 8)
    yield "few_spike_values silu 5632, T=8", SpikingActivation(bank), wide
    gated = SpikingGatedMLP(*(torch.nn.Identity(),) * 3, SpikingActivation(hg("silu")), neuron, None)
    gated.up_proj.forward = lambda _: other
    yield "hg_gated silu 5632", gated, wide
    yield (
        "gif_integers 2048",
        lambda: fused.gif_integers(x, *channel.closed_form()),
        lambda: channel(x).integers(),
    )
    head = burst(GROUPS, 1, SIZE)
    yield "gif_pack 4x64", lambda: fused.gif_pack(keys, *head.closed_form()), lambda: head.pack(head(keys))
    q = torch.randn(1, HEADS, rows, SIZE).to(dtype)
    past = context if rows == 1 else rows
    k, v = (torch.randn(1, GROUPS, past, SIZE) for _ in range(2))
    hidden = torch.arange(past) > torch.arange(rows)[:, None] + past - rows
    mask = torch.zeros(1, 1, rows, past, dtype=dtype).masked_fill(hidden, torch.finfo(dtype).min)
    for name, attention in (
        ("oat_attention", SpikingAttention(oat(), oat(), oat(), oat((0.1, 1.0)), hg("exp"), hg("reciprocal"))),
        (
            "gif_attention",
            SpikingAttention(burst(SIZE, steps=1), head, burst(GROUPS, 1, SIZE), Dynamic(Radix2(16)), None, None),
        ),
    ):
        packed = attention.pack(k, v)
        yield f"{name} {past} keys", attention, q, *packed, mask, 0.125


def microseconds(call, clock, least=2e-3):
    """Of one call, over as many as take two milliseconds."""
    count = 1
    while True:
        start = clock()
        for _ in range(count):
            call()
        took = clock() - start
        if took >= least:
            return took / count * 1e6
        count *= 2


def apart(call, clock):
    whole = dispatch.kernels
    dispatch.kernels = lambda device: (False, "the modules' own operations")
    try:
        return microseconds(call, clock)
    finally:
        dispatch.kernels = whole


def pair(first, *rest):
    """The fused call and the eager one."""
    if isinstance(first, torch.nn.Module):
        return lambda: first(*rest), lambda: first(*rest)
    return first, rest[0]


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    torch.manual_seed(0)
    few_spike_bank("silu", 8)  # fitted once, with gradients
    with torch.inference_mode():
        measure(options)


def measure(options):
    table = []
    for dtype in (torch.float32, torch.bfloat16):
        for rows, contexts in ((1, (128, 1024)), (128, (128,))):
            seen = {name: calls for context in contexts for name, *calls in cases(rows, context, dtype)}
            for name, calls in seen.items():
                table.append({"operator": name, "rows": rows, "dtype": str(dtype)[6:], "calls": pair(*calls)})
    for row in table:
        row["us"] = {}
    for _ in range(options.rounds):
        for threads in (1, 2):
            torch.set_num_threads(threads)
            clock = time.thread_time if threads == 1 else time.perf_counter
            for row in table:
                ours, eager = row["calls"]
                for kind, took in (("fused", microseconds(ours, clock)), ("eager", apart(eager, clock))):
                    key = f"{kind}, {threads} threads"
                    row["us"][key] = min(took, row["us"].get(key, took))
    for row in table:
        del row["calls"]
        row["us"] = {key: round(value, 1) for key, value in row["us"].items()}
        print(f"{row['operator']:32} rows {row['rows']:4} {row['dtype']:9}", row["us"])
    if options.out:
        about = {
            "torch": torch.__version__,
            "python": platform.python_version(),
            "level": level(),
            "rounds": options.rounds,
        }
        options.out.write_text(
            json.dumps({"protocol": " ".join(__doc__.split()), **about, "rows": table}, indent=1) + "\n"
        )


if __name__ == "__main__":
    sys.exit(main())
