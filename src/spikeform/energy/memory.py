"""Bytes that the networks move: weights, activations or spikes, potentials, running sums."""

from __future__ import annotations

from spikeform.energy.count import Counter
from spikeform.energy.models import CostModel
from spikeform.energy.tallies import ProductTally

POTENTIAL_BYTES = 4  # a membrane potential, written once and read once a window; between steps it is in a register

Lines = dict[str, float]


def memory(counter: Counter, model: CostModel, baseline: Counter | None = None) -> dict[str, Lines]:
    """Energy of the memory traffic, by line, of the three networks (four, with a baseline).

    Weights: from DRAM once a forward call, then from SRAM. A multiplying network reads each once (it reuses it for
    all tokens of the call); the spiking one fetches only rows whose channel spikes, and reads a row once in every
    step in which the channel spikes in some token: at most its spikes, and at most the window (exact at one token,
    an upper bound at more). Activations: each operand written once and read once; with a baseline, or scans, also those
    of products that stay real. Spiking: the wire bits of its train; the potential of every neuron; and the codes of
    both running sums of a product of two trains. With a cache, spiking self-attention reads and writes what spikes
    touch of its state, where its rivals read all keys and values so far. Integer weights are as many bits as their file
    has, and so are their scales; the dense network has its own weights.
    """
    sram, dram = model.sram_per_byte, model.dram_per_byte
    rival = baseline or counter
    products = counter.products.values()
    left = sum(t.weights for t in counter.dense.values()) * model.weight_bytes
    fetched = sum(_moved(t, t.bits_fetched, t.rows_fetched, model) for t in products) + left
    read = sum(_moved(t, t.bits_read, t.rows_read, model) for t in products) + left
    operands = [(t, operand) for t in products for operand in t.operands if t.kind != "weights"]
    wired = sum(operand.wire_bits for _, operand in operands) / 8
    sums = sum(operand.elements * operand.bits for t, operand in operands if t.windowed) / 8
    potentials = sum(t.sent.elements for t in counter.firings.values()) * POTENTIAL_BYTES
    kept = sum(t.weights for t in rival.dense.values()) * model.weight_bytes
    weights = sum(t.rows * t.row_size for t in rival.products.values()) * model.weight_bytes + kept
    stored = sum(_moved(t, t.bits, t.rows, model) for t in rival.products.values()) + kept
    elements = sum(o.elements for t in rival.products.values() if t.kind != "weights" for o in t.operands)
    inputs = sum(t.inputs for t in rival.products.values()) * model.activation_bytes
    real = _real_bytes(rival, model) + inputs
    lines = {
        "spiking": {
            "weights_dram": fetched * dram,
            "weights_sram": read * sram,
            "spikes": 2 * wired * sram,
            "running_sum_codes": 2 * sums * sram,
            "potentials": 2 * potentials * sram,
        },
        "dense": {**_once(weights, model), "activations": 2 * (elements * model.activation_bytes + real) * sram},
        "quantised": {**_once(stored, model), "activations": 2 * (_coded_bytes(rival) + real) * sram},
    }
    if counter.real or inputs:
        lines["spiking"]["activations"] = 2 * (_real_bytes(counter, model) + inputs) * sram
    for name, own in _cached(counter, model).items():
        lines[name] |= own
    if baseline is not None:
        once = _once(stored, model)
        lines["quantised_steps"] = {**once, "activations": 2 * (_coded_bytes(baseline, counter.steps) + real) * sram}
    return lines


def _cached(counter: Counter, model: CostModel) -> dict[str, Lines]:
    """What decoding with spiking self-attention reads (and writes) of its cache, where anything ran with one."""
    tallies = counter.attentions.tallies.values()
    keys = sum(t.cached for t in tallies)
    coded = sum(t.cached * counter.products[t.site, "recurrence"].operands[1].bits for t in tallies if t.cached) / 8
    if not (touched := sum(t.touched for t in tallies)) and not keys:
        return {}
    return {
        "spiking": {"attention_cache": touched * POTENTIAL_BYTES * model.sram_per_byte},
        "dense": {"attention_cache": keys * model.activation_bytes * model.sram_per_byte},
        "quantised": {"attention_cache": coded * model.sram_per_byte},
    }


def _moved(tally: ProductTally, bits: int, rows: int, model: CostModel) -> float:
    """Bytes of weights: as they are stored where they are integers, else as the cost model's."""
    return bits / 8 if tally.stored else rows * tally.row_size * model.weight_bytes


def _once(weights: float, model: CostModel) -> Lines:
    return {"weights_dram": weights * model.dram_per_byte, "weights_sram": weights * model.sram_per_byte}


def _real_bytes(counter: Counter, model: CostModel) -> float:
    return sum(t.elements for t in counter.real.values()) * model.activation_bytes


def _coded_bytes(counter: Counter, steps: int | None = None) -> float:
    coded = (t for t in counter.products.values() if t.kind != "weights")
    return sum(o.elements * o.bits_in(steps) for t in coded for o in t.operands) / 8
