"""HG neurons of fixed-point codes, alone or times the values of an OAT population, in one pass."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from spikeform.neurons.triton.codes import function, oat_code, oat_value, round_mantissa, rounded
from spikeform.neurons.triton.oat import units
from spikeform.neurons.triton.tiles import flat, launch, rows_of, run, tile


def bank(bits: int, low: int, high: int) -> tuple[float, float]:
    """The largest value that a bank of HG sub-neurons sends, and the least."""
    return (1 - 2.0**-bits) * 2.0**high, 2.0**low


@triton.jit
def _values(
    x,
    out,
    groups,
    inner,
    width,
    stride_b,
    stride_g,
    stride_s,
    top,
    floor,
    NAME: tl.constexpr,
    BITS: tl.constexpr,
    NEAREST: tl.constexpr,
    FLAT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    at, to, live, _ = tile(groups, inner, width, stride_b, stride_g, stride_s, FLAT, ROWS, BLOCK)
    y = function(tl.load(x + at, live, other=1.0).to(tl.float32), NAME)
    tl.store(out + to, rounded(round_mantissa(y, BITS, NEAREST, top, floor), out.dtype.element_ty), live)


@triton.jit
def _gated(
    gate,
    up,
    threshold,
    out,
    groups,
    inner,
    width,
    stride_b,
    stride_g,
    stride_s,
    up_groups,
    up_inner,
    up_width,
    up_b,
    up_g,
    up_s,
    top,
    floor,
    limit,
    resolution,
    NAME: tl.constexpr,
    BITS: tl.constexpr,
    NEAREST: tl.constexpr,
    TWO: tl.constexpr,
    ROUNDING: tl.constexpr,
    FLAT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    at, to, live, _ = tile(groups, inner, width, stride_b, stride_g, stride_s, FLAT, ROWS, BLOCK)
    up_at, _, _, _ = tile(up_groups, up_inner, up_width, up_b, up_g, up_s, FLAT, ROWS, BLOCK)
    y = function(tl.load(gate + at, live, other=1.0).to(tl.float32), NAME)
    v = tl.load(up + up_at, live, other=0.0).to(tl.float32)
    threshold0, threshold1, unit0, unit1 = units(threshold, resolution, TWO)
    code, outlier = oat_code(v, threshold0, threshold1, unit0, unit1, limit, TWO, ROUNDING)
    product = round_mantissa(y, BITS, NEAREST, top, floor) * oat_value(code, outlier, unit0, unit1, TWO)
    tl.store(out + to, rounded(product, out.dtype.element_ty), live)


def hg_values(x: Tensor, function: str, bits: int, nearest: bool, low: int, high: int) -> Tensor:
    """Values of :class:`~spikeform.neurons.hg.FixedPointHG`; see :mod:`spikeform.neurons.fused`."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.numel() == 0:
        return out
    rows = flat(x)
    grid, shape = launch(rows)
    run(
        _values,
        grid,
        rows.x,
        out,
        *rows[1:],
        *bank(bits, low, high),
        NAME=function,
        BITS=bits,
        NEAREST=nearest,
        **shape,
    )
    return out


def hg_gated(
    gate: Tensor,
    up: Tensor,
    function: str,
    bits: int,
    nearest: bool,
    low: int,
    high: int,
    threshold: Tensor,
    limit: int,
    resolution: int,
    rounding: int,
) -> Tensor:
    """HG of the gate times OAT of ``up``, of equal shapes."""
    out = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    if gate.numel() == 0:
        return out
    rows, others = flat(gate), flat(up)
    if rows[1:4] != others[1:4]:  # one of them is not contiguous
        rows, others = rows_of(gate, grouped=True), rows_of(up, grouped=True)
    grid, shape = launch(rows)
    run(
        _gated,
        grid,
        rows.x,
        others.x,
        threshold,
        out,
        *rows[1:],
        *others[1:],
        *bank(bits, low, high),
        limit,
        resolution,
        NAME=function,
        BITS=bits,
        NEAREST=nearest,
        TWO=threshold.numel() == 2,
        ROUNDING=rounding,
        **shape,
    )
    return out
