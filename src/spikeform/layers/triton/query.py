"""Queries, encoded: as matrices for tensor cores (multi-threshold), or as integers of their row's unit (GIF).

Queries of GIF neurons may be rotated first, on tensor cores: numbers of 24 bits are three bf16 planes, and those of a
Hadamard matrix are 1 and -1 but for a factor.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from spikeform.layers.rotation import mixing
from spikeform.layers.triton import tiles
from spikeform.layers.triton.operands import Populations, cdiv, padded, run
from spikeform.neurons.triton import codes
from spikeform.neurons.triton.oat import units as units_of

ELEMENTS = 4096  # of a program
FEW = 2048  # rows up to which processors are left over
FEW_ROWS, MANY_ROWS = 16, 64  # of a program: what tensor cores take
PLANES = tl.constexpr(3)  # bf16, of a number of 24 bits


@triton.jit
def _rotated(x, matrix, X: tl.constexpr, MATRIX: tl.constexpr):
    """``x`` ``[M, E]`` times a matrix ``[MATRIX, E, E]`` of planes, x of X planes; what is below 2^-24 is left out."""
    E: tl.constexpr = x.shape[1]
    e = tl.arange(0, E)
    at = matrix + e[:, None] * E + e[None, :]
    sums = tl.zeros(x.shape, tl.float32)
    for i in tl.static_range(X):
        plane = codes.rounded(x, tl.bfloat16)
        for j in tl.static_range(MATRIX):
            if i + j < PLANES:
                sums = tiles.dot(plane, tl.load(at + j * E * E), sums)
        x -= plane.to(tl.float32)
    return sums


@triton.jit(do_not_specialize=["total", "length"])
def _gif(
    q,
    signs,
    matrix,
    multiple,
    out,
    units,
    scale,
    levels,
    total,
    heads,
    length,
    q_b,
    q_h,
    q_l,
    STEPS: tl.constexpr,
    MATRIX: tl.constexpr,
    ROWS: tl.constexpr,
    SIZE: tl.constexpr,
    E: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    at = q + row // (heads * length) * q_b + row // length % heads * q_h + row % length * q_l
    e = tl.arange(0, E)
    inside = e < SIZE
    live = (row < total)[:, None] & inside[None, :]
    given = tl.load(at[:, None] + e[None, :], live, other=0.0)
    x = given.to(tl.float32)
    if MATRIX > 0:
        x *= tl.load(signs + e, inside, other=0).to(tl.float32)[None, :]
        x = _rotated(x, matrix, 1 if given.dtype == tl.bfloat16 else PLANES, MATRIX) * scale
    least, most = tl.minimum(tl.min(x, 1), 0.0), tl.maximum(tl.max(x, 1), 0.0)
    unit = codes.gif_unit(least, most, levels, STEPS)
    factor = tl.load(multiple + e, inside, other=1.0)[None, :]
    code = codes.gif_integer(x, least[:, None], unit[:, None], factor, levels, STEPS)
    tl.store(out + row[:, None] * E + e[None, :], codes.to_integer(code, tl.int8), live)
    tl.store(units + row, unit, row < total)


@lru_cache(maxsize=32)
def _matrix(size: int, device: torch.device) -> tuple[Tensor, float]:
    """The rotation of a size before its signs, bf16 ``[planes, E', E']``, zero beyond E; and a factor of their sum."""
    whole, scale = mixing(size, torch.device("cpu"), torch.float64), 1.0
    if size & (size - 1) == 0:  # Hadamard
        scale = size**-0.5
        whole = (whole / scale).round()
    planes, rest = [], whole
    while len(planes) < PLANES.value and (not planes or bool(rest.any())):
        planes.append(rest.to(torch.bfloat16))
        rest = rest - planes[-1]
    more = padded(size) - size
    return torch.nn.functional.pad(torch.stack(planes), (0, more, 0, more)).to(device), scale


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
    total, matrix, scale = units.numel(), multiple, 1.0
    if signs is not None:
        matrix, scale = _matrix(size, q.device)
    rows = FEW_ROWS if total <= FEW else MANY_ROWS
    run(
        _gif, (cdiv(total, rows),), q, signs, matrix, multiple, out, units, scale, levels, total, heads, length,
        *q.stride()[:3], STEPS=steps, MATRIX=0 if signs is None else len(matrix), ROWS=rows, SIZE=size, E=padded(size),
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
