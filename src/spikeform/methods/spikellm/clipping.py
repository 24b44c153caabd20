"""Learnable weight clipping: each row's range shrinks by learned factors (OmniQuant, arXiv 2308.13137).

    high = sigmoid(g) max(W),  low = sigmoid(b) min(W),  W ~ (q - zero) scale  on the grid over [low, high]

with ``g`` and ``b`` of each output row and tier of input columns, from 4.0, where the factors are 0.982.

N output rows, K input columns, R tiers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from spikeform.methods.spikellm.grids import affine

START = 4.0
Factors = tuple[Tensor, Tensor]


def start(tiers: int, rows: int, device: torch.device) -> Factors:
    """The logits that training begins with, ``(g, b)``, each fp32 ``[R, N]``, as leaves that want gradients."""
    g, b = (torch.full((tiers, rows), START, dtype=torch.float32, device=device, requires_grad=True) for _ in range(2))
    return g, b


def fake_quantise(weight: Tensor, levels: Sequence[int], tier: Tensor | None, factors: Factors | None) -> Tensor:
    """The values that the codes of ``weight`` stand for; differentiable in the weight and in the factors.

    Args:
        weight: ``[N, K]``.
        levels: The largest code of each tier, ``R`` of them.
        tier: Which tier a column is of, ``[K]``, integer; None where there is one.
        factors: On the largest and on the smallest weight of each row, ``(gamma, beta)``, each ``[R, N]``; None: 1.

    Returns:
        ``[N, K]``, what :func:`spikeform.methods.spikellm.grids.encode` with the same factors dequantises to.
    """
    if tier is None or len(levels) == 1:
        return _rounded(weight, levels[0], None if factors is None else (factors[0][0], factors[1][0]))
    order = torch.argsort(tier.long(), stable=True)
    parts, done = [], 0
    for r, size in enumerate(torch.bincount(tier.long(), minlength=len(levels)).tolist()):
        if size:
            ends = None if factors is None else (factors[0][r], factors[1][r])
            parts.append(_rounded(weight[:, order[done : done + size]], levels[r], ends))
        done += size
    return torch.cat(parts, 1)[:, torch.argsort(order)]


def _rounded(weight: Tensor, levels: int, ends: Factors | None) -> Tensor:
    low, high = weight.amin(1), weight.amax(1)
    if ends is not None:
        high, low = ends[0] * high, ends[1] * low
    q, scale, zero = affine(weight, low, high, levels)
    return (q - zero[:, None]) * scale[:, None]
