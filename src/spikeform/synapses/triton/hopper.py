# pyrefly: ignore-errors
"""Many rows of int8 codes on Hopper: matrix instructions that overlap, which Triton's own products of int8 do not.

``tl.dot`` of int8 waits for the tensor cores after every step, and so does the library that PyTorch asks; here a step
is under way while the next is given. The kernel is written in Gluon, Triton's lower level, which no interpreter runs:
without a Hopper GPU, and in tests without one, :func:`scaled_products` takes :func:`~.gemm.gemm`, whose numbers are the
same bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from spikeform.synapses.triton.gemm import ALIGNED, Tile, gemm
from spikeform.synapses.triton.launch import cdiv
from spikeform.synapses.triton.shapes import hopper_tile, int_tile

MOST = 3  # matrices of a launch

# Triton 3.9 has other names for them.
load = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
store = tma.async_store if hasattr(tma, "async_store") else tma.async_copy_shared_to_global


@gluon.jit
def _spot(tile, down, across, HIGH: gl.constexpr, WIDE: gl.constexpr, GROUPED: gl.constexpr):
    """First row and column of a tile."""
    first = tile // (GROUPED * across) * GROUPED
    height = min(down - first, GROUPED)
    inside = tile % (GROUPED * across)
    return (first + inside % height) * HIGH, inside // height * WIDE


@gluon.jit
def _fetch(
    step,
    steps,
    total,
    down,
    across,
    apart,
    codes,
    weights,
    bars,
    left,
    right,
    PARTS: gl.constexpr,
    HELD: gl.constexpr,
    GROUPED: gl.constexpr,
):
    """Ask for the tiles of a program's ``step``, if there is one."""
    HIGH: gl.constexpr = codes.block_type.shape[0]
    DEEP: gl.constexpr = codes.block_type.shape[1]
    WIDE: gl.constexpr = weights[0].block_type.shape[0]
    live = step < total
    tile = gl.program_id(0) + step // steps * gl.num_programs(0)
    part = tile // (down * across)
    row, column = _spot(tile % (down * across), down, across, HIGH, WIDE, GROUPED)
    k, slot = step % steps * DEEP, step % HELD
    bar = bars.index(slot)
    mbarrier.expect(bar, codes.block_type.nbytes + weights[0].block_type.nbytes, live)
    load(codes, [part * apart + row, k], bar, left.index(slot), live)
    for p in gl.static_range(PARTS):
        load(weights[p], [column, k], bar, right.index(slot), live & (part == p))


@gluon.jit
def _picked(vectors, part, at, live, PARTS: gl.constexpr):
    """Elements of one of so many vectors, fp32 ``[1, N]``."""
    found = gl.load(vectors[0] + at, live, other=0.0).to(gl.float32)
    for p in gl.static_range(1, PARTS):
        other = gl.load(vectors[p] + at, live & (part == p), other=0.0).to(gl.float32)
        found = gl.where(part == p, other, found)
    return gl.expand_dims(found, 0)


@gluon.jit
def _multiply(
    codes,
    weight0,
    weight1,
    weight2,
    result0,
    result1,
    result2,
    scales,
    unit,
    biases,
    residual,
    M,
    N,
    K,
    apart,
    unit_pitch,
    BIAS: gl.constexpr,
    RESIDUAL: gl.constexpr,
    PARTS: gl.constexpr,
    HELD: gl.constexpr,
    GROUPED: gl.constexpr,
    num_warps: gl.constexpr,
):
    """``result_p [M, N] = unit_row (scale_p (codes_p weight_p^T)) + bias_p``, rounded, ``+ residual``.

    ``apart``: rows of the codes from one matrix to the next. Of fewer matrices than three the last ones repeat.
    """
    weights = (weight0, weight1, weight2)  # launches take no tuple of descriptors
    results = (result0, result1, result2)
    HIGH: gl.constexpr = codes.block_type.shape[0]
    DEEP: gl.constexpr = codes.block_type.shape[1]
    WIDE: gl.constexpr = weights[0].block_type.shape[0]
    # Triton knows no instruction of int8 as wide as 256.
    form: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, min(WIDE, 128), 32])
    down, across, steps = gl.cdiv(M, HIGH), gl.cdiv(N, WIDE), gl.cdiv(K, DEEP)
    mine = gl.cdiv(PARTS * down * across - gl.program_id(0), gl.num_programs(0))
    total = mine * steps

    left = gl.allocate_shared_memory(codes.dtype, [HELD, HIGH, DEEP], codes.layout)
    right = gl.allocate_shared_memory(codes.dtype, [HELD, WIDE, DEEP], weights[0].layout)
    leave = gl.allocate_shared_memory(results[0].dtype, [HIGH, WIDE], results[0].layout)
    bars = gl.allocate_shared_memory(gl.int64, [HELD, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(HELD):
        mbarrier.init(bars.index(i), count=1)
    fence_async_shared()
    for i in gl.static_range(HELD - 1):
        _fetch(i, steps, total, down, across, apart, codes, weights, bars, left, right, PARTS, HELD, GROUPED)

    step = 0
    for i in range(mine):
        tile = gl.program_id(0) + i * gl.num_programs(0)
        part = tile // (down * across)
        row, column = _spot(tile % (down * across), down, across, HIGH, WIDE, GROUPED)
        sums = gl.zeros((HIGH, WIDE), gl.int32, form)
        for _ in range(steps):
            slot = step % HELD
            mbarrier.wait(bars.index(slot), step // HELD & 1)
            sums = warpgroup_mma(left.index(slot), right.index(slot).permute((1, 0)), sums, is_async=True)
            sums = warpgroup_mma_wait(1, deps=(sums,))  # the one before is done, and its tiles are free
            ahead = step + HELD - 1
            _fetch(ahead, steps, total, down, across, apart, codes, weights, bars, left, right, PARTS, HELD, GROUPED)
            step += 1
        sums = warpgroup_mma_wait(0, deps=(sums,))
        m = row + gl.arange(0, HIGH, gl.SliceLayout(1, form))
        n = column + gl.arange(0, WIDE, gl.SliceLayout(0, form))
        y = sums.to(gl.float32) * _picked(scales, part, n, n < N, PARTS)
        y *= gl.expand_dims(gl.load(unit + (part * apart + m) * unit_pitch, m < M, other=0.0), 1)
        if BIAS:
            y += _picked(biases, part, n, n < N, PARTS)
        y = y.to(results[0].dtype)
        if RESIDUAL:  # of a single matrix, to what the product alone would have left
            at = gl.expand_dims(m.to(gl.int64), 1) * N + gl.expand_dims(n, 0)
            live = gl.expand_dims(m < M, 1) & gl.expand_dims(n < N, 0)
            more = gl.load(residual + at, live, other=0.0)
            y = (y.to(gl.float32) + more.to(gl.float32)).to(results[0].dtype)
        tma.store_wait(0)  # the tile before has left
        leave.store(y)
        fence_async_shared()
        for p in gl.static_range(PARTS):
            if part == p:
                store(results[p], [row, column], leave)
    tma.store_wait(0)


@lru_cache
def _processors(device: torch.device) -> int:
    """How many a Hopper GPU has; 0: it is none."""
    known = torch.cuda.get_device_properties(device)
    return known.multi_processor_count if known.major == 9 else 0


def takes(codes: Tensor, weights: Sequence[Tensor], outs: Sequence[Tensor]) -> bool:
    """Whether :func:`multiply` is for these: a Hopper GPU, bf16 to write, aligned rows, more than a few of them."""
    tensors = codes, *weights, *outs
    whole = all(t.stride(0) * t.element_size() % ALIGNED == 0 == t.data_ptr() % ALIGNED for t in tensors)
    alike = len({t.shape for t in weights}) == 1 and len(outs) <= MOST and outs[0].dtype == torch.bfloat16
    return codes.is_cuda and whole and alike and len(outs[0]) > 64 and _processors(codes.device) > 0


def multiply(
    codes: Tensor,
    weights: Sequence[Tensor],
    scales: Sequence[Tensor],
    unit: Tensor,
    biases: Sequence[Tensor],
    outs: Sequence[Tensor],
    residual: Tensor | None,
    cut: Tile,
) -> None:
    """``out_p [M, N] = unit_row (scale_p (codes_p W_p^T)) + bias_p``, then ``+ residual``, of P matrices, at most MOST.

    Args:
        codes: int8 ``[P M, K]``, or ``[M, K]`` for all; rows may lie apart.
        weights: int8 ``[N, K]``.
        scales: fp32 ``[N]``.
        unit: fp32, one of each row of the codes, of any stride.
        biases: ``[N]``, or none.
        outs: bf16 ``[M, N]``.
        residual: ``[M, N]``, contiguous, for a single matrix; or None.
        cut: How, persistent.
    """
    (rows, columns), inner = outs[0].shape, codes.shape[1]
    tiles = cdiv(rows, cut.m) * cdiv(columns, cut.n) * len(outs)
    _multiply[(min(tiles, _processors(codes.device)),)](
        _described(codes, [cut.m, cut.k], gl.int8),
        *_three([_described(weight, [cut.n, cut.k], gl.int8) for weight in weights]),
        *_three([_described(out, [cut.m, cut.n], gl.bfloat16) for out in outs]),
        tuple(scales),
        unit,
        tuple(biases) or (unit,),
        unit if residual is None else residual,
        rows,
        columns,
        inner,
        rows if len(codes) > rows else 0,
        unit.stride(0),
        BIAS=len(biases) > 0,
        RESIDUAL=residual is not None,
        PARTS=len(outs),
        HELD=cut.stages,
        GROUPED=cut.group,
        num_warps=cut.warps,
        enable_fp_fusion=False,
    )


def _three(given: list[TensorDescriptor]) -> list[TensorDescriptor]:
    return given + given[-1:] * (MOST - len(given))


def _described(tensor: Tensor, block: list[int], dtype) -> TensorDescriptor:
    return TensorDescriptor.from_tensor(tensor, block, gl.NVMMASharedLayout.get_default_for(block, dtype))


def scaled_products(
    codes: Tensor,
    weights: Sequence[Tensor],
    scales: Sequence[Tensor],
    unit: Tensor,
    biases: Sequence[Tensor],
    outs: Sequence[Tensor],
    residual: Tensor | None = None,
) -> None:
    """What :func:`multiply` does, for any GPU, shapes and dtype of ``outs``; more than a few rows."""
    rows = len(outs[0])
    if takes(codes, weights, outs):
        multiply(codes, weights, scales, unit, biases, outs, residual, hopper_tile(rows))
        return
    for i, (weight, scale, out) in enumerate(zip(weights, scales, outs, strict=True)):
        own = slice(i * rows, (i + 1) * rows) if len(codes) > rows else slice(None)
        gemm(codes[own], weight, scale, unit[own], biases[i] if biases else None, out, int_tile(rows), residual)
