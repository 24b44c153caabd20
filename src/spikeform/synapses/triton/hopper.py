"""Many rows of int8 codes on Hopper: matrix instructions that overlap, which Triton's own products of int8 do not.

``tl.dot`` of int8 waits for the tensor cores after every step, and so does the library that PyTorch asks; here a step
is under way while the next is given. The kernel is written in Gluon, Triton's lower level, which no interpreter runs:
without a Hopper GPU, and in tests without one, :func:`scaled_product` takes :func:`~.gemm.gemm`, whose numbers are the
same bits.
"""

from __future__ import annotations

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
    step, steps, total, down, across, codes, weight, bars, left, right, HELD: gl.constexpr, GROUPED: gl.constexpr
):
    """Ask for the tiles of a program's ``step``, if there is one."""
    BYTES: gl.constexpr = codes.block_type.nbytes + weight.block_type.nbytes
    HIGH: gl.constexpr = codes.block_type.shape[0]
    WIDE: gl.constexpr = weight.block_type.shape[0]
    DEEP: gl.constexpr = codes.block_type.shape[1]
    live = step < total
    tile = gl.program_id(0) + step // steps * gl.num_programs(0)
    row, column = _spot(tile, down, across, HIGH, WIDE, GROUPED)
    k, slot = step % steps * DEEP, step % HELD
    bar = bars.index(slot)
    mbarrier.expect(bar, BYTES, live)
    load(codes, [row, k], bar, left.index(slot), live)
    load(weight, [column, k], bar, right.index(slot), live)


@gluon.jit
def _multiply(
    codes,
    weight,
    result,
    scale,
    unit,
    bias,
    residual,
    M,
    N,
    K,
    unit_pitch,
    BIAS: gl.constexpr,
    RESIDUAL: gl.constexpr,
    HELD: gl.constexpr,
    GROUPED: gl.constexpr,
    num_warps: gl.constexpr,
):
    """``result [M, N] = unit_row (scale (codes weight^T)) + bias``, rounded, ``+ residual``."""
    HIGH: gl.constexpr = codes.block_type.shape[0]
    WIDE: gl.constexpr = weight.block_type.shape[0]
    DEEP: gl.constexpr = codes.block_type.shape[1]
    form: gl.constexpr = gl.NVMMADistributedLayout(
        [3, 0], [num_warps, 1], [16, min(WIDE, 128), 32]
    )  # Triton knows none of 256
    down, across, steps = gl.cdiv(M, HIGH), gl.cdiv(N, WIDE), gl.cdiv(K, DEEP)
    tiles = down * across
    mine = gl.cdiv(tiles - gl.program_id(0), gl.num_programs(0))
    total = mine * steps

    left = gl.allocate_shared_memory(codes.dtype, [HELD, HIGH, DEEP], codes.layout)
    right = gl.allocate_shared_memory(weight.dtype, [HELD, WIDE, DEEP], weight.layout)
    leave = gl.allocate_shared_memory(result.dtype, [HIGH, WIDE], result.layout)
    bars = gl.allocate_shared_memory(gl.int64, [HELD, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(HELD):
        mbarrier.init(bars.index(i), count=1)
    fence_async_shared()
    for i in gl.static_range(HELD - 1):
        _fetch(i, steps, total, down, across, codes, weight, bars, left, right, HELD, GROUPED)

    step = 0
    for i in range(mine):
        row, column = _spot(gl.program_id(0) + i * gl.num_programs(0), down, across, HIGH, WIDE, GROUPED)
        sums = gl.zeros((HIGH, WIDE), gl.int32, form)
        for _ in range(steps):
            slot = step % HELD
            mbarrier.wait(bars.index(slot), step // HELD & 1)
            sums = warpgroup_mma(left.index(slot), right.index(slot).permute((1, 0)), sums, is_async=True)
            sums = warpgroup_mma_wait(1, deps=(sums,))  # the one before is done, and its tiles are free
            _fetch(step + HELD - 1, steps, total, down, across, codes, weight, bars, left, right, HELD, GROUPED)
            step += 1
        sums = warpgroup_mma_wait(0, deps=(sums,))
        m = row + gl.arange(0, HIGH, gl.SliceLayout(1, form))
        n = column + gl.arange(0, WIDE, gl.SliceLayout(0, form))
        factor = gl.load(scale + n, n < N, other=0.0)
        y = sums.to(gl.float32) * gl.expand_dims(factor, 0)
        y *= gl.expand_dims(gl.load(unit + m * unit_pitch, m < M, other=0.0), 1)
        if BIAS:
            y += gl.expand_dims(gl.load(bias + n, n < N, other=0.0).to(gl.float32), 0)
        y = y.to(result.dtype)
        if RESIDUAL:  # to what the product alone would have left
            at = gl.expand_dims(m.to(gl.int64), 1) * N + gl.expand_dims(n, 0)
            live = gl.expand_dims(m < M, 1) & gl.expand_dims(n < N, 0)
            more = gl.load(residual + at, live, other=0.0)
            y = (y.to(gl.float32) + more.to(gl.float32)).to(result.dtype)
        tma.store_wait(0)  # the tile before has left
        leave.store(y)
        fence_async_shared()
        store(result, [row, column], leave)
    tma.store_wait(0)


@lru_cache
def _processors(device: torch.device) -> int:
    """How many a Hopper GPU has; 0: it is none."""
    known = torch.cuda.get_device_properties(device)
    return known.multi_processor_count if known.major == 9 else 0


def takes(codes: Tensor, weight: Tensor, out: Tensor) -> bool:
    """Whether :func:`multiply` is for these: a Hopper GPU, bf16 to write, aligned rows, more than a few of them."""
    whole = all(t.stride(0) * t.element_size() % ALIGNED == 0 == t.data_ptr() % ALIGNED for t in (codes, weight, out))
    return codes.is_cuda and whole and out.dtype == torch.bfloat16 and len(codes) > 64 and _processors(codes.device) > 0


def multiply(
    codes: Tensor,
    weight: Tensor,
    scale: Tensor,
    unit: Tensor,
    bias: Tensor | None,
    out: Tensor,
    residual: Tensor | None,
    cut: Tile,
) -> None:
    """``out [M, N] = unit_row (scale (codes W^T)) + bias``, then ``+ residual``.

    Args:
        codes: int8 ``[M, K]``, whose rows may lie apart.
        weight: int8 ``[N, K]``.
        scale: fp32 ``[N]``.
        unit: fp32 ``[M]``, of any stride.
        bias: ``[N]``, or None.
        out: bf16 ``[M, N]``.
        residual: ``[M, N]``, contiguous, or None.
        cut: How, persistent.
    """
    (rows, columns), inner = out.shape, codes.shape[1]
    tiles = cdiv(rows, cut.m) * cdiv(columns, cut.n)
    _multiply[(min(tiles, _processors(codes.device)),)](
        _described(codes, [cut.m, cut.k], gl.int8),
        _described(weight, [cut.n, cut.k], gl.int8),
        _described(out, [cut.m, cut.n], gl.bfloat16),
        scale,
        unit,
        out if bias is None else bias,
        out if residual is None else residual,
        rows,
        columns,
        inner,
        unit.stride(0),
        BIAS=bias is not None,
        RESIDUAL=residual is not None,
        HELD=cut.stages,
        GROUPED=cut.group,
        num_warps=cut.warps,
        enable_fp_fusion=False,
    )


def _described(tensor: Tensor, block: list[int], dtype) -> TensorDescriptor:
    return TensorDescriptor.from_tensor(tensor, block, gl.NVMMASharedLayout.get_default_for(block, dtype))


def scaled_product(
    codes: Tensor,
    weight: Tensor,
    scale: Tensor,
    unit: Tensor,
    bias: Tensor | None,
    out: Tensor,
    residual: Tensor | None = None,
) -> None:
    """What :func:`multiply` does, for any GPU, shape and dtype of ``out``; more than a few rows."""
    if takes(codes, weight, out):
        multiply(codes, weight, scale, unit, bias, out, residual, hopper_tile(len(codes)))
    else:
        gemm(codes, weight, scale, unit, bias, out, int_tile(len(codes)), residual)
