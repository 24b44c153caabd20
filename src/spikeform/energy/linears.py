"""What the products of linear layers count beside additions: weights moved, widths, effort, units of integers.

N output features, K input channels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from spikeform.energy.codings import columns_of, sending_steps, slot_bits, tiers_of
from spikeform.energy.tallies import ProductTally, total
from spikeform.energy.weights import REAL_BITS, Weights, weights_in
from spikeform.spikes import SpikeTrain


def count_linear(
    tally: ProductTally, train: SpikeTrain, count: Tensor, features: int, macs: int, rows: int, weights: Weights | None
) -> None:
    """One product of a train and a weight.

    Args:
        tally: To add to.
        train: ``[..., K]``.
        count: Its spikes, the same shape.
        features: N.
        macs: Of this call, of one window.
        rows: Rows of the batch that are one window.
        weights: Their integers, or None where they are real.
    """
    channels = train.shape[-1]
    tier = columns_of(train)
    tier = torch.zeros(channels, dtype=torch.int64) if tier is None else tier.cpu()
    steps = torch.tensor(tiers_of(train.coding))[tier] * rows
    slot = slot_bits(train.coding, tally.operands[0].signed)
    _widths(tally, macs // channels, tier, slot, steps, weights)
    _rows(tally, sending_steps(train, count), features, steps, weights)


def count_weights(tally: ProductTally, train: SpikeTrain, macs: int, weights: Weights | None) -> None:
    """One product of real activations and a train of weights ``[N, K]``, which are read once."""
    features, channels = train.shape
    weights = weights_in(train) if weights is None else weights
    tally.inputs += macs // features
    tally.rescales += macs // channels * len(weights.steps)
    tally.stored = True
    _widths(tally, macs // channels, None, REAL_BITS, torch.ones(channels, dtype=torch.int64), weights)
    tally.row_size = features
    tally.rows, tally.rows_fetched, tally.rows_read = (
        old + channels for old in (tally.rows, tally.rows_fetched, tally.rows_read)
    )
    bits = total(weights.column(weights.stored, channels)) * features + weights.scale_bits
    tally.bits, tally.bits_fetched, tally.bits_read = (
        old + bits for old in (tally.bits, tally.bits_fetched, tally.bits_read)
    )


def count_units(tally: ProductTally, train: SpikeTrain, outputs: int, weights: Weights | None = None) -> None:
    """What makes integer sums real: a multiplication for each unit of an output, and the bias current of a zero.

    A row's unit is known when the row is, and multiplies what leaves the synapse: once where the branches' units are
    multiples of one, else once for each branch. So do an integer weight's scales. A code that stands for zero is taken
    off by ``zero * sum(w)``, one addition and one multiplication an output and branch.

    Args:
        tally: To add to.
        train: One operand.
        outputs: Sums that leave the synapse.
        weights: The integers on the other side, if any.
    """
    branches = train.quantum.shape[0]
    if biased(train):
        tally.corrections += outputs * branches
        tally.rescales += outputs * branches
    units = 1 if train.common_quantum() is not None else branches
    dynamic = train.exact and train.quantum.numel() > branches
    scales = units * len(weights.steps) if weights is not None else 0
    tally.rescales += outputs * (scales + (units if dynamic else 0))


def biased(train: SpikeTrain) -> bool:
    """Whether real zero is a code of its own, which a bias current takes off."""
    return train.zero is not None and bool(train.zero.any())


def _widths(
    tally: ProductTally, macs: int, tier: Tensor | None, slot: int, steps: Tensor, weights: Weights | None
) -> None:
    """MACs by width, and the effort, of ``macs`` MACs in each column."""
    channels = len(steps)
    ours = torch.zeros(channels, dtype=torch.int64) if tier is None else tier
    theirs = torch.zeros(channels, dtype=torch.int64) if weights is None else weights.tiers(channels)
    stored, step, times = (weights.stored, weights.step, weights.steps) if weights else ((None,), REAL_BITS, (1,))
    pairs = torch.bincount(ours * len(stored) + theirs).tolist()
    for pair, columns in enumerate(pairs):
        if columns:
            own, other = divmod(pair, len(stored))
            tally.widths[None if tier is None else own, stored[other]] += columns * macs
    tally.ace += macs * slot * step * total(steps * torch.tensor(times)[theirs])
    tally.one_step += macs * slot * step * channels


def _rows(tally: ProductTally, sending: Tensor, features: int, steps: Tensor, weights: Weights | None) -> None:
    """Weight rows of one call: fetched if their channel spikes at all, read at most once a step."""
    per_channel = sending.reshape(-1, sending.shape[-1]).sum(0, dtype=torch.int64).cpu()
    read = torch.minimum(per_channel, steps)
    tally.row_size = features
    tally.rows += per_channel.numel()
    tally.rows_fetched += int(per_channel.count_nonzero())
    tally.rows_read += total(read)
    if weights is not None:
        tally.stored = True
        bits = weights.column(weights.stored, len(per_channel)) * features
        tally.bits += total(bits) + weights.scale_bits
        tally.bits_fetched += total(bits * (per_channel > 0)) + weights.scale_bits
        tally.bits_read += total(bits * read) + weights.scale_bits
