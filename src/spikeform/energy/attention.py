"""What spiking self-attention costs beside dense attention: counted in full, and by the formula that papers use.

    E_dense = E_MAC 2 N^2 d        E_spiking = E_AC T fr 2 N^2 d        reduction = 1 - T fr E_AC / E_MAC

N tokens of an input, d channels of all heads, fr the share of slots (a step of a neuron) in which a layer's query, key
and value neurons fire. The formula has no causal mask, lets every spike add at all N tokens (though an addition takes
place only where a query's and a key's spike meet), and leaves out softmax, neurons, row factors and memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from spikeform.energy.count import Counter
from spikeform.energy.models import CostModel
from spikeform.energy.self_attention import NEURONS
from spikeform.energy.tallies import FiringTally

PAPER = (0.6471, 0.8528)  # least and largest reduction of arXiv 2510.00133
FORMS = {"quadratic": ("scores", "context"), "recurrent": ("state", "reads")}
LEFT_OUT = "causal mask, coincidence of spikes, softmax, neurons (LIF updates), row factors, memory traffic"
NOT_COUNTED = [
    "softmax of the dense and the quantised network: exp (its number is in ops), the row's maximum, subtraction and "
    "sum; the product with the row's inverse is counted",
    "scores of one step and the contexts' sums: accumulators on the chip; AND gates",
    "gains of the LIF neurons (in the projections' weights and the output's threshold), the mean over T (in the "
    "projection's unit); the row factor is counted, its division is a table of positions",
    "norms: statistics; activation functions that stay real; residual additions, score scaling, rotary embedding, "
    "embedding look-up (in none of the three networks)",
    "in the quantised rival: clipping and rounding beyond one multiplication an element (which favours it)",
    "accumulators and registers",
    "routing of spikes over a network on chip, clock, control, leakage, idle power",
]


def facts(counter: Counter, costs: Sequence[CostModel]) -> dict[str, Any]:
    """Attention alone, between its projections, of whole inputs: what a report says of it.

    Args:
        counter: Of a run without a cache.
        costs: The cost models.

    Returns:
        ``layers``: by site ``steps``, ``rates`` (of each of the four neurons), ``rate`` (fr), ``macs`` and
        ``additions``; ``counted``: additions and ESTIMATED pJ of both forms, by the rules of the whole report;
        ``formula``: the same by the formula above, and the paper's range. Empty where nothing of the kind ran.
    """
    tallies = counter.attentions.tallies
    if not tallies:
        return {}
    layers = {
        site: {
            "steps": own.steps,
            "rates": {name: _rate(_neurons(counter, site, (name,))) for name in NEURONS},
            "rate": _rate(_neurons(counter, site, NEURONS[:3])),
            "macs": own.quadratic_macs,
            "additions": {name: getattr(own, name) for names in FORMS.values() for name in names},
        }
        for site, own in tallies.items()
    }
    return {"layers": layers, "counted": _counted(counter, costs), "formula": _formula(counter, layers, costs)}


def _neurons(counter: Counter, site: str, names: Sequence[str]) -> list[FiringTally]:
    return [counter.firings[f"{site}.{name}", "identity"] for name in names]


def _rate(neurons: list[FiringTally]) -> float:
    return sum(t.sent.spikes for t in neurons) / max(sum(t.sent.slots for t in neurons), 1)


def _counted(counter: Counter, costs: Sequence[CostModel]) -> dict[str, Any]:
    tallies = counter.attentions.tallies.values()
    neurons = [tally for own in tallies for tally in _neurons(counter, own.site, NEURONS)]
    additions = {form: sum(getattr(own, name) for own in tallies for name in names) for form, names in FORMS.items()}
    operations = {
        "comparisons": sum(t.comparisons for t in neurons),
        "neuron_additions": sum(t.additions for t in neurons),
        "multiplications": sum(t.multiplications for t in neurons) + sum(own.row_factors for own in tallies),
    }
    macs, pairs = sum(own.quadratic_macs for own in tallies), sum(own.pairs for own in tallies)
    estimates = {}
    for cost in costs:
        rest = operations["comparisons"] * cost.comparison + operations["neuron_additions"] * cost.add
        rest += operations["multiplications"] * cost.multiply
        dense = macs * cost.mac + pairs * cost.multiply
        own = {form: added * cost.ac + rest for form, added in additions.items()}
        estimates[cost.name] = {"dense": dense, **own} | {f"reduction_{form}": 1 - e / dense for form, e in own.items()}
    return {
        "label": "ESTIMATED: every operation of attention between its projections, LIF neurons and row factors "
        "included; memory traffic left out. Dense: both products under the causal mask, and the softmax's product with "
        "the row's inverse",
        "additions": additions,
        **operations,
        "dense_macs": macs,
        "dense_multiplications": pairs,
        "estimates": estimates,
    }


def _formula(counter: Counter, layers: dict[str, dict[str, Any]], costs: Sequence[CostModel]) -> dict[str, Any]:
    products = {site: 2 * own.squares * own.size for site, own in counter.attentions.tallies.items()}
    shares = {site: own["steps"] * own["rate"] for site, own in layers.items()}
    macs = sum(products.values())
    additions = sum(shares[site] * products[site] for site in layers)
    return {
        "label": f"ESTIMATED by a convention common in papers on spiking networks, not what runs. Left out: {LEFT_OUT}",
        "equation": "E_dense = E_MAC 2 N^2 d; E_spiking = E_AC T fr 2 N^2 d; reduction = 1 - T fr E_AC / E_MAC",
        "rate": "fr: spikes of a layer's query, key and value neurons over their slots, measured",
        "macs": macs,
        "steps_times_rate": additions / macs,
        "estimates": {
            cost.name: {
                "mac": cost.mac,
                "ac": cost.ac,
                "dense": macs * cost.mac,
                "spiking": additions * cost.ac,
                "reduction": 1 - additions / macs * cost.ac / cost.mac,
                "layers": {site: 1 - share * cost.ac / cost.mac for site, share in shares.items()},
                "steps_times_rate_of_the_paper": [(1 - reduction) * cost.mac / cost.ac for reduction in PAPER],
            }
            for cost in costs
        },
        "paper": {
            "reduction": list(PAPER),
            "source": "arXiv 2510.00133, stated there for GPT-2; its own formula, rates and constants were not found",
        },
    }
