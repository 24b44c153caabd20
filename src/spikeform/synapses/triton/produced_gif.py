"""One row, encoded for GIF neurons by what makes it: an RMS norm, or the product of a gate and its other factor.

Neither is of spikes. Sums and functions are fp32, and results are rounded where PyTorch rounds them. Each program looks
at all of the row, as it needs its range. There the last rounding waits until the range is known: it keeps the order.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from spikeform.neurons.triton.codes import function as function_of
from spikeform.neurons.triton.codes import gif_unit, inverse_sqrt, rounded
from spikeform.synapses.rows import SUMMED
from spikeform.synapses.triton.launch import cdiv, meta
from spikeform.synapses.triton.many import GATE, NORM, encode_rows
from spikeform.synapses.triton.operands import await_inputs, pick, release
from spikeform.synapses.triton.row import gif_lines, put_gif

BITE = 2048  # channels whose function is computed while the next ones are on their way


@triton.jit
def _kept(v, dtype: tl.constexpr):
    """fp32 ``v`` as another dtype leaves it."""
    return rounded(v, dtype).to(tl.float32)


@triton.jit
def _range(low, high, levels, steps, dtype: tl.constexpr):
    """Least element and common unit of a row, of the least and the largest that each lane saw, not yet rounded."""
    least = _kept(tl.min(low, 0), dtype)
    return least, gif_unit(least, _kept(tl.max(high, 0), dtype), levels, steps)


@triton.jit
def _norm(
    x,
    weight,
    multiples,
    out,
    K,
    words,
    eps,
    levels,
    steps,
    STEPPED: tl.constexpr,
    PACKED: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """The first bite of the row, mostly all of it, and its weights stay in registers."""
    release(OVERLAP)
    part = tl.program_id(1)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    lanes = tl.arange(0, CHUNK)
    times = tl.load(pick(multiples, part) + at, at < K, other=1.0) if STEPPED else 1.0
    own = tl.load(weight + at, at < K, other=0.0).to(tl.float32)
    gain = tl.load(weight + lanes, lanes < K, other=0.0)
    await_inputs(OVERLAP)
    v = tl.load(x + at, at < K, other=0.0).to(tl.float32)
    first = tl.load(x + lanes, lanes < K, other=0.0).to(tl.float32)
    squares = first * first
    for k in range(CHUNK, K, CHUNK):
        more = tl.load(x + k + lanes, k + lanes < K, other=0.0).to(tl.float32)
        squares += more * more
    scale = inverse_sqrt(tl.div_rn(tl.sum(squares, 0), K * 1.0) + eps)
    y = _kept(first * scale, x.dtype.element_ty) * gain.to(tl.float32)
    low, high = tl.minimum(y, 0.0), tl.maximum(y, 0.0)
    for k in range(CHUNK, K, CHUNK):
        more = tl.load(x + k + lanes, k + lanes < K, other=0.0).to(tl.float32)
        y = _kept(more * scale, x.dtype.element_ty)
        y *= tl.load(weight + k + lanes, k + lanes < K, other=0.0).to(tl.float32)
        low, high = tl.minimum(low, y), tl.maximum(high, y)
    least, unit = _range(low, high, levels, steps, x.dtype.element_ty)
    v = _kept(_kept(v * scale, x.dtype.element_ty) * own, x.dtype.element_ty)
    put_gif(v, at, times, least, unit, out + part * words, K, levels, steps, PACKED)


@triton.jit
def _product(gate, up, at, K, NAME: tl.constexpr):
    """``function(gate) * up`` at some channels, fp32, the function's result as their dtype leaves it; 0 behind K."""
    y = tl.load(gate + at, at < K, other=1.0).to(tl.float32)
    if NAME != "":
        y = _kept(function_of(y, NAME), gate.dtype.element_ty)
    return y * tl.load(up + at, at < K, other=0.0).to(tl.float32)


@triton.jit
def _gated(
    gate,
    up,
    multiples,
    out,
    words,
    levels,
    steps,
    NAME: tl.constexpr,
    K: tl.constexpr,
    STEPPED: tl.constexpr,
    PACKED: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """K is known to the compiler: what a last bite has behind the row costs nothing."""
    release(OVERLAP)
    part = tl.program_id(1)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    times = tl.load(pick(multiples, part) + at, at < K, other=1.0) if STEPPED else 1.0
    await_inputs(OVERLAP)
    v = _kept(_product(gate, up, at, K, NAME), gate.dtype.element_ty)
    low = tl.zeros([CHUNK], tl.float32)
    high = tl.zeros([CHUNK], tl.float32)
    for k in tl.static_range(0, K, CHUNK):
        y = _product(gate, up, k + tl.arange(0, CHUNK), K, NAME)
        low, high = tl.minimum(low, y), tl.maximum(high, y)
    least, unit = _range(low, high, levels, steps, gate.dtype.element_ty)
    put_gif(v, at, times, least, unit, out + part * words, K, levels, steps, PACKED)


def row_norm_gif(
    x: Tensor, weight: Tensor, eps: float, multiples: Sequence[Tensor], levels: int, steps: int, packed: bool
) -> Tensor:
    """Codes of an RMS norm ``x / sqrt(mean(x^2) + eps) * weight``, as :func:`~.row.row_gif` makes them.

    The norm is fp32; it is rounded to the dtype of ``x`` ``[..., K]``, and so is its product with ``weight``
    ``[K]`` of that dtype.
    """
    if x.numel() > x.shape[-1]:
        return encode_rows(x, weight, multiples, levels, steps, kind=NORM.value, eps=eps)
    x, width = x.contiguous(), x.shape[-1]
    out, how = gif_lines(width, multiples, steps, packed)
    with torch.cuda.device_of(x):
        _norm[(cdiv(width, SUMMED), len(multiples))](
            x,
            weight.contiguous(),
            tuple(multiples),
            out,
            width,
            out.shape[1],
            eps,
            levels,
            steps,
            **meta(**how),
        )
    return out


def row_gated_gif(
    gate: Tensor, up: Tensor, function: str, multiples: Sequence[Tensor], levels: int, steps: int, packed: bool
) -> Tensor:
    """Codes of ``function(gate) * up`` ``[..., K]``, as :func:`~.row.row_gif` makes them.

    The function, of :data:`spikeform.neurons.functions.FUNCTIONS`, is fp32, and rounded to the dtype of both; "": the
    gate has gone through it, each channel once.
    """
    if gate.numel() > gate.shape[-1]:
        return encode_rows(gate, up, multiples, levels, steps, kind=GATE.value, function=function)
    gate, up, width = gate.contiguous(), up.contiguous(), gate.shape[-1]
    out, how = gif_lines(width, multiples, steps, packed)
    with torch.cuda.device_of(gate):
        _gated[(cdiv(width, SUMMED), len(multiples))](
            gate,
            up,
            tuple(multiples),
            out,
            out.shape[1],
            levels,
            steps,
            **meta(NAME=function, K=width, **how | {"CHUNK": min(how["CHUNK"], BITE)}),
        )
    return out
