"""Many rows: int8 products with their scales in the epilogue, and two bf16 planes against one load of each weight.

Tiles arrive through Hopper's tensor memory accelerator where its alignment allows, else by pointers.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from spikeform.neurons.triton.codes import rounded
from spikeform.synapses.triton.launch import cdiv, meta
from spikeform.synapses.triton.operands import await_inputs, multiply, release

ALIGNED = 16  # bytes: of a row, for the tensor memory accelerator


class Tile(NamedTuple):
    """How a product is cut.

    Attributes:
        m: Rows of a tile.
        n: Its output features.
        k: Input channels of a step.
        warps: Warps of a program.
        stages: Steps in flight.
        group: Rows of tiles that are done together, for the L2 cache.
        persistent: So many programs a multiprocessor take tile after tile; 0: each has one.
        specialised: Some warps fetch while others multiply (``warps`` 4: of each kind); persistent, aligned rows only.
    """

    m: int
    n: int
    k: int
    warps: int
    stages: int
    group: int = 8
    persistent: int = 1
    specialised: bool = False


@triton.jit
def _tile(source, row, k, rows, inner, pitch, TMA: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr):
    if TMA:
        return source.load([row, k])
    else:
        r = row + tl.arange(0, HEIGHT)
        c = k + tl.arange(0, WIDTH)
        at = source + r.to(tl.int64)[:, None] * pitch + c[None, :]
        return tl.load(at, (r < rows)[:, None] & (c < inner)[None, :], other=0)


@triton.jit
def _gemm(
    codes,
    weight,
    scale,
    unit,
    bias,
    residual,
    out,
    M,
    N,
    K,
    pitch,
    unit_pitch,
    PLANES: tl.constexpr,
    INTEGRAL: tl.constexpr,
    SCALED: tl.constexpr,
    BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    TMA: tl.constexpr,
    FLATTEN: tl.constexpr,
    SPECIALISED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """``out [M, N]``; codes ``[PLANES M, K]``, ``pitch`` elements a row; SCALED: ``unit_row (scale sum)``."""
    release(OVERLAP)
    await_inputs(OVERLAP)
    down = tl.cdiv(M, BLOCK_M)
    across = tl.cdiv(N, BLOCK_N)
    kind = tl.int32 if INTEGRAL else tl.float32
    for tile in tl.range(
        tl.program_id(0), down * across, tl.num_programs(0), flatten=FLATTEN, warp_specialize=SPECIALISED
    ):
        first = tile // (GROUP * across) * GROUP
        height = tl.minimum(down - first, GROUP)
        row = (first + tile % (GROUP * across) % height) * BLOCK_M
        column = tile % (GROUP * across) // height * BLOCK_N
        sums = tl.zeros([BLOCK_M, BLOCK_N], kind)
        if SPECIALISED:  # one product a step: the compiler deals such steps out to warps
            for step in tl.range(0, tl.cdiv(K, BLOCK_K) * PLANES):
                k = step // PLANES * BLOCK_K
                w = _tile(weight, column, k, N, K, K, TMA, BLOCK_N, BLOCK_K)
                c = _tile(codes, step % PLANES * M + row, k, PLANES * M, K, pitch, TMA, BLOCK_M, BLOCK_K)
                sums = multiply(c, w.T, sums)
        else:
            for k in range(0, K, BLOCK_K):
                w = _tile(weight, column, k, N, K, K, TMA, BLOCK_N, BLOCK_K)
                for plane in tl.static_range(PLANES):
                    c = _tile(codes, plane * M + row, k, PLANES * M, K, pitch, TMA, BLOCK_M, BLOCK_K)
                    sums = multiply(c, w.T, sums)
        m = row + tl.arange(0, BLOCK_M)
        n = column + tl.arange(0, BLOCK_N)
        if SCALED:
            factor = tl.load(scale + n, n < N, other=0.0)[None, :]
            y = sums.to(tl.float32) * factor * tl.load(unit + m * unit_pitch, m < M, other=0.0)[:, None]
        else:
            y = sums
        if BIAS:
            y += tl.load(bias + n, n < N, other=0.0).to(tl.float32)[None, :]
        place, live = m.to(tl.int64)[:, None] * N + n[None, :], (m < M)[:, None] & (n < N)[None, :]
        if RESIDUAL:  # to what the product alone would have left
            y = rounded(y, out.dtype.element_ty).to(tl.float32)
            y = rounded(y + tl.load(residual + place, live, other=0.0).to(tl.float32), out.dtype.element_ty)
        tl.store(out + place, y.to(out.dtype.element_ty), live)


def gemm(
    codes: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    unit: Tensor | None,
    bias: Tensor | None,
    out: Tensor,
    cut: Tile,
    residual: Tensor | None = None,
) -> None:
    """``out [M, N] = codes W^T``, in ``out``'s dtype.

    Args:
        codes: int8 ``[M, K]``, whose rows may lie apart, or bf16 ``[P, M, K]`` whose planes add up, contiguous.
        weight: ``[N, K]`` of the same dtype, contiguous.
        scale: fp32 ``[N]``: multiplies the sums, as ``unit`` then does; or None.
        unit: fp32 ``[M]``, of any stride.
        bias: ``[N]``, added then; or None.
        out: ``[M, N]``, contiguous.
        cut: The tiles.
        residual: ``[M, N]``, contiguous, to be added to the result, which is rounded first; or None.
    """
    inner, (rows, columns) = codes.shape[-1], out.shape
    flat = codes.flatten(0, -2)
    tma = all(t.stride(0) * t.element_size() % ALIGNED == 0 == t.data_ptr() % ALIGNED for t in (flat, weight))
    tiles = cdiv(rows, cut.m) * cdiv(columns, cut.n)
    programs = min(tiles, cut.persistent * _multiprocessors(codes.device)) if cut.persistent else tiles
    _gemm[(programs,)](
        TensorDescriptor.from_tensor(flat, [cut.m, cut.k]) if tma else flat,
        TensorDescriptor.from_tensor(weight, [cut.n, cut.k]) if tma else weight,
        out if scale is None else scale,
        out if unit is None else unit,
        out if bias is None else bias,
        out if residual is None else residual,
        out,
        rows,
        columns,
        inner,
        flat.stride(0),
        1 if unit is None else unit.stride(0),
        **meta(
            PLANES=flat.shape[0] // rows,
            INTEGRAL=codes.dtype == torch.int8,
            SCALED=scale is not None,
            BIAS=bias is not None,
            RESIDUAL=residual is not None,
            TMA=tma,
            FLATTEN=tma and cut.persistent > 0 and not cut.specialised,
            SPECIALISED=tma and cut.specialised,
            BLOCK_M=cut.m,
            BLOCK_N=cut.n,
            BLOCK_K=cut.k,
            GROUP=cut.group,
            num_warps=cut.warps,
            num_stages=cut.stages,
            enable_fp_fusion=codes.dtype != torch.int8,
        ),
    )


@lru_cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
