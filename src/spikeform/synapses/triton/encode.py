"""Multi-threshold populations as operands of a matrix product: two bf16 planes, or int8 limbs of the codes.

A limb is a digit to the base of 256. Tensor cores take signed digits, -128 .. 127: two of them reach 32639, so that
codes of 15 bits, up to 32767, are sent 128 less than they are, and what the product then lacks is 128 times the sum of
a row of the weight: one more row of codes, all ones, brings it. A dot product of four bytes takes unsigned digits too,
all but the highest one.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from spikeform.synapses.triton.launch import cdiv, meta, next_power
from spikeform.synapses.triton.operands import (
    await_inputs,
    drive,
    gif_integer,
    gif_row,
    oat_code,
    oat_real,
    oat_units,
    release,
)

BLOCK = 1024
SHORT = 512  # channels of a program where there is one row: the product waits for it
LONGEST = 16384  # channels that the search for a row's range takes in one bite


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
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """``out``: two bf16 planes; or PARTS planes of every other (PARTS 2) or each (1) value, fp32."""
    release(OVERLAP)
    await_inputs(OVERLAP)
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    one, two, unit0, unit1 = oat_units(threshold, resolution, TWO)
    v = drive(x, shift + at % K, at, at < total, SHIFTED)
    v = oat_real(v, one, two, unit0, unit1, limit, TWO, ROUNDING)
    if PARTS == 0:
        high = v.to(tl.bfloat16)
        tl.store(out + at, high, at < total)
        tl.store(out + total + at, (v - high.to(tl.float32)).to(tl.bfloat16), at < total)
    else:
        tl.store(out + at % PARTS * (total // PARTS) + at // PARTS, v, at < total)


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
    ROW: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """``out``: a plane of ``total`` bytes for each limb; then a row of ones where there is an EXCESS.

    ROW: digits are unsigned but the highest, and behind the planes are the units, fp32.
    """
    release(OVERLAP)
    await_inputs(OVERLAP)
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    one, two, unit0, unit1 = oat_units(threshold, resolution, TWO)
    v = tl.load(x + at, at < total, other=0.0).to(tl.float32)
    code, outlier = oat_code(v, one, two, unit0, unit1, limit, TWO, ROUNDING)
    code = code.to(tl.int32)
    half = 0 if ROW else 128
    for branch in tl.static_range(2 if TWO else 1):
        rest = tl.where(outlier == (branch == 1), code, 0) if TWO else code
        rest -= EXCESS
        for limb in tl.static_range(LIMBS):
            low = rest if limb == LIMBS - 1 else ((rest + half) & 255) - half
            rest = (rest - low) >> 8
            tl.store(out + total * (branch * LIMBS + limb) + at, low.to(tl.int8), at < total)
    end = out + total * (2 * LIMBS if TWO else LIMBS)
    if EXCESS:
        tl.store(end + at, tl.full([BLOCK], 1, tl.int8), at < K)
    if ROW:
        units = end.to(tl.pointer_type(tl.float32))
        first = tl.program_id(0) == 0
        tl.store(units, unit0, first)
        if TWO:
            tl.store(units + 1, unit1, first)


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
            PARTS=0,
            BLOCK=BLOCK,
        ),
    )
    return out


def oat_row(
    x: Tensor, threshold: Tensor, shift: Tensor | None, limit: int, resolution: int, rounding: int, parts: int
) -> Tensor:
    """Values of one row, fp32 ``[parts, K / parts]``: value i is in plane ``i % parts``."""
    width = x.numel()
    out = torch.empty((parts, width // parts), dtype=torch.float32, device=x.device)
    _planes[(cdiv(width, SHORT),)](
        x,
        threshold,
        x if shift is None else shift,
        out,
        width,
        width,
        limit,
        resolution,
        **meta(
            TWO=threshold.numel() == 2,
            ROUNDING=rounding,
            SHIFTED=shift is not None,
            PARTS=parts,
            BLOCK=SHORT,
        ),
    )
    return out


def limbs_of(limit: int) -> int:
    """Bytes of codes up to ``limit`` in magnitude, the highest of them signed."""
    return 1 if limit < 2**7 else 2 if limit < 2**15 else 3


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
    _encode(x, threshold, out, limit, resolution, rounding, EXCESS=excess, ROW=False, BLOCK=BLOCK)
    return out


def oat_words(x: Tensor, threshold: Tensor, limit: int, resolution: int, rounding: int) -> Tensor:
    """Codes of one row of K channels, int32 words.

    ``[R, L, K / 4]`` of four bytes each, then R units (bits of fp32).
    """
    branches = threshold.numel()
    size = branches * limbs_of(limit) * (x.numel() // 4) + branches
    out = torch.empty(size, dtype=torch.int32, device=x.device)
    _encode(x, threshold, out.view(torch.int8), limit, resolution, rounding, EXCESS=0, ROW=True, BLOCK=SHORT)
    return out


def _encode(x: Tensor, threshold: Tensor, out: Tensor, limit: int, resolution: int, rounding: int, **cut: int) -> None:
    _limbs[(cdiv(x.numel(), cut["BLOCK"]),)](
        x,
        threshold,
        out,
        x.numel(),
        x.shape[-1],
        limit,
        resolution,
        **meta(TWO=threshold.numel() == 2, ROUNDING=rounding, LIMBS=limbs_of(limit), **cut),
    )


@triton.jit
def _gif(
    x,
    multiple,
    out,
    K,
    levels,
    steps,
    STEPPED: tl.constexpr,
    PACKED: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Codes of one row: every program looks for the range of the row, and encodes BLOCK of its channels."""
    release(OVERLAP)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    times = tl.load(multiple + at, at < K, other=1.0) if STEPPED else 1.0
    await_inputs(OVERLAP)
    v = tl.load(x + at, at < K, other=0.0).to(tl.float32)
    low, unit = gif_row(x, K, levels, steps, CHUNK)
    code = gif_integer(v, low, unit, v * 0.0 + times, levels, steps).to(tl.int32)
    place = (at % 64 // 32) * (K // 2) + at // 64 * 32 + at % 32 if PACKED else at
    tl.store(out + place, code.to(tl.int8), at < K)
    behind = (out + K).to(tl.pointer_type(tl.int32))
    tl.store(behind, unit.to(tl.int32, bitcast=True), tl.program_id(0) == 0)
    tl.store(behind + 1 + tl.program_id(0), tl.sum(code, 0))


def gif_words(x: Tensor, multiple: Tensor, levels: int, steps: int, packed: bool) -> Tensor:
    """Codes of one row of K channels, int32 words.

    ``[K / 4]`` of four codes each (``packed``: those that meet low nibbles, then those that meet high ones), the row's
    unit (bits of fp32), and sums of the codes of BLOCK channels each.
    """
    width = x.numel()
    parts = cdiv(width, BLOCK)
    out = torch.empty(width // 4 + 1 + parts, dtype=torch.int32, device=x.device)
    _gif[(parts,)](
        x,
        multiple,
        out.view(torch.int8),
        width,
        levels,
        steps,
        **meta(
            STEPPED=steps > 1,
            PACKED=packed,
            CHUNK=min(next_power(width), LONGEST),
            BLOCK=BLOCK,
            num_warps=8 if width <= 4096 else 16,
            enable_fp_fusion=False,
        ),
    )
    return out
