# ruff: noqa: RUF005, SIM109 (kernels know no unpacking into a tuple, and no membership in one)
"""One row, encoded once by another kernel, times weight matrices: programs do nothing but stream weights.

Several matrices that meet the same row (queries, keys, values) are one launch: a program belongs to one of them, and
its codes may be others (each has its own neuron).

Weights do not depend on the neuron: a program has its first tiles on their way to registers before it waits for codes.
K is known to the compiler, so that tiles take turns in registers and nothing is copied. A thread has four words, 16
bytes, of each row of a tile. Sums as in :mod:`.gemv`.

For codes to come straight into the registers of those who want them, a step is as wide as all warps (32 x 4 words
each), or one warp wide and there are more threads than words; else they go round through shared memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
import triton
import triton.language as tl
from torch import Tensor

from spikeform.neurons.triton.codes import function as function_of
from spikeform.neurons.triton.codes import rounded
from spikeform.synapses.rows import SUMMED
from spikeform.synapses.triton import shapes
from spikeform.synapses.triton.launch import ahead, cdiv, meta
from spikeform.synapses.triton.many import row_products
from spikeform.synapses.triton.operands import ask, await_inputs, dot4, pick, release, together

BYTES, NIBBLES, BF16, FP32 = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)
KINDS = {torch.int8: BYTES.value, torch.uint8: NIBBLES.value, torch.bfloat16: BF16.value, torch.float32: FP32.value}
ELEMENTS = ("int8", "int4", "real", "real")  # by kind


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
    weights,
    scales,
    zeros,
    biases,
    residual,
    outs,
    sizes,
    KIND: tl.constexpr,
    WIDTH: tl.constexpr,
    BRANCHES: tl.constexpr,
    LIMBS: tl.constexpr,
    PLANES: tl.constexpr,
    PARTS: tl.constexpr,
    STRIDE: tl.constexpr,
    BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    NAME: tl.constexpr,
    ACTIVATED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DEPTH: tl.constexpr,
    AHEAD: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """``outs [N]``; ``weights`` int32 words ``[N, WIDTH]``: an fp32, two bf16, four int8 or eight nibbles each.

    Tuples have an entry for each matrix, whose output features are ``sizes``; its codes are STRIDE words after those
    of the one before it. ``codes``, words too, ``[PLANES, WIDTH]``: fp32 of real weights; of nibbles bytes, a unit and
    PARTS sums of codes; of int8 bytes, ``[BRANCHES, LIMBS, WIDTH]``, and BRANCHES units.
    """
    program = tl.program_id(0)
    part, first = program * 0, program * 0
    behind = first
    for i in tl.static_range(1, len(weights)):
        behind += tl.cdiv(sizes[i - 1], BLOCK_N)
        part = tl.where(program >= behind, i, part)
        first = tl.where(program >= behind, behind, first)
    N = pick(sizes, part)
    weight = pick(weights, part)
    codes += part * STRIDE
    n = (program - first) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = (n % N).to(tl.int64)
    REAL: tl.constexpr = KIND == BF16 or KIND == FP32
    SUMS: tl.constexpr = BRANCHES * LIMBS
    STEPS: tl.constexpr = (WIDTH + BLOCK_K - 1) // BLOCK_K
    rows = weight + row[:, None] * WIDTH + tl.arange(0, BLOCK_K)[None, :]
    tiles = _start(rows, STEPS, DEPTH, WIDTH, BLOCK_K)
    ask(weight.to(tl.pointer_type(tl.uint8)), row, WIDTH * 4, BLOCK_N, DEPTH * BLOCK_K * 4, AHEAD)
    factor = 1.0 if REAL else tl.load(pick(scales, part) + n, n < N, other=0.0)
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
            for i in tl.static_range(PARTS):
                count += tl.load(units + 1 + i)
            total -= tl.load(pick(zeros, part) + n, n < N, other=0).to(tl.int64) * count
        y = (total.to(tl.float32) * factor) * tl.load(units).to(tl.float32, bitcast=True)
        if BRANCHES == 2:
            unit = tl.load(units + 1).to(tl.float32, bitcast=True)
            y += (together(sums, LIMBS, LIMBS).to(tl.float32) * factor) * unit
    if BIAS:
        y += tl.load(pick(biases, part) + n, n < N, other=0.0).to(tl.float32)
    out = pick(outs, part)
    if NAME != "":  # of what the product alone would have left
        active = function_of(y.to(out.dtype.element_ty).to(tl.float32), NAME)
        y = tl.where(part == ACTIVATED, rounded(active, out.dtype.element_ty).to(tl.float32), y)
    if RESIDUAL:  # of a single matrix: what the product alone would have left, and then the sum
        y = rounded(y, out.dtype.element_ty).to(tl.float32) + tl.load(residual + n, n < N, other=0.0).to(tl.float32)
        tl.store(out + n, rounded(y, out.dtype.element_ty), n < N)
    else:
        tl.store(out + n, y.to(out.dtype.element_ty), n < N)


def row_product(
    codes: Tensor,
    weights: Sequence[Tensor],
    scales: Sequence[Tensor],
    zeros: Sequence[Tensor],
    biases: Sequence[Tensor],
    residual: Tensor | None,
    dtype: torch.dtype,
    lead: Sequence[int],
    branches: int,
    limbs: int,
    function: str = "",
    activated: int = 0,
) -> list[Tensor]:
    """``sum_r unit_r (scale sum_i 256^i W codes_ri) + bias``, or, of real weights, ``W values + bias``: ``[*lead, N]``.

    Sequences have an entry for each matrix; those of what there is not are empty.

    Args:
        codes: What a function of :mod:`.row` made: int32 ``[P M, words]``, P of the matrices or 1, M rows of each.
        weights: int8, bf16 or fp32 ``[N, K]``, or uint8 ``[N, K / 2]`` of
            :func:`spikeform.synapses.fused.pack_nibbles`; a row is whole words of four bytes.
        scales: fp32 ``[N]``, of integer weights.
        zeros: int16 ``[N]``, what packed weights hold in excess.
        biases: ``[N]``.
        residual: ``[*lead, N]``, to be added to the result of the only matrix, which is rounded first; or None.
        dtype: Of the results.
        lead: The axes before channels; M of all, and where that is more than 1 weights are int8, and neurons GIF.
        branches: R; 1 of real weights.
        limbs: L; 1 of real weights.
        function: What is applied to the result of one matrix, of integers, after that is rounded: fp32, a name in
            :data:`spikeform.neurons.functions.FUNCTIONS`; or nothing.
        activated: Which matrix.
    """
    if prod(lead) > 1:
        return row_products(codes, weights, scales, biases, residual, dtype, lead)
    words = tuple([weight.contiguous().view(torch.int32) for weight in weights])
    width, kind = words[0].shape[1], KINDS[weights[0].dtype]
    sizes = tuple([weight.shape[0] for weight in weights])
    planes = 2 if kind in (NIBBLES.value, BF16.value) else branches * limbs
    cut = shapes.stream_strip(ELEMENTS[kind], sum(sizes), width, planes)
    outs = [codes.new_empty((*lead, size), dtype=dtype) for size in sizes]
    none = (codes,)
    with torch.cuda.device_of(codes):
        _stream[(sum(cdiv(size, cut.n) for size in sizes),)](
            codes,
            words,
            tuple(scales) or none,
            tuple(zeros) or none,
            tuple(biases) or none,
            codes if residual is None else residual.contiguous(),
            tuple(outs),
            sizes,
            **meta(
                KIND=kind,
                WIDTH=width,
                BRANCHES=branches,
                LIMBS=limbs,
                PLANES=planes,
                PARTS=cdiv(8 * width, SUMMED) if kind == NIBBLES.value else 0,
                STRIDE=codes.shape[1] if len(codes) > 1 else 0,
                BIAS=len(biases) > 0,
                RESIDUAL=residual is not None,
                NAME=function,
                ACTIVATED=activated,
                BLOCK_N=cut.n,
                BLOCK_K=cut.k,
                DEPTH=cut.stages,
                AHEAD=min(ahead(cut, weight) for weight in weights),
                num_warps=cut.warps,
                enable_fp_fusion=kind in (BF16.value, FP32.value),
            ),
        )
    return outs
