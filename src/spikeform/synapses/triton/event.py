# ruff: noqa: RUF005 (kernels know no unpacking into a tuple)
"""Few rows, most of whose values are zero: only weight rows of the others are read, exactly so many.

A program owns some bytes of every weight row, and some input channels, which its slots share out: a slot is as many
threads as load those bytes of one row at once. What a slot has to visit is a word of bits in a register, of which it
takes the lowest again and again; so nothing lies between the values and the weights but the time that one load takes.
Where programs share the input channels, the one that comes last adds up what all of them left, or a second pass does.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from spikeform.synapses.triton.finish import scratch
from spikeform.synapses.triton.launch import cdiv, meta, next_power
from spikeform.synapses.triton.operands import await_inputs, dot4, release

# How many weights are in what is loaded as one element: one, or those of a word of bytes or of nibbles.
BYTES, NIBBLES = tl.constexpr(4), tl.constexpr(8)
RUN = tl.constexpr(8)  # neighbouring channels go to one slot: as many as fill a sector of the cache
MOST = 64  # channels of a slot: bits of a word
COLLECTED = 2048  # partial sums that a program of the second pass adds up


class Share(NamedTuple):
    """How an event product is cut.

    Attributes:
        size: Bytes of a weight row that a program loads.
        slots: Rows that it loads at once.
        splits: Programs that share the input channels, or as many more as have slots enough.
        depth: Rows of a slot that are on their way together.
        warps: Warps of a program.
        last: Whether the last program adds up partial sums, else a second pass.
    """

    size: int
    slots: int
    splits: int
    depth: int
    warps: int
    last: bool = False


@triton.jit
def _lowest(bits):
    """The place of the lowest bit that is set (else negative), and the other bits: int32 or int64 ``[...]``."""
    low = bits & -bits
    exponent = (low.to(tl.float32).to(tl.int32, bitcast=True) >> 23) & 255  # of a power of two, whatever its sign
    return exponent - 127, bits ^ low


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
def _collect(partial, scale, out, at, n, live, splits, stride, SCALED: tl.constexpr, PIECE: tl.constexpr):
    """``out[at] = scale[n] sum_s partial[s, at]``, PIECE of the splits at once."""
    lines = tl.arange(0, PIECE)
    total = tl.zeros([PIECE, at.shape[0]], partial.dtype.element_ty)
    for first in range(0, splits, PIECE):
        place = partial + (first + lines).to(tl.int64)[:, None] * stride + at[None, :]
        total += tl.load(place, (first + lines < splits)[:, None] & live[None, :], other=0, cache_modifier=".cg")
    y = tl.sum(total, 0).to(tl.float32)
    if SCALED:
        y *= tl.load(scale + n, live, other=0.0)
    tl.store(out + at, y, live)


@triton.jit
def _event(
    values,
    rows,
    scale,
    partial,
    arrived,
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
    BITS: tl.constexpr,
    DEPTH: tl.constexpr,
    WHOLE: tl.constexpr,
    LAST: tl.constexpr,
    PIECE: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """WIDTH: loaded elements of a weight row; BITS: channels of a slot; WHOLE: programs have all input channels."""
    release(OVERLAP)
    await_inputs(OVERLAP)
    kind = tl.int32 if INTEGRAL else tl.float32
    EVEN: tl.constexpr = WIDTH % WIDE == 0
    splits, stride = tl.num_programs(1), N.to(tl.int64) * ROWS
    own, apart = (tl.program_id(1) * SLOTS + tl.arange(0, SLOTS)) * RUN, splits * SLOTS * RUN
    word = tl.int64 if BITS > 32 else tl.int32
    left, found = tl.zeros([SLOTS], word), tl.zeros([SLOTS], tl.int32)
    excess = ()
    for _ in tl.static_range(ROWS):
        excess = excess + (tl.program_id(0) * 0,)
    for piece in tl.static_range((BITS + WIDE - 1) // WIDE):
        # In the shape of weights, so that bits are born with the threads that visit them.
        bit = piece * WIDE + tl.arange(0, WIDE)
        k = own[:, None] + (bit // RUN * apart + bit % RUN)[None, :]
        used, more = k < 0, ()
        for m in tl.static_range(ROWS):
            v = tl.load(values + m * K + k, (k < K) & (bit < BITS)[None, :], other=0)
            used = used | (v != 0)
            if HELD == NIBBLES and INTEGRAL:
                more = more + (excess[m] + 8 * tl.sum(tl.sum(v.to(tl.int32), 1), 0),)
        if HELD == NIBBLES and INTEGRAL:
            excess = more
        one = tl.full([1, WIDE], 1, word) << (bit % BITS)[None, :]
        left |= tl.xor_sum(tl.where(used, one, 0), 1)
        found += tl.sum(used.to(tl.int32), 1)
    count = tl.max(found, 0)
    n = tl.program_id(0) * WIDE + tl.arange(0, WIDE)
    sums = ()
    for _ in tl.static_range(ROWS * HELD):
        sums = sums + (tl.zeros([SLOTS, WIDE], kind),)
    for _ in range(0, count, DEPTH):
        tiles, given = (), ()
        for _ in tl.static_range(DEPTH):
            live = left != 0
            place, left = _lowest(left)
            channel = own + (place >> 3) * apart + (place & 7)
            at = rows + channel.to(tl.int64)[:, None] * WIDTH + n[None, :]
            inside = live[:, None] if EVEN else live[:, None] & (n < WIDTH)[None, :]
            tiles = tiles + (tl.load(at, inside, other=0, eviction_policy="evict_first"),)
            for m in tl.static_range(ROWS):
                given = given + (tl.load(values + m * K + channel, live, other=0),)
        for step in tl.static_range(DEPTH):
            added = ()
            for m in tl.static_range(ROWS):
                added = added + _visited(sums, tiles[step], given[step * ROWS + m], m * HELD, HELD)
            sums = added
    byte = tl.program_id(0) * (WIDE * min(HELD, 4)) + tl.arange(0, WIDE * min(HELD, 4))
    for m in tl.static_range(ROWS):
        for half in tl.static_range(max(HELD // 4, 1)):
            total = tl.sum(sums[m] if HELD == 1 else _bytes_of(sums, m * HELD + 4 * half), 0)
            if HELD == NIBBLES and INTEGRAL:
                total -= excess[m]
            column = byte // 32 * 64 + byte % 32 + 32 * half if HELD == NIBBLES else byte
            if WHOLE:
                y = total.to(tl.float32)
                if SCALED:
                    y *= tl.load(scale + column, column < N, other=0.0)
                tl.store(out + m * N + column, y, column < N)
            else:
                tl.store(partial + tl.program_id(1) * stride + m * N + column, total, column < N)
    if LAST:
        tl.debug_barrier()  # all threads have written
        if tl.atomic_add(arrived + tl.program_id(0), 1, sem="acq_rel", scope="gpu") == splits - 1:
            for m in tl.static_range(ROWS):
                for half in tl.static_range(max(HELD // 4, 1)):
                    column = byte // 32 * 64 + byte % 32 + 32 * half if HELD == NIBBLES else byte
                    _collect(partial, scale, out, m * N + column, column, column < N, splits, stride, SCALED, PIECE)
            tl.store(arrived + tl.program_id(0), 0)


@triton.jit
def _second(
    partial,
    scale,
    out,
    N,
    splits,
    stride,
    SCALED: tl.constexpr,
    PIECE: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    release(OVERLAP)
    await_inputs(OVERLAP)
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    _collect(partial, scale, out, tl.program_id(1) * N + n, n, n < N, splits, stride, SCALED, PIECE)


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
    words = packed or (integral and rows.shape[1] % 4 == 0 and rows.storage_offset() % 4 == 0)
    loaded = rows.view(torch.int32) if words else rows
    width = loaded.shape[1]
    wide = min(cut.size // loaded.element_size(), next_power(width))
    runs = cdiv(inner, cut.slots * RUN.value)
    splits = min(max(cut.splits, cdiv(runs, MOST // RUN.value)), runs)
    grid = (cdiv(width, wide), splits)
    whole, scaled = splits == 1, scale is not None
    last = cut.last and not whole
    partial = out if whole else scratch(splits, height, columns, torch.int32 if integral else torch.float32, values)
    _event[grid](
        values,
        loaded,
        scale if scaled else out,
        partial,
        counters(values.device, grid[0]) if last else partial,
        out,
        columns,
        inner,
        **meta(
            WIDTH=width,
            ROWS=height,
            HELD=NIBBLES.value if packed else BYTES.value if words else 1,
            INTEGRAL=integral,
            SCALED=scaled,
            WIDE=wide,
            SLOTS=cut.slots,
            BITS=next_power(cdiv(runs, splits)) * RUN.value,
            DEPTH=cut.depth,
            WHOLE=whole,
            LAST=last,
            PIECE=min(next_power(splits), 16),
            num_warps=cut.warps,
        ),
    )
    if not whole and not last:
        piece = next_power(splits)
        block = max(16, COLLECTED // piece)
        _second[(cdiv(columns, block), height)](
            partial,
            scale if scaled else out,
            out,
            columns,
            splits,
            height * columns,
            **meta(SCALED=scaled, PIECE=piece, BLOCK=block),
        )


_counters: dict[torch.device, Tensor] = {}


def counters(device: torch.device, count: int) -> Tensor:
    """Zeros, int32, which kernels leave as zeros."""
    known = _counters.get(device)
    if known is None or known.numel() < count:
        known = _counters[device] = torch.zeros(max(count, 4096), dtype=torch.int32, device=device)
    return known
