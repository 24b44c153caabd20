"""Pricing: counted operations and bytes times a cost model, for three networks by the same rules. All in pJ.

The three networks share every site: the spiking one; the dense one in the cost model's own number format; and
the quantised one, whose activations have as many levels as the trains (arXiv 2409.08290). Weights are the
same in all.
"""

from __future__ import annotations

from spikeform.energy.count import Counter
from spikeform.energy.models import CostModel

POTENTIAL_BYTES = 4  # a membrane potential, written once and read once a window; between steps it is in a register

Lines = dict[str, float]


def compute(counter: Counter, model: CostModel) -> dict[str, Lines]:
    """Energy of the operations, by line, of ``spiking``, ``dense`` and ``quantised``."""
    ops = operations(counter)
    spiking = ops["spiking"]
    real = {
        "left_dense": spiking["dense_macs"] * model.mac,
        "real_scales_and_biases": spiking["real_multiplications"] * model.multiply
        + spiking["real_additions"] * model.add,
    }
    products = quantised = 0.0
    for tally in counter.products.values():
        add = 0.0 if tally.kind == "hadamard" else model.add  # a lone product accumulates nothing
        products += tally.macs * (model.multiply + add)
        quantised += tally.macs * (model.quantised_multiply(*(operand.bits for operand in tally.operands)) + add)
    return {
        "spiking": {
            "accumulate_weights": spiking["accumulate_weights"] * model.ac,
            "accumulate_sums": spiking["accumulate_sums"] * model.ac,
            "multi_level_spikes": spiking["multi_level_additions"] * model.ac,
            "learned_step_weights": spiking["step_weight_multiplications"] * model.multiply,
            "running_sums": spiking["running_sum_additions"] * model.ac,
            "neurons": spiking["comparisons"] * model.comparison + spiking["neuron_additions"] * model.add,
            **real,
        },
        "dense": {"products": products, **real},
        "quantised": {
            "products": quantised,
            "quantise": ops["quantised"]["quantise"] * model.multiply,
            **real,
        },
    }


def operations(counter: Counter) -> dict[str, dict[str, int]]:
    """Operations by kind of the three networks: counts, no prices."""
    products, firings = counter.products.values(), counter.firings.values()
    real = {
        "dense_macs": sum(t.macs for t in counter.dense.values()),
        "real_multiplications": sum(t.multiplications for t in counter.dense.values()),
        "real_additions": sum(t.additions for t in counter.dense.values()),
    }
    macs = {f"{kind}_macs": sum(t.macs for t in products if t.kind == kind) for kind in _KINDS}
    return {
        "spiking": {
            "accumulate_weights": sum(t.accumulations for t in products if t.kind == "linear"),
            "accumulate_sums": sum(t.accumulations for t in products if t.kind != "linear"),
            "multi_level_additions": sum(t.level_additions for t in products),
            "step_weight_multiplications": sum(t.scalings for t in products),
            "running_sum_additions": sum(t.running_sums for t in products),
            "comparisons": sum(t.comparisons for t in firings),
            "neuron_additions": sum(t.additions for t in firings),
            **real,
        },
        "dense": macs | real,
        "quantised": macs | {"quantise": sum(t.sent.elements for t in firings if t.function == "identity")} | real,
    }


_KINDS = ("linear", "matmul", "hadamard")


def memory(counter: Counter, model: CostModel) -> dict[str, Lines]:
    """Energy of the memory traffic, by line, of the three networks.

    Weights: from DRAM once a forward call, then from SRAM. A multiplying network reads each once (it reuses
        it for all
    tokens of the call); the spiking one fetches only rows whose channel spikes, and reads a row once in every
    step in which the channel spikes in some token: at most its spikes, and at most the window (exact at one
    token, an upper bound at more). Activations: each operand written once and read once. Spiking: the wire
    bits of its train; the potential of every neuron; and the codes of both running sums of a product of two
    trains.
    """
    sram, dram = model.sram_per_byte, model.dram_per_byte
    products = counter.products.values()
    left = sum(t.weights for t in counter.dense.values()) * model.weight_bytes
    weights = sum(t.rows * t.row_size for t in products) * model.weight_bytes + left
    fetched = sum(t.rows_fetched * t.row_size for t in products) * model.weight_bytes + left
    read = sum(t.rows_read * t.row_size for t in products) * model.weight_bytes + left
    operands = [(t, operand) for t in products for operand in t.operands]
    elements = sum(operand.elements for _, operand in operands)
    coded = sum(operand.elements * operand.bits for _, operand in operands) / 8
    wired = sum(operand.wire_bits for _, operand in operands) / 8
    sums = sum(operand.elements * operand.bits for t, operand in operands if t.kind != "linear") / 8
    potentials = sum(t.sent.elements for t in counter.firings.values()) * POTENTIAL_BYTES
    once = {"weights_dram": weights * dram, "weights_sram": weights * sram}
    return {
        "spiking": {
            "weights_dram": fetched * dram,
            "weights_sram": read * sram,
            "spikes": 2 * wired * sram,
            "running_sum_codes": 2 * sums * sram,
            "potentials": 2 * potentials * sram,
        },
        "dense": {**once, "activations": 2 * elements * model.activation_bytes * sram},
        "quantised": {**once, "activations": 2 * coded * sram},
    }


def price(counter: Counter, model: CostModel) -> dict:
    """The estimate under one cost model, pJ: totals, ratios (below 1 the spiking one costs less), lines."""
    lines, traffic = compute(counter, model), memory(counter, model)
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
    def ratio(rival: str) -> float:
        return totals["spiking"] / totals[rival] if totals[rival] else float("nan")

    return totals | {"ratio_vs_dense": ratio("dense"), "ratio_vs_quantised": ratio("quantised")}
