"""What a coding costs: levels, comparisons, additions and bits on the wire, read off the coding itself."""

from __future__ import annotations

from functools import lru_cache
from math import ceil, log2

import torch
from torch import Tensor

from spikeform.spikes import Burst, Coding, MultiThreshold, SignedDigit, SpikeTrain
from spikeform.spikes.codings import popcount


def bits_for(values: int) -> int:
    """Bits that tell ``values`` things apart: ``ceil(log2(values))``, 0 for one."""
    return ceil(log2(values)) if values > 1 else 0


@lru_cache
def magnitudes(coding: Coding) -> int:
    """Different magnitudes that the coding can carry, zero included."""
    codes = torch.arange(coding.limit + 1)
    kept = coding.nearest_code(codes)
    return len(codes) if kept is codes else len(kept.unique())


def activation_bits(coding: Coding, signed: bool) -> int:
    """Width of the quantised network with as many levels: ``ceil(log2(levels))`` (arXiv 2409.08290).

    A train of magnitudes ``0..m-1`` has ``m`` levels, a signed one ``2m - 1``. The sub-neuron that fired is a
    choice of scale; a quantised network may have that too, so it adds no width here (which favours the
    rival).
    """
    count = magnitudes(coding)
    return max(bits_for(2 * count - 1 if signed else count), 1)


def step_bits(steps: int, signed: bool) -> int:
    """Width of the network with as many levels as ``steps`` equal steps have: ``ceil(log2(T + 1))``.

    With a ternary spike in each step ``ceil(log2(2T + 1))`` (arXiv 2409.08290).
    """
    return bits_for(2 * steps + 1 if signed else steps + 1)


def additions(train: SpikeTrain, count: Tensor) -> Tensor:
    """Additions that one element causes at each of its targets, int32, the shape of the codes.

    One for a unit spike; for a spike of amplitude 3 or 5 … one for every set bit of the amplitude, since an
    adder cannot multiply.

    Args:
        train: The spikes.
        count: ``train.count()``, which is the answer wherever spikes are units.
    """
    if isinstance(train.coding, MultiThreshold) and train.coding.levels > 1:
        return popcount(train.unroll().abs()).sum(0, dtype=torch.int32)
    return count


def comparisons(train: SpikeTrain, elements: int, spikes: int) -> int:
    """Comparisons of a population in one window.

    Every element compares once a step with each level it may fire at; a burst neuron compares once a step and
    again after each spike; the gate of R sub-neurons is a binary search, ``ceil(log2 R)`` an element.
    """
    coding = train.coding
    levels = coding.levels if isinstance(coding, MultiThreshold) else 1
    repeated = spikes if isinstance(coding, Burst) else 0
    return elements * (coding.window * levels + bits_for(train.quantum.shape[0])) + repeated


def wire_bits(train: SpikeTrain, elements: int, spikes: int, signed: bool) -> int:
    """Bits that carry a train once: a bitmap of its window or an address for each spike, the shorter one.

    The bitmap has one slot a step (two bits of a ternary one, ``ceil(log2(levels + 1))`` of a multi-level
    one) and one sign an element; an address event names channel, sign and level. Both name the sub-neuron
    that fires.
    """
    coding = train.coding
    levels = coding.levels if isinstance(coding, MultiThreshold | Burst) else 1
    ternary = isinstance(coding, SignedDigit)
    population = bits_for(train.quantum.shape[0])
    slot = 2 if ternary else bits_for(levels + 1)
    bitmap = elements * (coding.window * slot + population + (signed and not ternary))
    level = bits_for(levels) if isinstance(coding, MultiThreshold) else 0
    event = max(bits_for(train.shape[-1] if train.codes.ndim else 1), 1) + signed + level + population
    return min(bitmap, spikes * event)
