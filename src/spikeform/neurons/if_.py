"""The integrate-and-fire (IF) neuron with soft reset: the base of every streaming method.

For t = 1..T, from ``v(0) = initial``:

    v += x(t);   s(t) = 1[v >= theta];   v -= theta s(t)

Ternary: also ``s(t) = -1`` where ``v <= -theta``. The order of the inputs matters, so the neuron answers with
its literal spikes; the potential is local to the call. ``theta sum_t s(t) = v(0) + sum_t x(t) - v(T)``.
For an input constant in time the spikes have a closed form (:func:`constant_input_spikes`).
Source: arXiv 2502.04405 (unsigned), arXiv 2510.04595 (ternary).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from spikeform.neurons.surrogate import spike


class Fired(NamedTuple):
    """What a streaming neuron leaves behind.

    Attributes:
        spikes: ``[T, ...]``, 0 or 1 (ternary: -1, 0, 1): int8, or the dtype of the input with a surrogate.
        potential: ``v(T)``, ``[...]``; give it back as ``initial`` to go on.
    """

    spikes: Tensor
    potential: Tensor


def step(
    v: Tensor, x: Tensor, threshold: Tensor, *, leak: float = 1.0, ternary: bool = False, width: float = 1.0
) -> tuple[Tensor, Tensor]:
    """One time step ``v <- leak v + x``, fire, soft reset; differentiable, by the triangular surrogate.

    Args:
        v: Membrane potential ``[...]``, units of ``x``.
        x: Input of this step ``[...]``.
        threshold: Scalar, or ``[C]`` per channel.
        leak: What stays of the potential; 1 for IF.
        ternary: Fire -1 at ``v <= -threshold``.
        width: Half width of the surrogate triangle, units of ``x``.

    Returns:
        Spikes ``[...]`` in the dtype of ``x``, and the new potential.
    """
    v = v + x if leak == 1.0 else leak * v + x
    s = spike(v - threshold, width)
    if ternary:
        s = s - spike(-v - threshold, width)
    return s, v - threshold * s


def integrate_and_fire(
    x: Tensor,
    threshold: float | Tensor,
    initial: float | Tensor = 0.0,
    *,
    leak: float = 1.0,
    ternary: bool = False,
    surrogate: float | None = None,
) -> Fired:
    """Run the neuron over an input sequence.

    Args:
        x: Input currents ``[T, ..., C]``, floating, T >= 1.
        threshold: Positive; a scalar (per layer) or ``[C]`` (per channel), units of ``x``.
        initial: ``v(0)`` in units of ``x``; broadcasts to ``[..., C]``.
        leak: 0 < leak <= 1; 1 is IF.
        ternary: Fire -1 at ``v <= -threshold``.
        surrogate: Half width of the surrogate triangle; None for int8 spikes without a gradient.

    Returns:
        Spikes ``[T, ..., C]`` and the final potential.

    Raises:
        ValueError: No time step, input not floating, threshold not positive and finite, or leak out of range.
    """
    theta = _check(x, threshold)
    if not 0.0 < leak <= 1.0:
        raise ValueError(f"leak must be above 0 and at most 1, got {leak}")
    if surrogate is not None and not surrogate > 0:
        raise ValueError(f"the surrogate's width must be positive, got {surrogate}")
    with torch.set_grad_enabled(torch.is_grad_enabled() and surrogate is not None):
        v = torch.as_tensor(initial, dtype=x.dtype, device=x.device).expand(x.shape[1:])
        spikes = []
        for current in x:
            s, v = step(v, current, theta, leak=leak, ternary=ternary, width=surrogate or 1.0)
            spikes.append(s if surrogate is not None else s.to(torch.int8))
        return Fired(torch.stack(spikes), v)


def constant_input_spikes(
    x: Tensor, threshold: float | Tensor, steps: int, initial: float | Tensor = 0.0, *, ternary: bool = False
) -> Tensor:
    """The spikes of IF for an input constant in time, without the loop.

    ``s(t) = floor((t x + v0) / theta) - floor(((t-1) x + v0) / theta)`` with ``x`` clipped to [0, theta]:
    above the threshold it fires every step, below zero never. Equal to :func:`integrate_and_fire` in exact
    arithmetic; where ``t x + v0`` meets a multiple of theta, rounding may move a spike by one step.

    Args:
        x: Input of every step ``[..., C]``.
        threshold: Positive; a scalar or ``[C]``.
        steps: Time steps T >= 1.
        initial: ``v(0)``, ``0 <= v(0) < threshold``.
        ternary: Signed spikes; ``initial`` must then be 0.

    Returns:
        int8 ``[T, ..., C]``.

    Raises:
        ValueError: As :func:`integrate_and_fire`, or ``initial`` outside the range of the closed form.
    """
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"steps must be a positive integer, got {steps!r}")
    theta = _check(x[None], threshold)
    v0 = torch.as_tensor(initial, dtype=x.dtype, device=x.device)
    if bool((v0 < 0).any()) or bool((v0 >= theta).any()) or (ternary and bool((v0 != 0).any())):
        raise ValueError("the closed form needs 0 <= initial < threshold, and initial 0 for ternary spikes")
    drive = torch.minimum(x.abs() if ternary else x.clamp(min=0), theta)
    t = torch.arange(steps + 1, dtype=x.dtype, device=x.device).view(-1, *[1] * x.ndim)
    spikes = torch.floor((t * drive + v0) / theta).diff(dim=0)
    return (spikes * x.sign() if ternary else spikes).to(torch.int8)


def _check(x: Tensor, threshold: float | Tensor) -> Tensor:
    if not x.is_floating_point():
        raise ValueError(f"a streaming neuron needs a floating input, got {x.dtype}")
    if x.ndim == 0 or len(x) == 0:
        raise ValueError("a streaming neuron needs at least one time step on the first axis")
    theta = torch.as_tensor(threshold, dtype=x.dtype, device=x.device)
    if not bool((theta.isfinite() & (theta > 0)).all()):
        raise ValueError("the threshold must be positive and finite")
    return theta
