"""Attention on packed codes: kernels of :mod:`spikeform.layers.fused`, whose docstring explains the shapes."""

from __future__ import annotations

from array import array

import torch
from torch import Tensor

from spikeform.layers.attention import SpikingAttention
from spikeform.layers.rotation import rotate_heads
from spikeform.native.library import function
from spikeform.neurons import Dynamic
from spikeform.neurons.cpu.gif import burst
from spikeform.neurons.cpu.hg import bank
from spikeform.neurons.cpu.oat import population
from spikeform.neurons.cpu.real import KINDS
from spikeform.spikes import Radix2


def oat_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scaling: float,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    probability: Tensor,
    limit: int,
    peak: int,
    resolution: int,
    rounding: int,
    bits: int,
    nearest: bool,
    low: int,
    high: int,
) -> Tensor:
    """Attention of populations: real ``q`` ``[B, H, L, E]``, packed ``k``, ``v`` ``[B, G, S, E]``; ``[B, L, H, E]``."""
    run = function("oat_attention", "pppppp" + "ff" + "pppp" + "iiiii" + "iiii" + "ii")
    if run is None or q.dtype not in KINDS:
        populations = ((query, limit), (key, limit), (value, limit), (probability, peak))
        queries, keys, values, weights = (population(own, most, resolution, rounding) for own, most in populations)
        exp, reciprocal = (bank(name, bits, nearest, low, high) if bits else None for name in ("exp", "reciprocal"))
        return SpikingAttention(queries, keys, values, weights, exp, reciprocal)(q, k, v, mask, scaling)
    q, k, v, (mask, hidden) = _dense(q), _dense(k), _dense(v), _mask(mask)
    batch, heads, length, size = q.shape
    out = q.new_empty(batch, length, heads, size)
    query, key, value, probability = query.contiguous(), key.contiguous(), value.contiguous(), probability.contiguous()
    sizes = sizes_of(q, k, v, mask, q.dtype)
    run(
        sizes.buffer_info()[0],
        q.data_ptr(),
        k.data_ptr(),
        v.data_ptr(),
        None if mask is None else mask.data_ptr(),
        out.data_ptr(),
        scaling,
        hidden,
        query.data_ptr(),
        key.data_ptr(),
        value.data_ptr(),
        probability.data_ptr(),
        query.numel(),
        limit,
        peak,
        resolution,
        rounding,
        bits,
        nearest,
        low,
        high,
        k.dtype == torch.int32,
        torch.get_num_threads(),
    )
    return out


def gif_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scaling: float,
    signs: Tensor | None,
    q_top: Tensor,
    q_multiple: Tensor,
    q_steps: int,
    k_top: Tensor,
    k_multiple: Tensor,
    k_steps: int,
    v_top: Tensor,
    v_multiple: Tensor,
    v_steps: int,
    levels: int,
    peak: int,
) -> Tensor:
    """Attention of bursts: real ``q`` ``[B, H, L, E]``, packed ``k``, ``v`` ``[B, G, S, E + 4]``; ``[B, L, H, E]``."""
    run = function("gif_attention", "pppppp" + "ff" + "ppi" + "pp" + "ii" + "i")
    if run is None or q.dtype not in KINDS:
        tables = ((q_multiple, q_steps), (k_multiple, k_steps), (v_multiple, v_steps))
        queries, keys, values = (burst(multiple, levels, steps) for multiple, steps in tables)
        spiking = SpikingAttention(queries, keys, values, Dynamic(Radix2(peak.bit_length())), None, None)
        spiking.signs = signs
        return spiking(q, k, v, mask, scaling)
    dtype = q.dtype
    q = _dense(q if signs is None else rotate_heads(q, signs))
    k, v, (mask, hidden) = _dense(k), _dense(v), _mask(mask)
    out = torch.empty((q.shape[0], q.shape[2], q.shape[1], q.shape[3]), dtype=dtype)
    q_top, q_multiple, k_multiple, v_multiple = (t.contiguous() for t in (q_top, q_multiple, k_multiple, v_multiple))
    sizes = sizes_of(q, k, v, mask, dtype)
    run(
        sizes.buffer_info()[0],
        q.data_ptr(),
        k.data_ptr(),
        v.data_ptr(),
        None if mask is None else mask.data_ptr(),
        out.data_ptr(),
        scaling,
        hidden,
        q_top.data_ptr(),
        q_multiple.data_ptr(),
        q_steps,
        k_multiple.data_ptr(),
        v_multiple.data_ptr(),
        levels,
        peak,
        torch.get_num_threads(),
    )
    return out


def _mask(mask: Tensor | None) -> tuple[Tensor | None, float]:
    """A mask that the library reads, and what hides a key there."""
    if mask is None:
        return None, -1.0
    return _dense(mask if mask.dtype in KINDS else mask.float()), hidden_from(mask)


def hidden_from(mask: Tensor) -> float:
    """The value from which on down a mask hides a key."""
    return torch.finfo(mask.dtype).min / 2


def _dense(x: Tensor) -> Tensor:
    """``x`` with its last axis in one piece; heads, rows and batches may lie anywhere."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def sizes_of(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, out: torch.dtype) -> array:
    """What the library's ``Sizes`` holds, in its order; a mask's axes of size one are the same everywhere."""
    batch, heads, length, size = q.shape
    groups, keys = k.shape[1:3]
    of_mask, kind = (0, 0, 0), 0
    if mask is not None:
        by_batch, by_head, by_row, _ = mask.stride()
        wide, high, long, _ = mask.shape
        of_mask = by_batch if wide > 1 else 0, by_head if high > 1 else 0, by_row if long > 1 else 0
        kind = KINDS[mask.dtype]
    strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *of_mask)
    return array("q", (batch, heads, groups, length, keys, size, *strides, KINDS[q.dtype], kind, KINDS[out]))
