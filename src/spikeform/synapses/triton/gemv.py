# ruff: noqa: RUF005 (kernels know no unpacking into a tuple)
"""One to four rows times a weight matrix, the neuron in the product's prologue: weights are read once, at memory speed.

Every program encodes the input channels that it meets (the input is small), holds a tile of products in registers, and
adds them up at the end. Sums of integers are exact: int32 in each lane, int64 where limbs come together.
"""

from __future__ import annotations

import triton
import triton.language as tl

from spikeform.synapses.triton.operands import (
    ask,
    await_inputs,
    dot4,
    drive,
    fetch,
    gif_row,
    gif_word,
    oat_code,
    oat_real,
    oat_units,
    release,
)


@triton.jit
def oat_gemv(
    x,
    weight,
    bias,
    threshold,
    shift,
    out,
    N,
    K,
    limit,
    resolution,
    ROWS: tl.constexpr,
    TWO: tl.constexpr,
    ROUNDING: tl.constexpr,
    SHIFTED: tl.constexpr,
    BIAS: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    AHEAD: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """``out [ROWS, N] = OAT(x) [ROWS, K] W^T + b``; EVEN: K is a multiple of BLOCK_K."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    lanes = tl.arange(0, BLOCK_K)
    row = (n % N).to(tl.int64)
    if AHEAD:
        ask(weight.to(tl.pointer_type(tl.uint8)), row, K * (weight.dtype.element_ty.primitive_bitwidth // 8), BLOCK_N)
    await_inputs(OVERLAP)
    one, two, unit0, unit1 = oat_units(threshold, resolution, TWO)
    rows = weight + row[:, None] * K + lanes[None, :]
    values = ()
    sums = ()
    for m in tl.static_range(ROWS):
        v = drive(x, shift + lanes, m * K + lanes, lanes < K, SHIFTED)
        values = values + (oat_real(v, one, two, unit0, unit1, limit, TWO, ROUNDING),)
        sums = sums + (tl.zeros([BLOCK_N, BLOCK_K], tl.float32),)
    for k in tl.range(0, K, BLOCK_K, num_stages=STAGES):
        if EVEN:
            w = tl.load(rows + k, eviction_policy="evict_first").to(tl.float32)
        else:
            w = tl.load(rows + k, (k + lanes < K)[None, :], other=0.0, eviction_policy="evict_first").to(tl.float32)
        ahead = k + BLOCK_K + lanes  # the next tile's input is fetched and encoded while this one's weights arrive
        later = ()
        added = ()
        for m in tl.static_range(ROWS):
            v = drive(x, shift + ahead, m * K + ahead, ahead < K, SHIFTED)
            added = added + (sums[m] + w * values[m][None, :],)
            later = later + (oat_real(v, one, two, unit0, unit1, limit, TWO, ROUNDING),)
        sums = added
        values = later
    release(OVERLAP)  # no earlier: the next kernel's programs would take the place of this one's later ones
    for m in tl.static_range(ROWS):
        y = tl.sum(sums[m], 1)
        if BIAS:
            y += tl.load(bias + n, n < N, other=0.0).to(tl.float32)
        tl.store(out + m * N + n, y.to(out.dtype.element_ty), n < N)


@triton.jit
def _limb_words(x, k, K, one, two, unit0, unit1, limit, TWO: tl.constexpr, ROUNDING: tl.constexpr, LIMBS: tl.constexpr):
    """Bytes of the codes of channels ``k .. k + 3``, lowest limb first; those of normal neurons, then of outliers."""
    words = ()
    for _ in tl.static_range(LIMBS):
        words = words + (k * 0,)
    chosen = k * 0
    for byte in tl.static_range(4):
        v = tl.load(x + k + byte, k < K, other=0.0).to(tl.float32)
        code, outlier = oat_code(v, one, two, unit0, unit1, limit, TWO, ROUNDING)
        code = code.to(tl.int32)
        grown = ()
        for limb in tl.static_range(LIMBS):
            grown = grown + (words[limb] | (((code >> (8 * limb)) & 255) << (8 * byte)),)
        words = grown
        chosen |= tl.where(outlier, 255, 0) << (8 * byte)
    if TWO:
        split = ()
        for limb in tl.static_range(LIMBS):
            split = split + (words[limb] & ~chosen,)
        for limb in tl.static_range(LIMBS):
            split = split + (words[limb] & chosen,)
        words = split
    return words


@triton.jit
def oat_int_gemv(
    x,
    weight,
    scale,
    bias,
    threshold,
    out,
    N,
    K,
    limit,
    resolution,
    TWO: tl.constexpr,
    ROUNDING: tl.constexpr,
    LIMBS: tl.constexpr,
    BIAS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    AHEAD: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """One row; ``weight`` int32 words ``[N, K / 4]``, BLOCK_K of words; codes have LIMBS bytes, the last one signed."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    lanes = tl.arange(0, BLOCK_K)
    row = (n % N).to(tl.int64)
    if AHEAD:
        ask(weight.to(tl.pointer_type(tl.uint8)), row, K, BLOCK_N)
    await_inputs(OVERLAP)
    one, two, unit0, unit1 = oat_units(threshold, resolution, TWO)
    rows = weight + row[:, None] * (K // 4) + lanes[None, :]
    words = _limb_words(x, lanes * 4, K, one, two, unit0, unit1, limit, TWO, ROUNDING, LIMBS)
    sums = ()
    for _ in tl.static_range(LIMBS * 2 if TWO else LIMBS):
        sums = sums + (tl.zeros([BLOCK_N, BLOCK_K], tl.int32),)
    for k in tl.range(0, K // 4, BLOCK_K, num_stages=STAGES):
        w = tl.load(rows + k, (k + lanes < K // 4)[None, :], other=0, eviction_policy="evict_first")
        later = _limb_words(x, (k + BLOCK_K + lanes) * 4, K, one, two, unit0, unit1, limit, TWO, ROUNDING, LIMBS)
        added = ()
        for plane in tl.static_range(LIMBS * 2 if TWO else LIMBS):
            added = added + (dot4(w, words[plane][None, :], sums[plane], plane % LIMBS == LIMBS - 1),)
        sums = added
        words = later
    release(OVERLAP)
    factor = tl.load(scale + n, n < N, other=0.0)
    y = (_together(sums, 0, LIMBS).to(tl.float32) * factor) * unit0
    if TWO:
        y += (_together(sums, LIMBS, LIMBS).to(tl.float32) * factor) * unit1
    if BIAS:
        y += tl.load(bias + n, n < N, other=0.0).to(tl.float32)
    tl.store(out + n, y.to(out.dtype.element_ty), n < N)


@triton.jit
def _together(sums, FIRST: tl.constexpr, LIMBS: tl.constexpr):
    total = tl.sum(sums[FIRST], 1).to(tl.int64)
    for limb in tl.static_range(1, LIMBS):
        total += tl.sum(sums[FIRST + limb], 1).to(tl.int64) << (8 * limb)
    return total


@triton.jit
def gif_gemv(
    x,
    weight,
    scale,
    zero,
    bias,
    multiple,
    out,
    N,
    K,
    levels,
    steps,
    ROWS: tl.constexpr,
    STEPPED: tl.constexpr,
    PACKED: tl.constexpr,
    BIAS: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    AHEAD: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """ROWS rows; ``weight`` int32 words: int8 ``[N, K / 4]``, or PACKED ``[N, K / 8]``: ``weight + zero``.

    BLOCK_K counts words. The first tile is on its way while the range of the rows is looked for.
    """
    WORDS = 8 if PACKED else 4
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    lanes = tl.arange(0, BLOCK_K)
    row = (n % N).to(tl.int64)
    if AHEAD:
        ask(weight.to(tl.pointer_type(tl.uint8)), row, K // WORDS * 4, BLOCK_N)
    await_inputs(OVERLAP)
    rows = weight + row[:, None] * (K // WORDS) + lanes[None, :]
    w = tl.load(rows, (lanes < K // WORDS)[None, :], other=0, eviction_policy="evict_first")
    inputs, times = _gif_fetch(x, multiple, lanes, K, ROWS, STEPPED, PACKED)
    lows = ()
    units = ()
    sums = ()
    totals = ()
    for m in tl.static_range(ROWS):
        low, unit = gif_row(x + m * K, K, levels, steps, CHUNK)
        lows = lows + (low,)
        units = units + (unit,)
        sums = sums + (tl.zeros([BLOCK_N, BLOCK_K], tl.int32),)
        totals = totals + (tl.zeros([BLOCK_K], tl.int32),)
    for k in tl.range(0, K // WORDS, BLOCK_K, num_stages=STAGES):
        ahead = k + BLOCK_K + lanes
        later = tl.load(rows + (k + BLOCK_K), (ahead < K // WORDS)[None, :], other=0, eviction_policy="evict_first")
        inputs_later, times_later = _gif_fetch(x, multiple, ahead, K, ROWS, STEPPED, PACKED)
        added = ()
        counted = ()
        for m in tl.static_range(ROWS):
            if PACKED:
                first = gif_word(inputs, times, 8 * m, 0, lows[m], units[m], levels, steps, STEPPED)
                second = gif_word(inputs, times, 8 * m + 4, 4, lows[m], units[m], levels, steps, STEPPED)
                part = dot4(w & 0x0F0F0F0F, first[None, :], sums[m], True)
                added = added + (dot4((w >> 4) & 0x0F0F0F0F, second[None, :], part, True),)
                counted = counted + (_count(second, _count(first, totals[m])),)
            else:
                first = gif_word(inputs, times, 4 * m, 0, lows[m], units[m], levels, steps, STEPPED)
                added = added + (dot4(w, first[None, :], sums[m], True),)
                counted = counted + (totals[m],)
        sums = added
        totals = counted
        w = later
        inputs = inputs_later
        times = times_later
    release(OVERLAP)
    factor = tl.load(scale + n, n < N, other=0.0)
    for m in tl.static_range(ROWS):
        total = tl.sum(sums[m], 1)
        if PACKED:
            total -= tl.load(zero + n, n < N, other=0).to(tl.int32) * tl.sum(totals[m], 0)
        y = (total.to(tl.float32) * factor) * units[m]
        if BIAS:
            y += tl.load(bias + n, n < N, other=0.0).to(tl.float32)
        tl.store(out + m * N + n, y.to(out.dtype.element_ty), n < N)


@triton.jit
def _gif_fetch(x, multiple, at, K, ROWS: tl.constexpr, STEPPED: tl.constexpr, PACKED: tl.constexpr):
    """Inputs, by row, of the channels of words ``at``, and what their units are (nothing where all are 1)."""
    inputs = ()
    times = ()
    channel = (at // 8) * 64 + (at % 8) * 4 if PACKED else at * 4
    for m in tl.static_range(ROWS):
        inputs = inputs + fetch(x + m * K, channel, K, 0.0)
        if PACKED:
            inputs = inputs + fetch(x + m * K, channel + 32, K, 0.0)
    if STEPPED:
        times = times + fetch(multiple, channel, K, 1.0)
        if PACKED:
            times = times + fetch(multiple, channel + 32, K, 1.0)
    return inputs, times


@triton.jit
def _count(word, total):
    """``total`` and the four signed bytes of a word."""
    return dot4(word, word * 0 + 0x01010101, total, True)
