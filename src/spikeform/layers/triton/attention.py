"""Attention on codes on a GPU: the operators of :mod:`spikeform.layers.fused`. None of them has a gradient.

Few queries (decoding) and many (prefill) have kernels of their own; see those modules for how they work.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from spikeform.layers.triton import decode, few, prefill, short
from spikeform.layers.triton.append import gif_append, oat_append
from spikeform.layers.triton.operands import Counts, Mask, Populations, dense, train
from spikeform.layers.triton.query import encode_gif
from spikeform.layers.triton.short import Token
from spikeform.synapses.triton.row import oat_lines

FEW = 4  # queries of a sequence
OWN, LINE = 5, 6  # arguments of a token, and of those who read a line of codes


def oat_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float, *parameters: Any) -> Tensor:
    """Attention with multi-threshold populations; see :mod:`spikeform.layers.fused`."""
    return _attend(q, k, v, mask, scaling, Populations(*parameters))


def oat_appended(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float, *parameters: Any) -> Tensor:
    """The same after a token has been put into the cache."""
    token = Token(*parameters[-OWN:])
    return _attend(q, k, v, mask, scaling, Populations(*parameters[:-OWN]), token=token)


def row_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float, *given: Any) -> Tensor:
    """Codes of the ``[1, 1, H, E]`` of :func:`oat_attention`, as :func:`~spikeform.synapses.triton.row.row_oat` makes.

    ``given``: what both take behind their inputs; one threshold, no shifts.
    """
    line = _line(q, *given[-LINE:])
    _attend(q, k, v, mask, scaling, Populations(*given[:-LINE]), line=line)
    return line.codes


def row_appended(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float, *given: Any) -> Tensor:
    """Codes of the ``[1, 1, H, E]`` of :func:`oat_appended`, likewise."""
    line, own = _line(q, *given[-LINE:]), given[:-LINE]
    token = Token(*own[-OWN:])
    _attend(q, k, v, mask, scaling, Populations(*own[:-OWN]), line=line, token=token)
    return line.codes


def gif_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float, signs: Tensor | None, *parameters: Any
) -> Tensor:
    """Attention with GIF populations; see :mod:`spikeform.layers.fused`. Multiples say what the largest codes are."""
    return _attend(q, k, v, mask, scaling, _counts(*parameters), signs=signs)


def gif_appended(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float, signs: Tensor | None, *parameters: Any
) -> Tensor:
    """The same after a token has been put into the cache."""
    own, token = parameters[:-OWN], Token(*parameters[-OWN:])
    return _attend(q, k, v, mask, scaling, _counts(*own), signs=signs, token=token._replace(steps=(own[5], own[8])))


def _counts(_q, query: Tensor, steps: int, _k, key: Tensor, _ks, _v, value: Tensor, _vs, levels: int, peak: int):
    return Counts(query, key, value, peak, levels, steps)


def _line(q: Tensor, thresholds, shifts, limit: int, resolution: int, rounding: int, parts: int) -> few.Line:
    codes, how = oat_lines(q[0].numel(), thresholds, shifts, limit, rounding, parts)
    compiled = how["TWO"], how["ROUNDING"], how["LIMBS"], how["PARTS"]
    return few.Line(codes, thresholds[0], limit, resolution, compiled)


def _put(k: Tensor, v: Tensor, q: Tensor, rule: Populations | Counts, token: Token) -> Tensor:
    """Put a token into the cache by a kernel of its own; queries are given back, turned if they are to be."""
    turn = () if token.cos is None else (q, token.cos, token.sin)
    given = k, v, *token[:3], rule.key, rule.value
    if isinstance(rule, Populations):
        turned = oat_append(*given, rule.limit, rule.resolution, rule.rounding, *turn)
    else:
        turned = gif_append(*given, rule.levels, *token.steps, *turn)
    return q if turned is None else turned


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scaling: float,
    rule: Populations | Counts,
    *,
    signs: Tensor | None = None,
    line: few.Line | None = None,
    token: Token | None = None,
) -> Tensor:
    """Fill a line, or a new ``[B, L, H, E]``, which is given back in either case."""
    batch, heads, length, size = q.shape
    groups, keys = k.shape[1:3]
    out = q.transpose(1, 2) if line else torch.empty((batch, length, heads, size), dtype=q.dtype, device=q.device)
    if line is None and (out.numel() == 0 or keys == 0):
        return out.zero_()
    is_few = length <= FEW
    together = is_few and short.suits(batch, groups, heads // groups * length, keys, size, k.element_size())
    if token is not None and (signs is not None or not together):
        q, token = _put(k, v, q, rule, token), None
    rows, units = dense(q), None
    if isinstance(rule, Counts) and (signs is not None or not is_few):  # else each program encodes its own
        rows, units = encode_gif(rows, signs, rule.query, rule.levels, rule.steps)
    where = rows, units, train(k, size), train(v, size), Mask.of(mask, batch, heads, length, keys), scaling, rule, size
    if together:
        short.attend(*where, out, line=line, token=token)
    elif is_few:
        decode.attend(*where, out, line=line)
    else:
        prefill.attend(*where, out)
    return out
