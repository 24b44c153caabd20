"""Multi-threshold populations: their values, or what a cache holds of them, in one pass."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from spikeform.neurons.triton.codes import oat_code, oat_value, rounded, to_integer
from spikeform.neurons.triton.tiles import flat, launch, rows_of, run, tile


@triton.jit
def units(threshold, resolution, TWO: tl.constexpr):
    """Thresholds and code units of the two sub-neurons (of one, twice)."""
    threshold0 = tl.load(threshold)
    threshold1 = tl.load(threshold + 1) if TWO else threshold0
    return threshold0, threshold1, tl.div_rn(threshold0, resolution * 1.0), tl.div_rn(threshold1, resolution * 1.0)


@triton.jit
def _power(shift):
    """``2^-shift`` of int8, in halves: all of them are in the range of fp32 or of its square."""
    half = shift.to(tl.int32) >> 1
    rest = shift.to(tl.int32) - half
    return ((127 - half) << 23).to(tl.float32, bitcast=True) * ((127 - rest) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _values(
    x,
    threshold,
    shift,
    out,
    groups,
    inner,
    width,
    stride_b,
    stride_g,
    stride_s,
    limit,
    resolution,
    TWO: tl.constexpr,
    ROUNDING: tl.constexpr,
    SHIFTED: tl.constexpr,
    PACKED: tl.constexpr,
    FLAT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    at, to, live, column = tile(groups, inner, width, stride_b, stride_g, stride_s, FLAT, ROWS, BLOCK)
    v = tl.load(x + at, live, other=0.0).to(tl.float32)
    if SHIFTED:
        v *= _power(tl.load(shift + column, column < width, other=0))
    threshold0, threshold1, unit0, unit1 = units(threshold, resolution, TWO)
    code, outlier = oat_code(v, threshold0, threshold1, unit0, unit1, limit, TWO, ROUNDING)
    if PACKED:
        packed = code * 2.0
        if TWO:
            packed += tl.where(outlier, 1.0, 0.0)
        tl.store(out + to, to_integer(packed, out.dtype.element_ty), live)
    else:
        tl.store(out + to, rounded(oat_value(code, outlier, unit0, unit1, TWO), out.dtype.element_ty), live)


def _run(
    x: Tensor, threshold: Tensor, shift: Tensor | None, limit: int, resolution: int, rounding: int, dtype: torch.dtype
) -> Tensor:
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    if x.numel() == 0:
        return out
    rows = flat(x) if shift is None else rows_of(x)
    grid, shape = launch(rows)
    two, packed = threshold.numel() == 2, not dtype.is_floating_point
    run(
        _values,
        grid,
        rows.x,
        threshold,
        threshold if shift is None else shift.contiguous(),
        out,
        *rows[1:],
        limit,
        resolution,
        TWO=two,
        ROUNDING=rounding,
        SHIFTED=shift is not None,
        PACKED=packed,
        **shape,
    )
    return out


def oat_values(
    x: Tensor, threshold: Tensor, shift: Tensor | None, limit: int, resolution: int, rounding: int, narrow: bool
) -> Tensor:
    """Values of :class:`~spikeform.neurons.OAT` or MT; see :mod:`spikeform.neurons.fused`."""
    return _run(x, threshold, shift, limit, resolution, rounding, x.dtype if narrow else torch.float32)


def oat_pack(x: Tensor, threshold: Tensor, limit: int, resolution: int, rounding: int) -> Tensor:
    """``2 code + branch``, as a cache holds it."""
    return _run(x, threshold, None, limit, resolution, rounding, torch.int16 if limit < 2**14 else torch.int32)
