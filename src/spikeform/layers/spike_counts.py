"""What queries gather from the spikes of keys and values: integers, by the chunked forms of both kinds of heads.

G key/value heads, R query heads of each, L positions, E head size; the axes before are steps and rows. See
:mod:`spikeform.layers.self_attention`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from spikeform.errors import SpikeformError

CHUNK = 256  # positions that meet one another directly
CPU_CHUNK = 64  # on a CPU; measured: half the time of 256, for heads of 64 as for heads of 128


def causal_counts(q: Tensor, k: Tensor, v: Tensor, state: Tensor | None, chunk: int = CHUNK) -> tuple[Tensor, Tensor]:
    """``C`` and the last ``S``: integers, exact in fp32 while they are below 2^24.

    Args:
        q: Spikes ``[..., G, R, L, E]``, floating.
        k: ``[..., G, L, E]``.
        v: ``[..., G, L, E]``.
        state: ``S`` before the first position ``[..., G, E, E]``, or None: zero.
        chunk: Positions that meet one another directly; 1 is the recurrence, L the quadratic form.

    Returns:
        ``[..., G, R, L, E]`` and ``[..., G, E, E]``.
    """
    parts, length = [], q.shape[-2]
    for start in range(0, length, chunk):
        some = slice(start, start + chunk)
        q_, k_, v_ = q[..., some, :], k[..., some, :], v[..., some, :]
        scores = q_ @ k_.unsqueeze(-3).transpose(-1, -2)
        out = scores.tril() @ v_.unsqueeze(-3)
        parts.append(out if state is None else out + q_ @ state.unsqueeze(-3))
        step = k_.transpose(-1, -2) @ v_
        state = step if state is None else state + step
    if state is None:
        raise SpikeformError("attention over no positions")
    return torch.cat(parts, -2), state


def window_counts(
    q: Tensor, k: Tensor, v: Tensor, before: Tensor | None, windows: Tensor, width: int, chunk: int = CHUNK
) -> tuple[Tensor, Tensor]:
    """``C`` of heads that see a window of tokens, and the spikes that a cache keeps; exact as :func:`causal_counts`.

    Args:
        q: Spikes ``[..., G, R, L, E]``, floating.
        k: ``[..., G, L, E]``.
        v: ``[..., G, L, E]``.
        before: Spikes of keys and values of the ``width`` positions before ``[2, ..., G, width, E]``, or None: none.
        windows: w of each G, the query's own position among them.
        width: The largest of them, less one.
        chunk: Queries that are taken at once.

    Returns:
        ``[..., G, R, L, E]``, and ``before`` of what follows.
    """
    if before is None:
        k, v = (F.pad(x, (0, 0, width, 0)) for x in (k, v))
    else:
        k, v = (torch.cat([old.to(x.dtype), x], -2) for old, x in zip(before, (k, v), strict=True))
    length = q.shape[-2]
    chunk = min(chunk, length)
    apart = torch.arange(width, width + chunk, device=q.device)[:, None]
    apart = apart - torch.arange(width + chunk, device=q.device)
    seen = ((apart >= 0) & (apart < windows[:, None, None, None])).to(q.dtype)  # [G, 1, chunk, width + chunk]
    parts = []
    for start in range(0, length, chunk):
        now = q[..., start : start + chunk, :]
        here = now.shape[-2]
        near = slice(start, start + width + here)
        scores = now @ k[..., near, :].unsqueeze(-3).transpose(-1, -2) * seen[..., :here, : width + here]
        parts.append(scores @ v[..., near, :].unsqueeze(-3))
    return torch.cat(parts, -2), torch.stack([x[..., length:, :] for x in (k, v)])


def spread(windows: Sequence[int], groups: int) -> tuple[int, ...]:
    """The window of each of G key/value heads, in equal parts from the first to the last; 0: all tokens."""
    if not windows:
        return (0,) * groups
    gaps, last = max(groups - 1, 1), len(windows) - 1
    return tuple(windows[(2 * g * last + gaps) // (2 * gaps) if groups > 1 else last] for g in range(groups))
