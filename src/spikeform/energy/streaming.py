"""What a streaming network costs: T passes where one would do, counted beside the same network's one pass.

A streaming network spikes at some sites and multiplies at all others, T times. Its baseline is the network that
it was made from, the QCFS network of ``steps=0``: one pass, by the same hooks. Two accountings come out, and must
not be mixed up: what really runs (spikes add where a linear layer receives them, all else is multiplied, T times),
and the papers' convention, which takes every MAC of the network for additions at the mean firing rate.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from spikeform.energy.count import Counter
from spikeform.energy.models import CostModel
from spikeform.layers.streaming import paused, steps_of
from spikeform.neurons import StreamingNeuron
from spikeform.spikes import Thermometer

RUNS, PAPERS = "what runs", "papers' convention"
NOT_COUNTED = [
    "what stays real of softmax, the norms' statistics and activation functions; residual additions, score scaling, "
    "rotary embedding: in none of the networks, though the spiking one does them T times (which favours it); "
    "evaluations of functions are counted, without a price, in streaming.functions",
    "embedding look-up, repeating the rows T times, the mean over the T streams",
    "in the rivals: clipping and rounding beyond one multiplication an element (which favours them)",
    "accumulators and registers, the probabilities of attention (they stay on the chip); with a cache, reading keys "
    "and values (streaming.decoding has their bytes)",
    "routing of spikes over a network on chip, clock, control, leakage, idle power",
]
_PROMPT = 16  # tokens of the cached decoding step; what it counts does not depend on them


def accountings(counter: Counter, baseline: Counter, estimates: dict[str, dict], models: list[CostModel]) -> dict:
    """Both accountings, ESTIMATED pJ by cost model.

    The papers': ``E = rate x T x MACs x E_AC`` against ``MACs x E_MAC``, with the mean firing rate of all neurons
    and all MACs of the dense network, attention included. It prices additions that do not take place.

    Args:
        counter: Of the spiking run.
        baseline: Of the one pass.
        estimates: By cost model, of what runs.
        models: The cost models.
    """
    rate, macs = firing_rate(counter), linear_macs(baseline) + attention_macs(baseline)
    papers = {}
    for model in models:
        spiking, dense = rate * counter.steps * macs * model.ac, macs * model.mac
        papers[model.name] = {"spiking": spiking, "dense": dense, "ratio_vs_dense": spiking / dense}
    return {
        RUNS: {
            "label": "ESTIMATED: spikes are additions where a linear layer receives them; every other product of the "
            "network is a MAC in each of its T passes",
            "estimates": {
                name: {key: found[key] for key in ("spiking", "dense", "ratio_vs_dense")}
                for name, found in estimates.items()
            },
        },
        PAPERS: {
            "label": "ESTIMATED by a convention common in papers on spiking networks: every MAC of the network taken "
            "for additions at the mean firing rate. Not what runs",
            "equation": "E = rate x T x MACs x E_AC, dense: MACs x E_MAC",
            "rate": rate,
            "steps": counter.steps,
            "macs": macs,
            "estimates": papers,
        },
    }


def facts(model: nn.Module, ids: Tensor, counter: Counter, baseline: Counter) -> dict[str, Any]:
    """How much more than one dense pass the streaming network does, in operations, weights and cache.

    Args:
        model: The streaming model.
        ids: ``[N, L]``, a window; the first tokens of the first row are decoded with a cache.
        counter: Of the spiking run.
        baseline: Of the one pass.
    """
    dense, spiking = linear_macs(baseline), sum(t.macs for t in _linears(baseline))
    additions = sum(t.accumulations for t in _linears(counter))
    gated = [tally for tally in counter.real.values() if tally.kind == "gated_linear"]
    left = sum(tally.macs for tally in counter.dense.values())
    slots = left + sum(t.macs * t.operands[0].rows for t in _linears(counter))
    return {
        "steps": counter.steps,
        "operations": {
            "dense_macs": dense,
            "spiking_share": spiking / dense,
            "mac_slots": slots,
            "rows_ratio": slots / dense,
            "macs": left,
            "additions": additions,
            "events_ratio": (left + additions) / dense,
        },
        "gated": {"elements": sum(t.elements for t in gated), "zeros": sum(t.zeros for t in gated)},
        "attention": {"dense_macs": attention_macs(baseline), "macs": attention_macs(counter)},
        "quantised_bits": {"quantised": _bits(baseline), "quantised_steps": _bits(baseline, counter.steps)},
        "functions": {"spiking": _functions(counter), "dense": _functions(baseline)},
        "decoding": decoding(model, ids),
    }


def firing_rate(counter: Counter) -> float:
    """Spikes over slots of all streaming neurons."""
    sent = [tally.sent for tally in counter.firings.values() if isinstance(tally.sent.coding, Thermometer)]
    return sum(p.spikes for p in sent) / max(sum(p.slots for p in sent), 1)


def linear_macs(counter: Counter) -> int:
    """MACs of all linear layers, spiking (of one window) or not (of what ran)."""
    return sum(t.macs for t in _linears(counter)) + sum(t.macs for t in counter.dense.values())


def attention_macs(counter: Counter) -> int:
    """MACs of both products of attention, of trains or of real numbers."""
    spiking = sum(t.macs for t in counter.products.values() if t.kind == "matmul")
    return spiking + sum(t.macs for t in counter.real.values() if t.kind == "attention")


def _linears(counter: Counter) -> list:
    return [tally for tally in counter.products.values() if tally.kind == "linear"]


def _bits(counter: Counter, steps: int | None = None) -> list[int | float]:
    streaming = (tally.sent for tally in counter.firings.values() if isinstance(tally.sent.coding, Thermometer))
    return sorted({sent.bits_in(steps) for sent in streaming})


def _functions(counter: Counter) -> dict[str, int]:
    found = {"attention": 0, "activation": 0, "norm": 0}
    for tally in counter.real.values():
        if tally.kind in found:
            found[tally.kind] += tally.functions
    return found


@torch.no_grad()
def decoding(model: nn.Module, ids: Tensor) -> dict[str, Any] | None:
    """Bytes that one token of one sequence moves with a cache, spiking and dense; None for a model without one.

    Each linear layer reads its weight once a call, however many streams are in it. The spiking network also reads
    its neurons' thresholds and initial potentials (of one position), and the keys and values of its T streams.
    """
    if "past_key_values" not in inspect.signature(model.forward).parameters or ids.shape[1] < 2:
        return None
    ids = ids[:1, :_PROMPT].to(next(model.parameters()).device)
    spiking = _one_token(model, ids)
    with paused(model):
        dense = _one_token(model, ids)
    if spiking is None or dense is None:
        return None
    neurons = sum(
        (p.numel() if p.ndim < 2 else p.shape[-1]) * p.element_size()
        for neuron in model.modules()
        if isinstance(neuron, StreamingNeuron)
        for p in neuron.parameters()
    )
    return {
        "weight_bytes": spiking[0],
        "neuron_bytes": neurons,
        "dense_weight_bytes": dense[0],
        "weight_ratio": (spiking[0] + neurons) / dense[0],
        "cache_bytes_per_token": spiking[1],
        "dense_cache_bytes_per_token": dense[1],
        "cache_ratio": spiking[1] / dense[1],
    }


def _one_token(model: Any, ids: Tensor) -> tuple[int, int] | None:
    """Bytes of weights that the last token's call reads, and of the cache for each token."""
    training = model.training
    model.eval()
    try:
        cache = getattr(model(ids[:, :-1], use_cache=True), "past_key_values", None)
        if cache is None:
            return None
        counter = Counter(steps_of(model))
        with counter.watch(model):
            model(ids[:, -1:], past_key_values=cache, use_cache=True)
    finally:
        model.train(training)
    weights = sum(t.rows * t.row_size for t in _linears(counter)) + sum(t.weights for t in counter.dense.values())
    held = sum(x.numel() * x.element_size() for layer in cache.layers for x in (layer.keys, layer.values))
    return weights * model.dtype.itemsize, held // ids.shape[1]
