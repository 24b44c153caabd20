"""Which elements a program handles: tiles of rows of a tensor that need not be contiguous.

A tensor is ``[B, G, S, K]`` (fewer axes: ones before) of any strides but the last, which is 1: heads that were split
off and transposed, or halves of a wider projection, are read where they lie. Results are contiguous.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

INT32_END = 2**31
LARGE = 2**19  # elements from which all processors are busy with large tiles
SMALL_TILE, LARGE_TILE, WARPS = 1024, 4096, 4  # elements, elements, of a program
SHORTEST_CHUNK, LONGEST_CHUNK, WASTE = 1024, 4096, 1.25  # elements, elements, of a row that is held / those it has
HELD = 24  # elements that a thread holds


class Rows(NamedTuple):
    """A tensor as rows; the fields but the first are what :func:`tile` takes, in this order."""

    x: Tensor
    groups: int
    inner: int
    width: int
    stride_b: int
    stride_g: int
    stride_s: int

    @property
    def outer(self) -> int:
        """B times G."""
        return self.x.numel() // max(self.inner * self.width, 1)


def rows_of(x: Tensor, grouped: bool = False) -> Rows:
    """A tensor as rows of its last axis; copied only where its strides are beyond those of four axes.

    Args:
        x: ``[..., K]``.
        grouped: Keep G and S apart even where one stride would do.
    """
    if x.ndim > 4 or (x.ndim and x.stride(-1) != 1 and x.shape[-1] != 1):
        x = x.contiguous()
    width = x.shape[-1] if x.ndim else 1
    if x.is_contiguous() and not (grouped and x.ndim > 2):
        return Rows(x, 1, x.numel() // max(width, 1), width, 0, 0, width)
    if x.ndim > 4:
        x = x.flatten(0, -4)
    missing = 4 - x.ndim
    strides = [0] * missing + list(x.stride())
    _, groups, inner, _ = [1] * missing + list(x.shape)
    return Rows(x, groups, inner, width, *strides[:3])


def flat(x: Tensor) -> Rows:
    """A tensor as one long row where it is contiguous, else as rows."""
    total = x.numel()
    return Rows(x, 1, 1, total, 0, 0, total) if x.is_contiguous() and total < INT32_END - LARGE_TILE else rows_of(x)


class Launch(NamedTuple):
    """How a kernel runs over the tiles of a tensor."""

    grid: tuple[Any]
    shape: dict[str, Any]  # the last arguments of :func:`tile`, and the warps of a program


def launch(rows: Rows, elements: int | None = None) -> Launch:
    """Tiles of about so many elements; by default as many as keep all processors busy."""
    if elements is None:
        elements = LARGE_TILE if rows.outer * rows.inner * rows.width >= LARGE else SMALL_TILE
    block = min(triton.next_power_of_2(rows.width), elements)
    high = min(triton.next_power_of_2(rows.inner), elements // block)
    grid = (rows.outer * triton.cdiv(rows.inner, high) * triton.cdiv(rows.width, block),)
    flat = rows.outer * rows.inner == 1
    return Launch(grid, {"FLAT": flat, "ROWS": high, "BLOCK": block, "num_warps": WARPS})


class Chunks(NamedTuple):
    """A row that a program holds in registers: equal pieces, of which only the last may reach beyond its end."""

    block: int
    count: int

    def warps(self, rows: int = 1) -> int:
        """Of a program that holds so many rows."""
        return min(triton.next_power_of_2(triton.cdiv(self.block * self.count * rows, 32 * HELD)), 16)


def chunks(width: int) -> Chunks:
    """Pieces of a row: powers of two, as long as they may be without many elements that do not exist."""
    block = min(triton.next_power_of_2(width), LONGEST_CHUNK)
    while block > SHORTEST_CHUNK and triton.cdiv(width, block) * block > WASTE * width:
        block //= 2
    return Chunks(block, triton.cdiv(width, block))


def run(kernel: Any, grid: tuple[Any], *args: Any, **constants: Any) -> None:
    """Run a kernel on the device of its first argument, a tensor."""
    with torch.cuda.device_of(args[0]):
        kernel[grid](*args, **constants)


@triton.jit
def tile(
    groups,
    inner,
    width,
    stride_b,
    stride_g,
    stride_s,
    FLAT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The tile of this program ``[ROWS, BLOCK]``: where it is read and written, which elements exist, their columns."""
    program = tl.program_id(0)
    if FLAT:  # one row, and nothing to divide
        column = program * BLOCK + tl.arange(0, BLOCK)[None, :]
        return column, column, column < width, column
    else:
        columns = tl.cdiv(width, BLOCK)
        column = (program % columns) * BLOCK + tl.arange(0, BLOCK)[None, :]
        outer, row = band(program // columns, inner, ROWS)
        at = start(outer, groups, stride_b, stride_g) + row.to(tl.int64) * stride_s + column
        to = (outer.to(tl.int64) * inner + row) * width + column
        return at, to, (row < inner) & (column < width), column


@triton.jit
def within(column, width, chunk: tl.constexpr, CHUNKS: tl.constexpr):
    """Which columns of a piece of a row exist: of all but the last it is known that they do."""
    if chunk == CHUNKS - 1:
        return column < width - chunk * column.numel
    else:
        return column >= 0


@triton.jit
def band(program, inner, ROWS: tl.constexpr):
    """Which of the B times G the program works on, and its rows of S there ``[ROWS, 1]``."""
    bands = tl.cdiv(inner, ROWS)
    return program // bands, (program % bands) * ROWS + tl.arange(0, ROWS)[:, None]


@triton.jit
def start(outer, groups, stride_b, stride_g):
    """Offset of the first row of one of the B times G."""
    return (outer // groups).to(tl.int64) * stride_b + (outer % groups).to(tl.int64) * stride_g
