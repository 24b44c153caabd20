"""A report's rows: what each site did, and the sums by kind of operation."""

from __future__ import annotations

from collections import Counter as Histogram
from dataclasses import asdict
from typing import Any

from spikeform.energy.count import Counter
from spikeform.energy.self_attention import KINDS as ATTENTIONS
from spikeform.energy.tallies import ProductTally


def sites(counter: Counter) -> list[dict[str, Any]]:
    """One row per product, neuron population and module left real."""
    rows: list[dict[str, Any]] = []
    for tally in counter.products.values():
        spikes = sum(operand.spikes for operand in tally.operands)
        rows.append(
            {
                "site": tally.site,
                "kind": tally.kind,
                "elements": sum(operand.elements for operand in tally.operands),
                "spikes": spikes,
                "spikes_per_element": [o.spikes / max(o.elements, 1) for o in tally.operands],
                "spike_rate": spikes / max(sum(operand.slots for operand in tally.operands), 1),
                "coding": [type(operand.coding).__name__ for operand in tally.operands],
                "quantised_bits": [] if tally.kind == "weights" else [operand.bits for operand in tally.operands],
                **_integers(tally),
                **_attention(counter, tally),
                "macs": tally.macs,
                "accumulations": tally.accumulations,
                "multi_level_additions": tally.level_additions,
                "step_weight_multiplications": tally.scalings,
                "running_sum_additions": tally.running_sums,
                "accumulations_per_mac": (tally.accumulations + tally.level_additions) / max(tally.macs, 1),
                "sent": tally.sent,
            }
        )
    for tally in counter.firings.values():
        sent = tally.sent
        rows.append(
            {
                "site": tally.site,
                "kind": "neuron",
                "function": tally.function,
                "elements": sent.elements,
                "spikes": sent.spikes,
                "spikes_per_element": [sent.spikes / max(sent.elements, 1)],
                "spike_rate": sent.spikes / max(sent.slots, 1),
                "coding": [type(sent.coding).__name__],
                "comparisons": tally.comparisons,
                "additions": tally.additions,
                **({"multiplications": tally.multiplications} if tally.multiplications else {}),
                "saturated": tally.saturated,
            }
        )
    for tally in counter.dense.values():
        rows.append({**asdict(tally), "kind": "real", "module": tally.kind})
    for tally in counter.real.values():
        if tally.macs or tally.multiplications:  # linear layers have a row already
            rows.append({**asdict(tally), "kind": "real", "module": tally.kind})
    return rows


def _integers(tally: ProductTally) -> dict[str, Any]:
    """What a site of integers has more: bits of a weight, multiplications by units, the bias current."""
    found: dict[str, Any] = {}
    if tally.stored:
        found["weight_bits"] = sum((bits or 0) * macs for (_, bits), macs in tally.widths.items()) / max(tally.macs, 1)
    if tally.rescales or tally.corrections:
        found |= {"unit_multiplications": tally.rescales, "bias_current_additions": tally.corrections}
    return found


def _attention(counter: Counter, tally: ProductTally) -> dict[str, Any]:
    """What a site of spiking self-attention has more: its additions by product, of both forms of a whole input."""
    own = counter.attentions.tallies.get(tally.site) if tally.kind in ATTENTIONS else None
    names = ("scores", "context", "state", "reads")
    return {"by_product": {name: getattr(own, name) for name in names}} if own else {}


def kinds(counter: Counter) -> dict[str, dict[str, int]]:
    """Elements, spikes, accumulations and MACs by kind of operation."""
    found: dict[str, Histogram] = {}
    keys = (
        "elements",
        "spikes",
        "macs",
        "accumulations",
        "comparisons",
        "additions",
        "saturated",
        "multiplications",
    )
    for row in sites(counter):
        name = f"neuron:{row['function']}" if row["kind"] == "neuron" else row["kind"]
        found.setdefault(name, Histogram()).update({key: row[key] for key in keys if key in row})
    return {name: dict(values) for name, values in found.items()}
