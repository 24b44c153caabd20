"""One row, encoded for the kernel that streams weights: once for all of its programs, and for all of its matrices.

Codes of P matrices, each of which has a neuron of its own, are int32 ``[P, words]``; what a line holds is said where it
is made. Lines begin at multiples of 16 bytes, as threads load that much at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from spikeform.synapses.rows import SUMMED, limbs_of, words_of_gif, words_of_oat
from spikeform.synapses.triton.launch import cdiv, meta, next_power
from spikeform.synapses.triton.many import encode_rows
from spikeform.synapses.triton.operands import (
    await_inputs,
    drive,
    gif_integer,
    gif_row,
    oat_code,
    oat_units,
    oat_value,
    pick,
    release,
)

SHORT = 512  # channels of a program: the product waits for it
LONGEST = 16384  # channels that the search for a row's range takes in one bite
UNSIGNED = tl.constexpr(255)


@triton.jit
def put(
    v,
    at,
    live,
    line,
    threshold,
    K,
    limit,
    resolution,
    TWO: tl.constexpr,
    ROUNDING: tl.constexpr,
    LIMBS: tl.constexpr,
    PARTS: tl.constexpr,
):
    """:func:`put_by` with the units of a threshold."""
    units = oat_units(threshold, resolution, TWO)
    put_by(v, at, live, line, units, K, limit, TWO, ROUNDING, LIMBS, PARTS)


@triton.jit
def put_by(
    v,
    at,
    live,
    line,
    units,
    K,
    limit,
    TWO: tl.constexpr,
    ROUNDING: tl.constexpr,
    LIMBS: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Write what a population sends for the potentials ``v`` fp32 of the channels ``at`` into its line.

    ``units``: as :func:`oat_units` gives them, of constants: they may be there before a kernel waits for its input.
    LIMBS 0: values, fp32, in PARTS planes of every other or of each. Else bytes of the codes, a plane for each limb,
    unsigned but the highest, those of outliers in planes of their own; and the units, fp32, by the first channel.
    """
    one, two, unit0, unit1 = units
    code, outlier = oat_code(v, one, two, unit0, unit1, limit, TWO, ROUNDING)
    if LIMBS == 0:
        values = line.to(tl.pointer_type(tl.float32))
        tl.store(values + at % PARTS * (K // PARTS) + at // PARTS, oat_value(code, outlier, unit0, unit1, TWO), live)
    else:
        code = code.to(tl.int32)
        plane = line.to(tl.pointer_type(tl.int8))
        for branch in tl.static_range(2 if TWO else 1):
            rest = tl.where(outlier == (branch == 1), code, 0) if TWO else code
            for limb in tl.static_range(LIMBS):
                low = rest if limb == LIMBS - 1 else rest & UNSIGNED
                rest = (rest - low) >> 8
                tl.store(plane + at, low.to(tl.int8), live)
                plane += K
        behind = plane.to(tl.pointer_type(tl.float32))
        first = at == 0
        tl.store(behind + at, v * 0.0 + unit0, first)
        if TWO:
            tl.store(behind + 1 + at, v * 0.0 + unit1, first)


@triton.jit
def _oat(
    x,
    thresholds,
    shifts,
    out,
    K,
    words,
    limit,
    resolution,
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
    v = drive(x, pick(shifts, part) + at, at, at < K, SHIFTED)
    put(
        v, at, at < K, out + part * words, pick(thresholds, part), K, limit, resolution, TWO, ROUNDING, LIMBS, PARTS
    )  # fmt: skip


@triton.jit
def put_gif(v, at, times, low, unit, line, K, levels, steps, PACKED: tl.constexpr):
    """Write what GIF neurons send for the potentials ``v`` fp32 of a program's channels ``at`` into their line.

    Bytes of the codes, the row's unit, fp32, and a sum of codes for each program. ``times``: the channels' own units in
    ``unit``; ``low``: the row's least element. Potentials behind the row are 0.
    """
    code = gif_integer(v, low, unit, v * 0.0 + times, levels, steps).to(tl.int32)
    place = (at % 64 // 32) * (K // 2) + at // 64 * 32 + at % 32 if PACKED else at
    tl.store(line.to(tl.pointer_type(tl.int8)) + place, code.to(tl.int8), at < K)
    behind = line + K // 4
    tl.store(behind, unit.to(tl.int32, bitcast=True), tl.program_id(0) == 0)
    tl.store(behind + 1 + tl.program_id(0), tl.sum(code, 0))


@triton.jit
def _gif(
    x,
    multiples,
    out,
    K,
    words,
    levels,
    steps,
    STEPPED: tl.constexpr,
    PACKED: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Every program looks for the range of the row, and encodes BLOCK of its channels."""
    release(OVERLAP)
    part = tl.program_id(1)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    times = tl.load(pick(multiples, part) + at, at < K, other=1.0) if STEPPED else 1.0
    await_inputs(OVERLAP)
    v = tl.load(x + at, at < K, other=0.0).to(tl.float32)
    low, unit = gif_row(x, K, levels, steps, CHUNK)
    put_gif(v, at, times, low, unit, out + part * words, K, levels, steps, PACKED)


def oat_lines(
    width: int, thresholds: Sequence[Tensor], shifts: Sequence[Tensor], limit: int, rounding: int, parts: int
) -> tuple[Tensor, dict[str, int]]:
    """Room for a line for each population, int32 ``[P, words]``, and what :func:`put` is compiled for (and SHIFTED).

    ``parts``: weights of a word, 4 of integers.
    """
    branches, limbs = thresholds[0].numel(), limbs_of(limit) if parts == 4 else 0
    how = {"TWO": branches == 2, "ROUNDING": rounding, "SHIFTED": len(shifts) > 0, "LIMBS": limbs, "PARTS": parts}
    words = words_of_oat(width, branches, limit, parts)
    return torch.empty((len(thresholds), words), dtype=torch.int32, device=thresholds[0].device), how


def gif_lines(width: int, multiples: Sequence[Tensor], steps: int, packed: bool) -> tuple[Tensor, dict[str, Any]]:
    """Room for a line for each group, int32 ``[P, words]``, and how a kernel that fills it is compiled."""
    how = {
        "STEPPED": steps > 1,
        "PACKED": packed,
        "CHUNK": min(next_power(width), LONGEST),
        "BLOCK": SUMMED,
        "num_warps": 8 if width <= 4096 else 16,
        "enable_fp_fusion": False,
    }
    return torch.empty((len(multiples), words_of_gif(width)), dtype=torch.int32, device=multiples[0].device), how


def row_oat(
    x: Tensor,
    thresholds: Sequence[Tensor],
    shifts: Sequence[Tensor],
    limit: int,
    resolution: int,
    rounding: int,
    parts: int,
) -> Tensor:
    """A row of K channels through P populations.

    Args:
        x: ``[..., K]`` of one row.
        thresholds: fp32 ``[R]`` each.
        shifts: int8 ``[K]`` each, or none.
        limit: Of the codes.
        resolution: Code units to a threshold.
        rounding: Index of its name.
        parts: Weights of a word: 1 or 2 real ones, whose values are sent, or 4 bytes.
    """
    x, width = x.contiguous(), x.shape[-1]
    out, how = oat_lines(width, thresholds, shifts, limit, rounding, parts)
    with torch.cuda.device_of(x):
        _oat[(cdiv(width, SHORT), len(thresholds))](
            x,
            tuple(thresholds),
            tuple(shifts) or (x,),
            out,
            width,
            out.shape[1],
            limit,
            resolution,
            **meta(BLOCK=SHORT, **how),
        )
    return out


def row_gif(x: Tensor, multiples: Sequence[Tensor], levels: int, steps: int, packed: bool) -> Tensor:
    """A row of K channels, or many, through P groups of GIF neurons.

    ``packed``: of one row, first the codes that meet low nibbles, then those that meet high ones.
    """
    if x.numel() > x.shape[-1]:
        return encode_rows(x, None, multiples, levels, steps)
    x, width = x.contiguous(), x.shape[-1]
    out, how = gif_lines(width, multiples, steps, packed)
    with torch.cuda.device_of(x):
        _gif[(cdiv(width, SUMMED), len(multiples))](
            x,
            tuple(multiples),
            out,
            width,
            out.shape[1],
            levels,
            steps,
            **meta(**how),
        )
    return out
