"""What a coding costs: levels, comparisons, additions and bits on the wire, read off the coding itself."""

from __future__ import annotations

from functools import lru_cache
from math import ceil, log2

import torch
from torch import Tensor

from spikeform.spikes import Burst, Coding, MultiThreshold, SignedDigit, SpikeTrain, Thermometer
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


def activation_bits(coding: Coding, signed: bool, tier: int = 0) -> int:
    """Width of the quantised network with as many levels: ``ceil(log2(levels))`` (arXiv 2409.08290).

    A train of magnitudes ``0..m-1`` has ``m`` levels, a signed one ``2m - 1``. A burst neuron's codes are those of an
    affine quantiser, ``q - z`` or ``q`` with ``q`` in ``0..m-1``: ``m`` levels either way, so that a GIF neuron's rival
    is its own b-bit network; but of one spike a step (ternary) ``2m - 1`` where they are signed. The sub-neuron that
    fired is a choice of scale; a quantised network may have that too, so it adds no width here (which favours the
    rival).

    Args:
        coding: Of the train.
        signed: Whether it has negative codes.
        tier: Branch of a coding whose branches differ in steps: each is as wide as its own levels need.
    """
    if isinstance(coding, Burst):
        limit = coding.capacity(tiers_of(coding)[tier])
        return bits_for(2 * limit + 1 if _ternary(coding, signed) else limit + 1)
    count = magnitudes(coding)
    return max(bits_for(2 * count - 1 if signed else count), 1)


def tiers_of(coding: Coding) -> tuple[int, ...]:
    """Time steps of each branch: one entry where all have the same."""
    return (coding.tiers if isinstance(coding, Burst) else ()) or (coding.window,)


def slot_bits(coding: Coding, signed: bool) -> int:
    """Bits of one step of one element: 2 of a ternary spike, ``ceil(log2(levels + 1))`` of a graded one, else 1."""
    if _ternary(coding, signed) or (isinstance(coding, Thermometer) and coding.early and signed):
        return 2
    return bits_for(coding.levels + 1) if isinstance(coding, MultiThreshold | Burst) else 1


def _ternary(coding: Coding, signed: bool) -> bool:
    return isinstance(coding, SignedDigit) or (isinstance(coding, Burst) and coding.levels == 1 and signed)


def parts_of(train: SpikeTrain, visible: Tensor | None = None) -> tuple[int, ...]:
    """Elements of each tier (:func:`tiers_of`); ``visible`` (bool, the shape of the codes): those that exist."""
    count = len(tiers_of(train.coding))
    if count == 1 or train.branch is None:
        return (train.codes.numel() if visible is None else int(visible.sum()),) + (0,) * (count - 1)
    if visible is not None:
        branch, copies = train.branch.expand(train.shape)[visible], 1
    else:  # a branch that broadcasts names each tier equally often in all its copies
        branch, copies = train.branch.flatten(), train.codes.numel() // max(train.branch.numel(), 1)
    return tuple(copies * n for n in torch.bincount(branch.long(), minlength=count).tolist())


def columns_of(train: SpikeTrain) -> Tensor | None:
    """Tier of each channel ``[C]``, int64; None where there is but one."""
    if train.branch is None or len(tiers_of(train.coding)) == 1:
        return None
    channels = train.shape[-1]
    return train.branch.expand(*train.branch.shape[:-1], channels).reshape(-1, channels)[0].long()


def sending_steps(train: SpikeTrain, count: Tensor) -> Tensor:
    """Steps in which each element sends: its spikes, of a burst the steps that they fill."""
    if not isinstance(train.coding, Burst):
        return count
    levels = train.coding.levels
    return torch.div(count + levels - 1, levels, rounding_mode="floor").clamp(max=train.coding.steps)


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


def comparisons(train: SpikeTrain, parts: tuple[int, ...], spikes: int) -> int:
    """Comparisons of a population in one window.

    Every element compares once a step with each level it may fire at; a burst neuron compares once in each step of its
    tier and again after each spike; the gate of R sub-neurons is a binary search, ``ceil(log2 R)`` an element (a tier
    belongs to its channel for good and needs none).

    Args:
        train: The spikes.
        parts: Elements of each tier, as :func:`parts_of` gives them.
        spikes: That all of them sent.
    """
    coding = train.coding
    levels = coding.levels if isinstance(coding, MultiThreshold) else 1
    slots = sum(n * steps * levels for n, steps in zip(parts, tiers_of(coding), strict=True))
    return slots + sum(parts) * _gate(train) + (spikes if isinstance(coding, Burst) else 0)


def _gate(train: SpikeTrain) -> int:
    return 0 if isinstance(train.coding, Burst) else bits_for(train.quantum.shape[0])


def wire_bits(train: SpikeTrain, parts: tuple[int, ...], spikes: int, signed: bool, sending: int | None = None) -> int:
    """Bits that carry a train once: a bitmap of its window or an address for each spike, the shorter one.

    The bitmap has one slot a step (two bits of a ternary one, ``ceil(log2(levels + 1))`` of a multi-level one) and one
    sign an element; an address event names channel, sign and level. Both name the sub-neuron that fires. The spikes
    that a burst sends in one step are as many events, or one that has a level.

    Args:
        train: The spikes.
        parts: Elements of each tier, as :func:`parts_of` gives them.
        spikes: That all of them sent.
        signed: Whether spikes have signs.
        sending: Steps in which a burst sends (:func:`sending_steps`), of all elements.
    """
    coding, elements, population = train.coding, sum(parts), _gate(train)
    slots = sum(n * _window_bits(coding, steps, signed) for n, steps in zip(parts, tiers_of(coding), strict=True))
    bitmap = slots + elements * (population + (signed and not _ternary(coding, signed)))
    level = bits_for(coding.levels) if isinstance(coding, MultiThreshold) else 0
    address = max(bits_for(train.shape[-1] if train.codes.ndim else 1), 1) + signed + population
    events = spikes * (address + level)
    if isinstance(coding, Burst) and sending is not None:
        events = min(events, sending * (address + bits_for(coding.levels)))
    return min(bitmap, events)


def _window_bits(coding: Coding, steps: int, signed: bool) -> int:
    # A thermometer's sign is the element's: on a wire it is sent once.
    bits = steps * (1 if isinstance(coding, Thermometer) else slot_bits(coding, signed))
    if isinstance(coding, Burst) and coding.residual:  # the last step sends what is left, too
        bits += bits_for(coding.levels + steps) - bits_for(coding.levels + 1)
    return bits
