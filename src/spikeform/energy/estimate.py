"""Pricing: counted operations and bytes times a cost model, for three networks by the same rules. All in pJ.

The three networks share every site: the spiking one; the dense one in the cost model's own number format; and
the quantised one, whose activations have as many levels as the trains (arXiv 2409.08290). Weights are the
same in all.

What is not spiking in a streaming network runs T times, so its rivals are counted in a run of their own, the
``baseline``: the network of ``steps=0``, one pass. It has a fourth network, ``quantised_steps``: activations of as
many levels as T spikes have, where ``quantised`` has those of the QCFS network.
"""

from __future__ import annotations

from spikeform.energy.count import Counter
from spikeform.energy.models import CostModel

POTENTIAL_BYTES = 4  # a membrane potential, written once and read once a window; between steps it is in a register

Lines = dict[str, float]


def compute(counter: Counter, model: CostModel, baseline: Counter | None = None) -> dict[str, Lines]:
    """Energy of the operations, by line, of ``spiking``, ``dense``, ``quantised`` (and ``quantised_steps``)."""
    ops = operations(counter, baseline)
    spiking, real = ops["spiking"], _real(ops["dense"], model)
    products, quantised = _products(baseline or counter, model)
    lines = {
        "spiking": {
            "accumulate_weights": spiking["accumulate_weights"] * model.ac,
            "accumulate_sums": spiking["accumulate_sums"] * model.ac,
            "multi_level_spikes": spiking["multi_level_additions"] * model.ac,
            "learned_step_weights": spiking["step_weight_multiplications"] * model.multiply,
            "running_sums": spiking["running_sum_additions"] * model.ac,
            "neurons": spiking["comparisons"] * model.comparison + spiking["neuron_additions"] * model.add,
            **_real(spiking, model),
        },
        "dense": {"products": products, **real},
        "quantised": {
            "products": quantised,
            "quantise": ops["quantised"]["quantise"] * model.multiply,
            **real,
        },
    }
    if baseline is not None:
        lines["quantised_steps"] = lines["quantised"] | {"products": _products(baseline, model, counter.steps)[1]}
    return lines


def _real(ops: dict[str, int], model: CostModel) -> Lines:
    lines = {
        "left_dense": ops["dense_macs"] * model.mac,
        "real_scales_and_biases": ops["real_multiplications"] * model.multiply + ops["real_additions"] * model.add,
    }
    if "attention_macs" in ops:
        lines["attention"] = ops["attention_macs"] * model.mac
        lines["gated_products"] = ops["gated_multiplications"] * model.multiply
    return lines


def _products(counter: Counter, model: CostModel, steps: int | None = None) -> tuple[float, float]:
    """Products of the dense and of the quantised network (of as many levels as ``steps`` have, if given)."""
    products = quantised = 0.0
    for tally in counter.products.values():
        add = 0.0 if tally.kind == "hadamard" else model.add  # a lone product accumulates nothing
        products += tally.macs * (model.multiply + add)
        bits = [operand.bits_in(steps) for operand in tally.operands]
        quantised += tally.macs * (model.quantised_multiply(*bits) + add)
    return products, quantised


def operations(counter: Counter, baseline: Counter | None = None) -> dict[str, dict[str, int]]:
    """Operations by kind of the three networks: counts, no prices."""
    rival = baseline or counter
    products, firings = counter.products.values(), counter.firings.values()
    macs = {f"{kind}_macs": sum(t.macs for t in rival.products.values() if t.kind == kind) for kind in _KINDS}
    encoded = sum(t.sent.elements for t in rival.firings.values() if t.function == "identity")
    return {
        "spiking": {
            "accumulate_weights": sum(t.accumulations for t in products if t.kind == "linear"),
            "accumulate_sums": sum(t.accumulations for t in products if t.kind != "linear"),
            "multi_level_additions": sum(t.level_additions for t in products),
            "step_weight_multiplications": sum(t.scalings for t in products),
            "running_sum_additions": sum(t.running_sums for t in products),
            "comparisons": sum(t.comparisons for t in firings),
            "neuron_additions": sum(t.additions for t in firings),
            **_real_operations(counter),
        },
        "dense": macs | _real_operations(rival),
        "quantised": macs | {"quantise": encoded} | _real_operations(rival),
    }


def _real_operations(counter: Counter) -> dict[str, int]:
    found = {
        "dense_macs": sum(t.macs for t in counter.dense.values()),
        "real_multiplications": sum(t.multiplications for t in counter.dense.values()),
        "real_additions": sum(t.additions for t in counter.dense.values()),
    }
    if counter.real:
        found["attention_macs"] = sum(t.macs for t in counter.real.values())
        found["gated_multiplications"] = sum(t.multiplications for t in counter.real.values())
    return found


_KINDS = ("linear", "matmul", "hadamard")


def memory(counter: Counter, model: CostModel, baseline: Counter | None = None) -> dict[str, Lines]:
    """Energy of the memory traffic, by line, of the three networks (four, with a baseline).

    Weights: from DRAM once a forward call, then from SRAM. A multiplying network reads each once (it reuses it for
    all tokens of the call); the spiking one fetches only rows whose channel spikes, and reads a row once in every
    step in which the channel spikes in some token: at most its spikes, and at most the window (exact at one token,
    an upper bound at more). Activations: each operand written once and read once; with a baseline also those of
    products that stay real. Spiking: the wire bits of its train; the potential of every neuron; and the codes of
    both running sums of a product of two trains.
    """
    sram, dram = model.sram_per_byte, model.dram_per_byte
    rival = baseline or counter
    products = counter.products.values()
    left = sum(t.weights for t in counter.dense.values()) * model.weight_bytes
    fetched = sum(t.rows_fetched * t.row_size for t in products) * model.weight_bytes + left
    read = sum(t.rows_read * t.row_size for t in products) * model.weight_bytes + left
    operands = [(t, operand) for t in products for operand in t.operands]
    wired = sum(operand.wire_bits for _, operand in operands) / 8
    sums = sum(operand.elements * operand.bits for t, operand in operands if t.kind != "linear") / 8
    potentials = sum(t.sent.elements for t in counter.firings.values()) * POTENTIAL_BYTES
    weights = sum(t.rows * t.row_size for t in rival.products.values()) + sum(t.weights for t in rival.dense.values())
    once = {"weights_dram": weights * model.weight_bytes * dram, "weights_sram": weights * model.weight_bytes * sram}
    elements = sum(operand.elements for t in rival.products.values() for operand in t.operands)
    real = _real_bytes(rival, model)
    lines = {
        "spiking": {
            "weights_dram": fetched * dram,
            "weights_sram": read * sram,
            "spikes": 2 * wired * sram,
            "running_sum_codes": 2 * sums * sram,
            "potentials": 2 * potentials * sram,
        },
        "dense": {**once, "activations": 2 * (elements * model.activation_bytes + real) * sram},
        "quantised": {**once, "activations": 2 * (_coded_bytes(rival) + real) * sram},
    }
    if baseline is not None:
        lines["spiking"]["activations"] = 2 * _real_bytes(counter, model) * sram
        lines["quantised_steps"] = {**once, "activations": 2 * (_coded_bytes(baseline, counter.steps) + real) * sram}
    return lines


def _real_bytes(counter: Counter, model: CostModel) -> float:
    return sum(t.elements for t in counter.real.values()) * model.activation_bytes


def _coded_bytes(counter: Counter, steps: int | None = None) -> float:
    return sum(o.elements * o.bits_in(steps) for t in counter.products.values() for o in t.operands) / 8


def price(counter: Counter, model: CostModel, baseline: Counter | None = None) -> dict:
    """The estimate under one cost model, pJ: totals, ratios (below 1 the spiking one costs less), lines."""
    lines, traffic = compute(counter, model, baseline), memory(counter, model, baseline)
    totals = {name: sum(parts.values()) for name, parts in lines.items()}
    moved = {name: sum(parts.values()) for name, parts in traffic.items()}
    both = {name: totals[name] + moved[name] for name in totals}
    return {
        "label": "ESTIMATED",
        "unit": "pJ",
        **_with_ratios(totals),
        "lines": lines,
        "memory": {**_with_ratios(moved), "lines": traffic},
        "with_memory": _with_ratios(both),
        "model": model.to_dict(),
    }


def _with_ratios(totals: Lines) -> Lines:
    ratios = {
        f"ratio_vs_{rival}": totals["spiking"] / energy if energy else float("nan")
        for rival, energy in totals.items()
        if rival != "spiking"
    }
    return totals | ratios
