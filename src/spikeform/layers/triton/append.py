"""One token's keys and values, encoded and put into a cache that has room for them: one launch for both.

A program has one head of one sequence, and its keys or its values. Codes are those of
:mod:`spikeform.neurons.triton.oat` and :mod:`~spikeform.neurons.triton.gif`, as a cache holds them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from spikeform.layers.triton.operands import dense, pow2
from spikeform.neurons.triton.codes import gif_integer, gif_unit, inverse_power, oat_code, to_integer
from spikeform.neurons.triton.gif import UNIT_BYTES
from spikeform.synapses.triton.launch import meta
from spikeform.synapses.triton.operands import await_inputs, oat_units, pick, release


@triton.jit
def _append(
    given,
    caches,
    tables,
    place,
    limit,
    resolution,
    steps,
    groups,
    given_b,
    given_g,
    cache_b,
    cache_g,
    cache_s,
    OAT: tl.constexpr,
    TWO: tl.constexpr,
    ROUNDING: tl.constexpr,
    STEPPED: tl.constexpr,
    SIZE: tl.constexpr,
    E: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Tuples have an entry for keys and one for values. ``limit`` of GIF neurons: levels."""
    release(OVERLAP)
    await_inputs(OVERLAP)
    which, pair = tl.program_id(1), tl.program_id(0)
    batch, group = (pair // groups).to(tl.int64), (pair % groups).to(tl.int64)
    e = tl.arange(0, E)
    inside = e < SIZE
    x = pick(given, which) + batch * pick(given_b, which) + group * pick(given_g, which)
    v = tl.load(x + e, inside, other=0.0).to(tl.float32)
    token = tl.load(place) * pick(cache_s, which)
    out = pick(caches, which) + batch * pick(cache_b, which) + group * pick(cache_g, which) + token
    table = pick(tables, which)
    if OAT:
        one, two, unit0, unit1 = oat_units(table, resolution, TWO)
        code, outlier = oat_code(v, one, two, unit0, unit1, limit, TWO, ROUNDING)
        packed = code * 2.0
        if TWO:
            packed += tl.where(outlier, 1.0, 0.0)
        tl.store(out + e, to_integer(packed, out.dtype.element_ty), inside)
    else:
        most = pick(steps, which)
        low, high = tl.minimum(tl.min(v, 0), 0.0), tl.maximum(tl.max(v, 0), 0.0)
        unit = gif_unit(low, high, limit, most)
        times = v * 0.0 + 1.0
        if STEPPED:
            times = tl.load(table + group * SIZE + e, inside, other=1.0)
        code = gif_integer(v, low, unit, times, limit, most) * inverse_power(times)
        tl.store(out + e, to_integer(code, tl.int8), inside)
        byte = tl.arange(0, UNIT_BYTES)
        bits = (byte * 0 + unit.to(tl.int32, bitcast=True)) >> (8 * byte)
        tl.store(out + SIZE + byte, bits.to(tl.int8))


def oat_append(
    keys: Tensor,
    values: Tensor,
    place: Tensor,
    key: Tensor,
    value: Tensor,
    key_threshold: Tensor,
    value_threshold: Tensor,
    limit: int,
    resolution: int,
    rounding: int,
) -> None:
    """Codes of multi-threshold populations; see :mod:`spikeform.layers.fused`."""
    how = {"OAT": True, "TWO": key_threshold.numel() == 2, "ROUNDING": rounding, "STEPPED": False}
    _run(keys, values, place, key, value, (key_threshold, value_threshold), limit, resolution, (1, 1), how)


def gif_append(
    keys: Tensor,
    values: Tensor,
    place: Tensor,
    key: Tensor,
    value: Tensor,
    key_multiple: Tensor,
    value_multiple: Tensor,
    levels: int,
    key_steps: int,
    value_steps: int,
) -> None:
    """Codes of GIF populations; see :mod:`spikeform.layers.fused`."""
    steps = key_steps, value_steps
    how = {"OAT": False, "TWO": False, "ROUNDING": 0, "STEPPED": max(steps) > 1}
    multiples = key_multiple.contiguous(), value_multiple.contiguous()
    _run(keys, values, place, key, value, multiples, levels, 1, steps, how)


def _run(keys, values, place, key, value, tables, limit, resolution, steps, how) -> None:
    given, caches = (dense(key), dense(value)), (keys, values)
    batch, groups, _, size = key.shape
    with torch.cuda.device_of(keys):
        _append[(batch * groups, 2)](
            given,
            caches,
            tables,
            place,
            limit,
            resolution,
            steps,
            groups,
            *[tuple([x.stride(axis) for x in given]) for axis in (0, 1)],
            *[tuple([x.stride(axis) for x in caches]) for axis in (0, 1, 2)],
            **meta(SIZE=size, E=pow2(size), num_warps=1, enable_fp_fusion=False, **how),
        )
