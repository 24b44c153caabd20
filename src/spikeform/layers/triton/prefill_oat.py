"""Prefill with multi-threshold populations: two kernels, each of which finds the scores anew.

``_sums`` meets the keys twice, for the largest score of each row and for the sum of its terms. A sum could be rescaled
as the maximum grows, but not one of HG terms: each is rounded as the true maximum has it. ``_context`` meets them once
more, and sums codes of the probabilities times values.
"""

from __future__ import annotations

import triton
import triton.language as tl

from spikeform.layers.triton import tiles
from spikeform.neurons.triton import codes
from spikeform.neurons.triton.oat import units as units_of


@triton.jit
def _mine(query, key, value, TWO_Q: tl.constexpr, TWO_K: tl.constexpr, TWO_V: tl.constexpr, SPLIT: tl.constexpr):
    """Whether a kernel of so many planes does it: either a bf16 holds what every code stands for, or it does not."""
    one = tiles.power(query, TWO_Q) & tiles.power(key, TWO_K)
    return (one & tiles.power(value, TWO_V)) != SPLIT


@triton.jit
def _queries(q, plane, pair, first, length, M: tl.constexpr, E: tl.constexpr, SPLIT: tl.constexpr):
    """A tile of queries, and its lower plane."""
    row, e = first + tl.arange(0, M), tl.arange(0, E)
    at = q + pair.to(tl.int64) * length * E + row[:, None].to(tl.int64) * E + e[None, :]
    exists = (row < length)[:, None]
    high = tl.load(at, exists, other=0.0)
    return high, tl.load(at + plane, exists, other=0.0) if SPLIT else high


@triton.jit
def _scores(
    part: tl.constexpr,
    q,
    q_low,
    k,
    plane,
    t,
    scale,
    where,
    MASKED: tl.constexpr,
    SPLIT: tl.constexpr,
    N: tl.constexpr,
):
    """Scores of a tile in units of log 2, ``[M, N]``; -inf where hidden. ``where``: what :func:`tiles.masked` takes."""
    E: tl.constexpr = q.shape[1]
    M: tl.constexpr = q.shape[0]
    high = tl.trans(tiles.matrix(k, t, N, E))
    sums = tiles.dot(q, high, tl.zeros((M, N), tl.float32))
    if SPLIT:
        sums = tiles.dot(q_low, high, sums)
        sums = tiles.dot(q, tl.trans(tiles.matrix(k + plane, t, N, E)), sums)
    return tiles.masked(part, sums * scale, t, where, MASKED)


@triton.jit
def _term(score, most, top, floor, BITS: tl.constexpr, NEAREST: tl.constexpr):
    """``2^(score - most)``, through an HG neuron where there is one."""
    e = tl.exp2(score - most)
    if BITS > 0:
        e = codes.round_mantissa(e, BITS, NEAREST, top, floor, False)
    return e


@triton.jit(do_not_specialize=["length", "m_b", "m_h", "f_b", "f_h"])
def _sums(
    q,
    k,
    tops,
    shares,
    mask,
    flags,
    bits,
    query_threshold,
    key_threshold,
    value_threshold,
    q_plane,
    plane,
    least,
    scaling,
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
    BITS: tl.constexpr,
    NEAREST: tl.constexpr,
    MASKED: tl.constexpr,
    SPLIT: tl.constexpr,
    ALONE: tl.constexpr,
    E: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    TILES: tl.constexpr,
    STAGES: tl.constexpr,
):
    if not ALONE:  # noqa: SIM102, known when it is compiled
        if not _mine(query_threshold, key_threshold, value_threshold, TWO_Q, TWO_K, TWO_V, SPLIT):
            return
    pair, tile = tl.program_id(0), tl.num_programs(1) - 1 - tl.program_id(1)  # what meets most keys goes first
    batch, head = (pair // heads).to(tl.int64), (pair % heads).to(tl.int64)
    first = tile * M
    high, low = _queries(q, q_plane, pair, first, length, M, E, SPLIT)
    unit0 = tl.div_rn(tl.load(query_threshold), resolution)
    scale = unit0 * tl.div_rn(tl.load(key_threshold), resolution) * scaling * tiles.LOG2E
    k += (batch * groups + head // (heads // groups)) * span * E
    where = tiles.seen_by(
        mask, bits, pair, heads, first, length, keys, m_b, m_h, m_l, m_s, f_b, f_h, least, tl.num_programs(1), M, N
    )
    run, biased = tiles.runs(flags, pair, heads, f_b, f_h, tile, keys, MASKED, N, TILES)

    # Of each place in a tile, and of the rows only behind the loop: so nothing leaves its thread.
    highest = tl.full((M, N), float("-inf"), tl.float32)
    for part in tl.static_range(3 if MASKED else 2):
        for i in tl.range(0, tiles.count(part, run, biased), num_stages=STAGES):
            t = tiles.nth(part, i, run)
            score = _scores(part, high, low, k, plane, t, scale, where, MASKED, SPLIT, N)
            highest = tl.maximum(highest, score)
    most = tl.max(highest, 1)
    most = tl.where(most > float("-inf"), most, 0.0)  # of a row that sees nothing all terms are zero

    terms = tl.zeros((M, N), tl.float32)
    for part in tl.static_range(3 if MASKED else 2):
        for i in tl.range(0, tiles.count(part, run, biased), num_stages=STAGES):
            t = tiles.nth(part, i, run)
            score = _scores(part, high, low, k, plane, t, scale, where, MASKED, SPLIT, N)
            terms += _term(score, most[:, None], top, floor, BITS, NEAREST)
    inverse = codes.inverse(tl.maximum(tl.sum(terms, 1), 0.5))
    if BITS > 0:
        inverse = codes.round_mantissa(inverse, BITS, NEAREST, top, floor, False)
    row = first + tl.arange(0, M)
    at = pair.to(tl.int64) * length + row
    tl.store(tops + at, most, row < length)
    tl.store(shares + at, inverse, row < length)


@triton.jit(do_not_specialize=["length", "m_b", "m_h", "f_b", "f_h"])
def _context(
    q,
    k,
    v,
    tops,
    shares,
    out,
    mask,
    flags,
    bits,
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
    if not ALONE:  # noqa: SIM102, known when it is compiled
        if not _mine(query_threshold, key_threshold, value_threshold, TWO_Q, TWO_K, TWO_V, SPLIT):
            return
    pair, tile = tl.program_id(0), tl.num_programs(1) - 1 - tl.program_id(1)
    batch, head = (pair // heads).to(tl.int64), (pair % heads).to(tl.int64)
    first = tile * M
    q_high, q_low = _queries(q, q_plane, pair, first, length, M, E, SPLIT)
    unit = tl.div_rn(tl.load(query_threshold), resolution)
    scale = unit * tl.div_rn(tl.load(key_threshold), resolution) * scaling * tiles.LOG2E
    row = first + tl.arange(0, M)
    at = pair.to(tl.int64) * length + row
    most, inverse = tl.load(tops + at, row < length, other=0.0), tl.load(shares + at, row < length, other=0.0)
    group = batch * groups + head // (heads // groups)
    k += group * span * E
    v += group * span * E
    where = tiles.seen_by(
        mask, bits, pair, heads, first, length, keys, m_b, m_h, m_l, m_s, f_b, f_h, least, tl.num_programs(1), M, N
    )
    run, biased = tiles.runs(flags, pair, heads, f_b, f_h, tile, keys, MASKED, N, TILES)

    threshold0, threshold1, unit0, unit1 = units_of(probability_threshold, resolution, TWO_P)
    ratio = tl.div_rn(threshold1, threshold0)
    sums = tl.zeros((M, E), tl.float32)
    for part in tl.static_range(3 if MASKED else 2):
        for i in tl.range(0, tiles.count(part, run, biased), num_stages=STAGES):
            t = tiles.nth(part, i, run)
            score = _scores(part, q_high, q_low, k, plane, t, scale, where, MASKED, SPLIT, N)
            p = _term(score, most[:, None], top, floor, BITS, NEAREST) * inverse[:, None]
            code, outlier = codes.oat_code(p, threshold0, threshold1, unit0, unit1, peak, TWO_P, ROUNDING, False)
            if TWO_P:
                code *= tl.where(outlier, ratio, 1.0)
            high, low = tiles.planes(code)
            value = tiles.matrix(v, t, N, E)
            sums = tiles.dot(high, value, sums)
            if SPLIT_P:
                sums = tiles.dot(low, value, sums)
            if SPLIT:
                sums = tiles.dot(high, tiles.matrix(v + plane, t, N, E), sums)
    unit = unit0 * tl.div_rn(tl.load(value_threshold), resolution)
    tiles.store(out, sums * unit, pair, heads, first, length, SIZE)
