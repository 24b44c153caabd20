"""Prefill with GIF populations: two kernels, each of which finds the integer scores anew.

Scores s are in units of log 2. With u the unit of a key's value, a row's codes are ``round(peak 2^(s - top) u)``, top
being the largest ``s + log2 u``: the largest probability, in the values' units, has the code ``peak``. ``_tops`` finds
it. ``_context`` sums codes times values, and the terms too: the unit of the result is ``1 / (peak sum 2^(s - top))``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from spikeform.layers.triton import tiles
from spikeform.neurons.triton import codes


@triton.jit
def _products(q, k, units, t, N: tl.constexpr):
    """Integer products of a tile, times the units of its keys: fp32 ``[M, N]``."""
    E: tl.constexpr = q.shape[1]
    M: tl.constexpr = q.shape[0]
    sums = tiles.dot(q, tl.trans(tiles.matrix(k, t, N, E)), tl.zeros((M, N), tl.int32)).to(tl.float32)
    return sums * tl.load(units + t * N + tl.arange(0, N))[None, :]


@triton.jit
def _queries(q, row_units, scaling, pair, heads, first, length, q_b, q_h, q_l, M: tl.constexpr, SIZE: tl.constexpr,
             E: tl.constexpr):  # fmt: skip
    """Integers of a tile of queries, and what one of theirs is in units of log 2."""
    row, e = first + tl.arange(0, M), tl.arange(0, E)
    at = q + (pair // heads).to(tl.int64) * q_b + (pair % heads).to(tl.int64) * q_h + row[:, None].to(tl.int64) * q_l
    code = tl.load(at + e[None, :], (row < length)[:, None] & (e < SIZE)[None, :], other=0)
    unit = tl.load(row_units + pair.to(tl.int64) * length + row, row < length, other=0.0)
    return code, unit * (scaling * tiles.LOG2E)


@triton.jit(do_not_specialize=["length", "m_b", "m_h", "f_b", "f_h"])
def _tops(
    q,
    row_units,
    k,
    k_units,
    v_units,
    tops,
    mask,
    flags,
    bits,
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
    plane,
    MASKED: tl.constexpr,
    SIZE: tl.constexpr,
    E: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    TILES: tl.constexpr,
    STAGES: tl.constexpr,
):
    pair, tile = tl.program_id(0), tl.num_programs(1) - 1 - tl.program_id(1)  # what meets most keys goes first
    batch, head = (pair // heads).to(tl.int64), (pair % heads).to(tl.int64)
    first = tile * M
    code, unit = _queries(q, row_units, scaling, pair, heads, first, length, q_b, q_h, q_l, M, SIZE, E)
    group = batch * groups + head // (heads // groups)
    k += group * span * E
    k_units += group * span
    logs = v_units + plane + group * span
    where = tiles.seen_by(
        mask, bits, pair, heads, first, length, keys, m_b, m_h, m_l, m_s, f_b, f_h, least, tl.num_programs(1), M, N
    )
    run, biased = tiles.runs(flags, pair, heads, f_b, f_h, tile, keys, MASKED, N, TILES)

    terms = tl.full((M, N), float("-inf"), tl.float32)  # the largest that each place of a tile has met
    for part in tl.static_range(3 if MASKED else 2):
        for i in tl.range(0, tiles.count(part, run, biased), num_stages=STAGES):
            t = tiles.nth(part, i, run)
            score = _products(code, k, k_units, t, N) * unit[:, None]
            score = tiles.masked(part, score, t, where, MASKED)
            terms = tl.maximum(terms, score + tl.load(logs + t * N + tl.arange(0, N))[None, :])
    row = first + tl.arange(0, M)
    top = tl.max(terms, 1)
    # Where no key is seen all terms are zero.
    tl.store(tops + pair.to(tl.int64) * length + row, tl.where(top > float("-inf"), top, 0.0), row < length)


@triton.jit(do_not_specialize=["length", "m_b", "m_h", "f_b", "f_h"])
def _context(
    q,
    row_units,
    k,
    k_units,
    v,
    v_units,
    tops,
    out,
    mask,
    flags,
    bits,
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
    code, unit = _queries(q, row_units, scaling, pair, heads, first, length, q_b, q_h, q_l, M, SIZE, E)
    row = first + tl.arange(0, M)
    at = pair.to(tl.int64) * length + row
    top = tl.load(tops + at, row < length, other=0.0)
    group = batch * groups + head // (heads // groups)
    k += group * span * E
    v += group * span * E
    k_units += group * span
    v_units += group * span
    where = tiles.seen_by(
        mask, bits, pair, heads, first, length, keys, m_b, m_h, m_l, m_s, f_b, f_h, least, tl.num_programs(1), M, N
    )
    run, biased = tiles.runs(flags, pair, heads, f_b, f_h, tile, keys, MASKED, N, TILES)

    sums = tl.zeros((M, E), tl.float32)
    total = tl.zeros((M, N), tl.float32)
    for part in tl.static_range(3 if MASKED else 2):
        for i in tl.range(0, tiles.count(part, run, biased), num_stages=STAGES):
            t = tiles.nth(part, i, run)
            score = _products(code, k, k_units, t, N) * unit[:, None] - top[:, None]
            score = tiles.masked(part, score, t, where, MASKED)
            step = tl.load(v_units + t * N + tl.arange(0, N)) * peak
            term = tl.exp2(score)
            total += term
            sent = term * step[None, :] + codes.WHOLE  # the code is in its last bits, byte by byte
            upper = (sent.to(tl.int32, bitcast=True) & -256).to(tl.float32, bitcast=True)
            high, low = (upper - codes.WHOLE).to(tl.bfloat16), (sent - upper).to(tl.bfloat16)
            value = tiles.matrix(v, t, N, E)
            sums = tiles.dot(low, value, tiles.dot(high, value, sums))
    whole = tl.sum(total, 1)
    seen = whole > 0.0
    share = tl.where(seen, tl.div_rn(1.0, tl.where(seen, whole, 1.0) * peak), 0.0)
    tiles.store(out, sums * share[:, None], pair, heads, first, length, SIZE)
