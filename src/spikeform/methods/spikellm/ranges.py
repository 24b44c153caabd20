"""Ranges of weight grids: a scale and a zero-point for each row, from the row's ends or by the least error.

A grid has the codes 0..levels, of which ``zero`` stands for 0: ``w ~ (q - zero) scale``. Symmetric grids, which
ternary weights need, are those over ``[-a, a]``.
"""

from __future__ import annotations

import torch
from torch import Tensor

_SHRINKS = [2.0 ** (-i / 6) for i in range(31)]  # of a row's largest weights: down to 1/32, for rows with outliers
_REFINEMENTS = 4


def over(low: Tensor, high: Tensor, levels: int) -> tuple[Tensor, Tensor]:
    """The grid over ``[low, high]`` of each row, widened to hold 0.

    Args:
        low: ``[N]``.
        high: ``[N]``.
        levels: The largest code.

    Returns:
        ``(scale, zero)``, both ``[N]``: ``scale = (high - low) / levels``, which carries gradients, and
        ``zero = round(-low / scale)``, which carries none. A row without range has scale 1.
    """
    scale = (high.clamp(min=0) - low.clamp(max=0)) / levels
    scale = torch.where(scale > torch.finfo(scale.dtype).tiny, scale, torch.ones_like(scale))
    return scale, (-low.clamp(max=0) / scale).detach().round()


def nearest(weight: Tensor, scale: Tensor, zero: Tensor, levels: int) -> Tensor:
    """Nearest codes, their zero-point off, of a weight ``[N, k]``."""
    return torch.clamp((weight / scale[:, None]).round(), -zero[:, None], levels - zero[:, None])


def fit(
    weight: Tensor,
    levels: int,
    *,
    symmetric: bool = False,
    search: bool = False,
    clip: tuple[Tensor, Tensor] | None = None,
    importance: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Scale and zero-point of each row for the columns of one tier.

    Args:
        weight: The tier's columns, ``[N, k]``; with no column, scales are 1.
        levels: The largest code.
        symmetric: The range is ``[-a, a]``, as ternary weights need.
        search: Take the range of least squared error instead of the whole one: shrunk ranges are tried, and
            the best one's scale is then fitted to its codes in turn (Lloyd's algorithm), which raises no error.
        clip: ``(gamma, beta)``, factors ``[N]`` on the largest and smallest weight of each row.
        importance: What a squared error in each column counts, ``[k]``; None: all the same. Only for the search.

    Returns:
        ``(scale, zero)``, both ``[N]``.
    """
    if weight.shape[1] == 0:
        scale = weight.new_ones(len(weight))
        return scale, torch.full_like(scale, levels // 2 if symmetric else 0)
    low, high = weight.amin(1), weight.amax(1)
    if clip is not None:
        high, low = clip[0] * high, clip[1] * low
    if symmetric:
        high = torch.maximum(high, -low)
        low = -high

    def shrunk(factor: float) -> tuple[Tensor, Tensor]:
        scale, zero = over(low * factor, high * factor, levels)
        return scale, torch.full_like(zero, levels // 2) if symmetric else zero  # rows of zeros, too

    scale, zero = shrunk(1.0)
    if not search:
        return scale, zero
    column = weight.new_ones(weight.shape[1]) if importance is None else importance.to(weight)
    best = _error(weight, scale, zero, levels, column)
    for factor in _SHRINKS[1:]:
        best = _keep(shrunk(factor), (scale, zero), weight, levels, column, best)
    for _ in range(_REFINEMENTS):
        codes = nearest(weight, scale, zero, levels)
        norm = (codes.square() * column).sum(1)
        fitted = (codes * weight * column).sum(1) / norm
        candidate = (torch.where((norm > 0) & (fitted > 0), fitted, scale), zero)
        best = _keep(candidate, (scale, zero), weight, levels, column, best)
    return scale, zero


def _error(weight: Tensor, scale: Tensor, zero: Tensor, levels: int, column: Tensor) -> Tensor:
    return ((nearest(weight, scale, zero, levels) * scale[:, None] - weight).square() * column).sum(1)


def _keep(
    candidate: tuple[Tensor, Tensor],
    kept: tuple[Tensor, Tensor],
    weight: Tensor,
    levels: int,
    column: Tensor,
    best: Tensor,
) -> Tensor:
    """Replace, in place, the kept grid of each row where the candidate's error is less; the least error."""
    error = _error(weight, *candidate, levels, column)
    better = error < best
    for new, old in zip(candidate, kept, strict=True):
        old.copy_(torch.where(better, new, old))
    return torch.where(better, error, best)
