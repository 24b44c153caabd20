"""LayerNorm and RMSNorm of spikes, a row to a program: it is read once, piece by piece, and held as it is given."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from spikeform.neurons.triton.codes import inverse_sqrt, oat_code, oat_value, round_mantissa, rounded
from spikeform.neurons.triton.hg import bank
from spikeform.neurons.triton.oat import units
from spikeform.neurons.triton.tiles import chunks, rows_of, run, start, within

REGISTERS = 64  # of a thread of a long row that is not centred: two programs share a processor, and nothing is spilt


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
    CHUNKS: tl.constexpr,
):
    row = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    at = start(row // inner, groups, stride_b, stride_g) + (row % inner).to(tl.int64) * stride_s
    held = ()
    total = tl.zeros((BLOCK,), tl.float32)
    for chunk in tl.static_range(CHUNKS):
        there = within(column, width, chunk, CHUNKS)
        given = tl.load(x + at + chunk * BLOCK + column, there, other=0.0)
        total += given.to(tl.float32)
        held += (given,)
    # Asked for before the reductions, so that they have arrived when these are done.
    gains, offsets = (), ()
    for chunk in tl.static_range(CHUNKS):
        there = within(column, width, chunk, CHUNKS)
        place = chunk * BLOCK + column
        if WEIGHTED:
            gains += (tl.load(weight + place, there, other=0.0, eviction_policy="evict_last"),)
        if BIASED:
            offsets += (tl.load(bias + place, there, other=0.0, eviction_policy="evict_last"),)
    threshold0, threshold1, unit0, unit1 = units(threshold, resolution, TWO)
    mean = tl.div_rn(tl.sum(total, 0), width * 1.0) if CENTRED else 0.0
    squares = tl.zeros((BLOCK,), tl.float32)
    for chunk in tl.static_range(CHUNKS):
        d = held[chunk].to(tl.float32)
        if CENTRED:
            d -= mean
            if PADDED and chunk == CHUNKS - 1:
                d = tl.where(within(column, width, chunk, CHUNKS), d, 0.0)
        squares += round_mantissa(d * d, BITS, NEAREST, top, floor, SIGNED=False)
    mean_square = tl.div_rn(tl.sum(squares, 0), width * 1.0)
    scale = round_mantissa(inverse_sqrt(mean_square + eps), BITS, NEAREST, top, floor, SIGNED=False)
    to = out + row.to(tl.int64) * width
    for chunk in tl.static_range(CHUNKS):
        d = held[chunk].to(tl.float32)
        if CENTRED:
            d -= mean
        code, outlier = oat_code(d, threshold0, threshold1, unit0, unit1, limit, TWO, ROUNDING)
        y = oat_value(code, outlier, unit0, unit1, TWO) * scale
        if WEIGHTED:
            y *= gains[chunk].to(tl.float32) + gain_offset
        if BIASED:
            y += offsets[chunk].to(tl.float32)
        there = within(column, width, chunk, CHUNKS)
        tl.store(to + chunk * BLOCK + column, rounded(y, out.dtype.element_ty), there)


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
    pieces = chunks(rows.width)
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
        PADDED=pieces.block * pieces.count > rows.width,
        CENTRED=centred,
        WEIGHTED=weight is not None,
        BIASED=bias is not None,
        BITS=bits,
        NEAREST=nearest,
        TWO=threshold.numel() == 2,
        ROUNDING=rounding,
        BLOCK=pieces.block,
        CHUNKS=pieces.count,
        num_warps=pieces.warps(),
        maxnreg=REGISTERS if pieces.warps() == 16 and not centred else None,
        enable_fp_fusion=False,
    )
    return out
