"""Multi-threshold populations as operands of a matrix product: two bf16 planes, or int8 limbs of the codes."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

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
    limit,
    resolution,
    TWO: tl.constexpr,
    ROUNDING: tl.constexpr,
    LIMBS: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    release(OVERLAP)
    await_inputs(OVERLAP)
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    one, two, unit0, unit1 = oat_units(threshold, resolution, TWO)
    v = tl.load(x + at, at < total, other=0.0).to(tl.float32)
    code, outlier = oat_code(v, one, two, unit0, unit1, limit, TWO, ROUNDING)
    rest = code.to(tl.int32)
    for limb in tl.static_range(LIMBS):
        low = rest if limb == LIMBS - 1 else ((rest + 128) & 255) - 128
        rest = (rest - low) >> 8
        place = out + total * limb + at
        tl.store(place, (tl.where(outlier, 0, low) if TWO else low).to(tl.int8), at < total)
        if TWO:
            tl.store(place + total * LIMBS, tl.where(outlier, low, 0).to(tl.int8), at < total)


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


def limbs_of(limit: int) -> int:
    """Signed bytes of codes up to ``limit`` in magnitude: ``sum_i 256^i byte_i``, each in -128 .. 127."""
    return 1 if limit <= 127 else 2 if limit <= 127 * 256 + 127 else 3


def oat_limbs(x: Tensor, threshold: Tensor, limit: int, resolution: int, rounding: int) -> Tensor:
    """Codes ``[..., K]`` as int8 ``[R L, M, K]``: limbs of the normal sub-neuron, lowest first, then the other's."""
    width, limbs = x.shape[-1], limbs_of(limit)
    out = torch.empty((threshold.numel() * limbs, x.numel() // width, width), dtype=torch.int8, device=x.device)
    _limbs[(cdiv(x.numel(), BLOCK),)](
        x,
        threshold,
        out,
        x.numel(),
        limit,
        resolution,
        **meta(
            TWO=threshold.numel() == 2,
            ROUNDING=rounding,
            LIMBS=limbs,
            BLOCK=BLOCK,
        ),
    )
    return out
