"""Weights that are integers: what a spiking weight is made of, and the sums that they give."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from spikeform.spikes import Burst, SpikeTrain


@dataclass(frozen=True, eq=False)
class IntegerWeight:
    """``W[n, k] = scale[tier[k], n] * codes[n, k]``, N rows, K columns, R tiers of columns.

    Args:
        codes: int8 or int16 ``[N, K]``, the zero-point taken off.
        scale: fp32 ``[R, N]``, real value of a code unit.
        zero: int16 ``[R, N]``, the zero-point, in 0..``levels``: only files need it.
        tier: uint8 ``[K]``, which row of ``scale`` a column takes, or None where R is 1.
        bits: b: a step of the weight carries up to ``2^b - 1`` unit spikes.
        tiers: Steps T of each tier, powers of two.
        ternary: A step of the weight carries -1, 0 or 1.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor
    tier: Tensor | None
    bits: int
    tiers: tuple[int, ...] = (1,)
    ternary: bool = False

    @classmethod
    def of(cls, codes: Tensor) -> IntegerWeight:
        """An integer tensor ``[N, K]`` as a weight whose codes are worth 1."""
        ones = torch.ones(1, codes.shape[0], dtype=torch.float32, device=codes.device)
        bits = torch.iinfo(codes.dtype).bits
        return cls(codes, ones, torch.zeros_like(ones, dtype=torch.int16), None, bits)

    @property
    def shape(self) -> torch.Size:
        """``[N, K]``."""
        return self.codes.shape

    def levels(self, tier: int) -> int:
        """Largest unsigned code of a tier: ``T (2^b - 1)``; ternary ``2 T`` (codes ``-T .. T``, zero at T)."""
        steps = self.tiers[tier]
        return 2 * steps if self.ternary else steps * (2**self.bits - 1)

    @cached_property
    def peak(self) -> int:
        """The largest magnitude of a code, at least 1; looked up once, and for int8 taken to be 128 without looking."""
        return (
            128 if self.codes.dtype == torch.int8 else max(int(self.codes.abs().max()), 1) if self.codes.numel() else 1
        )

    def dequantise(self) -> Tensor:
        """The real weight, fp32 ``[N, K]``."""
        scale = self.scale[0][:, None] if self.tier is None else self.scale[self.tier.long()].T
        return self.codes.to(scale.dtype) * scale

    @cached_property
    def columns(self) -> tuple[Tensor | None, ...]:
        """Columns of each tier, int64; None stands for all of them."""
        if self.tier is None:
            return (None,)
        return tuple((self.tier == r).nonzero().squeeze(1) for r in range(self.scale.shape[0]))

    def part(self, tier: int) -> Tensor:
        """Codes of a tier's columns, contiguous; kept as long as this weight is."""
        columns = self.columns[tier]
        if columns is None:
            return self.codes
        if tier not in self._parts:
            self._parts[tier] = self.codes[:, columns].contiguous()
        return self._parts[tier]

    @cached_property
    def _parts(self) -> dict[int, Tensor]:
        return {}

    def train(self) -> SpikeTrain:
        """The weight's own spikes, ``[N, K]``: signed bursts of T steps."""
        order = tuple(self.tiers) if len(self.tiers) > 1 else ()
        coding = Burst(max(self.tiers), 1 if self.ternary else 2**self.bits - 1, order, common=False)
        return SpikeTrain(self.codes, self.scale[:, :, None], coding, self.tier if order else None)
