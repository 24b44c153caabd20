"""Pricing: counted operations and bytes times a cost model, for three networks by the same rules. All in pJ.

The three networks share every site: the spiking one; the dense one in the cost model's own number format; and
the quantised one, whose activations have as many levels as the trains (arXiv 2409.08290). Real weights are the same in
all; integer ones are in the quantised network too, and the dense one keeps its own.

What is not spiking in a streaming network runs T times, so its rivals are counted in a run of their own, the
``baseline``: the network of ``steps=0``, one pass. It has a fourth network, ``quantised_steps``: activations of as
many levels as T spikes have, where ``quantised`` has those of the QCFS network.
"""

from __future__ import annotations

from spikeform.energy.count import Counter
from spikeform.energy.memory import Lines, memory
from spikeform.energy.models import CostModel
from spikeform.energy.self_attention import KINDS as ATTENTIONS


def compute(counter: Counter, model: CostModel, baseline: Counter | None = None) -> dict[str, Lines]:
    """Energy of the operations, by line, of ``spiking``, ``dense``, ``quantised`` (and ``quantised_steps``)."""
    ops = operations(counter, baseline)
    spiking, real = ops["spiking"], _real(ops["dense"], model)
    products, quantised = _products(baseline or counter, model)
    lines = {
        "spiking": {
            "accumulate_weights": spiking["accumulate_weights"] * model.ac,
            "accumulate_sums": spiking["accumulate_sums"] * model.ac,
            **{key: spiking[key] * model.ac for key in ("accumulate_activations",) if key in spiking},
            "multi_level_spikes": spiking["multi_level_additions"] * model.ac,
            "learned_step_weights": spiking["step_weight_multiplications"] * model.multiply,
            "running_sums": spiking["running_sum_additions"] * model.ac,
            "neurons": spiking["comparisons"] * model.comparison + spiking["neuron_additions"] * model.add,
            **{key: spiking[key] * model.multiply for key in ("row_factors", "leaks") if key in spiking},
            **_units(spiking, model),
            **_rotation(spiking, model),
            **_real(spiking, model),
        },
        "dense": {"products": products, **real},
        "quantised": {
            "products": quantised,
            "quantise": ops["quantised"]["quantise"] * model.multiply,
            **_units(ops["quantised"], model),
            **_rotation(ops["quantised"], model),
            **real,
        },
    }
    if baseline is not None:
        lines["quantised_steps"] = lines["quantised"] | {"products": _products(baseline, model, counter.steps)[1]}
    return lines


def _units(ops: dict[str, int], model: CostModel) -> Lines:
    """Units and zeros of integer products: the same in the spiking and in the quantised network."""
    if "unit_multiplications" not in ops:
        return {}
    return {
        "units": ops["unit_multiplications"] * model.multiply,
        "bias_current": ops["bias_current_additions"] * model.add,
    }


def _rotation(ops: dict[str, int], model: CostModel) -> Lines:
    """Turning inputs before they are coded: the same in the spiking and in the quantised network."""
    return {"rotation": ops["rotation_additions"] * model.add} if "rotation_additions" in ops else {}


def _real(ops: dict[str, int], model: CostModel) -> Lines:
    lines = {
        "left_dense": ops["dense_macs"] * model.mac,
        "real_scales_and_biases": ops["real_multiplications"] * model.multiply + ops["real_additions"] * model.add,
    }
    if "attention_macs" in ops:
        lines["attention"] = ops["attention_macs"] * model.mac
        lines["gated_products"] = ops["gated_multiplications"] * model.multiply
    if "softmax_multiplications" in ops:
        lines["softmax"] = ops["softmax_multiplications"] * model.multiply
    if "scan_macs" in ops:
        lines["scan"] = ops["scan_macs"] * model.mac
    return lines


def _products(counter: Counter, model: CostModel, steps: int | None = None) -> tuple[float, float]:
    """Products of the dense and of the quantised network (of as many levels as ``steps`` have, if given)."""
    products = quantised = 0.0
    for tally in counter.products.values():
        add = 0.0 if tally.kind == "hadamard" else model.add  # a lone product accumulates nothing
        products += tally.macs * (model.multiply + add)
        if tally.kind in ATTENTIONS:
            q, k, v = (operand.bits for operand in tally.operands)
            score = counter.attentions.tallies[tally.site].score_bits
            both = model.quantised_multiply(q, k) + model.quantised_multiply(score, v)
            quantised += tally.macs * (both / 2 + add)
        elif not tally.converted:
            bits = [operand.bits_in(steps) for operand in tally.operands]
            quantised += tally.macs * (model.quantised_multiply(*bits) + add)
        for (tier, weight), macs in tally.widths.items():
            # A real operand is as wide as the multiplier.
            width = model.significand if tier is None else tally.operands[0].tier_bits(tier, steps)
            quantised += macs * (model.quantised_multiply(width, weight) + add)
    return products, quantised


def operations(counter: Counter, baseline: Counter | None = None) -> dict[str, dict[str, int]]:
    """Operations by kind of the three networks: counts, no prices."""
    rival = baseline or counter
    products, firings = counter.products.values(), counter.firings.values()
    macs = {f"{kind}_macs": sum(t.macs for t in rival.products.values() if t.kind == kind) for kind in _KINDS}
    macs["linear_macs"] += sum(t.macs for t in rival.products.values() if t.kind == "weights")
    macs["matmul_macs"] += sum(t.macs for t in rival.products.values() if t.kind in ATTENTIONS)
    softmax = _softmax(counter)
    encoded = sum(t.sent.elements for t in rival.firings.values() if t.function == "identity")
    units = _unit_operations(counter)
    if rotations := sum(t.rotations for t in firings):
        units["rotation_additions"] = rotations
    return {
        "spiking": {
            "accumulate_weights": sum(t.accumulations for t in products if t.kind == "linear"),
            "accumulate_sums": sum(t.accumulations for t in products if not t.converted),
            **_activations(counter),
            "multi_level_additions": sum(t.level_additions for t in products),
            "step_weight_multiplications": sum(t.scalings for t in products),
            "running_sum_additions": sum(t.running_sums for t in products),
            "comparisons": sum(t.comparisons for t in firings),
            "neuron_additions": sum(t.additions for t in firings),
            **_attention_operations(counter),
            **units,
            **_real_operations(counter),
        },
        "dense": macs | softmax | _real_operations(rival),
        "quantised": macs | {"quantise": encoded} | softmax | units | _real_operations(rival),
    }


def _attention_operations(counter: Counter) -> dict[str, int]:
    """Multiplications of spiking self-attention, where there is any."""
    tallies = counter.attentions.tallies.values()
    leaks = sum(t.multiplications for t in counter.firings.values())
    return {"row_factors": sum(t.row_factors for t in tallies), "leaks": leaks} if tallies else {}


def _softmax(counter: Counter) -> dict[str, int]:
    """What the rivals of spiking self-attention have in its place: products with the row's inverse, values of exp."""
    pairs = sum(t.pairs for t in counter.attentions.tallies.values())
    return {"softmax_multiplications": pairs, "softmax_exponentials": pairs} if pairs else {}


def _activations(counter: Counter) -> dict[str, int]:
    """Additions of real activations at the spikes of weights, where there are such products."""
    found = [t.accumulations for t in counter.products.values() if t.kind == "weights"]
    return {"accumulate_activations": sum(found)} if found else {}


def _unit_operations(counter: Counter) -> dict[str, int]:
    """What integers need before they are real, where there are any."""
    found = {
        "unit_multiplications": sum(t.rescales for t in counter.products.values()),
        "bias_current_additions": sum(t.corrections for t in counter.products.values()),
    }
    return found if any(found.values()) else {}


def _real_operations(counter: Counter) -> dict[str, int]:
    found = {
        "dense_macs": sum(t.macs for t in counter.dense.values()),
        "real_multiplications": sum(t.multiplications for t in counter.dense.values()),
        "real_additions": sum(t.additions for t in counter.dense.values()),
    }
    if counter.real:
        scans = [t.macs for t in counter.real.values() if t.kind == "scan"]
        found["attention_macs"] = sum(t.macs for t in counter.real.values() if t.kind == "attention")
        found["gated_multiplications"] = sum(t.multiplications for t in counter.real.values())
        found |= {"scan_macs": sum(scans)} if scans else {}
    return found


_KINDS = ("linear", "matmul", "hadamard")


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
