"""Descent on ``|(W - Q) X^T|^2`` from given codes: the best scales for the codes, the best codes for the scales.

Either step leaves the other's variables alone and solves for its own exactly, so that the error never rises.
Columns are those of one tier after the other: ``spans[r]`` is the slice of tier r.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from spikeform.methods.spikellm.grids import Grid

Spans = Sequence[tuple[int, int]]


def solve_scales(weight: Tensor, codes: Tensor, grid: Grid, spans: Spans, gram: Tensor) -> None:
    """Set each row's scales, one per tier, to the least squares solution for its codes.

    Rows whose solution is not positive keep their scales: codes do not change sign.

    Args:
        weight: What is approximated, ``[N, K]``.
        codes: Zero-points off, ``[N, K]``.
        grid: Its scales are replaced.
        spans: Slice of columns of each tier.
        gram: ``X^T X``, damped, ``[K, K]``.
    """
    codes, weight, gram = codes.double(), weight.double(), gram.double()
    normal = codes.new_zeros(len(weight), len(spans), len(spans))
    right = codes.new_zeros(len(weight), len(spans), 1)
    for r, (start, end) in enumerate(spans):
        seen = codes[:, start:end] @ gram[start:end]
        right[:, r, 0] = (seen * weight).sum(1)
        for s, (left, stop) in enumerate(spans):
            normal[:, r, s] = (seen[:, left:stop] * codes[:, left:stop]).sum(1)
    # A tier without a code that is not 0 has no say: its scale drops out, and is kept.
    silent = normal.diagonal(dim1=1, dim2=2) <= 0
    normal.diagonal(dim1=1, dim2=2).masked_fill_(silent, 1.0)
    solved, failed = torch.linalg.solve_ex(normal, right)
    scale = solved[:, :, 0]
    fit = ((scale > 0) | silent).all(1) & scale.isfinite().all(1) & (failed == 0)
    scale = torch.where(silent, grid.scale.T.double(), scale)
    grid.scale = torch.where(fit[:, None], scale, grid.scale.T.double()).T.to(grid.scale).contiguous()


def go_over(weight: Tensor, codes: Tensor, grid: Grid, spans: Spans, gram: Tensor, block_size: int) -> None:
    """Set each column's codes, in place, to the nearest ones given all others: one round of coordinate descent.

    Args:
        weight: What is approximated, ``[N, K]``.
        codes: Zero-points off, ``[N, K]``.
        grid: Scales, zero-points and levels.
        spans: Slice of columns of each tier.
        gram: ``X^T X``, damped, ``[K, K]``.
        block_size: Columns whose changes are passed on together.
    """
    value = torch.cat([codes[:, a:b] * grid.scale[r][:, None] for r, (a, b) in enumerate(spans)], 1)
    slope = (value - weight) @ gram
    for r, (first, last) in enumerate(spans):
        scale = grid.scale[r]
        for start in range(first, last, block_size):
            end = min(start + block_size, last)
            before = value[:, start:end].clone()
            for j in range(start, end):
                best = value[:, j] - slope[:, j] / gram[j, j]
                codes[:, j] = grid.codes(best[:, None], r)[:, 0]
                change = codes[:, j] * scale - value[:, j]
                slope[:, j:end] += change[:, None] * gram[j, j:end]
                value[:, j] += change
            slope[:, end:] += (value[:, start:end] - before) @ gram[start:end, end:]
