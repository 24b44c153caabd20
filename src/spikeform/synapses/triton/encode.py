"""Multi-threshold populations as operands of a matrix product: two bf16 planes, or int8 limbs of the codes.

A limb is a digit to the base of 256. Tensor cores take signed digits, -128 .. 127: two of them reach 32639, so that
codes of 15 bits, up to 32767, are sent 128 less than they are, and what the product then lacks is 128 times the sum of
a row of the weight: one more row of codes, all ones, brings it. A single row goes another way: see :mod:`.row`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from spikeform.synapses.rows import limbs_of
from spikeform.synapses.triton.launch import cdiv, meta
from spikeform.synapses.triton.operands import await_inputs, drive, oat_code, oat_real, oat_units, release

BLOCK = 1024


@triton.jit
def _planes(
    x,
    threshold,
    shift,
    out,
    total,
    K,
    limit,
    resolution,
    TWO: tl.constexpr,
    ROUNDING: tl.constexpr,
    SHIFTED: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    release(OVERLAP)
    await_inputs(OVERLAP)
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    one, two, unit0, unit1 = oat_units(threshold, resolution, TWO)
    v = drive(x, shift + at % K, at, at < total, SHIFTED)
    v = oat_real(v, one, two, unit0, unit1, limit, TWO, ROUNDING)
    high = v.to(tl.bfloat16)
    tl.store(out + at, high, at < total)
    tl.store(out + total + at, (v - high.to(tl.float32)).to(tl.bfloat16), at < total)


@triton.jit
def _limbs(
    x,
    threshold,
    out,
    total,
    K,
    limit,
    resolution,
    TWO: tl.constexpr,
    ROUNDING: tl.constexpr,
    LIMBS: tl.constexpr,
    EXCESS: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """``out``: a plane of ``total`` bytes for each limb; then a row of ones where there is an EXCESS."""
    release(OVERLAP)
    await_inputs(OVERLAP)
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    one, two, unit0, unit1 = oat_units(threshold, resolution, TWO)
    v = tl.load(x + at, at < total, other=0.0).to(tl.float32)
    code, outlier = oat_code(v, one, two, unit0, unit1, limit, TWO, ROUNDING)
    code = code.to(tl.int32)
    for branch in tl.static_range(2 if TWO else 1):
        rest = tl.where(outlier == (branch == 1), code, 0) if TWO else code
        rest -= EXCESS
        for limb in tl.static_range(LIMBS):
            low = rest if limb == LIMBS - 1 else ((rest + 128) & 255) - 128
            rest = (rest - low) >> 8
            tl.store(out + total * (branch * LIMBS + limb) + at, low.to(tl.int8), at < total)
    if EXCESS:
        tl.store(out + total * (2 * LIMBS if TWO else LIMBS) + at, tl.full([BLOCK], 1, tl.int8), at < K)


def oat_planes(
    x: Tensor, threshold: Tensor, shift: Tensor | None, limit: int, resolution: int, rounding: int
) -> Tensor:
    """Values ``[..., K]`` as ``high + low``: bf16 ``[2, M, K]``, right to 2^-17 of each."""
    width = x.shape[-1]
    out = torch.empty((2, x.numel() // width, width), dtype=torch.bfloat16, device=x.device)
    _planes[(cdiv(x.numel(), BLOCK),)](
        x,
        threshold,
        x if shift is None else shift,
        out,
        x.numel(),
        width,
        limit,
        resolution,
        **meta(
            TWO=threshold.numel() == 2,
            ROUNDING=rounding,
            SHIFTED=shift is not None,
            BLOCK=BLOCK,
        ),
    )
    return out


def excess_of(limit: int) -> int:
    """What such codes are sent less than they are, so that as many bytes, all of them signed, hold them."""
    return 128 if 127 * 257 < limit < 2**15 else 0


def oat_limbs(x: Tensor, threshold: Tensor, limit: int, resolution: int, rounding: int) -> Tensor:
    """Codes ``[..., K]`` as int8 ``[R L M, K]``: limbs of the normal sub-neuron, lowest first, then the other's.

    Where :func:`excess_of` says so, one more row, of ones.
    """
    width, limbs, excess = x.shape[-1], limbs_of(limit), excess_of(limit)
    rows = threshold.numel() * limbs * (x.numel() // width)
    out = torch.empty((rows + 1 if excess else rows, width), dtype=torch.int8, device=x.device)
    _limbs[(cdiv(x.numel(), BLOCK),)](
        x,
        threshold,
        out,
        x.numel(),
        width,
        limit,
        resolution,
        **meta(TWO=threshold.numel() == 2, ROUNDING=rounding, LIMBS=limbs, EXCESS=excess, BLOCK=BLOCK),
    )
    return out
