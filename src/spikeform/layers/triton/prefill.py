"""Attention of many queries on cached codes: bound by tensor cores; scores are found anew in each pass, never kept.

A program has a tile of queries of one head, and meets the keys tile by tile, in three passes: the largest score; the
sum of the terms, and for GIF the largest of them in the values' units; then codes of the probabilities and their
product with the values. A sum could be rescaled as the maximum grows, but not one of HG terms: each is rounded as the
true maximum has it.

Exponentials are the bare hardware instruction's (2^-22), which moves a code only at a rounding edge.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from spikeform.layers.triton import tiles
from spikeform.layers.triton.operands import Counts, Mask, Populations, Train, cdiv, padded, pow2, run
from spikeform.layers.triton.query import encode_oat
from spikeform.neurons.oat import ROUNDINGS
from spikeform.neurons.triton import codes
from spikeform.neurons.triton.oat import units as units_of

BF16 = 256  # integers up to here, and their products with powers of two, are bf16


@triton.jit
def _matrix(start, t, N: tl.constexpr, E: tl.constexpr):
    """Tile t of a dense matrix of E columns."""
    return tl.load(start + t.to(tl.int64) * (N * E) + tl.arange(0, N)[:, None] * E + tl.arange(0, E)[None, :])


@triton.jit
def _nth(i, first, a, b):
    """The i-th tile that is met, and whether the mask matters there.

    First come those from ``a`` to ``b``, where it does not, then those before and behind them.
    """
    mixed = i >= b - a
    t = first + i - (b - a)
    return tl.where(mixed, t + tl.where(t >= a, b - a, 0), a + i), mixed


@triton.jit
def _oat_scores(
    q,
    q_low,
    k,
    plane,
    t,
    scale,
    where,
    mixed,
    MASKED: tl.constexpr,
    SPLIT: tl.constexpr,
    N: tl.constexpr,
):
    """Scores of a tile in units of log 2, ``[M, N]``; -inf where hidden. ``where``: what :func:`tiles.bias` takes."""
    E: tl.constexpr = q.shape[1]
    M: tl.constexpr = q.shape[0]
    high = tl.trans(_matrix(k, t, N, E))
    sums = tiles.dot(q, high, tl.zeros((M, N), tl.float32))
    if SPLIT:
        sums = tiles.dot(q_low, high, sums)
        sums = tiles.dot(q, tl.trans(_matrix(k + plane, t, N, E)), sums)
    sums *= scale
    if mixed:
        mask, first, length, keys, m_l, m_s, least = where
        sums += tiles.bias(mask, first, t * N, length, keys, m_l, m_s, least, MASKED, M, N) * tiles.LOG2E
    return sums


@triton.jit
def _term(score, most, top, floor, BITS: tl.constexpr, NEAREST: tl.constexpr):
    """``2^(score - most)``, through an HG neuron where there is one."""
    e = tl.exp2(score - most)
    if BITS > 0:
        e = codes.round_mantissa(e, BITS, NEAREST, top, floor, False)
    return e


@triton.jit
def _oat_weigh(
    sums,
    p,
    v,
    plane,
    t,
    form,
    TWO: tl.constexpr,
    ROUNDING: tl.constexpr,
    SPLIT_P: tl.constexpr,
    SPLIT: tl.constexpr,
    N: tl.constexpr,
):
    """``sums`` plus codes of a tile's probabilities times its values."""
    threshold0, threshold1, unit0, unit1, ratio, peak = form
    E: tl.constexpr = sums.shape[1]
    code, outlier = codes.oat_code(p, threshold0, threshold1, unit0, unit1, peak, TWO, ROUNDING)
    if TWO:
        code *= tl.where(outlier, ratio, 1.0)
    value = _matrix(v, t, N, E)
    high, low = tiles.planes(code)
    sums = tiles.dot(high, value, sums)
    if SPLIT_P:
        sums = tiles.dot(low, value, sums)
    if SPLIT:
        sums = tiles.dot(high, _matrix(v + plane, t, N, E), sums)
    return sums


@triton.jit
def _store(out, context, pair, heads, first, length, SIZE: tl.constexpr):
    """A tile ``[M, E]`` of the output ``[B, L, H, SIZE]``."""
    row, e = first + tl.arange(0, context.shape[0]), tl.arange(0, context.shape[1])
    place = ((pair // heads).to(tl.int64) * length + row) * heads + pair % heads
    there = (row < length)[:, None] & (e < SIZE)[None, :]
    tl.store(out + place[:, None] * SIZE + e[None, :], codes.rounded(context, out.dtype.element_ty), there)


@triton.jit(do_not_specialize=["length", "m_b", "m_h", "f_b", "f_h"])
def _oat(
    q,
    k,
    v,
    out,
    mask,
    flags,
    query_threshold,
    key_threshold,
    value_threshold,
    probability_threshold,
    q_plane,
    plane,
    least,
    scaling,
    peak,
    resolution,
    top,
    floor,
    heads,
    groups,
    length,
    keys,
    span,
    m_b,
    m_h,
    m_l,
    m_s,
    f_b,
    f_h,
    TWO_Q: tl.constexpr,
    TWO_K: tl.constexpr,
    TWO_V: tl.constexpr,
    TWO_P: tl.constexpr,
    ROUNDING: tl.constexpr,
    BITS: tl.constexpr,
    NEAREST: tl.constexpr,
    MASKED: tl.constexpr,
    SPLIT_P: tl.constexpr,
    SPLIT: tl.constexpr,
    ALONE: tl.constexpr,
    SIZE: tl.constexpr,
    E: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    TILES: tl.constexpr,
    STAGES: tl.constexpr,
):
    if not ALONE:
        # Of two kernels one does it: either a bf16 holds what every code stands for, or it does not.
        one = tiles.power(query_threshold, TWO_Q) & tiles.power(key_threshold, TWO_K)
        if (one & tiles.power(value_threshold, TWO_V)) == SPLIT:
            return
    pair, tile = tl.program_id(0), tl.num_programs(1) - 1 - tl.program_id(1)  # what meets most keys goes first
    batch, head = (pair // heads).to(tl.int64), (pair % heads).to(tl.int64)
    first = tile * M
    q += pair.to(tl.int64) * length * E
    row, e = first + tl.arange(0, M), tl.arange(0, E)
    exists = (row < length)[:, None]
    high = tl.load(q + row[:, None].to(tl.int64) * E + e[None, :], exists, other=0.0)
    low = tl.load(q + q_plane + row[:, None].to(tl.int64) * E + e[None, :], exists, other=0.0) if SPLIT else high
    unit0 = tl.div_rn(tl.load(query_threshold), resolution)
    scale = unit0 * tl.div_rn(tl.load(key_threshold), resolution) * scaling * tiles.LOG2E

    group = batch * groups + head // (heads // groups)
    k += group * span * E
    v += group * span * E
    mask += batch * m_b + head * m_h
    where = (mask, first, length, keys, m_l, m_s, least)
    start, a, b, last = tiles.runs(flags, pair, heads, f_b, f_h, tile, keys, MASKED, N, TILES)

    # Of each place in a tile, and of the rows only behind the loop: so nothing leaves its thread.
    highest = tl.full((M, N), float("-inf"), tl.float32)
    for i in tl.range(0, last - start, num_stages=STAGES):
        t, mixed = _nth(i, start, a, b)
        score = _oat_scores(high, low, k, plane, t, scale, where, mixed, MASKED, SPLIT, N)
        highest = tl.maximum(highest, score)
    most = tl.max(highest, 1)
    alive = most > float("-inf")
    most = tl.where(alive, most, 0.0)

    terms = tl.zeros((M, N), tl.float32)
    for i in tl.range(0, last - start, num_stages=STAGES):
        t, mixed = _nth(i, start, a, b)
        score = _oat_scores(high, low, k, plane, t, scale, where, mixed, MASKED, SPLIT, N)
        terms += _term(score, most[:, None], top, floor, BITS, NEAREST)
    inverse = codes.inverse(tl.maximum(tl.sum(terms, 1), 0.5))
    if BITS > 0:
        inverse = codes.round_mantissa(inverse, BITS, NEAREST, top, floor, False)

    threshold0, threshold1, unit0, unit1 = units_of(probability_threshold, resolution, TWO_P)
    ratio = tl.div_rn(threshold1, threshold0)
    form = (threshold0, threshold1, unit0, unit1, ratio, peak)
    sums = tl.zeros((M, E), tl.float32)
    for i in tl.range(0, last - start, num_stages=STAGES):
        t, mixed = _nth(i, start, a, b)
        score = _oat_scores(high, low, k, plane, t, scale, where, mixed, MASKED, SPLIT, N)
        p = _term(score, most[:, None], top, floor, BITS, NEAREST) * inverse[:, None]
        sums = _oat_weigh(sums, p, v, plane, t, form, TWO_P, ROUNDING, SPLIT_P, SPLIT, N)
    unit = unit0 * tl.div_rn(tl.load(value_threshold), resolution)
    _store(out, tl.where(alive[:, None], sums * unit, 0.0), pair, heads, first, length, SIZE)


@triton.jit
def _gif_scores(q, row_unit, k, units, t, where, mixed, MASKED: tl.constexpr, N: tl.constexpr):
    """As :func:`_oat_scores`, of integers."""
    E: tl.constexpr = q.shape[1]
    M: tl.constexpr = q.shape[0]
    sums = tiles.dot(q, tl.trans(_matrix(k, t, N, E)), tl.zeros((M, N), tl.int32)).to(tl.float32)
    sums = sums * row_unit[:, None] * tl.load(units + t * N + tl.arange(0, N))[None, :]
    if mixed:
        mask, first, length, keys, m_l, m_s, least = where
        sums += tiles.bias(mask, first, t * N, length, keys, m_l, m_s, least, MASKED, M, N) * tiles.LOG2E
    return sums


@triton.jit
def _gif_weigh(sums, score, most, share, peak, v, units, t, N: tl.constexpr):
    """``sums`` plus codes of a tile's probabilities times the integers of its values."""
    E: tl.constexpr = sums.shape[1]
    e = tl.exp2(score - most[:, None]) * tl.load(units + t * N + tl.arange(0, N))[None, :]
    high, low = tiles.planes(tl.minimum(codes.round_even(e * share[:, None]), peak))
    value = _matrix(v, t, N, E)
    return tiles.dot(low, value, tiles.dot(high, value, sums))


@triton.jit(do_not_specialize=["length", "m_b", "m_h", "f_b", "f_h"])
def _gif(
    q,
    row_units,
    k,
    k_units,
    v,
    v_units,
    out,
    mask,
    flags,
    least,
    scaling,
    peak,
    heads,
    groups,
    length,
    keys,
    span,
    q_b,
    q_h,
    q_l,
    m_b,
    m_h,
    m_l,
    m_s,
    f_b,
    f_h,
    MASKED: tl.constexpr,
    SIZE: tl.constexpr,
    E: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    TILES: tl.constexpr,
    STAGES: tl.constexpr,
):
    pair, tile = tl.program_id(0), tl.num_programs(1) - 1 - tl.program_id(1)
    batch, head = (pair // heads).to(tl.int64), (pair % heads).to(tl.int64)
    first = tile * M
    row, e = first + tl.arange(0, M), tl.arange(0, E)
    at = q + batch * q_b + head * q_h + row[:, None].to(tl.int64) * q_l + e[None, :]
    code = tl.load(at, (row < length)[:, None] & (e < SIZE)[None, :], other=0)
    row_unit = tl.load(row_units + pair.to(tl.int64) * length + row, row < length, other=0.0)
    row_unit *= scaling * tiles.LOG2E

    group = batch * groups + head // (heads // groups)
    k += group * span * E
    v += group * span * E
    k_units += group * span
    v_units += group * span
    mask += batch * m_b + head * m_h
    where = (mask, first, length, keys, m_l, m_s, least)
    start, a, b, last = tiles.runs(flags, pair, heads, f_b, f_h, tile, keys, MASKED, N, TILES)

    highest = tl.full((M, N), float("-inf"), tl.float32)
    for i in tl.range(0, last - start, num_stages=STAGES):
        t, mixed = _nth(i, start, a, b)
        highest = tl.maximum(highest, _gif_scores(code, row_unit, k, k_units, t, where, mixed, MASKED, N))
    most = tl.max(highest, 1)
    most = tl.where(most > float("-inf"), most, 0.0)

    terms = tl.zeros((M, N), tl.float32)
    heights = tl.zeros((M, N), tl.float32)
    for i in tl.range(0, last - start, num_stages=STAGES):
        t, mixed = _nth(i, start, a, b)
        term = tl.exp2(_gif_scores(code, row_unit, k, k_units, t, where, mixed, MASKED, N) - most[:, None])
        terms += term
        heights = tl.maximum(heights, term * tl.load(v_units + t * N + tl.arange(0, N))[None, :])
    total, largest = tl.sum(terms, 1), tl.max(heights, 1)

    # Dynamic: the largest probability, in the values' units, has the code ``peak``. The sum of the terms cancels.
    seen = largest > 0.0
    share = tl.where(seen, tl.div_rn(largest * 0.0 + peak, tl.where(seen, largest, 1.0)), 0.0)
    sums = tl.zeros((M, E), tl.float32)
    for i in tl.range(0, last - start, num_stages=STAGES):
        t, mixed = _nth(i, start, a, b)
        score = _gif_scores(code, row_unit, k, k_units, t, where, mixed, MASKED, N)
        sums = _gif_weigh(sums, score, most, share, peak, v, v_units, t, N)
    unit = tl.div_rn(largest, tl.maximum(total, 0.5) * peak)
    _store(out, sums * unit[:, None], pair, heads, first, length, SIZE)


def attend(
    q: Tensor,
    q_unit: Tensor | None,
    k: Train,
    v: Train,
    mask: Mask,
    scaling: float,
    rule: Populations | Counts,
    size: int,
    out: Tensor,
    form: Form | None = None,
) -> None:
    """Fill ``out`` ``[B, L, H, E]``; as :func:`spikeform.layers.triton.decode.attend`, for many queries.

    Args:
        q: ``[B, H, L, E or more]``, the last axis dense: real, or integers of the unit ``q_unit`` ``[B, H, L]``.
        q_unit: None for real queries.
        k: Cached keys.
        v: Cached values.
        mask: Who sees what.
        scaling: Factor of the scores.
        rule: What encodes: :class:`Populations` of real queries, :class:`Counts` of integers.
        size: E.
        out: Contiguous.
        form: Sizes; None: what suits.
    """
    batch, length, heads, _ = out.shape
    groups, keys = k.codes.shape[1:3]
    one, two = variants(rule, q.dtype)
    form = form or form_of(length, padded(size), two)
    multiple = max(form.keys, tiles.KEYS)
    span = cdiv(keys, multiple) * multiple
    flags, f_b, f_h = tiles.look(mask, length, keys, form.rows, form.keys, out.device)
    values = q if mask.values is None else mask.values
    grid, sizes, places = (batch * heads, cdiv(length, form.rows)), (heads, groups, length, keys, span), mask.places
    constants = {
        "MASKED": mask.values is not None, "SIZE": size, "E": padded(size), "M": form.rows, "N": form.keys,
        "TILES": pow2(flags.shape[-1]), "STAGES": form.stages, "num_warps": form.warps,
    }  # fmt: skip
    if isinstance(rule, Counts):
        dense_keys, key_units = tiles.unpack(k, rule.key, size, span, torch.int8)
        dense_values, value_units = tiles.unpack(v, rule.value, size, span, torch.bfloat16)
        run(
            _gif, grid, q, q_unit, dense_keys, key_units, dense_values, value_units, out, values, flags, mask.least,
            scaling, rule.peak, *sizes, *q.stride()[:3], *places, f_b, f_h, **constants,
        )  # fmt: skip
        return
    queries = encode_oat(q, rule, two)
    dense_keys, _ = tiles.unpack(k, rule.key, size, span, torch.bfloat16, two)
    dense_values, _ = tiles.unpack(v, rule.value, size, span, torch.bfloat16, two)
    thresholds = rule.query, rule.key, rule.value, rule.probability
    pairs = {f"TWO_{name}": len(t) == 2 for name, t in zip("QKVP", thresholds, strict=True)}
    for split in [False] * one + [True] * two:
        run(
            _oat, grid, queries, dense_keys, dense_values, out, values, flags, *thresholds, queries.stride(0),
            dense_keys.stride(0), mask.least, scaling, rule.peak, float(rule.resolution), rule.top, rule.floor, *sizes,
            *places, f_b, f_h, **pairs, ROUNDING=rule.rounding, BITS=rule.bits, NEAREST=rule.nearest,
            SPLIT_P=rule.peak > BF16 or pairs["TWO_P"], SPLIT=split, ALONE=one != two, **constants,
        )  # fmt: skip


def variants(rule: Populations | Counts, dtype: torch.dtype) -> tuple[bool, bool]:
    """Whether one bf16 may hold what codes of queries, keys and values stand for, and whether it may take two.

    Where both may be, the thresholds decide, and only the device knows them.

    Args:
        rule: What encodes.
        dtype: Of real queries, and so of the keys and values that were encoded.
    """
    if isinstance(rule, Counts):
        return True, False
    if rule.limit > BF16:
        # A limit of 8 significant bits belongs to thresholds that are powers of two: codes are then as short as inputs.
        low = rule.limit & -rule.limit
        one = rule.limit // low < BF16 and dtype == torch.bfloat16 and ROUNDINGS[rule.rounding] != "strict"
        return one, not one
    return True, any(len(t) == 2 for t in (rule.query, rule.key, rule.value))


class Form(NamedTuple):
    """Sizes of a program.

    Args:
        rows: Queries of a tile.
        keys: Keys of a tile.
        stages: Tiles under way.
        warps: Of a program.
    """

    rows: int
    keys: int
    stages: int
    warps: int


MEMORY = 192 * 2**10  # bytes of a program's shared memory; the rest is for what changes places


def form_of(length: int, size: int, split: bool) -> Form:
    """What suits so many queries of E channels, in one plane or two."""
    rows, keys, stages = min(max(pow2(length), 16), 128), 64, 3

    def bytes_of(rows: int, keys: int, stages: int) -> int:
        return 2 * size * (1 + split) * (rows + 2 * keys * stages)

    while bytes_of(rows, keys, stages) > MEMORY and stages > 2:
        stages -= 1
    while bytes_of(rows, keys, stages) > MEMORY and rows > 64:
        rows //= 2
    while bytes_of(rows, keys, stages) > MEMORY and keys > 16:
        keys //= 2
    return Form(rows, keys, stages, 8 if rows == 128 else 4)
