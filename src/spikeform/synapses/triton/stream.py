# ruff: noqa: RUF005, SIM109 (kernels know no unpacking into a tuple, and no membership in one)
"""One row, encoded once by another kernel, times a weight matrix: programs do nothing but stream weights.

Weights do not depend on the neuron: a program has its first tiles on their way to registers before it waits for codes.
K is known to the compiler, so that tiles take turns in registers and nothing is copied. A thread has four words, 16
bytes, of each row of a tile. Sums as in :mod:`.gemv`.

For codes to come straight into the registers of those who want them, a step is as wide as all warps (32 x 4 words
each), or one warp wide and there are more threads than words; else they go round through shared memory.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from spikeform.synapses.triton.launch import Strip, ahead, cdiv, meta
from spikeform.synapses.triton.operands import ask, await_inputs, dot4, release, together

BYTES, NIBBLES, BF16, FP32 = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)
KINDS = {torch.int8: BYTES.value, torch.uint8: NIBBLES.value, torch.bfloat16: BF16.value, torch.float32: FP32.value}


@triton.jit
def _tile(rows, STEP: tl.constexpr, WIDTH: tl.constexpr, BLOCK_K: tl.constexpr):
    """Tile STEP of the rows ``[N, BLOCK_K]`` that begin at the pointers ``rows``; zeros behind WIDTH."""
    if (STEP + 1) * BLOCK_K <= WIDTH:
        return tl.load(rows + STEP * BLOCK_K, eviction_policy="evict_first")
    else:
        live = STEP * BLOCK_K + tl.arange(0, BLOCK_K) < WIDTH
        return tl.load(rows + STEP * BLOCK_K, live[None, :], other=0, eviction_policy="evict_first")


@triton.jit
def _start(rows, STEPS: tl.constexpr, DEPTH: tl.constexpr, WIDTH: tl.constexpr, BLOCK_K: tl.constexpr):
    tiles = ()
    for step in tl.static_range(min(DEPTH, STEPS)):
        tiles = tiles + (_tile(rows, step, WIDTH, BLOCK_K),)
    return tiles


@triton.jit
def _in_four(v):
    """Words 0, 1, 2 and 3 of each four along the last axis, which are with one thread: four tensors."""
    if len(v.shape) == 2:
        v = tl.reshape(v, [v.shape[0], v.shape[1] // 4, 2, 2])
    else:
        v = tl.reshape(v, [v.shape[0] // 4, 2, 2])
    even, odd = tl.split(v)
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    return first, second, third, fourth


@triton.jit
def _plane(codes, PLANE: tl.constexpr, STEP: tl.constexpr, WIDTH: tl.constexpr, BLOCK_K: tl.constexpr):
    at = STEP * BLOCK_K + tl.arange(0, BLOCK_K)
    if (STEP + 1) * BLOCK_K <= WIDTH:
        return _in_four(tl.load(codes + PLANE * WIDTH + at))
    else:
        return _in_four(tl.load(codes + PLANE * WIDTH + at, at < WIDTH, other=0))


@triton.jit
def _part(words, PLANE: tl.constexpr, KIND: tl.constexpr):
    """What meets a plane of codes: words of four bytes, or fp32."""
    if KIND == NIBBLES:
        return (words >> (4 * PLANE)) & 0x0F0F0F0F
    elif KIND == BF16:
        return (words & -65536 if PLANE else words << 16).to(tl.float32, bitcast=True)
    elif KIND == FP32:
        return words.to(tl.float32, bitcast=True)
    else:
        return words


@triton.jit
def _times(weights, codes, sums, SIGNED: tl.constexpr):
    for i in tl.static_range(4):
        if sums.dtype == tl.float32:
            sums += weights[i] * codes[i][None, :].to(tl.float32, bitcast=True)
        else:
            sums = dot4(weights[i], codes[i][None, :], sums, SIGNED)
    return sums


@triton.jit
def _stream(
    codes,
    weight,
    scale,
    zero,
    bias,
    out,
    N,
    KIND: tl.constexpr,
    WIDTH: tl.constexpr,
    BRANCHES: tl.constexpr,
    LIMBS: tl.constexpr,
    PLANES: tl.constexpr,
    PARTS: tl.constexpr,
    BIAS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DEPTH: tl.constexpr,
    AHEAD: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """``out [N]``; ``weight`` int32 words ``[N, WIDTH]``: an fp32, two bf16, four int8 or eight nibbles each.

    ``codes``, words too, ``[PLANES, WIDTH]``: fp32 of real weights; of nibbles bytes, a unit and PARTS sums of codes;
    of int8 bytes, ``[BRANCHES, LIMBS, WIDTH]``, and BRANCHES units.
    """
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = (n % N).to(tl.int64)
    REAL: tl.constexpr = KIND == BF16 or KIND == FP32
    SUMS: tl.constexpr = BRANCHES * LIMBS
    STEPS: tl.constexpr = (WIDTH + BLOCK_K - 1) // BLOCK_K
    rows = weight + row[:, None] * WIDTH + tl.arange(0, BLOCK_K)[None, :]
    tiles = _start(rows, STEPS, DEPTH, WIDTH, BLOCK_K)
    ask(weight.to(tl.pointer_type(tl.uint8)), row, WIDTH * 4, BLOCK_N, DEPTH * BLOCK_K * 4, AHEAD)
    factor = 1.0 if REAL else tl.load(scale + n, n < N, other=0.0)
    await_inputs(OVERLAP)
    release(OVERLAP)
    sums = ()
    for _ in tl.static_range(SUMS):
        sums = sums + (tl.zeros([BLOCK_N, BLOCK_K // 4], tl.float32 if REAL else tl.int32),)
    for step in tl.static_range(STEPS):
        if step + DEPTH < STEPS:
            tiles = tiles + (_tile(rows, step + DEPTH, WIDTH, BLOCK_K),)
        if SUMS == 1:
            total = sums[0]
            for plane in tl.static_range(PLANES):
                words = _in_four(_part(tiles[step], plane, KIND))
                total = _times(words, _plane(codes, plane, step, WIDTH, BLOCK_K), total, True)
            sums = (total,)
        else:
            words = _in_four(tiles[step])
            added = ()
            for plane in tl.static_range(PLANES):
                c = _plane(codes, plane, step, WIDTH, BLOCK_K)
                added = added + (_times(words, c, sums[plane], plane % LIMBS == LIMBS - 1),)
            sums = added
    if REAL:
        y = tl.sum(sums[0], 1)
    else:
        units = codes + PLANES * WIDTH
        total = together(sums, 0, LIMBS)
        if KIND == NIBBLES:
            count = 0
            for part in tl.static_range(PARTS):
                count += tl.load(units + 1 + part)
            total -= tl.load(zero + n, n < N, other=0).to(tl.int64) * count
        y = (total.to(tl.float32) * factor) * tl.load(units).to(tl.float32, bitcast=True)
        if BRANCHES == 2:
            unit = tl.load(units + 1).to(tl.float32, bitcast=True)
            y += (together(sums, LIMBS, LIMBS).to(tl.float32) * factor) * unit
    if BIAS:
        y += tl.load(bias + n, n < N, other=0.0).to(tl.float32)
    tl.store(out + n, y.to(out.dtype.element_ty), n < N)


def stream(
    codes: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    zero: Tensor | None,
    bias: Tensor | None,
    out: Tensor,
    branches: int,
    limbs: int,
    cut: Strip,
) -> None:
    """``out [N] = sum_r unit_r (scale sum_i 256^i W codes_ri) + bias``, or, of real weights, ``W values + bias``.

    Args:
        codes: What :func:`~.encode.oat_words`, :func:`~.encode.gif_words` or :func:`~.encode.oat_row` made.
        weight: int8, bf16 or fp32 ``[N, K]``, or uint8 ``[N, K / 2]`` of
            :func:`spikeform.synapses.fused.pack_nibbles`; contiguous, a row of whole words of four bytes.
        scale: fp32 ``[N]``, of integer weights.
        zero: int16 ``[N]``, what packed weights hold in excess.
        bias: ``[N]``.
        out: ``[N]``, contiguous.
        branches: R; 1 of real weights.
        limbs: L; 1 of real weights.
        cut: How it is cut.
    """
    columns, words = weight.shape[0], weight.view(torch.int32)
    width, kind = words.shape[1], KINDS[weight.dtype]
    _stream[(cdiv(columns, cut.n),)](
        codes,
        words,
        codes if scale is None else scale,
        codes if zero is None else zero,
        codes if bias is None else bias,
        out,
        columns,
        **meta(
            KIND=kind,
            WIDTH=width,
            BRANCHES=branches,
            LIMBS=limbs,
            PLANES=2 if kind in (NIBBLES.value, BF16.value) else branches * limbs,
            PARTS=codes.numel() - 2 * width - 1 if kind == NIBBLES.value else 0,
            BIAS=bias is not None,
            BLOCK_N=cut.n,
            BLOCK_K=cut.k,
            DEPTH=cut.stages,
            AHEAD=ahead(cut, weight),
            num_warps=cut.warps,
            enable_fp_fusion=kind in (BF16.value, FP32.value),
        ),
    )
