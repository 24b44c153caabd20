"""LIF neurons over T steps, as PyTorch's operations on one step after the other; see :mod:`spikeform.neurons.lif`."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from spikeform.neurons.surrogate import SURROGATES, bump


def _walk(
    current: Tensor, steps: int, tau: float, threshold: float, hard: bool, signed: bool
) -> Iterator[tuple[Tensor, Tensor]]:
    """Of each step the potential before the reset, and what is sent."""
    v = torch.zeros_like(current[0])
    for t in range(steps):
        now = current[t if len(current) > 1 else 0]
        u = (now - v).div_(tau).add_(v) if tau else v + now
        s = torch.ge(u, threshold, out=torch.empty_like(u))  # comparing into bools is slower
        if signed:
            s -= torch.le(u, -threshold, out=torch.empty_like(u))
        yield u, s
        v = u * (1 - s.abs()) if hard else u - threshold * s


def lif_spikes(
    current: Tensor, steps: int, tau: float, threshold: float, hard: bool, signed: bool, narrow: bool
) -> Tensor:
    """Spikes ``[T, ...]``; see :mod:`spikeform.neurons.fused`."""
    out = current.new_empty((steps, *current.shape[1:]), dtype=torch.int8 if narrow else current.dtype)
    for sent, (_, s) in zip(out, _walk(current, steps, tau, threshold, hard, signed), strict=True):
        sent.copy_(s)
    return out


def lif_gradient(
    grad: Tensor, current: Tensor, tau: float, threshold: float, hard: bool, signed: bool, kind: int
) -> Tensor:
    """The gradient of the currents; see :mod:`spikeform.neurons.fused`."""
    walked = list(_walk(current, len(grad), tau, threshold, hard, signed))
    out, later = torch.zeros_like(current), torch.zeros_like(current[0])
    for t in reversed(range(len(grad))):
        u, s = walked.pop()
        slope = bump(u - threshold, threshold, SURROGATES[kind])
        if signed:
            slope += bump(u + threshold, threshold, SURROGATES[kind])
        if hard:
            later *= 1 - s.abs()
        now = slope.mul_(grad[t]).add_(later)
        out[t if len(current) > 1 else 0] += now
        later = now.mul_(1 - 1 / tau) if tau else now
    return out.div_(tau) if tau else out
