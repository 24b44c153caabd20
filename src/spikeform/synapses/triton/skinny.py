"""A few rows (up to 128) times a weight matrix on tensor cores: the weight is the tall operand, split along K.

Operands are bf16 planes or int8 limbs that :mod:`.encode` or the GIF neuron made; each weight is read once for all.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from spikeform.synapses.triton.finish import scratch
from spikeform.synapses.triton.launch import cdiv, meta, next_power
from spikeform.synapses.triton.operands import await_inputs, multiply, release


class Shape(NamedTuple):
    """How a skinny product is cut.

    Attributes:
        n: Output features of a program.
        k: Input channels of a step.
        splits: Programs along K.
        warps: Warps of a program.
        stages: Steps in flight.
    """

    n: int
    k: int
    splits: int
    warps: int
    stages: int


@triton.jit
def _skinny(
    codes,
    weight,
    zero,
    partial,
    M,
    N,
    K,
    share,
    PLANES: tl.constexpr,
    INTEGRAL: tl.constexpr,
    PACKED: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    release(OVERLAP)
    await_inputs(OVERLAP)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.arange(0, BLOCK_M)
    start = tl.program_id(1) * share
    stop = tl.minimum(start + share, K)
    kind = tl.int32 if INTEGRAL else tl.float32
    sums = tl.zeros([BLOCK_N, BLOCK_M], kind)
    row = (n % N).to(tl.int64)[:, None]
    column = m[None, :] * K
    if PACKED:
        lanes = tl.arange(0, BLOCK_K // 2)
        channel = (lanes // 32) * 64 + lanes % 32
        total = tl.zeros([BLOCK_M], tl.int32)
        for k in range(start, stop, BLOCK_K):
            live = k + channel < stop
            w = tl.load(
                weight + row * (K // 2) + (k // 2 + lanes)[None, :],
                live[None, :],
                other=0,
                eviction_policy="evict_first",
            )
            at = codes + column + (k + channel)[:, None]
            seen = live[:, None] & (m < M)[None, :]
            low, high = tl.load(at, seen, other=0), tl.load(at + 32, seen, other=0)
            sums = multiply((w & 15).to(tl.int8), low, sums)
            sums = multiply((w >> 4).to(tl.int8), high, sums)
            total += tl.sum(low.to(tl.int32) + high.to(tl.int32), 0)
        sums -= tl.load(zero + n, n < N, other=0).to(tl.int32)[:, None] * total[None, :]
    else:
        lanes = tl.arange(0, BLOCK_K)
        for k in range(start, stop, BLOCK_K):
            live = k + lanes < stop
            at = weight + row * K + (k + lanes)[None, :]
            if EVEN:
                w = tl.load(at, eviction_policy="evict_first")
            else:
                w = tl.load(at, live[None, :], other=0, eviction_policy="evict_first")
            for plane in tl.static_range(PLANES):
                c = tl.load(
                    codes + plane * M * K + column + (k + lanes)[:, None], live[:, None] & (m < M)[None, :], other=0
                )
                sums = multiply(w, c, sums)
    place = partial + (tl.program_id(1).to(tl.int64) * M + m)[None, :] * N + n[:, None]
    tl.store(place, sums, (m < M)[None, :] & (n < N)[:, None])


def sums(codes: Tensor, weight: Tensor, zero: Tensor | None, shape: Shape) -> Tensor:
    """Partial sums ``[S, M, N]``, int32 of int8 codes and fp32 of bf16 planes.

    Args:
        codes: int8 ``[M, K]``, or bf16 ``[P, M, K]`` whose planes add up.
        weight: int8 or bf16 ``[N, K]``, or uint8 ``[N, K / 2]`` (see :func:`spikeform.synapses.fused.pack_nibbles`).
        zero: int16 ``[N]``, what packed weights hold in excess.
        shape: How it is cut.
    """
    rows, inner = codes.shape[-2:]
    columns, packed = weight.shape[0], weight.dtype == torch.uint8
    integral = codes.dtype == torch.int8
    share = cdiv(cdiv(inner, shape.splits), shape.k) * shape.k
    splits = cdiv(inner, share)
    partial = scratch(splits, rows, columns, torch.int32 if integral else torch.float32, codes)
    _skinny[(cdiv(columns, shape.n), splits)](
        codes,
        weight,
        weight if zero is None else zero,
        partial,
        rows,
        columns,
        inner,
        share,
        **meta(
            PLANES=1 if integral else codes.shape[0],
            INTEGRAL=integral,
            PACKED=packed,
            EVEN=inner % shape.k == 0,
            BLOCK_M=max(next_power(rows), 16),
            BLOCK_N=shape.n,
            BLOCK_K=shape.k,
            num_warps=shape.warps,
            num_stages=shape.stages,
        ),
    )
    return partial
