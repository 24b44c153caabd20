"""GIF neurons with a range of each token: integers in its common unit, a band of tokens to a program.

A program reads its rows once, piece by piece, and holds them, as they are given, until their ranges are known.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from spikeform.neurons.triton.codes import gif_integer, gif_unit, inverse_power, to_integer
from spikeform.neurons.triton.tiles import Chunks, Rows, band, chunks, rows_of, run, start, within

UNIT_BYTES = tl.constexpr(4)
FEW_ROWS = 256  # up to here there are processors for all rows at once, and what counts is that each is short
LONGEST = 16384  # elements of a row that a program then reads at once
BAND = 4096  # elements that a program of many rows reads at once


@triton.jit
def _integers(
    x,
    multiple,
    out,
    unit_out,
    tables,
    levels,
    groups,
    inner,
    width,
    stride_b,
    stride_g,
    stride_s,
    STEPS: tl.constexpr,
    PACKED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    outer, row = band(tl.program_id(0), inner, ROWS)
    at = start(outer, groups, stride_b, stride_g) + row.to(tl.int64) * stride_s
    column = tl.arange(0, BLOCK)[None, :]
    low = tl.zeros((ROWS, BLOCK), tl.float32)
    high = low
    held = ()
    for chunk in tl.static_range(CHUNKS):
        live = (row < inner) & within(column, width, chunk, CHUNKS)
        given = tl.load(x + at + chunk * BLOCK + column, live, other=0.0)
        v = given.to(tl.float32)
        low, high = tl.minimum(low, v), tl.maximum(high, v)
        held += (given,)
    low, high = tl.min(low, 1, keep_dims=True), tl.max(high, 1, keep_dims=True)
    unit = gif_unit(low, high, levels, STEPS)
    index = outer.to(tl.int64) * inner + row
    to = index * (width + UNIT_BYTES if PACKED else width)
    multiple += outer % tables * width
    for chunk in tl.static_range(CHUNKS):
        live = (row < inner) & within(column, width, chunk, CHUNKS)
        m = unit * 0.0 + 1.0
        if STEPS > 1:
            m = tl.load(multiple + chunk * BLOCK + column, within(column, width, chunk, CHUNKS), other=1.0)
        code = gif_integer(held[chunk].to(tl.float32), low, unit, m, levels, STEPS)
        if PACKED:  # a cache holds codes in each channel's own unit
            code *= inverse_power(m)
        tl.store(out + to + chunk * BLOCK + column, to_integer(code, tl.int8), live)
    if PACKED:
        byte = tl.arange(0, UNIT_BYTES)[None, :]
        bits = unit.to(tl.int32, bitcast=True) >> (8 * byte)
        tl.store(out + to + width + byte, bits.to(tl.int8), row < inner)
    else:
        tl.store(unit_out + index, unit, row < inner)


class _Table(NamedTuple):
    """The multiples of ``tables`` groups of rows, fp32 ``[tables, K]``."""

    values: Tensor
    tables: int


def _prepare(x: Tensor, multiple: Tensor) -> tuple[Rows, _Table]:
    """The rows of ``x``, grouped as the table has them."""
    while multiple.ndim > 1 and multiple.shape[0] == 1:
        multiple = multiple[0]
    if multiple.ndim == 3 and multiple.shape[1] == 1:
        rows = rows_of(x, grouped=True)
    elif multiple.ndim == 1:
        rows = rows_of(x)
    else:  # a table for each row
        x, multiple = x.contiguous(), multiple.expand(x.shape[-multiple.ndim :])
        count, width = multiple.shape[:-1].numel(), multiple.shape[-1]
        rows = Rows(x, count, 1, width, count * width, width, width)
    return rows, _Table(multiple.contiguous(), multiple.numel() // rows.width)


def _run(x: Tensor, multiple: Tensor, levels: int, steps: int, out: Tensor, unit: Tensor, packed: bool) -> None:
    rows, table = _prepare(x, multiple)
    if rows.outer * rows.inner <= FEW_ROWS:
        pieces, high = Chunks(min(triton.next_power_of_2(rows.width), LONGEST), 1), 1
        pieces = pieces._replace(count=triton.cdiv(rows.width, pieces.block))
    else:
        pieces = chunks(rows.width)
        high = min(max(BAND // (pieces.block * pieces.count), 1), triton.next_power_of_2(rows.inner))
    grid = (rows.outer * triton.cdiv(rows.inner, high),)
    run(
        _integers,
        grid,
        rows.x,
        table.values,
        out,
        unit,
        table.tables,
        levels,
        *rows[1:],
        STEPS=steps,
        PACKED=packed,
        ROWS=high,
        BLOCK=pieces.block,
        CHUNKS=pieces.count,
        num_warps=pieces.warps(high),
    )


def gif_integers(x: Tensor, top: Tensor, multiple: Tensor, levels: int, steps: int) -> tuple[Tensor, Tensor]:
    """Integers of :class:`~spikeform.neurons.GIF` and the unit of each row; see :mod:`spikeform.neurons.fused`."""
    out = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    unit = torch.empty((*x.shape[:-1], 1), dtype=torch.float32, device=x.device)
    if x.numel():
        _run(x, multiple, levels, steps, out, unit, packed=False)
    return out, unit


def gif_pack(x: Tensor, top: Tensor, multiple: Tensor, levels: int, steps: int) -> Tensor:
    """Codes of each row, then the bytes of its unit, as a cache holds them."""
    out = torch.empty((*x.shape[:-1], x.shape[-1] + UNIT_BYTES.value), dtype=torch.int8, device=x.device)
    if x.numel():
        _run(x, multiple, levels, steps, out, out, packed=True)
    return out
