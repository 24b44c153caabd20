# ruff: noqa: RUF005 (kernels know no unpacking into a tuple)
"""Few rows, most of whose values are zero: only weight rows of the others are read, exactly so many.

A program owns some bytes of every weight row, and its slots share out the input channels: a slot is as many threads as
load those bytes of one row at once. What a slot has to visit is words of bits in registers, of which it takes the
lowest again and again; so nothing lies between the values and the weights but the time that one load takes. A row that
has come is added, and the next is asked for in its place, so that as many as before are on their way.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from spikeform.synapses.triton.launch import cdiv, meta, next_power
from spikeform.synapses.triton.operands import await_inputs, dot4, release

# How many weights are in what is loaded as one element: one, or those of a word of bytes or of nibbles.
BYTES, NIBBLES = tl.constexpr(4), tl.constexpr(8)
RUN = tl.constexpr(8)  # neighbouring channels go to one slot: as many as fill a sector of the cache
LOAD = 16  # bytes that a thread loads at once
WORD = 32  # bits of a word: those of twice as many take more instructions


class Share(NamedTuple):
    """How an event product is cut.

    Attributes:
        size: Bytes of a weight row that a program loads.
        slots: Rows that it loads at once; a slot has a thread for each 16 bytes.
        depth: Rows of a slot that are on their way together.
    """

    size: int
    slots: int
    depth: int


@triton.jit
def _lowest(bits):
    """The place of the lowest bit that is set (else negative), and the other bits: int32 ``[...]``."""
    low = bits & -bits
    exponent = (low.to(tl.float32).to(tl.int32, bitcast=True) >> 23) & 255  # of a power of two, whatever its sign
    return exponent - 127, bits ^ low


@triton.jit
def _next(words, turn, BITS: tl.constexpr):
    """What each slot visits next.

    Args:
        words: Words of channels to visit, int32 ``[SLOTS]`` each; the first is the one at work.
        turn: Channels of the words before, int32 ``[SLOTS]``.
        BITS: Channels of a word.

    Returns:
        Whether there is one; which of the slot's; words; turn. A word that is spent makes room for the one after it,
        which is one step without a channel where that has none either.
    """
    left = words[0]
    rest = ()
    if len(words) > 1:
        spent = left == 0
        left, turn = tl.where(spent, words[1], left), tl.where(spent, turn + BITS, turn)
        for i in tl.static_range(1, len(words)):
            after = words[i + 1] if i + 1 < len(words) else words[i] * 0
            rest = rest + (tl.where(spent, after, words[i]),)
    live = left != 0
    place, left = _lowest(left)
    return live, turn + place, (left,) + rest, turn


@triton.jit
def _ask(rows, values, own, place, apart, live, n, K, WIDTH: tl.constexpr, ROWS: tl.constexpr, EVEN: tl.constexpr):
    """What the program has of one weight row of each slot, and the values that meet it, one tensor of each row."""
    channel = own + (place >> 3) * apart + (place & 7)
    inside = live[:, None] if EVEN else live[:, None] & (n < WIDTH)[None, :]
    at = rows + channel.to(tl.int64)[:, None] * WIDTH + n[None, :]
    given = ()
    for m in tl.static_range(ROWS):
        given = given + (tl.load(values + m * K + channel, live, other=0),)
    return tl.load(at, inside, other=0, eviction_policy="evict_first"), given


@triton.jit
def _bytes_of(sums, FIRST: tl.constexpr):
    """Sums of bytes 0 to 3 of words ``[S, W]``, four tensors from FIRST on, in the order of memory."""
    pairs = tl.join(tl.join(sums[FIRST], sums[FIRST + 2]), tl.join(sums[FIRST + 1], sums[FIRST + 3]))
    return tl.reshape(pairs, [pairs.shape[0], pairs.shape[1] * 4])


@triton.jit
def _visited(sums, weights, value, FIRST: tl.constexpr, HELD: tl.constexpr):
    """The sums of a row, from FIRST on, and what ``value [S]`` times ``weights [S, W]`` adds to them."""
    added = ()
    if HELD == 1:
        kind = sums[FIRST].dtype
        added = added + (sums[FIRST] + weights.to(kind) * value.to(kind)[:, None],)
    else:
        for half in tl.static_range(HELD // 4):
            part = (weights >> (4 * half)) & 0x0F0F0F0F if HELD == NIBBLES else weights
            for byte in tl.static_range(4):
                own = sums[FIRST + 4 * half + byte]
                if own.dtype == tl.float32:
                    added = added + (own + (((part >> (8 * byte)) & 15) - 8).to(tl.float32) * value[:, None],)
                else:  # all other bytes meet a zero
                    code = (value.to(tl.int32) & 255) << (8 * byte)
                    added = added + (dot4(part, code[:, None], own, True),)
    return added


@triton.jit
def _event(
    values,
    rows,
    scale,
    out,
    N,
    K,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    HELD: tl.constexpr,
    INTEGRAL: tl.constexpr,
    SCALED: tl.constexpr,
    WIDE: tl.constexpr,
    SLOTS: tl.constexpr,
    WORDS: tl.constexpr,
    BITS: tl.constexpr,
    DEPTH: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """WIDTH: loaded elements of a weight row; WIDE: of them a program's; a slot has WORDS times BITS channels."""
    release(OVERLAP)
    await_inputs(OVERLAP)
    kind = tl.int32 if INTEGRAL else tl.float32
    EVEN: tl.constexpr = WIDTH % WIDE == 0
    own, apart = tl.arange(0, SLOTS) * RUN, SLOTS * RUN
    found, words, sent = tl.zeros([SLOTS, WIDE], tl.int32), (), ()
    for _ in tl.static_range(ROWS):
        sent = sent + (tl.zeros([SLOTS, WIDE], kind),)
    for w in tl.static_range(WORDS):
        bits = tl.zeros([SLOTS, WIDE], tl.int32)
        for piece in tl.static_range((BITS + WIDE - 1) // WIDE):
            # In the shape of weights, so that bits are born with the threads that visit them.
            bit = piece * WIDE + tl.arange(0, WIDE)
            k = own[:, None] + ((w * BITS + bit) // RUN * apart + bit % RUN)[None, :]
            used, more = k < 0, ()
            for m in tl.static_range(ROWS):
                v = tl.load(values + m * K + k, (k < K) & (bit < BITS)[None, :], other=0)
                used = used | (v != 0)
                more = more + (sent[m] + v.to(kind) if HELD == NIBBLES and INTEGRAL else sent[m],)
            sent = more
            bits |= used.to(tl.int32) << (bit % BITS)[None, :]
            found += used.to(tl.int32)
        words = words + (tl.xor_sum(bits, 1),)
    n = tl.program_id(0) * WIDE + tl.arange(0, WIDE)
    turn, tiles, given, sums = tl.zeros([SLOTS], tl.int32), (), (), ()
    for _ in tl.static_range(DEPTH):
        live, place, words, turn = _next(words, turn, BITS)
        tile, value = _ask(rows, values, own, place, apart, live, n, K, WIDTH, ROWS, EVEN)
        tiles, given = tiles + (tile,), given + value
    for m in tl.static_range(ROWS):
        zero = tl.zeros([SLOTS, WIDE], kind)
        if HELD == NIBBLES and INTEGRAL:  # nibbles are 8 too large
            zero -= 8 * tl.sum(sent[m], 1)[:, None]
        for _ in tl.static_range(HELD):
            sums = sums + (zero,)
    for _ in range(0, tl.max(tl.sum(found, 1), 0) + max(WORDS - 2, 0), DEPTH):
        coming, meeting = (), ()
        for step in tl.static_range(DEPTH):
            added = ()
            for m in tl.static_range(ROWS):
                added = added + _visited(sums, tiles[step], given[step * ROWS + m], m * HELD, HELD)
            sums = added
            live, place, words, turn = _next(words, turn, BITS)
            tile, value = _ask(rows, values, own, place, apart, live, n, K, WIDTH, ROWS, EVEN)
            coming, meeting = coming + (tile,), meeting + value
        tiles, given = coming, meeting
    byte = tl.program_id(0) * (WIDE * min(HELD, 4)) + tl.arange(0, WIDE * min(HELD, 4))
    for m in tl.static_range(ROWS):
        for half in tl.static_range(max(HELD // 4, 1)):
            y = tl.sum(sums[m] if HELD == 1 else _bytes_of(sums, m * HELD + 4 * half), 0).to(tl.float32)
            column = byte // 32 * 64 + byte % 32 + 32 * half if HELD == NIBBLES else byte
            if SCALED:
                y *= tl.load(scale + column, column < N, other=0.0)
            tl.store(out + m * N + column, y, column < N)


def event(values: Tensor, rows: Tensor, scale: Tensor | None, out: Tensor, cut: Share) -> None:
    """``out [M, N] = scale (values rows)``, skipping rows whose value is zero in all of up to four ``values [M, K]``.

    Args:
        values: fp32 or int8, contiguous.
        rows: bf16, fp32 or int8 ``[K, N]``, or packed uint8 ``[K, N / 2]``.
        scale: fp32 ``[N]``, or None.
        out: fp32 ``[M, N]``.
        cut: How.
    """
    (height, inner), columns = values.shape, out.shape[1]
    integral = values.dtype == torch.int8 and not rows.is_floating_point()
    packed = rows.dtype == torch.uint8
    held = packed or (integral and rows.shape[1] % 4 == 0 and rows.storage_offset() % 4 == 0)
    loaded = rows.view(torch.int32) if held else rows
    width = loaded.shape[1]
    wide = min(cut.size // loaded.element_size(), next_power(width))
    channels = cdiv(inner, cut.slots * RUN.value) * RUN.value
    _event[(cdiv(width, wide),)](
        values,
        loaded,
        out if scale is None else scale,
        out,
        columns,
        inner,
        **meta(
            WIDTH=width,
            ROWS=height,
            HELD=NIBBLES.value if packed else BYTES.value if held else 1,
            INTEGRAL=integral,
            SCALED=scale is not None,
            WIDE=wide,
            SLOTS=cut.slots,
            WORDS=cdiv(channels, WORD),
            BITS=min(next_power(channels), WORD),
            DEPTH=cut.depth,
            num_warps=min(32, max(1, cut.slots * wide * loaded.element_size() // (32 * LOAD))),
        ),
    )
