"""One row, encoded by what makes it: a norm of spikes, or the product of a gate and its other factor.

Both are as the kernels of :mod:`spikeform.neurons.triton` have them, and what they would have left is rounded as there:
then each program encodes its channels for one matrix. A row is short, and each program looks at all of it for the norm.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from spikeform.neurons.triton.codes import function as function_of
from spikeform.neurons.triton.codes import inverse_sqrt, round_mantissa, rounded
from spikeform.neurons.triton.hg import bank
from spikeform.synapses.triton.launch import cdiv, meta, next_power
from spikeform.synapses.triton.operands import (
    await_inputs,
    oat_code,
    oat_real,
    oat_units,
    oat_value,
    pick,
    release,
    shifted,
)
from spikeform.synapses.triton.row import LONGEST, SHORT, oat_lines, put


@triton.jit
def _norm(
    x,
    weight,
    bias,
    threshold,
    thresholds,
    shifts,
    out,
    K,
    words,
    eps,
    gain_offset,
    top,
    floor,
    own_limit,
    own_resolution,
    limit,
    resolution,
    CENTRED: tl.constexpr,
    WEIGHTED: tl.constexpr,
    BIASED: tl.constexpr,
    BITS: tl.constexpr,
    NEAR: tl.constexpr,
    OWN_TWO: tl.constexpr,
    OWN_ROUNDING: tl.constexpr,
    TWO: tl.constexpr,
    ROUNDING: tl.constexpr,
    SHIFTED: tl.constexpr,
    LIMBS: tl.constexpr,
    PARTS: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    release(OVERLAP)
    part = tl.program_id(1)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = at < K
    gain, offset = 1.0, 0.0
    if WEIGHTED:
        gain = tl.load(weight + at, live, other=0.0).to(tl.float32) + gain_offset
    if BIASED:
        offset = tl.load(bias + at, live, other=0.0).to(tl.float32)
    one, two, unit0, unit1 = oat_units(threshold, own_resolution, OWN_TWO)
    await_inputs(OVERLAP)
    v = tl.load(x + at, live, other=0.0).to(tl.float32)
    lanes = tl.arange(0, CHUNK)
    mean = 0.0
    if CENTRED:
        total = tl.zeros([CHUNK], tl.float32)
        for k in range(0, K, CHUNK):
            total += tl.load(x + k + lanes, k + lanes < K, other=0.0).to(tl.float32)
        mean = tl.div_rn(tl.sum(total, 0), K * 1.0)
        v -= mean
    squares = tl.zeros([CHUNK], tl.float32)
    for k in range(0, K, CHUNK):
        d = tl.load(x + k + lanes, k + lanes < K, other=0.0).to(tl.float32)
        if CENTRED:
            d = tl.where(k + lanes < K, d - mean, 0.0)
        squares += round_mantissa(d * d, BITS, NEAR, top, floor, SIGNED=False)
    mean_square = tl.div_rn(tl.sum(squares, 0), K * 1.0)
    scale = round_mantissa(inverse_sqrt(mean_square + eps), BITS, NEAR, top, floor, SIGNED=False)
    y = oat_real(v, one, two, unit0, unit1, own_limit, OWN_TWO, OWN_ROUNDING) * scale
    if WEIGHTED:
        y *= gain
    if BIASED:
        y += offset
    v = shifted(rounded(y, x.dtype.element_ty).to(tl.float32), pick(shifts, part) + at, live, SHIFTED)
    line, own = out + part * words, pick(thresholds, part)
    put(v, at, live, line, own, K, limit, resolution, TWO, ROUNDING, LIMBS, PARTS)


@triton.jit
def _gated(
    gate,
    up,
    threshold,
    thresholds,
    shifts,
    out,
    K,
    words,
    top,
    floor,
    own_limit,
    own_resolution,
    limit,
    resolution,
    NAME: tl.constexpr,
    BITS: tl.constexpr,
    NEAR: tl.constexpr,
    OWN_TWO: tl.constexpr,
    OWN_ROUNDING: tl.constexpr,
    TWO: tl.constexpr,
    ROUNDING: tl.constexpr,
    SHIFTED: tl.constexpr,
    LIMBS: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    release(OVERLAP)
    await_inputs(OVERLAP)
    part = tl.program_id(1)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = at < K
    y = function_of(tl.load(gate + at, live, other=1.0).to(tl.float32), NAME)
    other = tl.load(up + at, live, other=0.0).to(tl.float32)
    one, two, unit0, unit1 = oat_units(threshold, own_resolution, OWN_TWO)
    code, outlier = oat_code(other, one, two, unit0, unit1, own_limit, OWN_TWO, OWN_ROUNDING)
    y = round_mantissa(y, BITS, NEAR, top, floor) * oat_value(code, outlier, unit0, unit1, OWN_TWO)
    v = shifted(rounded(y, gate.dtype.element_ty).to(tl.float32), pick(shifts, part) + at, live, SHIFTED)
    line, own = out + part * words, pick(thresholds, part)
    put(v, at, live, line, own, K, limit, resolution, TWO, ROUNDING, LIMBS, PARTS)


def row_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    centred: bool,
    gain_offset: float,
    threshold: Tensor,
    own_limit: int,
    own_resolution: int,
    own_rounding: int,
    bits: int,
    nearest: bool,
    low: int,
    high: int,
    thresholds: Sequence[Tensor],
    shifts: Sequence[Tensor],
    limit: int,
    resolution: int,
    rounding: int,
    parts: int,
) -> Tensor:
    """Codes of ``hg_norm(x, ...)`` ``[..., K]`` of one row, as :func:`~.row.row_oat` makes them."""
    x, width = x.contiguous(), x.shape[-1]
    out, how = oat_lines(width, thresholds, shifts, limit, rounding, parts)
    with torch.cuda.device_of(x):
        _norm[(cdiv(width, SHORT), len(thresholds))](
            x,
            x if weight is None else weight.contiguous(),
            x if bias is None else bias.contiguous(),
            threshold,
            tuple(thresholds),
            tuple(shifts) or (x,),
            out,
            width,
            out.shape[1],
            eps,
            gain_offset,
            *bank(bits, low, high),
            own_limit,
            own_resolution,
            limit,
            resolution,
            **meta(
                CENTRED=centred,
                WEIGHTED=weight is not None,
                BIASED=bias is not None,
                BITS=bits,
                NEAR=nearest,
                OWN_TWO=threshold.numel() == 2,
                OWN_ROUNDING=own_rounding,
                CHUNK=min(next_power(width), LONGEST),
                BLOCK=SHORT,
                num_warps=8 if width <= 4096 else 16,
                enable_fp_fusion=False,
                **how,
            ),
        )
    return out


def row_gated(
    gate: Tensor,
    up: Tensor,
    function: str,
    bits: int,
    nearest: bool,
    low: int,
    high: int,
    threshold: Tensor,
    own_limit: int,
    own_resolution: int,
    own_rounding: int,
    thresholds: Sequence[Tensor],
    shifts: Sequence[Tensor],
    limit: int,
    resolution: int,
    rounding: int,
    parts: int,
) -> Tensor:
    """Codes of ``hg_gated(gate, up, ...)`` ``[..., K]`` of one row, as :func:`~.row.row_oat` makes them."""
    gate, up, width = gate.contiguous(), up.contiguous(), gate.shape[-1]
    out, how = oat_lines(width, thresholds, shifts, limit, rounding, parts)
    with torch.cuda.device_of(gate):
        _gated[(cdiv(width, SHORT), len(thresholds))](
            gate,
            up,
            threshold,
            tuple(thresholds),
            tuple(shifts) or (gate,),
            out,
            width,
            out.shape[1],
            *bank(bits, low, high),
            own_limit,
            own_resolution,
            limit,
            resolution,
            **meta(
                NAME=function,
                BITS=bits,
                NEAR=nearest,
                OWN_TWO=threshold.numel() == 2,
                OWN_ROUNDING=own_rounding,
                BLOCK=SHORT,
                **how,
            ),
        )
    return out
