"""Attention of few queries on a short cache, in one kernel: there the time between kernels is longer than they are.

A program has some channels of one key/value head's output. It finds all scores of its rows (as other programs of that
head do: keys come from the cache that all processors share), and keeps them in scratch of its own; then their softmax
and what neurons send for it; then it sums values. Before that it may encode a token's key and value, of all programs
of the head alike, and put them into the cache: then what it knows takes the place of what the cache holds, and nobody
has to wait for another. Queries and the key are turned by their position first, if they are to be.

Codes of earlier tokens are asked for before the kernel waits for the one before it. They go into the processors' common
cache, which is right whoever writes meanwhile; the registers' copy is read after that.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from spikeform.layers.triton import few
from spikeform.layers.triton.append import coded_gif, coded_oat, put_unit, turned
from spikeform.layers.triton.operands import Counts, Mask, Populations, Train, cdiv, dense, padded, pow2, run, settings
from spikeform.neurons.triton.codes import gif_unit, to_integer
from spikeform.synapses.triton.launch import meta
from spikeform.synapses.triton.operands import ask_run, await_inputs, release

ROWS = 16  # queries of a key/value head
KEYS = 512  # of more, kernels that share them are faster
BYTES = 2**18  # of the keys of a head, which each of its programs reads
PROGRAMS = 132  # as many as there are processors


@triton.jit
def _cached(key, begin, end, place, APPEND: tl.constexpr):
    """Which keys are read from the cache."""
    there = (key >= begin) & (key < end)
    if APPEND:
        there = there & (key != place)
    return there


@triton.jit
def _units(units, key, apart, begin, end, place, own, APPEND: tl.constexpr):
    """Units of values ``[1, N]``, ``own`` that of the new one."""
    found = tl.load(units + key * apart, _cached(key, begin, end, place, APPEND), other=0.0)
    if APPEND:
        found = tl.where(key == place, own, found)
    return found[None, :]


# As a cache grows little is to be compiled anew.
@triton.jit(
    do_not_specialize=["k_b", "k_g", "ku_b", "ku_g", "v_b", "v_g", "vu_b", "vu_g", "m_b", "m_h", "m_l"],
    do_not_specialize_on_alignment=["mask"],
)
def _attend(
    q,
    q_unit,
    k,
    k_unit,
    v,
    v_unit,
    mask,
    scores,
    sent,
    out,
    token,
    turn,
    query_table,
    key_table,
    value_table,
    probability_table,
    least,
    scaling,
    limit,
    resolution,
    key_steps,
    value_steps,
    peak,
    top,
    floor,
    heads,
    groups,
    length,
    keys,
    q_b,
    q_h,
    q_l,
    k_b,
    k_g,
    k_s,
    ku_b,
    ku_g,
    ku_s,
    v_b,
    v_g,
    v_s,
    vu_b,
    vu_g,
    vu_s,
    m_b,
    m_h,
    m_l,
    m_s,
    token_b,
    token_g,
    turn_b,
    line,
    line_threshold,
    line_limit,
    line_resolution,
    LINE: tl.constexpr,
    LINE_TWO: tl.constexpr,
    LINE_ROUNDING: tl.constexpr,
    LINE_LIMBS: tl.constexpr,
    LINE_PARTS: tl.constexpr,
    K_WORD: tl.constexpr,
    V_WORD: tl.constexpr,
    OAT: tl.constexpr,
    ENCODE: tl.constexpr,
    APPEND: tl.constexpr,
    TURN: tl.constexpr,
    ASK: tl.constexpr,
    TWO_Q: tl.constexpr,
    TWO_K: tl.constexpr,
    TWO_V: tl.constexpr,
    TWO_P: tl.constexpr,
    ROUNDING: tl.constexpr,
    BITS: tl.constexpr,
    NEAREST: tl.constexpr,
    MASKED: tl.constexpr,
    ROWS: tl.constexpr,
    HIGH: tl.constexpr,
    SIZE: tl.constexpr,
    E: tl.constexpr,
    CHANNELS: tl.constexpr,
    SPAN: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
    STEP: tl.constexpr,
    STAGES: tl.constexpr,
    ONCE: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """``token``: where the key and value of a token go, and they; ``turn``: cos and sin. SPAN: keys, or more.

    ONCE: a single row meets all values at once, and they are asked for before its scores are found. ASK: bytes of a
    key's codes, if one head's lie together.
    """
    release(OVERLAP)
    part, pair = tl.program_id(0), tl.program_id(1)
    batch, group = (pair // groups).to(tl.int64), (pair % groups).to(tl.int64)
    k += batch * (k_b * K_WORD) + group * (k_g * K_WORD)
    v += batch * (v_b * V_WORD) + group * (v_g * V_WORD)
    if APPEND and ASK:  # were this not yet the token's place, other codes would be asked for, and nothing else change
        size = tl.minimum(tl.load(token[0]).to(tl.int32), keys) * ASK
        ask_run(k.to(tl.pointer_type(tl.uint8)), size, part, tl.num_programs(0))
        ask_run(v.to(tl.pointer_type(tl.uint8)), size, part, tl.num_programs(0))
    e, channel = tl.arange(0, E), part * CHANNELS + tl.arange(0, CHANNELS)
    inside, within = e < SIZE, channel < SIZE
    by_query = few.units(query_table, resolution, OAT, TWO_Q)
    by_key = few.units(key_table, resolution, OAT, TWO_K)
    by_value = few.units(value_table, resolution, OAT, TWO_V)
    by_probability = few.units(probability_table, resolution, OAT, TWO_P)
    by_line = few.units(line_threshold, line_resolution, LINE, LINE_TWO)
    times, of_keys, of_values = 1.0, 1.0, 1.0
    if not OAT:
        times = tl.load(query_table + e, inside, other=1.0)
        of_keys = tl.load(key_table + group * SIZE + e, inside, other=1.0)
        of_values = tl.load(value_table + group * SIZE + channel, within, other=1.0)
        k_unit += batch * ku_b + group * ku_g
        v_unit += batch * vu_b + group * vu_g
    await_inputs(OVERLAP)

    head, query, row, live = few.rows_of(group, heads, groups, length, ROWS, ROWS)
    heads_, queries, rows, exist = few.rows_of(group, heads, groups, length, ROWS, HIGH)
    first, last = keys, 0
    if MASKED:
        for start in tl.static_range(0, SPAN, WIDE):
            key = start + tl.arange(0, WIDE)
            exists = live[:, None] & (key < keys)[None, :]
            bias = few.bias_of(mask, batch, head, query, exists, key, m_b, m_h, m_l, m_s, least, MASKED)
            seen = tl.max(bias, 0) > float("-inf")
            first = tl.minimum(first, tl.where(seen, key, keys))
            last = tl.maximum(last, tl.where(seen, key + 1, 0))
    at_query = q + batch * q_b + heads_[:, None] * q_h + queries[:, None] * q_l
    asks = exist[:, None] & inside[None, :]
    x = tl.load(at_query + e[None, :], asks, other=0).to(tl.float32)
    if TURN:
        x = turned(at_query, x, e[None, :] + tl.zeros_like(asks).to(tl.int32), asks, turn, batch, turn_b, SIZE)
    place, y, z, whole = part * 0, x, x, x
    own_key, own_value, own_key_unit, own_value_unit = 0, 0, 0.0, 0.0
    if APPEND:
        place = tl.load(token[0]).to(tl.int32)
        at_key = token[1] + batch * token_b[0] + group * token_g[0]
        at_value = token[2] + batch * token_b[1] + group * token_g[1]
        y = tl.load(at_key + e, inside, other=0.0).to(tl.float32)
        if TURN:
            y = turned(at_key, y, e, inside, turn, batch, turn_b, SIZE)
        z = tl.load(at_value + channel, within, other=0.0).to(tl.float32)
        whole = 0.0 if OAT else tl.load(at_value + e, inside, other=0.0).to(tl.float32)
    begin, end = 0, keys  # keys that some row sees
    if MASKED:
        begin, end = tl.min(first, 0) // BLOCK * BLOCK, tl.max(last, 0)

    held, all_keys = tl.zeros((1, 1), tl.int32), tl.arange(0, SPAN)
    if ONCE:
        there = _cached(all_keys, begin, end, place, APPEND)[:, None] & within[None, :]
        held = tl.load(v + all_keys[:, None] * (v_s * V_WORD) + channel[None, :], there, other=0)
    if ENCODE:
        x, of_row = few.encoded(x, by_query, times, limit, resolution, OAT, TWO_Q, ROUNDING)
    else:
        of_row = tl.load(q_unit + (batch * heads + heads_) * length + queries, exist, other=0.0)
    scratch = (pair.to(tl.int64) * tl.num_programs(0) + part) * (ROWS * SPAN)
    scores += scratch
    sent += scratch
    for start in tl.range(begin, end, BLOCK, num_stages=STAGES):
        some = start + tl.arange(0, BLOCK)
        known = _cached(some, begin, end, place, APPEND)
        at = k + some[:, None] * (k_s * K_WORD) + e[None, :]
        packed_key = tl.load(at, known[:, None] & inside[None, :], other=0).to(tl.int32)
        of_key = 0.0
        if not OAT:
            of_key = tl.load(k_unit + some * ku_s, known, other=0.0)
        real = few.value_of(packed_key, by_key, 1.0 if OAT else of_keys[None, :], OAT, TWO_K)
        found = few.met(x, of_row, real, of_key, OAT, HIGH)
        tl.store(scores + rows[:, None] * SPAN + some[None, :], found, (rows < ROWS)[:, None] & known[None, :])
    if APPEND:
        if OAT:
            y = coded_oat(y, by_key, limit, TWO_K, ROUNDING)
            z = coded_oat(z, by_value, limit, TWO_V, ROUNDING)
        else:
            low, high = tl.minimum(tl.min(y, 0), 0.0), tl.maximum(tl.max(y, 0), 0.0)
            own_key_unit = gif_unit(low, high, limit, key_steps)
            y = coded_gif(y, low, own_key_unit, of_keys, limit, key_steps)
            low, high = tl.minimum(tl.min(whole, 0), 0.0), tl.maximum(tl.max(whole, 0), 0.0)
            own_value_unit = gif_unit(low, high, limit, value_steps)
            z = coded_gif(z, low, own_value_unit, of_values, limit, value_steps)
        own_key, own_value = to_integer(y, tl.int32), to_integer(z, tl.int32)
        real = few.value_of(own_key[None, :], by_key, 1.0 if OAT else of_keys[None, :], OAT, TWO_K)
        score_own = tl.sum(x * real, 1)
        if not OAT:
            score_own = score_own * of_row * own_key_unit
        fits = place < keys  # else it is left out; below in vectors, as the interpreter spreads no condition
        tl.store(scores + rows * SPAN + place, score_own, (place + 0 * rows < keys) & (rows < ROWS))
        to_key = k + place.to(tl.int64) * (k_s * K_WORD)
        to_value = v + place.to(tl.int64) * (v_s * V_WORD)
        tl.store(to_key + e, own_key.to(k.dtype.element_ty), inside & (part + 0 * e == 0) & (place + 0 * e < keys))
        tl.store(to_value + channel, own_value.to(v.dtype.element_ty), within & (place + 0 * channel < keys))
        if not OAT:
            put_unit(to_key + SIZE, own_key_unit, fits & (part == 0))
            put_unit(to_value + SIZE, own_value_unit, fits & (part == 0))
    tl.debug_barrier()  # scores are read by other lanes than wrote them

    bases = ()
    most = tl.full((ROWS, WIDE), float("-inf"), tl.float32)
    for start in tl.static_range(0, SPAN, WIDE):
        key = start + tl.arange(0, WIDE)
        exists = live[:, None] & ((key >= begin) & (key < end))[None, :]
        bias = few.bias_of(mask, batch, head, query, exists, key, m_b, m_h, m_l, m_s, least, MASKED)
        score = tl.load(scores + row[:, None] * SPAN + key[None, :], exists, other=0.0) * scaling + bias
        bases += (score,)
        most = tl.maximum(most, score)
    highest = tl.max(most, 1)
    highest = tl.where(highest > float("-inf"), highest, 0.0)  # of a row that sees nothing all terms are zero
    terms = tl.zeros((ROWS, WIDE), tl.float32)
    heights = tl.zeros((ROWS, WIDE), tl.float32)
    exponentials = ()
    for start in tl.static_range(0, SPAN, WIDE):
        power = few.exp(bases[start // WIDE], highest[:, None], top, floor, BITS, NEAREST)
        terms += power
        if not OAT:
            of_value = _units(v_unit, start + tl.arange(0, WIDE), vu_s, begin, end, place, own_value_unit, APPEND)
            heights = tl.maximum(heights, power * of_value)
        exponentials += (power,)
    p = most
    total, inverse, unit = few.normal(terms, heights, peak, top, floor, OAT, BITS, NEAREST)
    for start in tl.static_range(0, SPAN, WIDE):
        key = start + tl.arange(0, WIDE)
        of_value = 0.0
        if not OAT:
            of_value = _units(v_unit, key, vu_s, begin, end, place, own_value_unit, APPEND)
        p = few.probability(
            exponentials[start // WIDE], of_value, total[:, None], inverse[:, None], unit[:, None], by_probability,
            peak, OAT, TWO_P, BITS, ROUNDING,
        )  # fmt: skip
        if not ONCE:
            tl.store(sent + row[:, None] * SPAN + key[None, :], p)
    if not ONCE:
        tl.debug_barrier()

    height = 1.0 if OAT else of_values[None, :]
    if ONCE:
        of_all = tl.reshape(p, (SPAN,))
        of_own = tl.sum(tl.where(all_keys == place, of_all, 0.0), 0, keep_dims=True)
        sums = of_all[:, None] * few.value_of(held.to(tl.int32), by_value, height, OAT, TWO_V)
    else:
        sums = tl.zeros((STEP if HIGH == 1 else HIGH, CHANNELS), tl.float32)
        for start in tl.range(begin, end, STEP, num_stages=STAGES):
            more = start + tl.arange(0, STEP)
            there_too = _cached(more, begin, end, place, APPEND)[:, None] & within[None, :]
            packed = tl.load(v + more[:, None] * (v_s * V_WORD) + channel[None, :], there_too, other=0).to(tl.int32)
            if HIGH == 1:
                share = tl.load(sent + more, more < end, other=0.0)[:, None]
            else:
                share = tl.load(sent + row[:, None] * SPAN + more[None, :], (more < end)[None, :], other=0.0)
            sums += few.weighted(share, few.value_of(packed, by_value, height, OAT, TWO_V), OAT, HIGH, ROWS)
        of_own = 0.0
        if APPEND:
            of_own = tl.load(sent + rows * SPAN + place, (place + 0 * rows < keys) & (rows < ROWS), other=0.0)
    if HIGH == 1:
        sums = tl.sum(sums, 0)[None, :]
    if APPEND:
        sums += of_own[:, None] * few.value_of(own_value[None, :], by_value, height, OAT, TWO_V)
    if not OAT:
        sums *= unit[:, None] if HIGH == 1 else few.sixteen(unit[:, None], ROWS)
    to = ((batch * length + queries[:, None]) * heads + heads_[:, None]) * SIZE + channel[None, :]
    few.leave(
        sums, to, exist[:, None] & within[None, :], out, line, by_line, heads * SIZE, line_limit, LINE,
        LINE_TWO, LINE_ROUNDING, LINE_LIMBS, LINE_PARTS,
    )  # fmt: skip


class Token(NamedTuple):
    """One token's key and value on their way into the cache.

    Args:
        place: Where they go, int64 ``[]`` or ``[1]``.
        key: ``[B, G, 1, E]``.
        value: Likewise.
        cos: ``[B or 1, 1, 1, E]``; it and ``sin`` turn the key and the queries. None: they are as they should be.
        sin: Likewise.
        steps: Of GIF neurons: of the longest sub-neuron of keys, and of values.
    """

    place: Tensor
    key: Tensor
    value: Tensor
    cos: Tensor | None = None
    sin: Tensor | None = None
    steps: tuple[int, int] = (1, 1)


class Form(NamedTuple):
    """Sizes of a program.

    Args:
        rows: Queries of one key/value head.
        block: Keys that it takes at once while it finds scores.
        channels: Of its sums.
        step: Keys that it takes at once while it sums values; of one row as many as there may be, or more: all of them,
            and they are asked for before scores are found.
        stages: Loads under way.
        warps: Of the program.
    """

    rows: int
    block: int
    channels: int
    step: int
    stages: int
    warps: int


def suits(batch: int, groups: int, rows: int, keys: int, size: int, width: int) -> bool:
    """Whether one kernel takes so many key/value heads, rows of each and keys; ``width``: bytes of a code."""
    return rows <= ROWS and batch * groups <= PROGRAMS and keys <= KEYS and keys * size * width <= BYTES


def form_of(keys: int, rows: int, size: int, width: int, pairs: int) -> Form:
    """What suits so many keys and rows of one head, E, bytes of a code, and key/value heads of a batch."""
    channels = padded(size)
    while channels > 32 and size // (channels // 2) * pairs <= PROGRAMS:
        channels //= 2
    span = span_of(keys)
    if rows == 1 and span * channels <= 2**14:  # values in one go, and keys of so short a cache, too
        block, stages = (span, 1) if span <= 256 else (64, 3)
        return Form(1, block, channels, span, stages, 8)
    return Form(pow2(rows), 64, channels, 64, 3, 8)


def span_of(keys: int) -> int:
    """Places for so many keys: few numbers, for each of which a kernel is compiled."""
    return max(pow2(keys), 256)


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
    line: few.Line | None = None,
    token: Token | None = None,
) -> None:
    """As :func:`.decode.attend`, where :func:`suits` says so.

    ``token``: what is put into the cache first, which ``k`` and ``v`` are; queries are real then, and one of each head.
    """
    batch, length, heads, _ = out.shape
    where, kept = few.left(out, line)
    groups, keys = k.codes.shape[1:3]
    rows, given = heads // groups * length, settings(rule)
    form = form or form_of(keys, rows, size, k.codes.element_size(), batch * groups)
    parts, span = cdiv(size, form.channels), max(span_of(keys), form.block)
    scratch = torch.empty((2, batch * groups * parts * form.rows * span), dtype=torch.float32, device=out.device)
    tokens, turn = (q, q, q), (q, q)
    steps, asked = (1, 1), 0
    if token is not None:
        tokens, steps = (token.place, dense(token.key), dense(token.value)), token.steps
        if token.cos is not None and token.sin is not None:
            turn = dense(token.cos), dense(token.sin)
        asked = _together(k.codes, v.codes)
    run(
        _attend, (parts, batch * groups), q, q_unit, k.codes, k.units, v.codes, v.units, mask.values, *scratch, out,
        tokens, turn, *given.tables, mask.least, scaling, given.limit, given.resolution, *steps, given.peak, given.top,
        given.floor, heads, groups, length, keys, *q.stride()[:3], *k.places, *k.unit_places, *v.places,
        *v.unit_places, *mask.places, *[tuple([x.stride(axis) for x in tokens[1:]]) for axis in (0, 1)],
        tuple([x.stride(0) if x.shape[0] > 1 else 0 for x in turn]), *where, K_WORD=k.word, V_WORD=v.word,
        ENCODE=q_unit is None, APPEND=token is not None, TURN=token is not None and token.cos is not None,
        ASK=asked, MASKED=mask.values is not None, ROWS=form.rows,
        HIGH=1 if form.rows == 1 else 16, SIZE=size, E=padded(size), CHANNELS=form.channels, SPAN=span,
        WIDE=min(span, max(4096 // form.rows, 64)), BLOCK=form.block, STEP=form.step, STAGES=form.stages,
        ONCE=form.step >= span and form.rows == 1, num_warps=form.warps, **given.how, **given.two, **kept, **meta(),
    )  # fmt: skip


def _together(*caches: Tensor) -> int:
    """Bytes of a token's codes in either cache, if those of a head follow one another and begin at 16 bytes; else 0."""
    rows = {cache.stride(2) * cache.element_size() for cache in caches}
    for cache in caches:
        starts = [cache.data_ptr(), *[cache.stride(axis) * cache.element_size() for axis in (0, 1)]]
        if cache.stride(2) != cache.shape[3] or any(start % 16 for start in starts):
            return 0
    return rows.pop() if len(rows) == 1 else 0
