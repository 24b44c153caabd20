"""Tiles of queries x keys: which of them a mask hides, and cached codes as matrices for tensor cores."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from spikeform.layers.triton.operands import Mask, Train, cdiv, padded, run
from spikeform.neurons.triton import codes

# What a mask does to a tile of scores. ``MIXED``: it hides some and adds nothing to others. ``OPEN``: it adds nothing.
HIDDEN, MIXED, BIASED, OPEN = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)
WORD = tl.constexpr(32)  # keys whose bits, who sees them, are together
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
    # Rounded by integers (halves away from zero): conversions of single numbers are slow, those of pairs are not.
    high = ((x.to(tl.int32, bitcast=True) + 0x8000) & -0x10000).to(tl.float32, bitcast=True)
    return high.to(tl.bfloat16), codes.rounded(x - high, tl.bfloat16)


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


@triton.jit
def visible(bits, first_key, keys, MASKED: tl.constexpr, M: tl.constexpr, N: tl.constexpr):
    """Which keys of a tile are seen, ``[M, N]``; ``bits``: where its words for these rows are, and how far apart."""
    place = tl.arange(0, N)
    seen = (first_key + place < keys)[None, :]
    if MASKED:
        start, apart = bits
        row = tl.arange(0, M)
        word = tl.load(start + row)[:, None]
        for i in tl.static_range(1, N // WORD):
            word = tl.where((place // WORD == i)[None, :], tl.load(start + i * apart + row)[:, None], word)
        seen = ((word >> (place % WORD)[None, :]) & 1) != 0
    return seen


@triton.jit(do_not_specialize=["length"])
def _look(mask, flags, bits, length, keys, heads, m_b, m_h, m_l, m_s, least, M: tl.constexpr, N: tl.constexpr):
    pair = tl.program_id(2)
    first, start = tl.program_id(1) * M, tl.program_id(0) * N
    mask += (pair // heads).to(tl.int64) * m_b + (pair % heads).to(tl.int64) * m_h
    added = bias(mask, first, start, length, keys, m_l, m_s, least, True, M, N)
    # Rows that do not exist are neither seen nor in the way; keys that do not exist are hidden.
    own = added > float("-inf")
    exists = (first + tl.arange(0, M) < length)[:, None]
    seen = tl.max(tl.max(own.to(tl.int32), 1), 0)
    plain = tl.min(tl.min(((added == 0.0) | (exists == 0)).to(tl.int32), 1), 0)
    biased = tl.max(tl.max((own & (added != 0.0)).to(tl.int32), 1), 0)
    at = (pair * tl.num_programs(1) + tl.program_id(1)) * tl.num_programs(0) + tl.program_id(0)
    flag = tl.where(plain == 1, OPEN, tl.where(biased == 1, BIASED, MIXED))
    tl.store(flags + at, tl.where(seen == 0, HIDDEN, flag).to(tl.int8))
    WIDE: tl.constexpr = N if N < WORD else WORD
    words = tl.sum(tl.where(tl.reshape(own, (M, N // WIDE, WIDE)), 1 << tl.arange(0, WIDE)[None, None, :], 0), 2)
    apart = tl.num_programs(1) * M
    word = (pair * tl.num_programs(0) + tl.program_id(0)) * (N // WIDE) + tl.arange(0, N // WIDE)
    tl.store(bits + word[None, :].to(tl.int64) * apart + (first + tl.arange(0, M))[:, None], words)


class Looked(NamedTuple):
    """What a mask does to each tile.

    Args:
        flags: int8 ``[B or 1, H or 1, tiles of queries, tiles of keys]``.
        bits: int32, who sees whom: ``[B or 1, H or 1, words of keys, queries]``, whole tiles of them.
        batch: Stride of the flags' batches.
        head: Likewise of heads.
    """

    flags: Tensor
    bits: Tensor
    batch: int
    head: int

    @classmethod
    def of(cls, flags: Tensor, bits: Tensor) -> Looked:
        """What :func:`look` made, from its tensors."""
        batch, heads = flags.shape[:2]
        return cls(flags, bits, flags.stride(0) if batch > 1 else 0, flags.stride(1) if heads > 1 else 0)


def look(mask: Mask, length: int, keys: int, high: int, wide: int, device: torch.device) -> Looked:
    """What a mask does to each tile.

    Args:
        mask: For ``[B, H, L, S]``.
        length: L.
        keys: S.
        high: Queries of a tile.
        wide: Keys of a tile.
        device: Of the result.
    """
    rows, columns = cdiv(length, high), cdiv(keys, wide)
    if mask.values is None:
        flags = torch.empty((1, 1, rows, columns), dtype=torch.int8, device=device)
        return Looked.of(flags, flags)
    batch, heads = (n if stride else 1 for n, stride in zip(mask.values.shape, mask.places[:2], strict=False))
    flags = torch.empty((batch, heads, rows, columns), dtype=torch.int8, device=device)
    words = columns * cdiv(wide, WORD.value)
    bits = torch.empty((batch, heads, words, rows * high), dtype=torch.int32, device=device)
    grid = (columns, rows, batch * heads)
    run(_look, grid, mask.values, flags, bits, length, keys, heads, *mask.places, mask.least, M=high, N=wide)
    return Looked.of(flags, bits)


@triton.jit
def runs(flags, pair, heads, f_b, f_h, tile, keys, MASKED: tl.constexpr, N: tl.constexpr, TILES: tl.constexpr):
    """Which tiles of keys a tile of queries meets.

    Returns:
        Open ones from ``a`` to ``b``, and others from ``first`` to ``last``, as ``(first, a, b, last)``; then whether
        the mask adds to scores of one of these.
    """
    columns = tl.cdiv(keys, N)
    if MASKED:
        t = tl.arange(0, TILES)
        at = flags + (pair // heads) * f_b + (pair % heads) * f_h + tile * columns + t
        flag = tl.load(at, t < columns, other=0)
        first = tl.min(tl.where(flag != HIDDEN, t, columns), 0)
        last = tl.max(tl.where(flag != HIDDEN, t + 1, 0), 0)
        a = tl.min(tl.where(flag == OPEN, t, last), 0)
        b = tl.min(tl.where((flag != OPEN) & (t >= a), t, last), 0)
        biased = tl.max((flag == BIASED).to(tl.int32), 0) == 1
    else:
        first, a, b, last, biased = 0, 0, keys // N, columns, 0 > 1
    return (first, a, b, last), biased


@triton.jit
def count(part: tl.constexpr, run, biased):
    """How many tiles each of three loops meets: open ones; others, of bits that say who sees whom; or with biases."""
    first, a, b, last = run
    others = last - first - (b - a)
    if part == 0:
        return b - a
    elif part == 1:
        return tl.where(biased, 0, others)
    else:
        return tl.where(biased, others, 0)


@triton.jit
def nth(part: tl.constexpr, i, run):
    """The i-th tile of such a loop."""
    first, a, b, _ = run
    if part == 0:
        return a + i
    else:
        return first + i + tl.where(first + i >= a, b - a, 0)


@triton.jit
def masked(part: tl.constexpr, score, t, where, MASKED: tl.constexpr):
    """Scores of tile t in units of log 2, with what the mask adds in such a loop; -inf where hidden."""
    M: tl.constexpr = score.shape[0]
    N: tl.constexpr = score.shape[1]
    mask, bits, first, length, keys, m_l, m_s, least = where
    if part == 1:
        start, apart = bits
        own = start + t.to(tl.int64) * (tl.cdiv(N, WORD) * apart)
        score = tl.where(visible((own, apart), t * N, keys, MASKED, M, N), score, float("-inf"))
    elif part == 2:
        score += bias(mask, first, t * N, length, keys, m_l, m_s, least, MASKED, M, N) * LOG2E
    return score


@triton.jit
def seen_by(mask, bits, pair, heads, first, length, keys, m_b, m_h, m_l, m_s, f_b, f_h, least, tiles, M: tl.constexpr,
            N: tl.constexpr):  # fmt: skip
    """What :func:`masked` takes for a tile of queries."""
    batch, head = (pair // heads).to(tl.int64), (pair % heads).to(tl.int64)
    bits += (batch * f_b + head * f_h) * (tl.cdiv(N, WORD) * M) + first
    return mask + batch * m_b + head * m_h, (bits, tiles * M), first, length, keys, m_l, m_s, least


@triton.jit
def matrix(start, t, N: tl.constexpr, E: tl.constexpr):
    """Tile t of a dense matrix of E columns."""
    return tl.load(start + t.to(tl.int64) * (N * E) + tl.arange(0, N)[:, None] * E + tl.arange(0, E)[None, :])


@triton.jit
def store(out, context, pair, heads, first, length, SIZE: tl.constexpr):
    """A tile ``[M, E]`` of the output ``[B, L, H, SIZE]``."""
    row, e = first + tl.arange(0, context.shape[0]), tl.arange(0, context.shape[1])
    place = ((pair // heads).to(tl.int64) * length + row) * heads + pair % heads
    there = (row < length)[:, None] & (e < SIZE)[None, :]
    tl.store(out + place[:, None] * SIZE + e[None, :], codes.rounded(context, out.dtype.element_ty), there)


@triton.jit(do_not_specialize=["p_b", "p_g", "u_b", "u_g"])
def _unpack(
    packed,
    unit,
    threshold,
    multiple,
    out,
    units,
    plane,
    logs,
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
        own = tl.load(unit + batch * u_b + group * u_g + key * u_s, exists, other=0.0)
        tl.store(units + place, own)
        tl.store(units + logs + place, tl.log2(own))


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
        token; and those of tokens, fp32, with their logarithms to base 2, ``[2, B, G, span]`` (nothing where they have
        none).
    """
    (batch, groups, keys), oat = train.codes.shape[:3], train.units is train.codes
    device = train.codes.device
    out = torch.empty((1 + split, batch, groups, span, padded(size)), dtype=dtype, device=device)
    units = torch.empty(0 if oat else (2, batch, groups, span), dtype=torch.float32, device=device)
    run(
        _unpack, (span // KEYS, batch * groups), train.codes, train.units, parameter, parameter, out, units,
        out.stride(0), batch * groups * span, groups, keys, span, *train.places, *train.unit_places, WORD=train.word,
        OAT=oat, TWO=oat and len(parameter) == 2, SPLIT=split, SIZE=size, E=padded(size), N=KEYS,
    )  # fmt: skip
    return out, units
