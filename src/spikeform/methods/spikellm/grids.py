"""Weight grids: uniform integer codes, one scale per output row and tier of input columns.

A column of tier r has ``T_r`` weight steps. An affine weight of b bits then has ``T_r (2^b - 1) + 1`` codes, a
ternary one ``2 T_r + 1``, from ``-T_r`` to ``T_r`` (a sum of T_r spikes of -1, 0 or 1). Both are the same rule

    q = clamp(round(w / scale) + zero, 0, levels),   w ~ (q - zero) scale

with ``zero = round(-low / scale)`` (Shao et al. 2023, arXiv 2308.13137, as SpikeLLM's code uses it); ternary is
the symmetric range, whose zero-point is ``T_r``. Where a range is searched, it is the one with the least
(weighted) squared error of the row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from spikeform.errors import ConversionError
from spikeform.methods.spikellm.ranges import fit, nearest, over
from spikeform.synapses.integer import IntegerWeight


def levels_of(bits: int, tiers: Sequence[int], ternary: bool) -> tuple[int, ...]:
    """The largest code of each tier: ``T (2^bits - 1)``, or ``2 T`` for ternary weights."""
    return tuple(2 * steps if ternary else steps * (2**bits - 1) for steps in tiers)


def affine(weight: Tensor, low: Tensor, high: Tensor, levels: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes of a weight on the uniform grid over ``[low, high]`` of each row.

    The range is widened to hold 0, so that zero-points lie on the grid: this only concerns rows whose weights
    all have one sign. A row without range has scale 1 and codes of 0.

    Args:
        weight: ``[N, K]``.
        low: Lower end of each row's range, ``[N]``.
        high: Upper end, ``[N]``.
        levels: The largest code.

    Returns:
        ``(q, scale, zero)``: codes ``[N, K]``, integer-valued in 0..levels, scales ``[N]`` and zero-points
        ``[N]`` in 0..levels. Rounding passes gradients straight through, clamping those inside the grid; the
        scale carries gradients to low and high, the zero-point none.
    """
    scale, zero = over(low, high, levels)
    scaled = weight / scale[:, None]
    rounded = scaled + (scaled.round() - scaled).detach()  # the difference is exact, and so is the sum
    return (rounded + zero[:, None]).clamp(0, levels), scale, zero


@dataclass
class Grid:
    """The grids of one weight: one scale and zero-point for each tier and row.

    Attributes:
        scale: fp32 ``[R, N]``.
        zero: Zero-points, integer-valued, ``[R, N]``.
        levels: The largest code of each tier.
        symmetric: Ranges are ``[-a, a]``.
    """

    scale: Tensor
    zero: Tensor
    levels: tuple[int, ...]
    symmetric: bool

    @classmethod
    def blank(cls, weight: Tensor, levels: tuple[int, ...], symmetric: bool) -> Grid:
        """Grids still to be fitted, for a weight ``[N, K]``."""
        shape = (len(levels), len(weight))
        return cls(weight.new_ones(shape), weight.new_zeros(shape), levels, symmetric)

    def fit(self, tier: int, columns: Tensor, **options: Any) -> None:
        """Fit the grid of one tier to its columns ``[N, k]``; options as for `ranges.fit`."""
        fitted = fit(columns, self.levels[tier], symmetric=self.symmetric, **options)
        self.scale[tier], self.zero[tier] = fitted

    def codes(self, columns: Tensor, tier: int) -> Tensor:
        """Nearest codes of columns ``[N, k]`` of one tier, zero-points off."""
        return nearest(columns, self.scale[tier], self.zero[tier], self.levels[tier])


def encode(
    weight: Tensor,
    *,
    bits: int,
    tiers: Sequence[int] = (1,),
    ternary: bool = False,
    tier: Tensor | None = None,
    clip: tuple[Tensor, Tensor] | None = None,
    search: bool = False,
    importance: Tensor | None = None,
) -> IntegerWeight:
    """Round a weight to the nearest codes of its grids.

    Args:
        weight: ``[N, K]``.
        bits: Width of an affine code of one step.
        tiers: Weight steps T of each tier.
        ternary: Ternary codes; their scale is always searched.
        tier: Which tier a column is of, ``[K]``; None where there is one tier.
        clip: Learned factors ``(gamma, beta)``, each ``[R, N]``, on the largest and smallest weight.
        search: Search affine ranges as well.
        importance: What a squared error in each column counts in the search, ``[K]``, such as the diagonal of
            the inputs' Gram matrix.

    Raises:
        ConversionError: The weight is not finite, or ``tier`` does not name a tier for each column.
    """
    weight, which = check(weight, tiers, tier)
    grid = Grid.blank(weight, levels_of(bits, tiers, ternary), ternary)
    codes = torch.empty_like(weight)
    for r in range(len(tiers)):
        mine = which == r
        grid.fit(
            r,
            weight[:, mine],
            search=search or ternary,
            clip=None if clip is None else (clip[0][r].to(weight), clip[1][r].to(weight)),
            importance=None if importance is None else importance[mine],
        )
        codes[:, mine] = grid.codes(weight[:, mine], r)
    return integer_weight(codes, grid, which, bits, tiers)


def check(weight: Tensor, tiers: Sequence[int], tier: Tensor | None) -> tuple[Tensor, Tensor]:
    """The weight in fp32, and each column's tier.

    Raises:
        ConversionError: The weight is not finite, or ``tier`` does not name a tier for each column.
    """
    weight = weight.detach().float()
    if not bool(weight.isfinite().all()):
        raise ConversionError("a weight to be coded is not finite: check the dense model's weights")
    which = torch.zeros(weight.shape[1], dtype=torch.long) if tier is None else tier.long()
    if which.shape != weight.shape[1:] or (len(which) and not 0 <= int(which.min()) <= int(which.max()) < len(tiers)):
        raise ConversionError(
            f"each of the {weight.shape[1]} input columns needs a tier from 0 to {len(tiers) - 1}, "
            f"got {list(which.shape)} of them: {which.unique().tolist()}"
        )
    return weight, which.to(weight.device)


def integer_weight(codes: Tensor, grid: Grid, which: Tensor, bits: int, tiers: Sequence[int]) -> IntegerWeight:
    """Codes ``[N, K]`` (integer-valued, zero-points off), grids and each column's tier, as the synapses take them."""
    kind = torch.int8 if max(grid.levels) <= 127 else torch.int16
    tier = which.to(torch.uint8) if len(tiers) > 1 else None
    return IntegerWeight(
        codes.to(kind), grid.scale, grid.zero.to(torch.int16), tier, bits, tuple(tiers), ternary=grid.symmetric
    )
