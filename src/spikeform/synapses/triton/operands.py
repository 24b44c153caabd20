# ruff: noqa: RUF005 (kernels know no unpacking into a tuple)
"""What the kernels of products share: neurons in front of a product, and integer arithmetic on packed bytes.

Words are int32 and hold four bytes, the first channel in the lowest one. N output features, K input channels.
"""

from __future__ import annotations

import triton
import triton.language as tl

from spikeform.neurons.triton.codes import INTERPRETED, gif_integer, gif_unit, oat_code, oat_value


@triton.jit
def release(OVERLAP: tl.constexpr):
    """Let the next kernel begin where this one leaves room: once all programs of this one have come here, or ended.

    After :func:`await_inputs` no more than one kernel is ahead of the running one, and weights that it asks for stay in
    the cache until they are read. What is short, and has another long one behind it, lets that begin before it waits.
    """
    if OVERLAP and not INTERPRETED:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def await_inputs(OVERLAP: tl.constexpr):
    """Wait for the kernel before; nothing but constant weights may be asked for, and nothing written, until then."""
    if OVERLAP and not INTERPRETED:
        tl.extra.cuda.gdc_wait()


@triton.jit
def pick(given, part):
    """Element ``part`` of a tuple of pointers, or of numbers."""
    found = given[0]
    for i in tl.static_range(1, len(given)):
        found = tl.where(part == i, given[i], found)
    return found


@triton.jit
def oat_units(threshold, resolution, TWO: tl.constexpr):
    """Thresholds and units of both sub-neurons, fp32 scalars; those of the first twice where there is one."""
    first = tl.load(threshold)
    second = tl.load(threshold + 1) if TWO else first
    return first, second, tl.div_rn(first, first * 0.0 + resolution), tl.div_rn(second, second * 0.0 + resolution)


@triton.jit
def drive(x, shift, at, live, SHIFTED: tl.constexpr):
    """Membrane potentials, fp32: the input at ``at``, of which channel ``shift`` points at the powers of two."""
    return shifted(tl.load(x + at, live, other=0.0).to(tl.float32), shift, live, SHIFTED)


@triton.jit
def shifted(v, shift, live, SHIFTED: tl.constexpr):
    """``v`` as potentials, where channel thresholds differ by powers of two, at which ``shift`` points."""
    if SHIFTED:
        exponent = tl.load(shift, live, other=0).to(tl.int32)
        v = v * ((127 - exponent) << 23).to(tl.float32, bitcast=True)
    return v


@triton.jit
def oat_real(v, one, two, unit0, unit1, limit, TWO: tl.constexpr, ROUNDING: tl.constexpr):
    """What the population sends for ``v``, fp32."""
    code, outlier = oat_code(v, one, two, unit0, unit1, limit, TWO, ROUNDING)
    return oat_value(code, outlier, unit0, unit1, TWO)


@triton.jit
def dot4(weights, codes, sums, SIGNED: tl.constexpr):
    """``sums + weights . codes`` of four bytes a word: weights signed, codes signed or not. The three broadcast."""
    if INTERPRETED:
        for byte in tl.static_range(4):
            w = (weights << (24 - 8 * byte)) >> 24
            c = (codes << (24 - 8 * byte)) >> 24
            sums += w * (c if SIGNED else c & 255)
        return sums
    elif SIGNED:
        return tl.inline_asm_elementwise(
            "dp4a.s32.s32 $0, $1, $2, $3;", "=r,r,r,r", [weights, codes, sums], dtype=tl.int32, is_pure=True, pack=1
        )
    else:
        return tl.inline_asm_elementwise(
            "dp4a.s32.u32 $0, $1, $2, $3;", "=r,r,r,r", [weights, codes, sums], dtype=tl.int32, is_pure=True, pack=1
        )


@triton.jit
def count4(word, total):
    """``total`` and the four signed bytes of a word."""
    return dot4(word, word * 0 + 0x01010101, total, True)


@triton.jit
def together(sums, FIRST: tl.constexpr, LIMBS: tl.constexpr):
    """Sums over the last axis of LIMBS tensors, of which each counts 256 times what the one before it does; int64."""
    total = tl.sum(sums[FIRST], 1).to(tl.int64)
    for limb in tl.static_range(1, LIMBS):
        total += tl.sum(sums[FIRST + limb], 1).to(tl.int64) << (8 * limb)
    return total


@triton.jit
def multiply(a, b, sums):
    """``sums + a b`` of matrices: int8 into int32, bf16 into fp32."""
    if INTERPRETED and a.dtype == tl.bfloat16:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), sums)  # the interpreter would multiply the bits of bf16
    else:
        return tl.dot(a, b, sums, out_dtype=sums.dtype)


@triton.jit
def gif_row(x, K, levels, steps, CHUNK: tl.constexpr):
    """Least element (at most 0) and common unit of a row of GIF neurons."""
    lanes = tl.arange(0, CHUNK)
    low = tl.zeros([CHUNK], tl.float32)
    high = tl.zeros([CHUNK], tl.float32)
    for k in range(0, K, CHUNK):
        v = tl.load(x + k + lanes, k + lanes < K, other=0.0).to(tl.float32)
        low, high = tl.minimum(low, v), tl.maximum(high, v)
    least = tl.min(low, 0)
    return least, gif_unit(least, tl.max(high, 0), levels, steps)


@triton.jit
def fetch(source, k, K, other):
    """Elements of channels ``k .. k + 3``, four tensors; ``k`` int32 ``[...]``, a multiple of 4, as K is."""
    found = ()
    for byte in tl.static_range(4):
        found = found + (tl.load(source + k + byte, k < K, other=other),)
    return found


@triton.jit
def gif_word(inputs, times, FIRST: tl.constexpr, low, unit, levels, steps, STEPPED: tl.constexpr):
    """Integers of four channels as one word each.

    Args:
        inputs: What :func:`fetch` found of a row, from the element FIRST on.
        times: The channels' units in common units, likewise; read where STEPPED, else they are 1.
        FIRST: As said.
        low: Of :func:`gif_row`.
        unit: Of :func:`gif_row`.
        levels: L.
        steps: T.
        STEPPED: Whether channels may differ.
    """
    word = inputs[FIRST].to(tl.int32) * 0
    for byte in tl.static_range(4):
        v = inputs[FIRST + byte].to(tl.float32)
        multiple = times[FIRST + byte] if STEPPED else v * 0.0 + 1.0
        code = gif_integer(v, low, unit, multiple, levels, steps).to(tl.int32)
        word |= (code & 255) << (8 * byte)
    return word


@triton.jit
def _ask(place, live):
    """Have 256 bytes at each of some places, aligned to 16, brought into the L2 cache."""
    tl.inline_asm_elementwise(
        "{ .reg .pred p; setp.ne.u32 p, $2, 0; @p cp.async.bulk.prefetch.L2.global [$1], 256; mov.u32 $0, 0; }",
        "=r,l,r",
        [place, live.to(tl.int32)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def ask_run(start, size, part, parts):
    """Have one of some parts of ``size`` bytes brought into the L2 cache; not what is behind the last whole 256."""
    if not INTERPRETED:
        lanes = tl.arange(0, 256)
        pieces = size // 256
        for first in range(part, pieces, parts * 256):
            piece = first + lanes * parts
            _ask(start + piece * 256, piece < pieces)


@triton.jit
def ask(weight, row, size, HEIGHT: tl.constexpr, FIRST: tl.constexpr, AHEAD: tl.constexpr):
    """Have a part of some rows brought into the L2 cache while the program waits.

    Args:
        weight: Pointer to bytes.
        row: int64 ``[HEIGHT]``.
        size: Bytes of a row, a multiple of 256; rows are aligned to 16 bytes.
        HEIGHT: Rows.
        FIRST: The part's first byte, a multiple of 256.
        AHEAD: How many bytes, if a row has them; 0: none.
    """
    if AHEAD and not INTERPRETED:
        lanes = tl.arange(0, 16) * 256
        end = tl.minimum(size, FIRST + AHEAD)
        for start in range(FIRST, end, 4096):
            byte = start + lanes
            _ask(weight + row[:, None] * size + byte[None, :], (byte < end)[None, :])
