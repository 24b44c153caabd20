# ruff: noqa: RUF005 (kernels know no unpacking into a tuple)
"""Many rows, each encoded for GIF neurons once: for all matrices that meet it, by what makes it where that is plain.

As :mod:`.row` and :mod:`.produced_gif` do it for one row, whose programs share its channels. Here a program has a few
whole rows, in registers from when they are read; what differs from channel to channel is read once for all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
import triton
import triton.language as tl
from torch import Tensor

from spikeform.neurons.triton.codes import function as function_of
from spikeform.neurons.triton.codes import (
    gif_byte,
    gif_saturates,
    gif_sent,
    gif_unit,
    greater,
    inverse_sqrt,
    lesser,
    rounded,
    widened,
)
from spikeform.neurons.triton.tiles import Chunks, within
from spikeform.synapses.rows import words_of_gif
from spikeform.synapses.triton.hopper import scaled_products
from spikeform.synapses.triton.launch import cdiv, meta
from spikeform.synapses.triton.operands import await_inputs, pick, release

GIVEN, NORM, GATE = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
# Of a program: a row of a 7B model, so that several share a multiprocessor. A thread has four neighbours of a piece:
# with more, codes or tables would change places among threads.
ELEMENTS, WARPS, PIECE = 4096, 4, 512
FEW = 256  # rows up to which a program has one of them: there are processors for all


@triton.jit
def _rows(
    first,
    second,
    multiples,
    out,
    rows,
    K,
    words,
    eps,
    levels,
    steps,
    KIND: tl.constexpr,
    NAME: tl.constexpr,
    PARTS: tl.constexpr,
    STEPPED: tl.constexpr,
    HIGH: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNKS: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """``first`` [rows, K] is encoded, or normed and multiplied with ``second`` [K], or the gate of ``second``."""
    release(OVERLAP)
    await_inputs(OVERLAP)
    dtype: tl.constexpr = first.dtype.element_ty
    row = tl.program_id(0) * HIGH + tl.arange(0, HIGH)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    at = row.to(tl.int64) * K + column
    held = ()
    for chunk in tl.static_range(CHUNKS):
        live = (row < rows) & within(column, K, chunk, CHUNKS)
        given = tl.load(first + at + chunk * BLOCK, live, other=0.0)
        if KIND == GATE:
            other = tl.load(second + at + chunk * BLOCK, live, other=0.0)
            made = rounded(function_of(widened(given), NAME), dtype).to(tl.float32) * other.to(tl.float32)
            given = rounded(made, dtype)
        held = held + (given,)
    if KIND == NORM:
        squares = tl.zeros((HIGH, BLOCK), tl.float32)
        for chunk in tl.static_range(CHUNKS):
            squares += widened(held[chunk]) * widened(held[chunk])
        scale = inverse_sqrt(tl.div_rn(tl.sum(squares, 1, keep_dims=True), K * 1.0) + eps)
        normed = ()
        for chunk in tl.static_range(CHUNKS):
            gain = tl.load(second + chunk * BLOCK + column, within(column, K, chunk, CHUNKS), other=0.0)
            made = rounded(widened(held[chunk]) * scale, dtype).to(tl.float32) * gain.to(tl.float32)
            normed = normed + (rounded(made, dtype),)
        held = normed
    least, most = held[0], held[0]
    for chunk in tl.static_range(1, CHUNKS):
        least, most = lesser(least, held[chunk]), greater(most, held[chunk])
    low = tl.minimum(tl.min(widened(least), 1, keep_dims=True), 0.0)
    high = tl.maximum(tl.max(widened(most), 1, keep_dims=True), 0.0)
    unit = gif_unit(low, high, levels, steps)
    if tl.max(gif_saturates(low, high, unit, levels, steps)) == 1:
        _send(held, low, unit, multiples, out, row, column, rows, K, words, levels, steps, PARTS, STEPPED, BLOCK, True)
    else:
        _send(held, low, unit, multiples, out, row, column, rows, K, words, levels, steps, PARTS, STEPPED, BLOCK, False)


@triton.jit
def _send(held, low, unit, multiples, out, row, column, rows, K, words, levels, steps, PARTS: tl.constexpr,
          STEPPED: tl.constexpr, BLOCK: tl.constexpr, CUT: tl.constexpr):  # fmt: skip
    """Write codes of ``held``, a tuple, by the tables of each part, and the unit."""
    for part in tl.static_range(PARTS):
        line = out + (part * rows + row).to(tl.int64) * words
        for chunk in tl.static_range(len(held)):
            exists = within(column, K, chunk, len(held))
            times = unit * 0.0 + 1.0
            if STEPPED:
                times = tl.load(pick(multiples, part) + chunk * BLOCK + column, exists, other=1.0)
            sent = gif_sent(widened(held[chunk]), low, unit, times, levels, steps, CUT)
            place = line.to(tl.pointer_type(tl.int8)) + chunk * BLOCK + column
            tl.store(place, gif_byte(sent, times), (row < rows) & exists)
        tl.store(line + K // 4, unit.to(tl.int32, bitcast=True), row < rows)


def encode_rows(
    first: Tensor,
    second: Tensor | None,
    multiples: Sequence[Tensor],
    levels: int,
    steps: int,
    *,
    kind: int = GIVEN.value,
    function: str = "",
    eps: float = 0.0,
) -> Tensor:
    """Rows of K channels through P groups of GIF neurons: bytes, and the unit of each row behind them.

    Args:
        first: ``[..., K]``, K a multiple of 4: what is encoded, or of which that is made.
        second: ``[K]`` of a norm, ``[..., K]`` of a gate.
        multiples: fp32 ``[K]`` each.
        levels: L.
        steps: T.
        kind: GIVEN; NORM, of root mean squares; GATE: ``function(first) * second``.
        function: Of :data:`spikeform.neurons.functions.FUNCTIONS`.
        eps: Of the norm.

    Returns:
        int32 ``[P M, words]``, M the number of rows: see :mod:`spikeform.synapses.rows`.
    """
    first, width = first.contiguous(), first.shape[-1]
    rows, words, block = first.numel() // width, words_of_gif(width), min(triton.next_power_of_2(width), PIECE)
    pieces = Chunks(block, cdiv(width, block))
    out = torch.empty((len(multiples) * rows, words), dtype=torch.int32, device=first.device)
    held = pieces.block * pieces.count
    high = 1 if rows <= FEW else max(1, 1 << (max(ELEMENTS // held, 1).bit_length() - 1))
    high = min(high, triton.next_power_of_2(rows), 16)
    with torch.cuda.device_of(first):
        _rows[(cdiv(rows, high),)](
            first,
            first if second is None else second.contiguous(),
            tuple(multiples),
            out,
            rows,
            width,
            words,
            eps,
            levels,
            steps,
            **meta(
                KIND=kind,
                NAME=function,
                PARTS=len(multiples),
                STEPPED=steps > 1,
                HIGH=high,
                BLOCK=pieces.block,
                CHUNKS=pieces.count,
                num_warps=min(pieces.warps(high), WARPS),
                enable_fp_fusion=False,
            ),
        )
    return out


def row_products(
    codes: Tensor,
    weights: Sequence[Tensor],
    scales: Sequence[Tensor],
    biases: Sequence[Tensor],
    residual: Tensor | None,
    dtype: torch.dtype,
    lead: Sequence[int],
) -> list[Tensor]:
    """``unit_row (scale W codes) + bias``, ``[*lead, N]`` each: :func:`~.stream.row_product` of what is made here."""
    inner, rows = weights[0].shape[1], prod(lead)
    outs = [codes.new_empty((*lead, weight.shape[0]), dtype=dtype) for weight in weights]
    with torch.cuda.device_of(codes):
        scaled_products(
            codes.view(torch.int8)[:, :inner],
            [weight.contiguous() for weight in weights],
            scales,
            codes.view(torch.float32)[:, inner // 4],
            biases,
            [out.view(rows, -1) for out in outs],
            None if residual is None else residual.contiguous(),
        )
    return outs
