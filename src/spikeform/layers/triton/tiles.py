"""Tiles of queries x keys: which of them a mask hides, and cached codes as matrices for tensor cores."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from spikeform.layers.triton.operands import Mask, Train, cdiv, padded, run
from spikeform.neurons.triton import codes

# What a mask does to a tile of scores. ``OPEN``: it adds nothing.
HIDDEN, MIXED, OPEN = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
LOG2E = tl.constexpr(1.4426950408889634)
KEYS = 64  # of a program that unpacks codes


@triton.jit
def dot(a, b, sums):
    """``a b + sums`` on tensor cores, fp32 or int32 sums; the interpreter has no bfloat16 product."""
    if codes.INTERPRETED and a.dtype == tl.bfloat16:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), sums)
    else:
        return tl.dot(a, b, sums, out_dtype=sums.dtype)


@triton.jit
def planes(x):
    """fp32 as the sum of two bf16, to within 2^-17 of it; integers below 2^16 exactly."""
    high = codes.rounded(x, tl.bfloat16)
    return high, codes.rounded(x - high.to(tl.float32), tl.bfloat16)


@triton.jit
def ratio(threshold):
    """What a unit of the outlier sub-neuron is in units of the normal one."""
    return tl.div_rn(tl.load(threshold + 1), tl.load(threshold))


@triton.jit
def power(threshold, TWO: tl.constexpr):
    """Whether that is a power of two, so that codes of 8 bits times it are bf16."""
    if TWO:
        return (ratio(threshold).to(tl.int32, bitcast=True) & 0x7FFFFF) == 0
    else:
        return tl.load(threshold) > 0.0


@triton.jit
def bias(
    mask, first_row, first_key, length, keys, m_l, m_s, least, MASKED: tl.constexpr, M: tl.constexpr, N: tl.constexpr
):
    """What is added to a tile of scores ``[M, N]``: -inf where a key is hidden, or there is none; rows alike."""
    row, key = first_row + tl.arange(0, M), first_key + tl.arange(0, N)
    exists = (row < length)[:, None] & (key < keys)[None, :]
    if MASKED:
        at = mask + row[:, None].to(tl.int64) * m_l + key[None, :].to(tl.int64) * m_s
        added = tl.load(at, exists, other=float("-inf")).to(tl.float32)
        return tl.where(added > least, added, float("-inf"))
    else:
        return tl.where(exists, 0.0, float("-inf"))


@triton.jit(do_not_specialize=["length"])
def _look(mask, flags, length, keys, heads, m_b, m_h, m_l, m_s, least, M: tl.constexpr, N: tl.constexpr):
    pair = tl.program_id(2)
    first, start = tl.program_id(1) * M, tl.program_id(0) * N
    mask += (pair // heads).to(tl.int64) * m_b + (pair % heads).to(tl.int64) * m_h
    added = bias(mask, first, start, length, keys, m_l, m_s, least, True, M, N)
    # Rows that do not exist are neither seen nor in the way; keys that do not exist are hidden.
    exists = (first + tl.arange(0, M) < length)[:, None]
    seen = tl.max(tl.max((added > float("-inf")).to(tl.int32), 1), 0)
    plain = tl.min(tl.min(((added == 0.0) | (exists == 0)).to(tl.int32), 1), 0)
    at = (pair * tl.num_programs(1) + tl.program_id(1)) * tl.num_programs(0) + tl.program_id(0)
    tl.store(flags + at, tl.where(seen == 0, HIDDEN, tl.where(plain == 1, OPEN, MIXED)).to(tl.int8))


def look(mask: Mask, length: int, keys: int, high: int, wide: int, device: torch.device) -> tuple[Tensor, int, int]:
    """What a mask does to each tile.

    Args:
        mask: For ``[B, H, L, S]``.
        length: L.
        keys: S.
        high: Queries of a tile.
        wide: Keys of a tile.
        device: Of the result.

    Returns:
        int8 ``[B or 1, H or 1, tiles of queries, tiles of keys]``, and its strides for batches and heads.
    """
    rows, columns = cdiv(length, high), cdiv(keys, wide)
    if mask.values is None:
        return torch.empty((1, 1, rows, columns), dtype=torch.int8, device=device), 0, 0
    batch, heads = (n if stride else 1 for n, stride in zip(mask.values.shape, mask.places[:2], strict=False))
    flags = torch.empty((batch, heads, rows, columns), dtype=torch.int8, device=device)
    grid = (columns, rows, batch * heads)
    run(_look, grid, mask.values, flags, length, keys, heads, *mask.places, mask.least, M=high, N=wide)
    tiles = rows * columns
    return flags, tiles * heads if batch > 1 else 0, tiles if heads > 1 else 0


@triton.jit
def runs(flags, pair, heads, f_b, f_h, tile, keys, MASKED: tl.constexpr, N: tl.constexpr, TILES: tl.constexpr):
    """Which tiles of keys a tile of queries meets: open ones from ``a`` to ``b``, others from ``first`` to ``last``."""
    columns = tl.cdiv(keys, N)
    if MASKED:
        t = tl.arange(0, TILES)
        at = flags + (pair // heads) * f_b + (pair % heads) * f_h + tile * columns + t
        flag = tl.load(at, t < columns, other=0)
        first = tl.min(tl.where(flag != HIDDEN, t, columns), 0)
        last = tl.max(tl.where(flag != HIDDEN, t + 1, 0), 0)
        a = tl.min(tl.where(flag == OPEN, t, last), 0)
        b = tl.min(tl.where((flag != OPEN) & (t >= a), t, last), 0)
    else:
        first, a, b, last = 0, 0, keys // N, columns
    return first, a, b, last


@triton.jit(do_not_specialize=["p_b", "p_g", "u_b", "u_g"])
def _unpack(
    packed,
    unit,
    threshold,
    multiple,
    out,
    units,
    plane,
    groups,
    keys,
    span,
    p_b,
    p_g,
    p_s,
    u_b,
    u_g,
    u_s,
    WORD: tl.constexpr,
    OAT: tl.constexpr,
    TWO: tl.constexpr,
    SPLIT: tl.constexpr,
    SIZE: tl.constexpr,
    E: tl.constexpr,
    N: tl.constexpr,
):
    pair = tl.program_id(1)
    batch, group = (pair // groups).to(tl.int64), (pair % groups).to(tl.int64)
    key, e = tl.program_id(0) * N + tl.arange(0, N), tl.arange(0, E)
    exists = key < keys
    at = packed + batch * (p_b * WORD) + group * (p_g * WORD) + key[:, None].to(tl.int64) * (p_s * WORD) + e[None, :]
    code = tl.load(at, exists[:, None] & (e < SIZE)[None, :], other=0).to(tl.int32)
    place = pair.to(tl.int64) * span + key
    to = out + place[:, None] * E + e[None, :]
    if OAT:
        value = (code >> 1).to(tl.float32)
        if TWO:
            value *= tl.where((code & 1) != 0, ratio(threshold), 1.0)
        high, low = planes(value)
        tl.store(to, high)
        if SPLIT:
            tl.store(to + plane, low)
    else:
        factor = tl.load(multiple + group * SIZE + e, e < SIZE, other=0.0)
        tl.store(to, (code * factor.to(tl.int32)[None, :]).to(tl.float32).to(out.dtype.element_ty))
        tl.store(units + place, tl.load(unit + batch * u_b + group * u_g + key * u_s, exists, other=0.0))


def unpack(
    train: Train, parameter: Tensor, size: int, span: int, dtype: torch.dtype, split: bool = False
) -> tuple[Tensor, Tensor]:
    """Cached codes as dense matrices, zero beyond the last key and channel.

    Args:
        train: Codes ``[B, G, S, E]``.
        parameter: Thresholds ``[R]`` of real populations; or, where tokens have units, what those of channels are in
            them, ``[G, 1, E]``.
        size: E.
        span: Keys of the result, a multiple of ``KEYS``.
        dtype: bf16, or int8 for integers.
        split: Two planes, whose sum it is; else one.

    Returns:
        ``[planes, B, G, span, E']``, E' the power of two from E and 16 on: in units of the normal sub-neuron, or of the
        token; and those of tokens, fp32 ``[B, G, span]`` (nothing where they have none).
    """
    (batch, groups, keys), oat = train.codes.shape[:3], train.units is train.codes
    device = train.codes.device
    out = torch.empty((1 + split, batch, groups, span, padded(size)), dtype=dtype, device=device)
    units = torch.empty(0 if oat else (batch, groups, span), dtype=torch.float32, device=device)
    run(
        _unpack, (span // KEYS, batch * groups), train.codes, train.units, parameter, parameter, out, units,
        out.stride(0), groups, keys, span, *train.places, *train.unit_places, WORD=train.word, OAT=oat,
        TWO=oat and len(parameter) == 2, SPLIT=split, SIZE=size, E=padded(size), N=KEYS,
    )  # fmt: skip
    return out, units
