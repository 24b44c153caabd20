"""Spiking self-attention of many tokens: chunks of positions side by side, by S where they meet earlier ones.

Three kernels. ``_encode`` writes the spikes of keys and values, a byte each, and for each chunk the sum of keys times
values. ``_before`` adds them up over chunks, which makes S before each; that is the only walk along the sequence, and
it does nothing else. ``_context`` has a tile of queries of one head, in each step: spikes, the first form with the keys
of its own chunk (or window), the second with S, and the output neurons.

Products are those of tensor cores, fp16 with sums in fp32, and exact: spikes are -1, 0 or 1; scores are at most E, and
sums of a chunk at most CHUNK, which fp16 holds up to 2,048; S is two planes, ``2048 high + low``, up to 2^22 tokens.
Counts are exact below 2^24, as everywhere.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from spikeform.layers.triton.operands import cdiv, pow2, run
from spikeform.layers.triton.ssa_operands import LEAST, PLANE, Given, currents, fire, mean, sent
from spikeform.synapses.triton.operands import pick

TILE = 8192  # elements of a chunk's keys
LONGEST, SHORTEST = 128, 32  # positions of a chunk
QUERIES = 64  # of a program, and keys that they meet at once
WIDEST = 64  # channels of values that a program has
MANY, BLOCK = 16, 256  # chunks that are added up at once, elements of S of a program
SIZES = ["batches", "length", "width", "chunks"]  # kernels are not to be compiled anew for each of them


@triton.jit(do_not_specialize=SIZES)
def _encode(
    k,
    v,
    seen,
    spikes,
    sums,
    k_gain,
    v_gain,
    tau,
    threshold,
    batches,
    groups,
    length,
    width,
    k_b,
    k_g,
    k_l,
    v_b,
    v_g,
    v_l,
    SEEN: tl.constexpr,
    STEPS: tl.constexpr,
    NEURON: tl.constexpr,
    NORMALISE: tl.constexpr,
    LOCAL: tl.constexpr,
    SIZE: tl.constexpr,
    E: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Spikes ``[2, T, B, G, width + L, E]``; sums ``[T, B, heads without a window, chunks, E, E]``."""
    chunk, pair, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    batch, group = (pair // groups).to(tl.int64), (pair % groups).to(tl.int64)
    p, e = chunk * CHUNK + tl.arange(0, CHUNK), tl.arange(0, E)
    c = part * COLUMNS + tl.arange(0, COLUMNS)
    k_live = (p < length)[:, None] & (e < SIZE)[None, :]
    v_live = (p < length)[:, None] & (c < SIZE)[None, :]
    k_at = k + batch * k_b + group * k_g + p[:, None].to(tl.int64) * k_l + e[None, :]
    v_at = v + batch * v_b + group * v_g + p[:, None].to(tl.int64) * v_l + c[None, :]
    k_now, v_now = currents(k_at, k_gain + group, k_live), currents(v_at, v_gain + group, v_live)
    heard = (p < length).to(tl.float32)
    if SEEN:
        heard = tl.load(seen + batch * length + p, p < length, other=0).to(tl.float32)
    k_v, v_v = k_now * 0.0, v_now * 0.0
    span = (length + width).to(tl.int64) * SIZE
    row = (pair.to(tl.int64) * (length + width) + width + p[:, None]) * SIZE
    apart = batches.to(tl.int64) * groups * span
    far = groups - LOCAL
    to = (batch * far + group - LOCAL) * tl.num_programs(0) + chunk
    to = sums + to * (E * E) + e[:, None] * E + c[None, :]
    for t in tl.range(STEPS):
        k_v, k_s = fire(k_v, k_now, tau, threshold, NEURON)
        v_v, v_s = fire(v_v, v_now, tau, threshold, NEURON)
        k_s, v_s = k_s * heard[:, None], v_s * heard[:, None]
        if part == 0:
            tl.store(spikes + t * apart + row + e[None, :], k_s.to(tl.int8), k_live)
        tl.store(spikes + (STEPS + t) * apart + row + c[None, :], v_s.to(tl.int8), v_live)
        if group >= LOCAL:
            found = tl.dot(tl.trans(k_s.to(tl.float16)), v_s.to(tl.float16))
            tl.store(to + t * (batches.to(tl.int64) * far * tl.num_programs(0) * (E * E)), found.to(tl.float16))


@triton.jit(do_not_specialize=SIZES[-1:])
def _before(
    sums,
    planes,
    state,
    chunks,
    CACHED: tl.constexpr,
    SIZE: tl.constexpr,
    E: tl.constexpr,
    MANY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """S before each chunk as two planes, high and low, the shape of ``sums``; ``state`` moves on."""
    head = tl.program_id(1).to(tl.int64)
    x = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = (x // E < SIZE) & (x % E < SIZE)
    at = head * chunks * (E * E) + x[None, :]
    behind = tl.num_programs(1).to(tl.int64) * chunks * (E * E)
    total = tl.zeros((BLOCK,), tl.float32)
    place = state
    if CACHED:
        place = state + head * (SIZE * SIZE) + x // E * SIZE + x % E
        total = tl.load(place, live, other=0.0)
    for start in range(0, chunks, MANY):
        chunk = start + tl.arange(0, MANY)[:, None]
        own = at + chunk.to(tl.int64) * (E * E)
        found = tl.load(sums + own, chunk < chunks, other=0.0).to(tl.float32)
        before = total[None, :] + (tl.cumsum(found, 0) - found)
        high = tl.floor(before / PLANE)
        tl.store(planes + own, high.to(tl.float16), chunk < chunks)
        tl.store(planes + behind + own, (before - high * PLANE).to(tl.float16), chunk < chunks)
        total += tl.sum(found, 0)
    if CACHED:
        tl.store(place, total, live)


@triton.jit(do_not_specialize=SIZES)
def _context(
    q,
    spikes,
    planes,
    counted,
    number,
    windows,
    out,
    q_gain,
    gain,
    rule,
    batches,
    heads,
    groups,
    length,
    width,
    chunks,
    q_b,
    q_h,
    q_l,
    COUNTED: tl.constexpr,
    NUMBERED: tl.constexpr,
    STEPS: tl.constexpr,
    NEURON: tl.constexpr,
    NORMALISE: tl.constexpr,
    LOCAL: tl.constexpr,
    SIZE: tl.constexpr,
    E: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr,
    M: tl.constexpr,
):
    """M queries of a head, in some channels; ``counted`` ``[B, L]``: keys seen from the first new one on."""
    tile, pair, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    batch, head = (pair // heads).to(tl.int64), (pair % heads).to(tl.int64)
    group = head // (heads // groups)
    tau, threshold, last = rule
    p, e = tile * M + tl.arange(0, M), tl.arange(0, E)
    c = part * COLUMNS + tl.arange(0, COLUMNS)
    at = q + batch * q_b + head * q_h + p[:, None].to(tl.int64) * q_l + e[None, :]
    q_now = currents(at, q_gain + head, (p < length)[:, None] & (e < SIZE)[None, :])
    own = tl.load(gain + head).to(tl.float32)
    keys = (p + 1).to(tl.float32)
    if COUNTED:
        keys = tl.load(counted + batch * length + p, p < length, other=1).to(tl.float32)
    if NUMBERED:
        keys += tl.load(number + batch).to(tl.float32)
    divisor = tl.maximum(keys, 1.0)
    # Rows of spikes are ``width`` behind the new positions.
    window = length + width
    begin = tile * M // CHUNK * CHUNK + width
    if group < LOCAL:
        window = pick(windows, group) + 0 * window
        begin = tile * M + width + 1 - window
        divisor = tl.minimum(divisor, window.to(tl.float32))
    end = tl.minimum(tile * M + M, length) + width
    span = (length + width).to(tl.int64) * SIZE
    apart = batches.to(tl.int64) * groups * span
    rows = spikes + (batch * groups + group) * span
    far = groups - LOCAL
    size = batches.to(tl.int64) * far * chunks * (E * E)
    square = ((batch * far + group - LOCAL) * chunks + tile * M // CHUNK) * (E * E)
    square = planes + square + e[:, None] * E + c[None, :]
    q_v = q_now * 0.0
    out_v = tl.zeros((M, COLUMNS), tl.float32)
    total = tl.zeros((M, COLUMNS), tl.float32)
    for t in tl.range(STEPS):  # not unrolled: that would take more registers than there are
        q_v, s = fire(q_v, q_now, tau, threshold, NEURON)
        q_s = s.to(tl.float16)
        counts = tl.zeros((M, COLUMNS), tl.float32)
        if group >= LOCAL:
            high = tl.load(square + t * size)
            counts = tl.dot(q_s, high) * PLANE
            counts = tl.dot(q_s, tl.load(square + STEPS * size + t * size), counts)
        for start in range(begin, end, M):
            j = start + tl.arange(0, M)
            k_at = rows + t * apart + j[:, None].to(tl.int64) * SIZE + e[None, :]
            v_at = rows + (STEPS + t) * apart + j[:, None].to(tl.int64) * SIZE + c[None, :]
            k_s = tl.load(k_at, (j < end)[:, None] & (e < SIZE)[None, :], other=0).to(tl.float16)
            v_s = tl.load(v_at, (j < end)[:, None] & (c < SIZE)[None, :], other=0).to(tl.float16)
            scores = tl.dot(q_s, tl.trans(k_s))
            ago = p[:, None] + width - j[None, :]
            scores = tl.where((ago >= 0) & (ago < window), scores, 0.0)
            counts = tl.dot(scores.to(tl.float16), v_s, counts)
        out_v, s = sent(out_v, counts, divisor[:, None], own, tau, last, NEURON, NORMALISE)
        total += s
    to = ((batch * length + p[:, None]) * heads + head) * SIZE + c[None, :]
    mean(out, to, total, (p < length)[:, None] & (c < SIZE)[None, :], STEPS)


def attend(given: Given, out: Tensor) -> None:
    """Fill ``out`` ``[B, L, H, E]``; a cache, if there is one, moves on."""
    q, k, v, steps, width, local = given.q, given.k, given.v, given.steps, given.width, given.local
    batch, heads, length, size = q.shape
    groups, e = k.shape[1], max(pow2(size), LEAST)
    chunk = max(min(LONGEST, TILE // e), SHORTEST)
    chunks, columns, rows = cdiv(length, chunk), min(e, WIDEST), min(QUERIES, chunk)
    far = groups - local
    spikes = torch.empty((2, steps, batch, groups, width + length, size), dtype=torch.int8, device=q.device)
    if local and width:
        old = spikes[:, :, :, :local, :width]
        old.zero_() if given.recent is None else old.copy_(given.recent)
    sums = torch.empty((steps, batch, far, chunks, e, e), dtype=torch.float16, device=q.device)
    planes = torch.empty((2, *sums.shape), dtype=torch.float16, device=q.device)
    tau, threshold, _ = given.rule
    shape = {"SIZE": size, "E": e}
    cut = shape | {"COLUMNS": columns, "CHUNK": chunk}
    query, key, value, output = given.gains
    counted = None if given.seen is None else given.seen.cumsum(-1, dtype=torch.int32)
    run(
        *(_encode, (chunks, batch * groups, cdiv(e, columns)), k, v, given.seen, spikes, sums, key, value),
        *(tau, threshold, batch, groups, length, width, *k.stride()[:3], *v.stride()[:3]),
        **(given.how | cut | {"SEEN": given.seen is not None, "num_warps": 8}),
    )
    if far:
        run(
            *(_before, (cdiv(e * e, BLOCK), steps * batch * far), sums, planes, given.state, chunks),
            **(shape | {"CACHED": given.state is not None, "MANY": MANY, "BLOCK": BLOCK}),
        )
    run(
        *(_context, (cdiv(length, rows), batch * heads, cdiv(e, columns)), q, spikes, planes, counted, given.number),
        *(given.windows[:local] or (1,), out, query, output, given.rule),
        *(batch, heads, groups, length, width, chunks, *q.stride()[:3]),
        **(given.how | cut | {"COUNTED": counted is not None, "NUMBERED": given.number is not None, "M": rows}),
        num_warps=4 if e <= 64 else 8,
    )
    if given.recent is not None and width:
        given.recent.copy_(spikes[:, :, :, :local, length:])
