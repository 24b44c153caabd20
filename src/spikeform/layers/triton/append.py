"""One token's keys and values, encoded and put into a cache that has room for them: one launch for both.

A program has one head of one sequence, and its keys or its values. Codes are those of
:mod:`spikeform.neurons.triton.oat` and :mod:`~spikeform.neurons.triton.gif`, as a cache holds them. Where the launch
has to turn queries and keys by their position (rotary embedding) first, other programs have the queries' heads. Each
product and each sum of that is rounded to the dtype, as PyTorch does it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from spikeform.layers.triton.operands import dense, pow2
from spikeform.neurons.triton.codes import gif_integer, gif_unit, inverse_power, oat_code, rounded, times, to_integer
from spikeform.neurons.triton.gif import UNIT_BYTES
from spikeform.synapses.triton.launch import meta
from spikeform.synapses.triton.operands import await_inputs, oat_units, pick, release


@triton.jit
def turned(x, v, e, inside, turn, batch, turn_b, SIZE: tl.constexpr):
    """``v``, the heads at ``x``, turned: ``v cos + (-second half, first half) sin``. All but ``x`` have one shape."""
    first = e < SIZE // 2
    other = tl.load(x + tl.where(first, e + SIZE // 2, e - SIZE // 2), inside, other=0.0).to(tl.float32)
    cos = tl.load(turn[0] + batch * turn_b[0] + e, inside, other=0.0).to(tl.float32)
    sin = tl.load(turn[1] + batch * turn_b[1] + e, inside, other=0.0).to(tl.float32)
    real = x.dtype.element_ty
    along = rounded(times(v, cos), real).to(tl.float32)
    across = rounded(times(tl.where(first, -other, other), sin), real).to(tl.float32)
    return rounded(along + across, real).to(tl.float32)


@triton.jit
def coded_oat(v, known, limit, TWO: tl.constexpr, ROUNDING: tl.constexpr):
    """Packed codes of a multi-threshold population, integer-valued fp32; ``known``: what :func:`oat_units` gives."""
    one, two, unit0, unit1 = known
    code, outlier = oat_code(v, one, two, unit0, unit1, limit, TWO, ROUNDING)
    packed = code * 2.0
    if TWO:
        packed += tl.where(outlier, 1.0, 0.0)
    return packed


@triton.jit
def coded_gif(v, low, unit, times, levels, steps):
    """Codes of GIF neurons in the channels' own units, integer-valued fp32; ``times``: those units in ``unit``."""
    return gif_integer(v, low, unit, times, levels, steps) * inverse_power(times)


@triton.jit
def put_unit(out, unit, live):
    """Store the four bytes of a unit; ``live``: whether at all, a scalar."""
    byte = tl.arange(0, UNIT_BYTES)
    bits = (byte * 0 + unit.to(tl.int32, bitcast=True)) >> (8 * byte)
    tl.store(out + byte, bits.to(tl.int8), live.to(tl.int32) + 0 * byte > 0)


@triton.jit
def _append(
    given,
    caches,
    tables,
    place,
    turn,
    out_query,
    limit,
    resolution,
    steps,
    heads,
    groups,
    batches,
    slots,
    turn_b,
    given_b,
    given_g,
    cache_b,
    cache_g,
    cache_s,
    OAT: tl.constexpr,
    TWO: tl.constexpr,
    ROUNDING: tl.constexpr,
    STEPPED: tl.constexpr,
    TURN: tl.constexpr,
    SIZE: tl.constexpr,
    E: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Tuples have an entry for keys and one for values, ``given`` and its places a third for queries where TURN.

    ``limit`` of GIF neurons: levels. A token beyond a cache's ``slots`` is left out.
    """
    release(OVERLAP)
    await_inputs(OVERLAP)
    which, pair = tl.program_id(1), tl.program_id(0)
    e = tl.arange(0, E)
    inside = e < SIZE
    of = groups
    if TURN:
        of = tl.where(which == 2, heads, groups)
    batch, head = (pair // of).to(tl.int64), (pair % of).to(tl.int64)
    x = pick(given, which) + batch * pick(given_b, which) + head * pick(given_g, which)
    here = inside & (batch + 0 * e < batches)  # where there are more queries' heads than keys'
    v = tl.load(x + e, here, other=0.0).to(tl.float32)
    if TURN:
        v = tl.where(which == 1, v, turned(x, v, e, here, turn, batch, turn_b, SIZE))
        if which == 2:
            tl.store(out_query + pair.to(tl.int64) * SIZE + e, v.to(out_query.dtype.element_ty), here)
            here = e < 0
    last = tl.minimum(which, 1)
    number = tl.load(place)
    here = here & (number + 0 * e < slots)
    token = number * pick(cache_s, last)
    out = pick(caches, last) + batch * pick(cache_b, last) + head * pick(cache_g, last) + token
    table = pick(tables, last)
    if OAT:
        packed = coded_oat(v, oat_units(table, resolution, TWO), limit, TWO, ROUNDING)
        tl.store(out + e, to_integer(packed, out.dtype.element_ty), here)
    else:
        most = pick(steps, last)
        low, high = tl.minimum(tl.min(v, 0), 0.0), tl.maximum(tl.max(v, 0), 0.0)
        unit = gif_unit(low, high, limit, most)
        times = v * 0.0 + 1.0
        if STEPPED:
            times = tl.load(table + head * SIZE + e, here, other=1.0)
        code = coded_gif(v, low, unit, times, limit, most)
        tl.store(out + e, to_integer(code, tl.int8), here)
        put_unit(out + SIZE, unit, (number < slots) & (batch < batches) & (which < 2))


@triton.jit
def _advance(counters, by, OVERLAP: tl.constexpr):
    release(OVERLAP)
    await_inputs(OVERLAP)
    own = pick(counters, tl.program_id(0))
    tl.store(own, tl.load(own) + by)


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
    query: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
) -> Tensor | None:
    """Codes of multi-threshold populations; see :mod:`spikeform.layers.fused`. With ``query``, that is turned too."""
    how = {"OAT": True, "TWO": key_threshold.numel() == 2, "ROUNDING": rounding, "STEPPED": False}
    tables, turn = (key_threshold, value_threshold), (query, cos, sin)
    return _run(keys, values, place, key, value, tables, limit, resolution, (1, 1), how, *turn)


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
    query: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
) -> Tensor | None:
    """Codes of GIF populations; see :mod:`spikeform.layers.fused`. With ``query``, that is turned too."""
    steps = key_steps, value_steps
    how = {"OAT": False, "TWO": False, "ROUNDING": 0, "STEPPED": max(steps) > 1}
    multiples = key_multiple.contiguous(), value_multiple.contiguous()
    return _run(keys, values, place, key, value, multiples, levels, 1, steps, how, query, cos, sin)


def advance(counters: list[Tensor], by: int) -> None:
    """Add to integers ``[]``, each a tensor of its own, in their places."""
    with torch.cuda.device_of(counters[0]):
        _advance[(len(counters),)](tuple(counters), by, **meta(num_warps=1))


def _run(keys, values, place, key, value, tables, limit, resolution, steps, how, query, cos, sin) -> Tensor | None:
    given, caches, turned = [dense(key), dense(value)], (keys, values), None
    batch, groups, _, size = key.shape
    heads, turn = groups, (keys, keys)
    if query is not None:
        given.append(dense(query))
        heads, turn = query.shape[1], (dense(cos), dense(sin))
        turned = torch.empty((batch, heads, 1, size), dtype=query.dtype, device=query.device)
    with torch.cuda.device_of(keys):
        _append[(batch * max(heads, groups), len(given))](
            tuple(given),
            caches,
            tables,
            place,
            turn,
            keys if turned is None else turned,
            limit,
            resolution,
            steps,
            heads,
            groups,
            batch,
            keys.shape[2],
            tuple([x.stride(0) if x.shape[0] > 1 else 0 for x in turn]),
            *[tuple([x.stride(axis) for x in given]) for axis in (0, 1)],
            *[tuple([x.stride(axis) for x in caches]) for axis in (0, 1, 2)],
            **meta(SIZE=size, E=pow2(size), TURN=turned is not None, num_warps=1, enable_fp_fusion=False, **how),
        )
    return turned
