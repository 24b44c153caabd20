"""Attention on codes on a GPU: the operators of :mod:`spikeform.layers.fused`. None of them has a gradient.

Few queries (decoding) and many (prefill) have kernels of their own; see those modules for how they work.
"""

from __future__ import annotations

import torch
from torch import Tensor

from spikeform.layers.triton import decode, prefill
from spikeform.layers.triton.operands import Counts, Mask, Populations, dense, train
from spikeform.layers.triton.query import encode_gif

FEW = 4  # queries of a sequence


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
    """Attention with multi-threshold populations; see :mod:`spikeform.layers.fused`."""
    rule = Populations(query, key, value, probability, limit, peak, resolution, rounding, bits, nearest, low, high)
    return _attend(dense(q), None, k, v, mask, scaling, rule, q)


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
    """Attention with GIF populations; see :mod:`spikeform.layers.fused`. Multiples say what the largest codes are."""
    codes, units = encode_gif(dense(q), signs, q_multiple, levels, q_steps)
    return _attend(codes, units, k, v, mask, scaling, Counts(k_multiple, v_multiple, peak), q)


def _attend(
    rows: Tensor,
    units: Tensor | None,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scaling: float,
    rule: Populations | Counts,
    q: Tensor,
) -> Tensor:
    batch, heads, length, size = q.shape
    out = torch.empty((batch, length, heads, size), dtype=q.dtype, device=q.device)
    if out.numel() == 0 or k.shape[2] == 0:
        return out.zero_()
    seen = Mask.of(mask, batch, heads, length, k.shape[2])
    attend = decode.attend if length <= FEW else prefill.attend
    attend(rows, units, train(k, size), train(v, size), seen, scaling, rule, size, out)
    return out
