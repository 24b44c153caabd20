"""Attention on codes on a GPU: the operators of :mod:`spikeform.layers.fused`. None of them has a gradient.

Few queries (decoding) and many (prefill) have kernels of their own; see those modules for how they work.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from spikeform.layers.triton import decode, few, prefill, short
from spikeform.layers.triton.operands import Counts, Mask, Populations, dense, train
from spikeform.layers.triton.query import encode_gif
from spikeform.synapses.triton.row import oat_lines

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


def row_attention(*args: Any) -> Tensor:
    """Codes of the ``[1, 1, H, E]`` of :func:`oat_attention`, as :func:`~spikeform.synapses.triton.row.row_oat` makes.

    ``args``: those of both, the latter's without its input; one threshold, no shifts.
    """
    q, k, v, mask, scaling, *parameters = args[:-6]
    thresholds, shifts, limit, resolution, rounding, parts = args[-6:]
    batch, heads, length, size = q.shape
    codes, how = oat_lines(heads * size, thresholds, shifts, limit, rounding, parts)
    compiled = how["TWO"], how["ROUNDING"], how["LIMBS"], how["PARTS"]
    line = few.Line(codes, thresholds[0], limit, resolution, compiled)
    seen = Mask.of(mask, batch, heads, length, k.shape[2])
    shape = q.transpose(1, 2)
    attend = _few(q, k).attend
    attend(dense(q), None, train(k, size), train(v, size), seen, scaling, Populations(*parameters), size, shape, line=line)
    return codes


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
    rule = Counts(q_multiple, k_multiple, v_multiple, peak, levels, q_steps)
    if signs is None and q.shape[2] <= FEW:  # few enough for each program to encode its own
        return _attend(dense(q), None, k, v, mask, scaling, rule, q)
    codes, units = encode_gif(dense(q), signs, q_multiple, levels, q_steps)
    return _attend(codes, units, k, v, mask, scaling, rule, q)


def _few(q: Tensor, k: Tensor) -> Any:
    """The module of kernels for few queries and so many cached keys."""
    batch, groups, keys, _ = k.shape
    rows = q.shape[1] // groups * q.shape[2]
    return short if short.suits(batch, groups, rows, keys, q.shape[3], k.element_size()) else decode


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
    attend = _few(q, k).attend if length <= FEW else prefill.attend
    attend(rows, units, train(k, size), train(v, size), seen, scaling, rule, size, out)
    return out
