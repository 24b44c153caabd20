"""Codes by error feedback: columns are rounded one after the other, later ones make up for the error.

GPTQ (Frantar et al. 2023, arXiv 2210.17323): with ``H = X^T X`` and U the upper Cholesky factor of its damped
inverse, rounding column j to q_j lets every later column k move by ``-(w_j - q_j) U_jk / U_jj``: the least of
``|(W - Q) X^T|^2`` given the columns before. SpikeLLM rounds to T weight steps, T by column. Ours, each because it
measured better on real layers:

- Ordinary columns come first, so that the finer grids of the salient ones take up what is left of their errors.
- A tier's ranges are searched when its turn comes, on the columns as moved by then, and a squared error counts
  as much as the feedback lets it cost, ``1 / U_jj^2``.
- ``sweeps``: afterwards each row's scales are solved for by least squares, and all codes are gone over again,
  each given all others (coordinate descent, as in QuantEase, arXiv 2309.01885). No sweep raises the error.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from spikeform.errors import ConversionError
from spikeform.methods.spikellm import grids
from spikeform.methods.spikellm.descent import go_over, solve_scales
from spikeform.methods.spikellm.saliency import inverse_factor
from spikeform.synapses.integer import IntegerWeight


def gptq(
    weight: Tensor,
    gram: Tensor,
    *,
    bits: int,
    tiers: Sequence[int] = (1,),
    ternary: bool = False,
    tier: Tensor | None = None,
    damp: float = 0.01,
    block_size: int = 128,
    act_order: bool = False,
    sweeps: int = 2,
) -> IntegerWeight:
    """Integer codes of a weight that keep its layer's output on the inputs of ``gram``.

    Args:
        weight: ``[N, K]``.
        gram: ``X^T X`` over calibration inputs ``X [tokens, K]``, ``[K, K]``.
        bits: Width of an affine code of one step.
        tiers: Weight steps T of each tier.
        ternary: Ternary codes.
        tier: Which tier a column is of, ``[K]``; None where there is one tier.
        damp: Share of the mean diagonal that is added to the diagonal of ``gram``.
        block_size: Columns whose errors are passed on together; changes speed, not the result.
        act_order: Within a tier, take columns by falling diagonal of ``gram`` instead of in their own order.
        sweeps: Rounds of fitting scales and going over all codes again; 0 is GPTQ's one pass.

    Raises:
        ConversionError: The weight is not finite, or ``tier`` does not name a tier for each column.
        CalibrationError: ``gram`` is not finite or far from positive semidefinite.
    """
    weight, which = grids.check(weight, tiers, tier)
    order = _order(gram, act_order).to(weight.device)
    order = order[which[order].argsort(stable=True)]
    gram = gram.to(weight.device)
    target = weight[:, order]
    damped, upper = (matrix.float() for matrix in inverse_factor(gram[order][:, order], damp))
    importance = upper.diagonal() ** -2
    grid = grids.Grid.blank(weight, grids.levels_of(bits, tiers, ternary), ternary)
    ends = [int((which < r).sum()) for r in range(len(tiers) + 1)]
    spans = list(itertools.pairwise(ends))
    moved, codes = target.clone(), torch.empty_like(target)
    for r, (start, end) in enumerate(spans):
        grid.fit(r, moved[:, start:end], search=True, importance=importance[start:end])

        def nearest(column: Tensor, j: int, r: int = r) -> Tensor:
            codes[:, j] = grid.codes(column[:, None], r)[:, 0]
            return codes[:, j] * grid.scale[r]

        for cut in _blocks(start, end, block_size):
            _feed_back(moved, upper, cut, nearest)
    for _ in range(sweeps):
        solve_scales(target, codes, grid, spans, damped)
        go_over(target, codes, grid, spans, damped, block_size)
    if sweeps:
        solve_scales(target, codes, grid, spans, damped)
    return grids.integer_weight(codes[:, order.argsort()], grid, which, bits, tiers)


def partial_binary(
    weight: Tensor,
    gram: Tensor,
    binary_fraction: float,
    *,
    high_bits: int = 8,
    damp: float = 0.01,
    block_size: int = 128,
    act_order: bool = False,
) -> Tensor:
    """A partly binary weight by the same loop, as PB-LLM finds it (Shang et al. 2023, arXiv 2310.00034).

    In each block of columns the entries of least ``w^2 / U_jj^2`` become binary, ``mean + sign(w - mean) a`` with the
    mean of the row's binary entries and their mean distance from it; the others take an affine grid over the row.

    Args:
        weight: ``[N, K]``.
        gram: ``X^T X``, ``[K, K]``.
        binary_fraction: Share of binary entries of each block, rounded down.
        high_bits: Width of the other entries.
        damp: As for `gptq`.
        block_size: Columns of a block: here it changes the result.
        act_order: As for `gptq`.

    Returns:
        The weight's new values, fp32 ``[N, K]``.

    Raises:
        ConversionError: The weight is not finite, or ``binary_fraction`` is not from 0 to 1.
        CalibrationError: As for `gptq`.
    """
    weight, _ = grids.check(weight, (1,), None)
    if not 0 <= binary_fraction <= 1:
        raise ConversionError(f"binary_fraction must be from 0 to 1, got {binary_fraction}")
    order = _order(gram, act_order).to(weight.device)
    gram = gram.to(weight.device)
    upper = inverse_factor(gram[order][:, order], damp)[1].float()
    moved = weight[:, order]
    grid = grids.Grid.blank(weight, grids.levels_of(high_bits, (1,), ternary=False), symmetric=False)
    grid.fit(0, weight)
    for start, end in _blocks(0, weight.shape[1], block_size):
        block = moved[:, start:end]
        scores = (block / upper.diagonal()[start:end]).square().flatten()
        least = scores.argsort(stable=True)[: int(round(binary_fraction * len(scores), 6))]
        binary = torch.zeros_like(scores, dtype=torch.bool).index_fill_(0, least, True).view_as(block)
        count = binary.sum(1).clamp(min=1)
        mean = (block * binary).sum(1) / count
        distance = ((block - mean[:, None]).abs() * binary).sum(1) / count

        def nearest(column: Tensor, j: int, low: Tensor = binary, at: int = start, m=mean, a=distance) -> Tensor:
            fine = grid.codes(column[:, None], 0)[:, 0] * grid.scale[0]
            return torch.where(low[:, j - at], m + torch.where(column >= m, a, -a), fine)

        _feed_back(moved, upper, (start, end), nearest)
    return moved[:, order.argsort()]


def _order(gram: Tensor, by_activation: bool) -> Tensor:
    """Columns by falling diagonal, or as they are."""
    return gram.diagonal().argsort(descending=True, stable=True) if by_activation else torch.arange(len(gram))


def _blocks(start: int, end: int, size: int) -> Iterable[tuple[int, int]]:
    return ((at, min(at + size, end)) for at in range(start, end, size))


def _feed_back(weight: Tensor, upper: Tensor, cut: tuple[int, int], nearest: Callable[[Tensor, int], Tensor]) -> None:
    """Round the columns of a block, in place, and pass their errors on to all later columns."""
    start, end = cut
    errors = weight.new_empty(len(weight), end - start)
    for j in range(start, end):
        rounded = nearest(weight[:, j], j)
        error = (weight[:, j] - rounded) / upper[j, j]
        weight[:, j + 1 : end] -= error[:, None] * upper[j, j + 1 : end]
        weight[:, j], errors[:, j - start] = rounded, error
    weight[:, end:] -= errors @ upper[start:end, end:]
