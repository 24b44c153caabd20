"""Queries, encoded: as matrices for tensor cores (multi-threshold), or as integers of their row's unit (GIF).

Queries of GIF neurons may be rotated first. The matrix of a rotation is a Kronecker product, ``M = diag(signs) (A (x)
C)``: a row of E = a c channels is an a x c matrix X, and ``X M`` is ``A^T X C``: some E (a + c) products, not E^2.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from spikeform.layers.rotation import mixing
from spikeform.layers.triton import tiles
from spikeform.layers.triton.operands import Populations, cdiv, padded, pow2, run
from spikeform.neurons.triton import codes
from spikeform.neurons.triton.oat import units as units_of

ELEMENTS = 4096  # of a program
FEW = 128  # rows for which there is a processor each


@triton.jit(do_not_specialize=["total", "length"])
def _gif(
    q,
    signs,
    left,
    right,
    multiple,
    out,
    units,
    levels,
    total,
    heads,
    length,
    q_b,
    q_h,
    q_l,
    STEPS: tl.constexpr,
    ROTATE: tl.constexpr,
    ROWS: tl.constexpr,
    SIZE: tl.constexpr,
    HIGH: tl.constexpr,
    WIDTH: tl.constexpr,
    WIDE: tl.constexpr,
    E: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    at = q + row // (heads * length) * q_b + row // length % heads * q_h + row % length * q_l
    high, wide = tl.arange(0, HIGH), tl.arange(0, WIDE)
    channel = high[:, None] * WIDTH + wide[None, :]
    inside = (channel < SIZE) & (wide < WIDTH)[None, :]
    live = (row < total)[:, None, None] & inside[None]
    x = tl.load(at[:, None, None] + channel[None], live, other=0.0).to(tl.float32)
    if ROTATE:
        x *= tl.load(signs + channel, inside, other=0).to(tl.float32)[None]
        of_left = tl.load(left + high[:, None] * HIGH + high[None, :])
        known = (wide < WIDTH)[:, None] & (wide < WIDTH)[None, :]
        of_right = tl.load(right + wide[:, None] * WIDTH + wide[None, :], known, other=0.0)
        x = tl.sum(x[:, :, None, :] * of_left[None, :, :, None], 1)
        x = tl.sum(x[:, :, :, None] * of_right[None, None, :, :], 2)
    least, most = tl.min(tl.min(x, 2), 1), tl.max(tl.max(x, 2), 1)
    least, most = tl.minimum(least, 0.0), tl.maximum(most, 0.0)
    unit = codes.gif_unit(least, most, levels, STEPS)
    factor = tl.load(multiple + channel, inside, other=1.0)[None]
    code = codes.gif_integer(x, least[:, None, None], unit[:, None, None], factor, levels, STEPS)
    to = out + row[:, None, None] * E + channel[None]
    tl.store(to, code.to(tl.int32).to(tl.int8), live)
    tl.store(units + row, unit, row < total)


def encode_gif(q: Tensor, signs: Tensor | None, multiple: Tensor, levels: int, steps: int) -> tuple[Tensor, Tensor]:
    """Integers of queries in the common unit of each, and those units.

    Args:
        q: Real ``[B, H, L, E]``, the last axis dense.
        signs: int8 ``[E]`` of the rotation, or None.
        multiple: fp32 ``[E]``: what a channel's unit is in common units.
        levels: L.
        steps: T of the longest sub-neuron.

    Returns:
        int8 ``[B, H, L, E']``, E' the power of two from E and 16 on, of which the first E are written; fp32 ``[B, H,
        L]``.
    """
    batch, heads, length, size = q.shape
    out = torch.empty((batch, heads, length, padded(size)), dtype=torch.int8, device=q.device)
    units = torch.empty((batch, heads, length), dtype=torch.float32, device=q.device)
    two = size & -size  # the power of two in E
    high = 1 if signs is None else 1 << min(two.bit_length() - 1, (size.bit_length() - 1) // 2)
    width, total = size // high, units.numel()
    left = right = multiple
    if signs is not None:
        left, right = (mixing(n, q.device, torch.float32) for n in (high, width))
    rows = 1 if total <= FEW else 4
    run(
        _gif, (cdiv(total, rows),), q, signs, left, right, multiple, out, units, levels, total, heads, length,
        *q.stride()[:3], STEPS=steps, ROTATE=signs is not None, ROWS=rows, SIZE=size, HIGH=high, WIDTH=width,
        WIDE=pow2(width), E=padded(size),
    )  # fmt: skip
    return out, units


@triton.jit(do_not_specialize=["total", "length"])
def _oat(
    q,
    threshold,
    out,
    plane,
    limit,
    resolution,
    total,
    heads,
    length,
    q_b,
    q_h,
    q_l,
    TWO: tl.constexpr,
    ROUNDING: tl.constexpr,
    SPLIT: tl.constexpr,
    SIZE: tl.constexpr,
    E: tl.constexpr,
    ROWS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    at = q + row // (heads * length) * q_b + row // length % heads * q_h + row % length * q_l
    e = tl.arange(0, E)
    exists = (row < total)[:, None]
    x = tl.load(at[:, None] + e[None, :], exists & (e < SIZE)[None, :], other=0.0).to(tl.float32)
    threshold0, threshold1, unit0, unit1 = units_of(threshold, resolution, TWO)
    value, outlier = codes.oat_code(x, threshold0, threshold1, unit0, unit1, limit, TWO, ROUNDING)
    if TWO:
        value *= tl.where(outlier, tiles.ratio(threshold), 1.0)
    high, low = tiles.planes(value)
    to = out + row[:, None] * E + e[None, :]
    tl.store(to, high, exists)
    if SPLIT:
        tl.store(to + plane, low, exists)


def encode_oat(q: Tensor, rule: Populations, split: bool) -> Tensor:
    """What codes of real queries stand for, in units of the normal sub-neuron.

    Args:
        q: ``[B, H, L, E]``, the last axis dense.
        rule: The populations.
        split: Two planes, whose sum it is; else one.

    Returns:
        bf16 ``[planes, B, H, L, E']``, zero beyond E; E' the power of two from E and 16 on.
    """
    batch, heads, length, size = q.shape
    out = torch.empty((1 + split, batch, heads, length, padded(size)), dtype=torch.bfloat16, device=q.device)
    total, rows = batch * heads * length, max(ELEMENTS // padded(size), 1)
    run(
        _oat, (cdiv(total, rows),), q, rule.query, out, out.stride(0), rule.limit, float(rule.resolution), total, heads,
        length, *q.stride()[:3], TWO=len(rule.query) == 2, ROUNDING=rule.rounding, SPLIT=split, SIZE=size,
        E=padded(size), ROWS=rows,
    )  # fmt: skip
    return out
