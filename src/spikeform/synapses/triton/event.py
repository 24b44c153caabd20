# ruff: noqa: RUF005 (kernels know no unpacking into a tuple)
"""Few rows, most of whose values are zero: only weight rows of the others are read, exactly so many.

A program owns some output features and some input channels. It lists the channels that any row uses, gathers their
weights, and leaves partial sums for a second pass. The length of its loop is known to the device alone.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from spikeform.synapses.triton.finish import finish_real, scratch
from spikeform.synapses.triton.launch import cdiv, meta
from spikeform.synapses.triton.operands import await_inputs, release


class Share(NamedTuple):
    """How an event product is cut.

    Attributes:
        n: Stored columns (bytes of packed rows) of a program.
        k: Input channels of a program.
        rows: Weight rows gathered at once.
        warps: Warps of a program.
    """

    n: int
    k: int
    rows: int
    warps: int


@triton.jit
def _event(
    values,
    rows,
    listed,
    partial,
    N,
    K,
    width,
    ROWS: tl.constexpr,
    INTEGRAL: tl.constexpr,
    PACKED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """``width``: elements of a stored row; ``listed`` int32: BLOCK_K places of each program."""
    release(OVERLAP)
    await_inputs(OVERLAP)
    kind = tl.int32 if INTEGRAL else tl.float32
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    used = k < 0
    for m in tl.static_range(ROWS):
        used = used | (tl.load(values + m * K + k, k < K, other=0) != 0)
    count = tl.sum(used.to(tl.int32), 0)
    own = listed + (tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)) * BLOCK_K
    tl.store(own + tl.cumsum(used.to(tl.int32), 0) - 1, k, used)
    tl.debug_barrier()  # the list is read by other lanes than wrote it
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    lanes = tl.arange(0, BLOCK_R)
    sums = ()
    for _ in tl.static_range(2 * ROWS if PACKED else ROWS):
        sums = sums + (tl.zeros([BLOCK_R, BLOCK_N], kind),)
    for i in range(0, count, BLOCK_R):
        live = i + lanes < count
        channel = tl.load(own + i + lanes, live, other=0)
        place = rows + channel.to(tl.int64)[:, None] * width + n[None, :]
        w = tl.load(place, live[:, None] & (n < width)[None, :], other=0, eviction_policy="evict_first")
        added = ()
        for m in tl.static_range(ROWS):
            v = tl.load(values + m * K + channel, live, other=0).to(kind)[:, None]
            if PACKED:
                added = added + (sums[2 * m] + ((w & 15).to(tl.int32) - 8).to(kind) * v,)
                added = added + (sums[2 * m + 1] + ((w >> 4).to(tl.int32) - 8).to(kind) * v,)
            else:
                added = added + (sums[m] + w.to(kind) * v,)
        sums = added
    for m in tl.static_range(ROWS):
        place = partial + (tl.program_id(1).to(tl.int64) * ROWS + m) * N
        if PACKED:
            column = (n // 32) * 64 + n % 32
            tl.store(place + column, tl.sum(sums[2 * m], 0), n < width)
            tl.store(place + column + 32, tl.sum(sums[2 * m + 1], 0), n < width)
        else:
            tl.store(place + n, tl.sum(sums[m], 0), n < width)


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
    grid = (cdiv(rows.shape[1], cut.n), cdiv(inner, cut.k))
    partial = scratch(grid[1], height, columns, torch.int32 if integral else torch.float32, values)
    listed = torch.empty(grid[0] * grid[1] * cut.k, dtype=torch.int32, device=values.device)
    _event[grid](
        values,
        rows,
        listed,
        partial,
        columns,
        inner,
        rows.shape[1],
        **meta(
            ROWS=height,
            INTEGRAL=integral,
            PACKED=rows.dtype == torch.uint8,
            BLOCK_N=cut.n,
            BLOCK_K=cut.k,
            BLOCK_R=cut.rows,
            num_warps=cut.warps,
        ),
    )
    finish_real(partial, scale, None, out)
