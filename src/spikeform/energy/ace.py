"""Arithmetic computation effort: bits of the weight x bits of the activation x steps, summed over MACs.

The paper on SpikeLLM (arXiv 2407.04752) measures the products of linear layers so: a product of numbers of ``b_w`` and
``b_a`` bits is ``b_w b_a`` operations on single bits. That a channel of T steps does it T times is our reading. Real
numbers count as 16 bits. It sees neither silence nor memory: nothing here is energy.
"""

from __future__ import annotations

from typing import Any

from spikeform.energy.count import Counter
from spikeform.energy.weights import REAL_BITS

UNIFORM = (4, 5)  # bits of weights and activations of the uniformly quantised rivals


def effort(counter: Counter, tokens: int) -> dict[str, Any]:
    """ACE of the converted linear layers, and how many of their MACs are additions alone.

    Args:
        counter: Of a run.
        tokens: That it ran.

    Returns:
        ``macs_per_token``; ``per_token`` and ``per_mac``, each by network: ``spiking``, ``one step`` (the same widths,
        every channel of one step), ``uniform W4A4``, ``uniform W5A5``, ``dense fp16``; ``additive_fraction``, the share
        of MACs in whose place spikes only add, of those of all converted linear layers, layers that ran on real numbers
        included. Empty where no linear layer was converted.
    """
    products = [tally for tally in counter.products.values() if tally.converted]
    real = sum(tally.macs for name, tally in counter.dense.items() if name in counter.converted)
    macs = sum(tally.macs for tally in products) + real
    if not macs:
        return {}
    dense = REAL_BITS * REAL_BITS
    sums = {
        "spiking": sum(tally.ace for tally in products) + real * dense,
        "one step": sum(tally.one_step for tally in products) + real * dense,
        **{f"uniform W{bits}A{bits}": macs * bits * bits for bits in UNIFORM},
        f"dense fp{REAL_BITS}": macs * dense,
    }
    additive = sum(tally.macs for tally in products if not tally.scalings)
    return {
        "macs_per_token": macs / tokens,
        "per_token": {name: value / tokens for name, value in sums.items()},
        "per_mac": {name: value / macs for name, value in sums.items()},
        "additive_fraction": additive / macs,
    }
