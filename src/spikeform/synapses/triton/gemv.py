# ruff: noqa: RUF005 (kernels know no unpacking into a tuple)
"""One row times a weight matrix, the neuron in the product's prologue: weights are read once, at memory speed.

Every program encodes the input channels that it meets (the input is small), holds a tile of products in registers, and
adds them up at the end; :mod:`.stream` has the row encoded once instead. Sums of integers are exact: int32 in each
lane, int64 where limbs come together.
"""

from __future__ import annotations

import triton
import triton.language as tl

from spikeform.synapses.triton.operands import (
    ask,
    await_inputs,
    count4,
    dot4,
    drive,
    fetch,
    gif_row,
    gif_word,
    oat_code,
    oat_real,
    oat_units,
    release,
    together,
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
    """``out [N] = OAT(x) [K] W^T + b``; EVEN: K is a multiple of BLOCK_K."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    lanes = tl.arange(0, BLOCK_K)
    row = (n % N).to(tl.int64)
    ask(
        weight.to(tl.pointer_type(tl.uint8)),
        row,
        K * (weight.dtype.element_ty.primitive_bitwidth // 8),
        BLOCK_N,
        0,
        AHEAD,
    )
    await_inputs(OVERLAP)
    release(OVERLAP)
    one, two, unit0, unit1 = oat_units(threshold, resolution, TWO)
    rows = weight + row[:, None] * K + lanes[None, :]
    v = drive(x, shift + lanes, lanes, lanes < K, SHIFTED)
    value = oat_real(v, one, two, unit0, unit1, limit, TWO, ROUNDING)
    sums = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    for k in tl.range(0, K, BLOCK_K, num_stages=STAGES):
        if EVEN:
            w = tl.load(rows + k, eviction_policy="evict_first").to(tl.float32)
        else:
            w = tl.load(rows + k, (k + lanes < K)[None, :], other=0.0, eviction_policy="evict_first").to(tl.float32)
        ahead = k + BLOCK_K + lanes  # the next tile's input is fetched and encoded while this one's weights arrive
        v = drive(x, shift + ahead, ahead, ahead < K, SHIFTED)
        sums += w * value[None, :]
        value = oat_real(v, one, two, unit0, unit1, limit, TWO, ROUNDING)
    y = tl.sum(sums, 1)
    if BIAS:
        y += tl.load(bias + n, n < N, other=0.0).to(tl.float32)
    tl.store(out + n, y.to(out.dtype.element_ty), n < N)


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
    ask(weight.to(tl.pointer_type(tl.uint8)), row, K, BLOCK_N, 0, AHEAD)
    await_inputs(OVERLAP)
    release(OVERLAP)
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
    factor = tl.load(scale + n, n < N, other=0.0)
    y = (together(sums, 0, LIMBS).to(tl.float32) * factor) * unit0
    if TWO:
        y += (together(sums, LIMBS, LIMBS).to(tl.float32) * factor) * unit1
    if BIAS:
        y += tl.load(bias + n, n < N, other=0.0).to(tl.float32)
    tl.store(out + n, y.to(out.dtype.element_ty), n < N)


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
    """``weight`` int32 words: int8 ``[N, K / 4]``, or PACKED ``[N, K / 8]``: ``weight + zero``.

    BLOCK_K counts words. The first tile is on its way while the range of the row is looked for.
    """
    WORDS = 8 if PACKED else 4
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    lanes = tl.arange(0, BLOCK_K)
    row = (n % N).to(tl.int64)
    ask(weight.to(tl.pointer_type(tl.uint8)), row, K // WORDS * 4, BLOCK_N, 0, AHEAD)
    rows = weight + row[:, None] * (K // WORDS) + lanes[None, :]
    w = tl.load(rows, (lanes < K // WORDS)[None, :], other=0, eviction_policy="evict_first")
    await_inputs(OVERLAP)
    release(OVERLAP)
    inputs, times = _gif_fetch(x, multiple, lanes, K, STEPPED, PACKED)
    low, unit = gif_row(x, K, levels, steps, CHUNK)
    sums = tl.zeros([BLOCK_N, BLOCK_K], tl.int32)
    totals = tl.zeros([BLOCK_K], tl.int32)
    for k in tl.range(0, K // WORDS, BLOCK_K, num_stages=STAGES):
        ahead = k + BLOCK_K + lanes
        later = tl.load(rows + (k + BLOCK_K), (ahead < K // WORDS)[None, :], other=0, eviction_policy="evict_first")
        inputs_later, times_later = _gif_fetch(x, multiple, ahead, K, STEPPED, PACKED)
        first = gif_word(inputs, times, 0, low, unit, levels, steps, STEPPED)
        if PACKED:
            second = gif_word(inputs, times, 4, low, unit, levels, steps, STEPPED)
            sums = dot4(w & 0x0F0F0F0F, first[None, :], sums, True)
            sums = dot4((w >> 4) & 0x0F0F0F0F, second[None, :], sums, True)
            totals = count4(second, count4(first, totals))
        else:
            sums = dot4(w, first[None, :], sums, True)
        w = later
        inputs = inputs_later
        times = times_later
    factor = tl.load(scale + n, n < N, other=0.0)
    total = tl.sum(sums, 1)
    if PACKED:
        total -= tl.load(zero + n, n < N, other=0).to(tl.int32) * tl.sum(totals, 0)
    y = (total.to(tl.float32) * factor) * unit
    if BIAS:
        y += tl.load(bias + n, n < N, other=0.0).to(tl.float32)
    tl.store(out + n, y.to(out.dtype.element_ty), n < N)


@triton.jit
def _gif_fetch(x, multiple, at, K, STEPPED: tl.constexpr, PACKED: tl.constexpr):
    """Inputs of the channels of words ``at``, and what their units are (nothing where all are 1)."""
    channel = (at // 8) * 64 + (at % 8) * 4 if PACKED else at * 4
    inputs = fetch(x, channel, K, 0.0)
    times = ()
    if PACKED:
        inputs = inputs + fetch(x, channel + 32, K, 0.0)
    if STEPPED:
        times = times + fetch(multiple, channel, K, 1.0)
        if PACKED:
            times = times + fetch(multiple, channel + 32, K, 1.0)
    return inputs, times
