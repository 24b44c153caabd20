"""Attention of few queries on many cached codes: bound by the memory that holds the codes, which is read once.

Kernels follow one another with no host in between. ``_scores`` reads keys: a program has one block of keys of one
key/value head, and leaves real scores and their largest. ``_context`` reads values: a program has some channels of one
key/value head and a part of the keys that its rows see. It finds the softmax of its rows anew (there are few), as a
probability is encoded only when its sum is known. ``_merge`` sums over parts, where there are several. Blocks of keys
that no row sees are not read. A single row is summed in fp32; several go to tensor cores, operands in two bf16 planes.
A short cache has a kernel of its own: :mod:`.short`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from spikeform.layers.triton import few
from spikeform.layers.triton.operands import Counts, Mask, Populations, Train, cdiv, padded, pow2, run, settings
from spikeform.synapses.triton.launch import meta
from spikeform.synapses.triton.operands import await_inputs, release

ROWS = 16  # of a program: more rows of one head go to further programs
PEAKS = tl.constexpr(128)  # blocks whose largest scores are looked at at once
PROGRAMS = 264  # two for each processor
LEAST = 128  # keys of a part


# As a cache grows little is to be compiled anew.
@triton.jit(
    do_not_specialize=["k_b", "k_g", "ku_b", "ku_g", "vu_b", "vu_g", "m_b", "m_h", "m_l"],
    do_not_specialize_on_alignment=["mask"],
)
def _scores(
    q,
    q_unit,
    k,
    k_unit,
    v_unit,
    mask,
    scores,
    peaks,
    units,
    query_threshold,
    key_threshold,
    multiple,
    least,
    scaling,
    limit,
    resolution,
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
    vu_b,
    vu_g,
    vu_s,
    m_b,
    m_h,
    m_l,
    m_s,
    WORD: tl.constexpr,
    OAT: tl.constexpr,
    ENCODE: tl.constexpr,
    TWO_Q: tl.constexpr,
    TWO_K: tl.constexpr,
    ROUNDING: tl.constexpr,
    MASKED: tl.constexpr,
    ROWS: tl.constexpr,
    HIGH: tl.constexpr,
    SIZE: tl.constexpr,
    E: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    known_query = few.units(query_threshold, resolution, OAT, TWO_Q)
    known_key = few.units(key_threshold, resolution, OAT, TWO_K)
    await_inputs(OVERLAP)
    release(OVERLAP)
    block, pair = tl.program_id(0), tl.program_id(1)
    batch, group = (pair // groups).to(tl.int64), (pair % groups).to(tl.int64)
    head, query, row, live = few.rows_of(group, heads, groups, length, ROWS, HIGH)
    key = block * BLOCK + tl.arange(0, BLOCK)
    exists = live[:, None] & (key < keys)[None, :]
    bias = few.bias_of(mask, batch, head, query, exists, key, m_b, m_h, m_l, m_s, least, MASKED)
    span = tl.num_programs(0) * BLOCK
    place = pair.to(tl.int64) * tl.num_programs(2) * ROWS + row
    found = bias
    unit = tl.zeros((BLOCK,), tl.float32)
    if tl.max(tl.max(bias, 1), 0) > float("-inf"):
        e = tl.arange(0, E)
        inside = e < SIZE
        there = live[:, None] & inside[None, :]
        at_query = q + batch * q_b + head[:, None] * q_h + query[:, None] * q_l + e[None, :]
        v = tl.load(at_query, there, other=0).to(tl.float32)
        if ENCODE:  # of GIF neurons the limit is the levels, the resolution the steps
            times = 1.0 if OAT else tl.load(query_threshold + e, inside, other=1.0)
            v, of_row = few.encoded(v, known_query, times, limit, resolution, OAT, TWO_Q, ROUNDING)
        else:
            of_row = tl.load(q_unit + (batch * heads + head) * length + query, live, other=0.0)
        start = batch * (k_b * WORD) + group * (k_g * WORD)
        at_key = k + start + key[:, None].to(tl.int64) * (k_s * WORD) + e[None, :]
        packed = tl.load(at_key, (key < keys)[:, None] & inside[None, :], other=0).to(tl.int32)
        factor, of_key = 0.0, 0.0
        if not OAT:
            factor = tl.load(multiple + group * SIZE + e, inside, other=0.0)[None, :]
            of_key = tl.load(k_unit + batch * ku_b + group * ku_g + key * ku_s, key < keys, other=0.0)
            unit = tl.load(v_unit + batch * vu_b + group * vu_g + key * vu_s, key < keys, other=0.0)
        value = few.value_of(packed, known_key, factor, OAT, TWO_K)
        found = few.met(v, of_row, value, of_key, OAT, HIGH) * scaling + bias
    own = row < (tl.program_id(2) + 1) * ROWS
    tl.store(scores + place[:, None] * span + key[None, :], found, own[:, None])
    tl.store(peaks + place * tl.num_programs(0) + block, tl.max(found, 1), own)
    if not OAT:  # they lie far apart, among the values' codes: the next kernel wants them together
        tl.store(units + pair.to(tl.int64) * span + key, unit)


@triton.jit(do_not_specialize=["blocks", "v_b", "v_g", "parts"])
def _context(
    scores,
    peaks,
    units,
    v,
    out,
    value_threshold,
    probability_threshold,
    multiple,
    peak,
    resolution,
    top,
    floor,
    heads,
    groups,
    length,
    keys,
    blocks,
    parts,
    v_b,
    v_g,
    v_s,
    line,
    line_threshold,
    line_limit,
    line_resolution,
    LINE: tl.constexpr,
    LINE_TWO: tl.constexpr,
    LINE_ROUNDING: tl.constexpr,
    LINE_LIMBS: tl.constexpr,
    LINE_PARTS: tl.constexpr,
    WORD: tl.constexpr,
    OAT: tl.constexpr,
    TWO_P: tl.constexpr,
    TWO_V: tl.constexpr,
    ROUNDING: tl.constexpr,
    BITS: tl.constexpr,
    NEAREST: tl.constexpr,
    ROWS: tl.constexpr,
    HIGH: tl.constexpr,
    SIZE: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDE: tl.constexpr,
    STEP: tl.constexpr,
    STAGES: tl.constexpr,
    PARTS: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    known_value = few.units(value_threshold, resolution, OAT, TWO_V)
    known_probability = few.units(probability_threshold, resolution, OAT, TWO_P)
    known_line = few.units(line_threshold, line_resolution, LINE, LINE_TWO)
    await_inputs(OVERLAP)
    release(OVERLAP)
    pair = tl.program_id(1)
    batch, group = (pair // groups).to(tl.int64), (pair % groups).to(tl.int64)
    _, _, row, _ = few.rows_of(group, heads, groups, length, ROWS, ROWS)
    place = pair.to(tl.int64) * tl.num_programs(2) * ROWS + row
    span = blocks * BLOCK
    at_score = scores + place[:, None] * span
    at_unit = units + pair.to(tl.int64) * span

    tops = tl.full((ROWS, PEAKS), float("-inf"), tl.float32)
    firsts = tl.zeros((ROWS, PEAKS), tl.int32) + blocks
    lasts = tl.zeros((ROWS, PEAKS), tl.int32)
    for start in range(0, blocks, PEAKS):
        block = start + tl.arange(0, PEAKS)[None, :]
        highest = tl.load(peaks + place[:, None] * blocks + block, block < blocks, other=float("-inf"))
        tops = tl.maximum(tops, highest)
        seen = highest > float("-inf")
        firsts = tl.where(seen, tl.minimum(firsts, block), firsts)
        lasts = tl.where(seen, tl.maximum(lasts, block + 1), lasts)
    most = tl.max(tops, 1)
    most = tl.where(most > float("-inf"), most, 0.0)  # of a row that sees nothing all terms are zero
    # Blocks of keys that some row sees lie in first .. last - 1.
    first, last = tl.min(tl.min(firsts, 1), 0), tl.max(tl.max(lasts, 1), 0)
    begin, end = first * BLOCK, last * BLOCK

    terms = tl.zeros((ROWS, WIDE), tl.float32)
    heights = tl.zeros((ROWS, WIDE), tl.float32)
    for start in tl.range(begin, end, WIDE):
        key = start + tl.arange(0, WIDE)
        score = tl.load(at_score + key[None, :], (key < end)[None, :], other=float("-inf"))
        e = few.exp(score, most[:, None], top, floor, BITS, NEAREST)
        terms += e
        if not OAT:
            heights = tl.maximum(heights, e * tl.load(at_unit + key, key < end, other=0.0)[None, :])
    total, inverse, unit = few.normal(terms, heights, peak, top, floor, OAT, BITS, NEAREST)

    mine = tl.program_id(0) % parts
    channel = tl.program_id(0) // parts * CHANNELS + tl.arange(0, CHANNELS)
    inside = channel < SIZE
    factor = 0.0
    if not OAT:
        factor = tl.load(multiple + group * SIZE + channel, inside, other=0.0)[None, :]
    at_value = v + batch * (v_b * WORD) + group * (v_g * WORD) + channel[None, :]
    # One row stands upright, as its keys do in a tile of values; several lie, as a product wants them.
    if HIGH == 1:
        origin, whole, part, step = tl.max(most, 0), tl.max(total, 0), tl.max(inverse, 0), tl.max(unit, 0)
        sums = tl.zeros((STEP, CHANNELS), tl.float32)
    else:
        origin, whole, part, step = most[:, None], total[:, None], inverse[:, None], unit[:, None]
        sums = tl.zeros((HIGH, CHANNELS), tl.float32)
    if PARTS:
        share = tl.cdiv(tl.cdiv(end - begin, parts), STEP) * STEP
        begin += mine * share
        end = tl.minimum(end, begin + share)
    for start in tl.range(begin, end, STEP, num_stages=STAGES):
        key = start + tl.arange(0, STEP)
        there = (key < keys)[:, None] & inside[None, :]
        packed = tl.load(at_value + key[:, None].to(tl.int64) * (v_s * WORD), there, other=0).to(tl.int32)
        lane = key[:, None] if HIGH == 1 else key[None, :]
        score = tl.load(at_score + lane, lane < end, other=float("-inf"))
        e = few.exp(score, origin, top, floor, BITS, NEAREST)
        of_value = 0.0 if OAT else tl.load(at_unit + lane, lane < end, other=0.0)
        p = few.probability(e, of_value, whole, part, step, known_probability, peak, OAT, TWO_P, BITS, ROUNDING)
        value = few.value_of(packed, known_value, factor, OAT, TWO_V)
        sums += few.weighted(p, value, OAT, HIGH, ROWS)
    if HIGH == 1:
        sums = tl.sum(sums, 0)[None, :]
    if not OAT:
        sums *= unit[:, None] if HIGH == 1 else few.sixteen(unit[:, None], ROWS)
    head, query, row, live = few.rows_of(group, heads, groups, length, ROWS, HIGH)
    there = live[:, None] & inside[None, :]
    if PARTS:
        at = ((pair.to(tl.int64) * parts + mine) * (heads // groups * length) + row[:, None]) * SIZE
        tl.store(out + at + channel[None, :], sums, there)
    else:
        at = ((batch * length + query[:, None]) * heads + head[:, None]) * SIZE
        few.leave(
            sums,
            at + channel[None, :],
            there,
            out,
            line,
            known_line,
            heads * SIZE,
            line_limit,
            LINE,
            LINE_TWO,
            LINE_ROUNDING,
            LINE_LIMBS,
            LINE_PARTS,
        )


@triton.jit
def _merge(
    sums,
    out,
    parts,
    heads,
    groups,
    length,
    line,
    line_threshold,
    line_limit,
    line_resolution,
    LINE: tl.constexpr,
    LINE_TWO: tl.constexpr,
    LINE_ROUNDING: tl.constexpr,
    LINE_LIMBS: tl.constexpr,
    LINE_PARTS: tl.constexpr,
    PARTS: tl.constexpr,
    SIZE: tl.constexpr,
    E: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    known_line = few.units(line_threshold, line_resolution, LINE, LINE_TWO)
    await_inputs(OVERLAP)
    release(OVERLAP)
    row, pair = tl.program_id(0), tl.program_id(1).to(tl.int64)
    share = heads // groups
    part, e = tl.arange(0, PARTS)[:, None], tl.arange(0, E)
    at = sums + ((pair * parts + part) * (share * length) + row) * SIZE + e[None, :]
    found = tl.sum(tl.load(at, (part < parts) & (e < SIZE)[None, :], other=0.0), 0)
    head = pair % groups * share + row // length
    at = ((pair // groups * length + row % length) * heads + head) * SIZE + e
    few.leave(
        found,
        at,
        e < SIZE,
        out,
        line,
        known_line,
        heads * SIZE,
        line_limit,
        LINE,
        LINE_TWO,
        LINE_ROUNDING,
        LINE_LIMBS,
        LINE_PARTS,
    )


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
) -> None:
    """Fill ``out`` ``[B, L, H, E]``, or a line of codes of the only row.

    Args:
        q: ``[B, H, L, E or more]``, the last axis dense: real, or integers of the unit ``q_unit`` ``[B, H, L]``.
        q_unit: None for real queries, which ``rule`` encodes.
        k: Cached keys.
        v: Cached values.
        mask: Who sees what.
        scaling: Factor of the scores.
        rule: What encodes.
        size: E.
        out: Contiguous; where there is a line it only says what shape and dtype the result would have.
        form: Sizes; None: what suits.
        line: Where codes go.
    """
    batch, length, heads, _ = out.shape
    where, kept = few.left(out, line)
    groups, keys = k.codes.shape[1:3]
    rows, given = heads // groups * length, settings(rule)
    pairs = batch * groups
    form = form or form_of(keys, rows, size, k.codes.element_size(), pairs)
    blocks, splits, parts = cdiv(keys, form.block), cdiv(rows, form.rows), form.parts
    sums = out if parts == 1 else torch.empty((pairs, parts, rows, size), dtype=torch.float32, device=out.device)
    scores = torch.empty((pairs, splits * form.rows, blocks * form.block), dtype=torch.float32, device=out.device)
    peaks = torch.empty((pairs, splits * form.rows, blocks), dtype=torch.float32, device=out.device)
    units = scores  # written by GIF neurons alone
    if isinstance(rule, Counts):
        units = torch.empty((pairs, blocks * form.block), dtype=torch.float32, device=out.device)
    of_query, of_key, of_value, of_probability = given.tables
    two, how = given.two, given.how
    sizes = {"ROWS": form.rows, "HIGH": form.high, "SIZE": size, "BLOCK": form.block, "num_warps": form.warps} | meta()
    run(
        _scores, (blocks, pairs, splits), q, q_unit, k.codes, k.units, v.units, mask.values, scores, peaks, units,
        of_query, of_key, of_key, mask.least, scaling, given.limit, given.resolution, heads, groups, length, keys,
        *q.stride()[:3], *k.places, *k.unit_places, *v.unit_places, *mask.places, WORD=k.word, TWO_Q=two["TWO_Q"],
        TWO_K=two["TWO_K"], MASKED=mask.values is not None, ENCODE=q_unit is None, E=padded(size), OAT=how["OAT"],
        ROUNDING=how["ROUNDING"], **sizes,
    )  # fmt: skip
    run(
        _context, (cdiv(size, form.channels) * parts, pairs, splits), scores, peaks, units, v.codes, sums, of_value,
        of_probability, of_value, given.peak, given.resolution, given.top, given.floor, heads, groups, length, keys,
        blocks, parts, *v.places, *where, WORD=v.word, TWO_P=two["TWO_P"], TWO_V=two["TWO_V"], CHANNELS=form.channels,
        WIDE=form.wide, STEP=form.step, STAGES=form.stages, PARTS=parts > 1, **how, **sizes, **kept,
    )  # fmt: skip
    if parts > 1:
        run(
            _merge, (rows, pairs), sums, out, parts, heads, groups, length, *where, PARTS=pow2(parts), SIZE=size,
            E=padded(size), num_warps=1 if parts < 8 else 4, **kept, **meta(),
        )  # fmt: skip


class Form(NamedTuple):
    """Sizes of the two kernels' programs.

    Args:
        rows: Queries of one key/value head.
        block: Keys of a program that finds scores.
        channels: Channels of a program that sums values.
        step: Keys that it takes at once.
        wide: Scores that it takes at once while it looks for their sum.
        stages: Loads under way.
        warps: Of either.
        parts: Programs that share the keys of the same channels.
    """

    rows: int
    block: int
    channels: int
    step: int
    wide: int
    stages: int
    warps: int
    parts: int

    @property
    def high(self) -> int:
        """Rows of a product: one is summed by hand, more are padded to what tensor cores take."""
        return 1 if self.rows == 1 else 16


def form_of(keys: int, rows: int, size: int, width: int, pairs: int) -> Form:
    """What suits so many keys and rows of one head, E, bytes of a code, and key/value heads of a batch."""
    several, rows = cdiv(rows, ROWS), min(pow2(rows), ROWS)
    channels = min(padded(size), 64 // width)
    programs = cdiv(size, channels) * pairs * several
    parts = max(min(cdiv(PROGRAMS, programs), keys // (LEAST if rows > 1 else 2 * LEAST)), 1)
    wide = max(min(pow2(keys), 4096 // rows), 64)
    return Form(rows, 64 if keys > 256 else 32, channels, 64, wide, 3, 4, parts)
