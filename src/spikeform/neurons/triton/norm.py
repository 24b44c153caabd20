"""LayerNorm and RMSNorm of spikes, a row to a program: the row stays in registers between its two reductions."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from spikeform.neurons.triton.codes import inverse_sqrt, oat_code, oat_value, round_mantissa, rounded
from spikeform.neurons.triton.hg import bank
from spikeform.neurons.triton.oat import units
from spikeform.neurons.triton.tiles import rows_of, run, start

LANE = 16  # elements of a row a thread, while there are threads enough


@triton.jit
def _norm(
    x,
    weight,
    bias,
    threshold,
    out,
    groups,
    inner,
    width,
    stride_b,
    stride_g,
    stride_s,
    eps,
    gain_offset,
    top,
    floor,
    limit,
    resolution,
    PADDED: tl.constexpr,
    CENTRED: tl.constexpr,
    WEIGHTED: tl.constexpr,
    BIASED: tl.constexpr,
    BITS: tl.constexpr,
    NEAREST: tl.constexpr,
    TWO: tl.constexpr,
    ROUNDING: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    live = column < width
    at = start(row // inner, groups, stride_b, stride_g) + (row % inner).to(tl.int64) * stride_s
    d = tl.load(x + at + column, live, other=0.0).to(tl.float32)
    # Asked for before the reductions, so that they have arrived when these are done.
    gain, offset = 1.0, 0.0
    if WEIGHTED:
        gain = tl.load(weight + column, live, other=0.0, eviction_policy="evict_last").to(tl.float32) + gain_offset
    if BIASED:
        offset = tl.load(bias + column, live, other=0.0, eviction_policy="evict_last").to(tl.float32)
    threshold0, threshold1, unit0, unit1 = units(threshold, resolution, TWO)
    if CENTRED:
        d -= tl.div_rn(tl.sum(d, 0), width * 1.0)
        if PADDED:
            d = tl.where(live, d, 0.0)
    code, outlier = oat_code(d, threshold0, threshold1, unit0, unit1, limit, TWO, ROUNDING)
    value = oat_value(code, outlier, unit0, unit1, TWO)
    square = round_mantissa(d * d, BITS, NEAREST, top, floor, SIGNED=False)
    mean_square = tl.div_rn(tl.sum(square, 0), width * 1.0)
    scale = round_mantissa(inverse_sqrt(mean_square + eps), BITS, NEAREST, top, floor, SIGNED=False)
    y = value * scale
    if WEIGHTED:
        y *= gain
    if BIASED:
        y += offset
    tl.store(out + row.to(tl.int64) * width + column, rounded(y, out.dtype.element_ty), live)


def hg_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    centred: bool,
    gain_offset: float,
    threshold: Tensor,
    limit: int,
    resolution: int,
    rounding: int,
    bits: int,
    nearest: bool,
    low: int,
    high: int,
) -> Tensor:
    """:class:`~spikeform.layers.norm.SpikingNorm` of ``x`` ``[..., D]``; see :mod:`spikeform.neurons.fused`."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.numel() == 0:
        return out
    rows = rows_of(x)
    block = triton.next_power_of_2(rows.width)
    # Products are not fused into sums: y would have bits that the layer in PyTorch has not.
    run(
        _norm,
        (rows.outer * rows.inner,),
        rows.x,
        x if weight is None else weight.contiguous(),
        x if bias is None else bias.contiguous(),
        threshold,
        out,
        *rows[1:],
        eps,
        gain_offset,
        *bank(bits, low, high),
        limit,
        resolution,
        PADDED=block > rows.width,
        CENTRED=centred,
        WEIGHTED=weight is not None,
        BIASED=bias is not None,
        BITS=bits,
        NEAREST=nearest,
        TWO=threshold.numel() == 2,
        ROUNDING=rounding,
        BLOCK=block,
        num_warps=min(max(block // (32 * LANE), 1), 16),
        enable_fp_fusion=False,
    )
    return out
