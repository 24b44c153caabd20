"""Spiking self-attention of one new token with a cache: one launch, all T steps of it.

A program has one key/value head of one sequence, all its query heads, and some channels of its values. Where the head
sees all tokens, columns of S need no other columns: they are read once, moved on, read by the queries and written back.
Where it sees a window, one program meets the cached spikes, and moves them up by a place. Membranes stay in registers.

Counts are integers in fp32, exact while below 2^24. Where a key head has several query heads, S is two planes of fp16
for tensor cores, up to 2^22 tokens: see :mod:`~spikeform.layers.triton.ssa_prefill`.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from spikeform.layers.triton.operands import cdiv, pow2, run
from spikeform.layers.triton.ssa_operands import LEAST, PLANE, Given, currents, fire, mean, sent
from spikeform.neurons.triton.codes import to_integer
from spikeform.synapses.triton.launch import meta
from spikeform.synapses.triton.operands import await_inputs, pick, release

NEAR = 32  # tokens that are met at once
COLUMNS = 16  # channels of a program


@triton.jit
def _queries(
    q,
    where,
    q_gain,
    gain,
    heads,
    SHARE: tl.constexpr,
    SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    E: tl.constexpr,
):
    """Of the query heads of a key/value head.

    Returns:
        Their currents ``[ROWS, E]``, the output's gains, which rows exist, and where the output begins, ``[ROWS, 1]``.
    """
    batch, group, q_h = where
    head = group * SHARE + tl.arange(0, ROWS)[:, None]
    e, own = tl.arange(0, E)[None, :], (tl.arange(0, ROWS) < SHARE)[:, None]
    now = tl.load(q + head * q_h + e, own & (e < SIZE), other=0.0).to(tl.float32)
    now *= tl.load(q_gain + head, own, other=0.0).to(tl.float32)
    return now, tl.load(gain + head, own, other=0.0).to(tl.float32), own, (batch * heads + head) * SIZE


@triton.jit
def _far(
    queries,
    keys,
    v,
    state,
    out,
    part,
    rule,
    STEPS: tl.constexpr,
    NEURON: tl.constexpr,
    NORMALISE: tl.constexpr,
    SIZE: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Some channels of a head that sees all tokens. Several queries are products of tensor cores; see :func:`_near`.

    Args:
        queries: What :func:`_queries` knows.
        keys: The key's current ``[E]``, whether it is no padding, and how many keys are seen.
        v: Where the values are, and their gain.
        state: S of step 0, and how far those of two steps are apart.
        out: The output.
        part: Which channels.
        rule: tau, the threshold, and that of the output.
        STEPS: T.
        NEURON: As :func:`fire` has it.
        NORMALISE: As :func:`sent` has it.
        SIZE: E.
        COLUMNS: How many channels.
    """
    q_now, gain, own, to = queries
    k_now, heard, divisor = keys
    at, apart = state
    tau, threshold, last = rule
    e, c = tl.arange(0, k_now.shape[0]), part * COLUMNS + tl.arange(0, COLUMNS)
    square = (e < SIZE)[:, None] & (c < SIZE)[None, :]
    v_now = currents(v[0] + c, v[1], c < SIZE)
    q_v, k_v, v_v = q_now * 0.0, k_now * 0.0, v_now * 0.0
    out_v = tl.zeros((q_now.shape[0], COLUMNS), tl.float32)
    total = out_v
    at += e[:, None] * SIZE + c[None, :]
    s_next = tl.load(at, square, other=0.0)
    for t in tl.static_range(STEPS):
        s_now = s_next
        if t + 1 < STEPS:
            s_next = tl.load(at + apart, square, other=0.0)
        q_v, q = fire(q_v, q_now, tau, threshold, NEURON)
        k_v, k = fire(k_v, k_now, tau, threshold, NEURON)
        v_v, v_t = fire(v_v, v_now, tau, threshold, NEURON)
        s_now += (k * heard)[:, None] * v_t[None, :]
        tl.store(at, s_now, square)
        at += apart
        if q.shape[0] == 1:
            counts = tl.sum(tl.trans(q) * s_now, 0)[None, :]
        else:
            high = tl.floor(s_now / PLANE)
            counts = tl.dot(q.to(tl.float16), high.to(tl.float16)) * PLANE
            counts = tl.dot(q.to(tl.float16), (s_now - high * PLANE).to(tl.float16), counts)
        out_v, s = sent(out_v, counts, divisor, gain, tau, last, NEURON, NORMALISE)
        total += s
    mean(out, to + c[None, :], total, own & (c < SIZE)[None, :], STEPS)


@triton.jit
def _near(
    queries,
    keys,
    v,
    recent,
    out,
    width,
    window,
    rule,
    STEPS: tl.constexpr,
    NEURON: tl.constexpr,
    NORMALISE: tl.constexpr,
    SIZE: tl.constexpr,
    NEAR: tl.constexpr,
):
    """All channels of a head that sees ``window`` tokens, at most ``width + 1``; arguments as :func:`_far`'s.

    ``recent``: the cached keys' spikes of step 0, how far those of two steps are apart, and how far values are behind.
    NEAR tokens are met at once. Products are those of tensor cores, as :mod:`~spikeform.layers.triton.ssa_prefill` has
    them.
    """
    q_now, gain, own, to = queries
    k_now, heard, divisor = keys
    first, apart, half = recent
    tau, threshold, last = rule
    e = tl.arange(0, k_now.shape[0])
    inside = (e < SIZE)[None, :]
    divisor = tl.minimum(divisor, window * 1.0)
    v_now = currents(v[0] + e, v[1], e < SIZE)
    q_v, k_v, v_v = q_now * 0.0, k_now * 0.0, v_now * 0.0
    out_v, total = q_v, q_v
    for _ in tl.range(STEPS):
        q_v, q = fire(q_v, q_now, tau, threshold, NEURON)
        k_v, k = fire(k_v, k_now, tau, threshold, NEURON)
        v_v, v_t = fire(v_v, v_now, tau, threshold, NEURON)
        k_new, v_new = to_integer(k * heard, tl.int8)[None, :], to_integer(v_t * heard, tl.int8)[None, :]
        q = q.to(tl.float16)
        counts = q_now * 0.0
        for start in range(0, width + 1, NEAR):  # the new token is the last
            j = start + tl.arange(0, NEAR)[:, None]
            at = first + j * SIZE + e[None, :]
            seen = (j < width) & (j > width - window) & inside
            k_s = tl.where(j == width, k_new, tl.load(at, seen, other=0)).to(tl.float16)
            v_s = tl.where(j == width, v_new, tl.load(at + half, seen, other=0)).to(tl.float16)
            counts = tl.dot(tl.dot(q, tl.trans(k_s)).to(tl.float16), v_s, counts)
        for start in range(0, width, NEAR):
            j = start + tl.arange(0, NEAR)[:, None]
            at = first + j * SIZE + e[None, :]
            k_s = tl.where(j == width - 1, k_new, tl.load(at + SIZE, (j < width - 1) & inside, other=0))
            v_s = tl.where(j == width - 1, v_new, tl.load(at + half + SIZE, (j < width - 1) & inside, other=0))
            tl.debug_barrier()  # all have read what is now written over, here and above
            tl.store(at, k_s, (j < width) & inside)
            tl.store(at + half, v_s, (j < width) & inside)
        first += apart
        out_v, s = sent(out_v, counts, divisor, gain, tau, last, NEURON, NORMALISE)
        total += s
    mean(out, to + e[None, :], total, own & inside, STEPS)


@triton.jit(do_not_specialize=["batches"])
def _token(
    q,
    k,
    v,
    seen,
    state,
    recent,
    number,
    gains,
    windows,
    out,
    rule,
    batches,
    heads,
    groups,
    width,
    q_b,
    q_h,
    k_b,
    k_h,
    v_b,
    v_h,
    SEEN: tl.constexpr,
    NUMBERED: tl.constexpr,
    STEPS: tl.constexpr,
    NEURON: tl.constexpr,
    NORMALISE: tl.constexpr,
    LOCAL: tl.constexpr,
    SHARE: tl.constexpr,
    SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    HIGH: tl.constexpr,
    E: tl.constexpr,
    COLUMNS: tl.constexpr,
    NEAR: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """``gains``: of queries, keys, values and the output. SHARE query heads of a key head; tiles of ROWS or HIGH."""
    await_inputs(OVERLAP)
    release(OVERLAP)
    pair, part = tl.program_id(0), tl.program_id(1)
    batch, group = (pair // groups).to(tl.int64), (pair % groups).to(tl.int64)
    heard = 1.0
    if SEEN:
        heard = tl.load(seen + batch).to(tl.float32)
    seen_keys = heard
    if NUMBERED:
        seen_keys += tl.load(number + batch).to(tl.float32)
    e = tl.arange(0, E)
    k_now = currents(k + batch * k_b + group * k_h + e, gains[1] + group, e < SIZE)
    now = k_now, heard, tl.maximum(seen_keys, 1.0)
    values = v + batch * v_b + group * v_h, gains[2] + group
    where = batch, group, q_h
    q += batch * q_b
    far = batches.to(tl.int64) * (groups - LOCAL) * (SIZE * SIZE)
    square = state + (batch * (groups - LOCAL) + group - LOCAL) * (SIZE * SIZE)
    if group >= LOCAL:
        rows = _queries(q, where, gains[0], gains[3], heads, SHARE, SIZE, ROWS, E)
        _far(rows, now, values, (square, far), out, part, rule, STEPS, NEURON, NORMALISE, SIZE, COLUMNS)
    if LOCAL:
        apart = batches.to(tl.int64) * LOCAL * (width * SIZE)
        near = recent + (batch * LOCAL + group) * (width * SIZE), apart, STEPS * apart
        if (group < LOCAL) & (part == 0):  # the spikes move: in one program
            tall = _queries(q, where, gains[0], gains[3], heads, SHARE, SIZE, HIGH, E)
            _near(tall, now, values, near, out, width, pick(windows, group), rule, STEPS, NEURON, NORMALISE, SIZE, NEAR)


def attend(given: Given, out: Tensor) -> None:
    """Fill ``out`` ``[B, 1, H, E]``; a cache, which there must be, moves on."""
    q, k, v, share = given.q, given.k, given.v, given.share
    batch, heads, _, size = q.shape
    groups, e, high = k.shape[1], max(pow2(size), LEAST), max(pow2(share), LEAST)
    run(
        *(_token, (batch * groups, cdiv(size, COLUMNS))),
        *(q, k, v, given.seen, given.state, given.recent, given.number),
        *(given.gains, given.windows[: given.local] or (1,), out, given.rule),
        *(batch, heads, groups, given.width, *q.stride()[:2], *k.stride()[:2], *v.stride()[:2]),
        **meta(
            SEEN=given.seen is not None,
            NUMBERED=given.number is not None,
            SHARE=share,
            SIZE=size,
            ROWS=1 if share == 1 else high,
            HIGH=high,
            E=e,
            COLUMNS=COLUMNS,
            NEAR=NEAR,
            num_warps=4,
            **given.how,
        ),
    )
