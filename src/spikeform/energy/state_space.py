"""Three accountings of a spiking state-space model, as papers estimate them: products alone.

    E_dense = E_MAC (M_s + M_o)          E_spiking = E_AC sum_l r_l M_l + E_MAC M_o

with M_s MACs (by layer M_l) in whose place spikes add, M_o MACs that stay, and r_l = E|n|, the spikes of a value of the
layer's input in all D steps: an integer n costs |n| additions. (The share of values that are not zero would be less.)
How much less energy a network takes depends on what is taken in, so each result has the name of what that is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from spikeform.conversion.kinds import mixers
from spikeform.energy.count import Counter
from spikeform.energy.models import CostModel

PROJECTIONS = "projections only"
CORE = "projections, convolution and scan"
WHOLE = "projections, convolution, scan and head"
ACCOUNTINGS = (PROJECTIONS, CORE, WHOLE)
UNCOUNTED = "neurons (comparisons, subtractions), rotations, memory traffic, norms, gates, biases, functions, embedding"
NOT_COUNTED = [
    "of state-space mixers: exp and softplus of the step sizes, their bias and product with A, the skip D x, SiLU, and "
    "reading and writing the recurrent state; the scan is counted in its recurrent form, whatever form ran",
    "norms: statistics; gains and gates are counted",
    "residual additions, embedding look-up (in none of the three networks)",
    "in the quantised rival: clipping and rounding beyond one multiplication an element (which favours it)",
    "accumulators and registers",
    "routing of spikes over a network on chip, clock, control, leakage, idle power",
]


@dataclass(frozen=True)
class Account:
    """MACs of a network that spikes replace or leave.

    Args:
        spiking: MACs in whose place spikes add: M_s.
        other: MACs that stay: M_o.
        additions: That the spikes cause: ``sum_l r_l M_l``.
    """

    spiking: int = 0
    other: int = 0
    additions: float = 0

    def __add__(self, more: Account) -> Account:
        """Both together."""
        return Account(self.spiking + more.spiking, self.other + more.other, self.additions + more.additions)

    @property
    def rate(self) -> float:
        """``r``: additions for each MAC that they replace."""
        return self.additions / self.spiking if self.spiking else 0.0

    def estimate(self, model: CostModel) -> dict[str, float]:
        """Energy of both networks in pJ, and by how much they differ (``times_less``: dense over spiking)."""
        spiking = model.ac * self.additions + model.mac * self.other
        dense = model.mac * (self.spiking + self.other)
        nan = float("nan")
        return {
            "mac": model.mac,
            "ac": model.ac,
            "spiking": spiking,
            "dense": dense,
            "ratio_vs_dense": spiking / dense if dense else nan,
            "times_less": dense / spiking if spiking else nan,
        }


def accounts(counter: Counter, model: nn.Module) -> dict[str, Account]:
    """What ran, by accounting; each takes in what the one before does.

    Args:
        counter: Of a run, attention and scans of real numbers included.
        model: That ran.
    """
    place: dict[str, int] = {}
    for name, _ in mixers(model):
        place |= dict.fromkeys((f"{name}.in_proj", f"{name}.out_proj"), 0)
        parts = ("in_proj.conv", "conv1d", "x_proj", "dt_proj")
        place |= dict.fromkeys((name, *(f"{name}.{part}" for part in parts)), 1)
    sums = [Account()] * len(ACCOUNTINGS)
    found = [(t.site, Account(t.macs, 0, t.accumulations)) for t in counter.products.values() if t.converted]
    found += [(t.site, Account(other=t.macs)) for t in (*counter.dense.values(), *counter.real.values())]
    for site, own in found:
        for i in range(place.get(site, len(sums) - 1), len(sums)):
            sums[i] += own
    return dict(zip(ACCOUNTINGS, sums, strict=True))


def accountings(counter: Counter, model: nn.Module, costs: Sequence[CostModel]) -> dict[str, dict[str, Any]]:
    """The three accountings, ESTIMATED pJ by cost model; arguments as of :func:`accounts`."""
    return {
        name: {
            "label": f"ESTIMATED, of {name}; in no figure: {UNCOUNTED}",
            "equation": "E_spiking = E_AC additions + E_MAC other_macs; E_dense = E_MAC (spiking_macs + other_macs)",
            "spiking_macs": account.spiking,
            "other_macs": account.other,
            "additions": account.additions,
            "rate": account.rate,
            "estimates": {cost.name: account.estimate(cost) for cost in costs},
        }
        for name, account in accounts(counter, model).items()
    }
