"""How an exact product is put together: integer sums of each group of channels, then one factor for each.

A train gives groups of channels of one unit (a single group where its sub-neurons are commensurate), a weight gives
groups of one scale. Every executor finds the same integers, and what is real happens here: so they agree bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from spikeform.errors import SpikeformError
from spikeform.spikes import SpikeTrain
from spikeform.synapses.integer import IntegerWeight

Sums = Callable[[Tensor, Tensor, int, int], Tensor]  # codes [..., K], weight [N, K], their bounds: codes @ weight^T


def integer_sums(train: SpikeTrain, codes: Tensor, weight: IntegerWeight, sums: Sums) -> list[list[Tensor]]:
    """Integers ``[..., N]`` of each unit of the train and each tier of the weight.

    All channels are summed at once, then those of every group but the first (the salient few), gathered; what the first
    group gives is the difference, which integers have exactly. So no large group is gathered, and no zero multiplied.

    Args:
        train: ``[..., K]``.
        codes: The train's centred codes, or what a step of it adds to them, ``[..., K]``.
        weight: ``[N, K]``.
        sums: The arithmetic.

    Raises:
        SpikeformError: Channels of one sub-neuron differ in unit: integers of two of them must not be added.
    """
    limit, peak = train.coding.limit, weight.peak

    def product(codes: Tensor, weight: Tensor) -> Tensor:
        return sums(codes, weight, limit, peak)

    def by_tier(codes: Tensor) -> list[Tensor]:
        rest = [product(codes[..., c], weight.part(s)) for s, c in enumerate(weight.columns) if s and c is not None]
        return [_less(product(codes, weight.codes), rest), *rest]

    if train.common_quantum() is not None:
        return [by_tier(train.common_integers(codes))]
    if train.branch is None or (train.quantum.ndim > 1 and train.quantum.shape[-1] != 1):
        raise SpikeformError(
            "integer weights need one quantum for all channels; fold the channel shifts into the weights first"
        )
    if train.branch.ndim > 1:
        return [by_tier(codes * (train.branch == r)) for r in range(train.quantum.shape[0])]
    found = []
    for r in range(1, train.quantum.shape[0]):
        columns = (train.branch == r).nonzero().squeeze(1)
        inner, rows = codes[..., columns], weight.codes[:, columns]
        tiers = [] if weight.tier is None else [weight.tier[columns] == s for s in range(1, len(weight.scale))]
        where = [mask.nonzero().squeeze(1) for mask in tiers]
        rest = [product(inner[..., c], rows[:, c]) for c in where]
        found.append([_less(product(inner, rows), rest), *rest])
    first = [_less(whole, list(rest)) for whole, *rest in zip(by_tier(codes), *found, strict=True)]
    return [first, *found]


def _less(whole: Tensor, parts: list[Tensor]) -> Tensor:
    for part in parts:
        whole = whole - part
    return whole


def scaled(sums: list[list[Tensor]], train: SpikeTrain, weight: IntegerWeight) -> Tensor:
    """``sum_r unit[r] sum_s scale[s] sums[r][s]``: the one place where these integers become real, ``[..., N]``."""
    dtype, common = train.quantum.dtype, train.common_quantum()
    units = list(train.quantum) if common is None else [common]
    total = None
    for unit, tiers in zip(units, sums, strict=True):
        terms = [integers.to(dtype) * scale.to(dtype) for scale, integers in zip(weight.scale, tiers, strict=True)]
        part = sum(terms[1:], terms[0]) * unit
        total = part if total is None else total + part
    assert total is not None  # a train has at least one unit
    return total
