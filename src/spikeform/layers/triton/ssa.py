"""Spiking self-attention on a GPU: the operator of :mod:`spikeform.layers.fused`, whose docstring explains the shapes.

One token and a cache are one launch (:mod:`~spikeform.layers.triton.ssa_decode`), more tokens some
(:mod:`~spikeform.layers.triton.ssa_prefill`). Both give the bits of
:meth:`~spikeform.layers.self_attention.SpikingSelfAttention.attend`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from spikeform.layers.triton import ssa_decode, ssa_prefill
from spikeform.layers.triton.operands import dense
from spikeform.layers.triton.ssa_operands import Given


def ssa_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seen: Tensor | None,
    state: Tensor | None,
    recent: Tensor | None,
    number: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    steps: int,
    tau: float,
    threshold: float,
    last: float,
    hard: bool,
    signed: bool,
    normalise: bool,
    windows: list[int],
) -> Tensor:
    """Attention ``[B, L, H, E]`` of real ``q`` ``[B, H, L, E]`` and ``k``, ``v`` ``[B, G, L, E]``; a cache moves on."""
    batch, heads, length, size = q.shape
    given = Given(
        *(dense(q), dense(k), dense(v)),
        None if seen is None else seen.contiguous().view(torch.uint8),
        *(state, recent, number, (query, key, value, output), tuple(windows), (tau, threshold, last)),
        *(steps, (tau > 0, hard, signed), normalise),
    )
    out = torch.empty((batch, length, heads, size), dtype=q.dtype, device=q.device)
    if out.numel():
        attend = ssa_decode.attend if length == 1 and state is not None else ssa_prefill.attend
        attend(given, out)
    return out
