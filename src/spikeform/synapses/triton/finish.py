"""The second pass of a product that was cut along its inner axis: partial sums come together and become real."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from spikeform.synapses.triton.launch import cdiv, meta
from spikeform.synapses.triton.operands import await_inputs, oat_units, release

BLOCK = 256


@triton.jit
def _total(partial, at, live, splits, stride):
    total = tl.load(partial + at, live, other=0)
    for split in range(1, splits):
        total += tl.load(partial + split * stride + at, live, other=0)
    return total


@triton.jit
def _real(
    partial,
    scale,
    bias,
    out,
    M,
    N,
    splits,
    SCALED: tl.constexpr,
    BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    release(OVERLAP)
    await_inputs(OVERLAP)
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = at < M * N
    y = _total(partial, at, live, splits, M * N).to(tl.float32)
    if SCALED:
        y *= tl.load(scale + at % N, live, other=0.0)
    if BIAS:
        y += tl.load(bias + at % N, live, other=0.0).to(tl.float32)
    tl.store(out + at, y.to(out.dtype.element_ty), live)


@triton.jit
def _row_unit(
    partial,
    scale,
    unit,
    bias,
    out,
    M,
    N,
    splits,
    BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    release(OVERLAP)
    await_inputs(OVERLAP)
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = at < M * N
    total = _total(partial, at, live, splits, M * N)
    y = total.to(tl.float32) * tl.load(scale + at % N, live, other=0.0) * tl.load(unit + at // N, live, other=0.0)
    if BIAS:
        y += tl.load(bias + at % N, live, other=0.0).to(tl.float32)
    tl.store(out + at, y.to(out.dtype.element_ty), live)


@triton.jit
def _limbs(
    partial,
    scale,
    threshold,
    bias,
    out,
    size,
    N,
    splits,
    resolution,
    TWO: tl.constexpr,
    LIMBS: tl.constexpr,
    EXCESS: tl.constexpr,
    BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    release(OVERLAP)
    await_inputs(OVERLAP)
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = at < size
    _, _, unit0, unit1 = oat_units(threshold, resolution, TWO)
    factor = tl.load(scale + at % N, live, other=0.0)
    planes = size * (2 * LIMBS if TWO else LIMBS)
    stride = planes + N if EXCESS else planes
    missing = _total(partial, planes + at % N, live, splits, stride).to(tl.int64) * EXCESS if EXCESS else at * 0
    y = factor * 0.0
    for branch in tl.static_range(2 if TWO else 1):
        total = missing
        for limb in tl.static_range(LIMBS):
            place = at + size * (branch * LIMBS + limb)
            total += _total(partial, place, live, splits, stride).to(tl.int64) << (8 * limb)
        part = total.to(tl.float32) * factor * (unit1 if branch else unit0)
        y = y + part if branch else part
    if BIAS:
        y += tl.load(bias + at % N, live, other=0.0).to(tl.float32)
    tl.store(out + at, y.to(out.dtype.element_ty), live)


def finish_real(partial: Tensor, scale: Tensor | None, bias: Tensor | None, out: Tensor) -> None:
    """``out [M, N] = scale sum_s partial[s] + bias``; partial fp32 or int32 ``[S, M, N]``."""
    splits, rows, columns = partial.shape
    _real[(cdiv(rows * columns, BLOCK),)](
        partial,
        partial if scale is None else scale,
        partial if bias is None else bias,
        out,
        rows,
        columns,
        splits,
        **meta(
            SCALED=scale is not None,
            BIAS=bias is not None,
            BLOCK=BLOCK,
            enable_fp_fusion=False,
        ),
    )


def finish_rows(partial: Tensor, scale: Tensor, unit: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """``out [M, N] = unit_row (scale sum_s partial[s]) + bias``; partial int32 ``[S, M, N]``, unit fp32 ``[M]``."""
    splits, rows, columns = partial.shape
    _row_unit[(cdiv(rows * columns, BLOCK),)](
        partial,
        scale,
        unit,
        partial if bias is None else bias,
        out,
        rows,
        columns,
        splits,
        **meta(
            BIAS=bias is not None,
            BLOCK=BLOCK,
            enable_fp_fusion=False,
        ),
    )


def finish_limbs(
    partial: Tensor,
    scale: Tensor,
    threshold: Tensor,
    resolution: int,
    excess: int,
    bias: Tensor | None,
    out: Tensor,
) -> None:
    """``out [M, N] = sum_r unit_r (scale sum_i 256^i sum_s partial[s, r L + i]) + bias``.

    Args:
        partial: int32 ``[S, R L M, N]``: R sub-neurons, L limbs, lowest first; ``[S, R L M + 1, N]`` where codes were
            sent less than they are: the last row holds sums of the weights.
        scale: fp32 ``[N]``.
        threshold: fp32 ``[R]``; the unit is ``threshold / resolution``.
        resolution: Code units to a threshold.
        excess: How much less, 0: not; see :mod:`.encode`.
        bias: ``[N]``.
        out: ``[M, N]``.
    """
    rows, columns = out.shape
    _limbs[(cdiv(rows * columns, BLOCK),)](
        partial,
        scale,
        threshold,
        partial if bias is None else bias,
        out,
        rows * columns,
        columns,
        partial.shape[0],
        resolution,
        **meta(
            TWO=threshold.numel() == 2,
            LIMBS=partial.shape[1] // (rows * threshold.numel()),
            EXCESS=excess,
            BIAS=bias is not None,
            BLOCK=BLOCK,
            enable_fp_fusion=False,
        ),
    )


def scratch(splits: int, rows: int, columns: int, dtype: torch.dtype, like: Tensor) -> Tensor:
    """Room for partial sums, ``[splits, rows, columns]``."""
    return torch.empty((splits, rows, columns), dtype=dtype, device=like.device)
