"""What weights are made of, column by column: bits as stored, bits of a step, steps.

N output features, K input channels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from spikeform.energy.codings import activation_bits, columns_of, slot_bits, tiers_of
from spikeform.spikes import SpikeTrain
from spikeform.spikes.packing import packed_bytes

REAL_BITS = 16  # what a real weight or activation counts for, whatever format computes it
SCALE_BITS = 32  # of each row's scale, per tier


@dataclass(frozen=True)
class Weights:
    """Integer weights of one layer.

    Attributes:
        stored: Bits of one weight of each tier, as files hold it.
        step: Bits of one of its steps.
        steps: Steps of each tier.
        tier: Which tier each column is of, int64 ``[K]``, or None where there is one.
        rows: N.
    """

    stored: tuple[int, ...]
    step: int
    steps: tuple[int, ...]
    tier: Tensor | None
    rows: int

    @property
    def scale_bits(self) -> int:
        """Bits of all scales."""
        return SCALE_BITS * self.rows * len(self.steps)

    def file_bits(self, columns: int) -> int:
        """Bits of all codes of ``[N, K]`` weights in a file: rows end on whole bytes, tier by tier."""
        counts = [columns] if self.tier is None else torch.bincount(self.tier, minlength=len(self.steps)).tolist()
        return 8 * self.rows * sum(packed_bytes(n, bits) for n, bits in zip(counts, self.stored, strict=True))

    def column(self, values: tuple[int, ...], columns: int) -> Tensor:
        """The value of each column's tier, int64 ``[K]``."""
        return torch.tensor(values)[self.tiers(columns)]

    def tiers(self, columns: int) -> Tensor:
        """The tier of each column, int64 ``[K]``, on the CPU."""
        return torch.zeros(columns, dtype=torch.int64) if self.tier is None else self.tier


def weights_of(module: nn.Module | None) -> Weights | None:
    """Those of a layer that holds integers; None for real ones."""
    whole = getattr(module, "integer_weight", lambda: None)()
    if whole is None:
        return None
    tiers = range(len(whole.tiers))
    return Weights(
        stored=tuple(whole.levels(r).bit_length() for r in tiers),
        step=2 if whole.ternary else whole.bits,
        steps=tuple(whole.tiers),
        tier=None if whole.tier is None else whole.tier.long().cpu(),
        rows=whole.shape[0],
    )


def weights_in(train: SpikeTrain) -> Weights:
    """Those that are a train themselves, ``[N, K]``."""
    coding, signed = train.coding, bool((train.codes < 0).any())
    steps, tier = tiers_of(coding), columns_of(train)
    return Weights(
        stored=tuple(activation_bits(coding, signed, r) for r in range(len(steps))),
        step=slot_bits(coding, signed),
        steps=steps,
        tier=None if tier is None else tier.cpu(),
        rows=train.shape[0],
    )
