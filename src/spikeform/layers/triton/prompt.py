"""Queries, keys and values of a prompt, turned by their positions and encoded by one launch; then their attention.

What :mod:`.query`, :mod:`.tiles` and :mod:`spikeform.neurons.triton.gif` do one after the other, where no key was in
the cache before: keys and values leave as the cache holds them and as matrices for tensor cores, and queries as codes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from spikeform.layers.triton import tiles
from spikeform.layers.triton.operands import Mask, cdiv, dense, padded, pow2
from spikeform.layers.triton.prefill import attend_integers, form_of, span_of
from spikeform.neurons.triton.codes import (
    WHOLE,
    gif_byte,
    gif_sent,
    gif_unit,
    greater,
    last_byte,
    lesser,
    rounded,
    widened,
)
from spikeform.neurons.triton.gif import UNIT_BYTES
from spikeform.synapses.triton.launch import meta
from spikeform.synapses.triton.operands import await_inputs, pick, release

ROWS, HEADS = 16, 8  # of a program: tokens, and heads one after the other, which are turned alike
VALUES = tl.constexpr(2)


@triton.jit
def _encode(
    given,
    turn,
    tables,
    codes,
    values,
    packed,
    query_units,
    units,
    levels,
    steps,
    heads,
    length,
    span,
    plane,
    given_b,
    given_h,
    given_l,
    turn_b,
    turn_l,
    table_h,
    BANDS,
    STEPPED: tl.constexpr,
    SIZE: tl.constexpr,
    E: tl.constexpr,
    HALF: tl.constexpr,
    ROWS: tl.constexpr,
    HEADS: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Tuples have an entry each for queries, keys and values; those of what is left of the last two alone, two.

    ``codes``: int8 in common units, of queries ``[B, H, L, E]`` and keys ``[B, G, span, E]``; ``values``: bf16 alike.
    """
    release(OVERLAP)
    await_inputs(OVERLAP)
    which = tl.program_id(2)
    kept = tl.maximum(which, 1) - 1
    batch, first = (tl.program_id(1) // BANDS).to(tl.int64), tl.program_id(1) % BANDS * HEADS
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    e = tl.arange(0, HALF)[None, :]
    inside = e < SIZE // 2
    along = turn[0] + batch * turn_b[0] + row.to(tl.int64) * turn_l[0] + e
    across = turn[1] + batch * turn_b[1] + row.to(tl.int64) * turn_l[1] + e
    turned = (row < length) & inside & (which + 0 * row < VALUES)  # values are turned by nothing
    cos0 = tl.load(along, turned, other=1.0).to(tl.float32)
    cos1 = tl.load(along + SIZE // 2, turned, other=1.0).to(tl.float32)
    sin0 = tl.load(across, turned, other=0.0).to(tl.float32)
    sin1 = tl.load(across + SIZE // 2, turned, other=0.0).to(tl.float32)
    of, most = pick(heads, which), pick(steps, which)
    long = tl.where(which == 0, length, span)
    live = (row < length) & inside
    x = pick(given, which) + batch * pick(given_b, which) + row.to(tl.int64) * pick(given_l, which) + e
    x += first.to(tl.int64) * pick(given_h, which)
    real = x.dtype.element_ty
    place, there = row * E + e, (row < long) & inside
    next0, next1 = tl.load(x, live, other=0.0), tl.load(x + SIZE // 2, live, other=0.0)
    for i in range(tl.minimum(HEADS, of - first)):
        head = first + i
        v0, v1 = next0, next1
        x += pick(given_h, which)
        more = live & (i + 1 + 0 * row < tl.minimum(HEADS, of - first))
        next0, next1 = tl.load(x, more, other=0.0), tl.load(x + SIZE // 2, more, other=0.0)
        if which < VALUES:
            a, b = v0.to(tl.float32), v1.to(tl.float32)  # of bf16 all this is done with pairs
            turned0 = rounded(a * cos0, real).to(tl.float32) - rounded(b * sin0, real).to(tl.float32)
            turned1 = rounded(b * cos1, real).to(tl.float32) + rounded(a * sin1, real).to(tl.float32)
            v0, v1 = rounded(turned0, real), rounded(turned1, real)
        low = tl.minimum(tl.min(widened(lesser(v0, v1)), 1, keep_dims=True), 0.0)
        high = tl.maximum(tl.max(widened(greater(v0, v1)), 1, keep_dims=True), 0.0)
        unit = gif_unit(low, high, levels, most)
        pair = batch * of + head
        times0, times1 = unit * 0.0 + 1.0, unit * 0.0 + 1.0
        if STEPPED:
            table = pick(tables, which) + head * pick(table_h, which) + e
            times0 = tl.load(table, inside, other=1.0)
            times1 = tl.load(table + SIZE // 2, inside, other=1.0)
        sent0 = gif_sent(widened(v0), low, unit, times0, levels, most)
        sent1 = gif_sent(widened(v1), low, unit, times1, levels, most)
        if which < VALUES:
            matrix = pick(codes, which) + pair * long * E + place
            tl.store(matrix, gif_byte(sent0, times0), there)
            tl.store(matrix + SIZE // 2, gif_byte(sent1, times1), there)
        else:
            value = values + pair * long * E + place
            tl.store(value, rounded(sent0 - times0 * WHOLE, values.dtype.element_ty), there)
            tl.store(value + SIZE // 2, rounded(sent1 - times1 * WHOLE, values.dtype.element_ty), there)
        if which == 0:
            tl.store(query_units + pair * length + row, unit, row < length)
        else:
            own = pick(units, kept) + pair * span + row
            tl.store(own, unit, row < span)
            tl.store(own + plane, tl.log2(unit), row < span)
            line = pick(packed, kept) + pair * length * (SIZE + UNIT_BYTES) + row * (SIZE + UNIT_BYTES)
            tl.store(line + e, last_byte(sent0), live)
            tl.store(line + SIZE // 2 + e, last_byte(sent1), live)
            bits = unit.to(tl.int32, bitcast=True)
            tl.store((line + SIZE).to(tl.pointer_type(tl.int32)), bits, row < length)


def mask_tiles(mask: Tensor, length: int, rows: int, keys: int) -> tuple[Tensor, Tensor]:
    """See :mod:`spikeform.layers.fused`."""
    values = Mask.of(mask, mask.shape[0], mask.shape[1], length, length)
    return tiles.look(values, length, length, rows, keys, mask.device)[:2]


def gif_prompt(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    mask: Tensor | None,
    scaling: float,
    q_multiple: Tensor,
    q_steps: int,
    k_multiple: Tensor,
    k_steps: int,
    v_multiple: Tensor,
    v_steps: int,
    levels: int,
    peak: int,
    flags: Tensor | None = None,
    bits: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """See :mod:`spikeform.layers.fused`."""
    (batch, heads, length, size), groups, device = q.shape, k.shape[1], q.device
    form, wide = form_of(length, padded(size), False), padded(size)
    span = span_of(length, form)
    given, turn = tuple([dense(x) for x in (q, k, v)]), (dense(cos), dense(sin))
    blank = torch.empty if wide == size else torch.zeros  # channels beyond the last are silent
    codes = tuple(
        [blank((batch, n, s, wide), dtype=torch.int8, device=device) for n, s in ((heads, length), (groups, span))]
    )
    values = blank((batch, groups, span, wide), dtype=torch.bfloat16, device=device)
    packed = tuple([x.new_empty((batch, groups, length, size + UNIT_BYTES.value), dtype=torch.int8) for x in (k, v)])
    query_units = torch.empty((batch, heads, length), dtype=torch.float32, device=device)
    units = tuple([torch.empty((2, batch, groups, span), dtype=torch.float32, device=device) for _ in packed])
    tables = tuple([x.contiguous() for x in (q_multiple, k_multiple, v_multiple)])
    steps, bands = (q_steps, k_steps, v_steps), cdiv(max(heads, groups), HEADS)
    with torch.cuda.device_of(q):
        _encode[(cdiv(span, ROWS), batch * bands, len(given))](
            given,
            turn,
            tables,
            codes,
            values,
            packed,
            query_units,
            units,
            levels,
            steps,
            (heads, groups, groups),
            length,
            span,
            batch * groups * span,
            tuple([x.stride(0) for x in given]),
            tuple([x.stride(1) for x in given]),
            tuple([x.stride(2) for x in given]),
            tuple([x.stride(0) if x.shape[0] > 1 else 0 for x in turn]),
            tuple([x.stride(2) for x in turn]),
            (0, size, size),
            bands,
            **meta(
                STEPPED=max(steps) > 1,
                SIZE=size,
                E=wide,
                HALF=pow2(size // 2),
                ROWS=ROWS,
                HEADS=HEADS,
                num_warps=4,
                enable_fp_fusion=False,
            ),
        )
        out = torch.empty((batch, length, heads, size), dtype=q.dtype, device=device)
        hidden = Mask.of(mask, batch, heads, length, length)
        seen = None if flags is None else tiles.Looked.of(flags, bits)
        k_matrix, v_matrix = (codes[1], units[0]), (values, units[1])
        attend_integers(codes[0], query_units, k_matrix, v_matrix, length, hidden, scaling, peak, size, out, form, seen)
    return out, packed[0], packed[1]
