"""The integrate-and-fire (IF) neuron with soft reset: the base of every streaming method.

For t = 1..T, from ``v(0) = initial``:

    v += x(t);   s(t) = 1[v >= level theta];   v -= theta s(t)

Ternary (signed): also ``s(t) = -1`` where ``v <= -level theta``. The order of the inputs matters, so the neuron answers
with its literal spikes; the potential is local to the call.

- ``theta sum_t s(t) = v(0) + sum_t x(t) - v(T)``, always.
- Unsigned: firing at ``(1 - beta) theta`` from 0 is firing at ``theta`` from ``beta theta``.
- Signed at level 1/2: ``|v| <= theta / 2`` while ``|x(t)| <= theta``, so ``sum_t s(t)`` is ``sum_t x(t) / theta``
  rounded to a nearest integer; in a tie the last input decides to which of the two.
- For an input constant in time the spikes have a closed form (:func:`constant_input_spikes`).

Source: arXiv 2502.04405 (unsigned), arXiv 2510.04595 (ternary).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from spikeform.errors import SpikeformError
from spikeform.neurons.operands import Rule, operand, positive, positive_integer
from spikeform.neurons.scan import Scan, run


class Fired(NamedTuple):
    """What a streaming neuron leaves behind.

    Attributes:
        spikes: ``[T, ...]``, 0 or 1 (ternary: -1, 0, 1): int8, or floating with a surrogate.
        potential: ``v(T)``, ``[...]``, fp32 (fp64 for fp64 input); give it back as ``initial`` to go on.
    """

    spikes: Tensor
    potential: Tensor


def step(
    v: Tensor,
    x: Tensor,
    threshold: Tensor,
    *,
    leak: float = 1.0,
    ternary: bool = False,
    width: float = 1.0,
    level: float | Tensor = 1.0,
) -> tuple[Tensor, Tensor]:
    """One time step: floating spikes ``[...]`` and the new potential; :func:`integrate_and_fire` with T = 1.

    Args:
        v: Membrane potential ``[...]``, units of ``x``.
        x: Input of this step ``[...]``.
        threshold: Scalar, or ``[C]`` per channel.
        leak: What stays of the potential; 1 for IF.
        ternary: Fire -1 at ``v <= -level threshold``.
        width: Half width of the surrogate triangle, units of ``x``.
        level: The share of the threshold at which it fires.
    """
    fired = integrate_and_fire(x[None], threshold, v, leak=leak, ternary=ternary, surrogate=width, level=level)
    return fired.spikes[0], fired.potential


def integrate_and_fire(
    x: Tensor,
    threshold: float | Tensor,
    initial: float | Tensor = 0.0,
    *,
    leak: float = 1.0,
    ternary: bool = False,
    surrogate: float | None = None,
    level: float | Tensor = 1.0,
) -> Fired:
    """Run the neuron over an input sequence.

    Args:
        x: Input currents ``[T, ..., C]``, floating, T >= 1.
        threshold: Positive; a scalar (per layer) or ``[C]`` (per channel), units of ``x``.
        initial: ``v(0)`` in units of ``x``; broadcasts to ``[..., C]``.
        leak: 0 < leak <= 1; 1 is IF.
        ternary: Fire -1 at ``v <= -level threshold``.
        surrogate: Half width of the surrogate triangle, units of ``x``; None for int8 spikes without a gradient.
        level: The share of the threshold at which it fires, above 0.

    Returns:
        Spikes ``[T, ..., C]`` and the final potential.

    Raises:
        SpikeformError: No time step, input not floating, threshold or level not positive, or leak out of range.
    """
    if x.ndim == 0 or len(x) == 0:
        raise SpikeformError("a streaming neuron needs at least one time step on the first axis")
    if not 0.0 < leak <= 1.0:
        raise SpikeformError(f"leak must be above 0 and at most 1, got {leak}")
    rule = Rule(leak, ternary, axis=0)
    return Fired(*_scan(x, threshold, initial, level, rule, surrogate, relative=False))


def scan(
    x: Tensor,
    threshold: float | Tensor,
    initial: float | Tensor = 0.0,
    level: float | Tensor = 1.0,
    *,
    steps: int,
    signed: bool = False,
    surrogate: float | None = None,
) -> Tensor:
    """The neuron over time folded into the batch, batch-major: row ``b T + t`` of ``x`` is step t of sequence b.

    One node in the graph, with gradients to ``x``, ``threshold``, ``initial`` and ``level``; on CUDA one fused kernel
    each way. It does not wait for the device.

    Args:
        x: Input currents ``[B T, ..., C]``, floating. Potentials are fp32 (fp64 for fp64 input).
        threshold: Positive, units of ``x``. Like ``initial`` and ``level`` it broadcasts to one step of the
            sequences, ``[B, ..., C]``: a scalar, ``[C]``, ``[P, C]`` …
        initial: ``v(0)``, units of ``x``.
        level: The share of the threshold at which it fires, above 0.
        steps: T, at least 1.
        signed: Fire -1 at ``v <= -level threshold``.
        surrogate: Half width of the surrogate triangle, in thresholds.

    Returns:
        Spikes ``[B T, ..., C]``. With a surrogate and grad enabled floating, in the dtype of the potential; else int8.

    Raises:
        SpikeformError: Rows are not whole windows of T, input not floating, or threshold or level not positive.
    """
    if x.ndim == 0 or len(x) % positive_integer("steps", steps):
        raise SpikeformError(f"rows must be whole windows of {steps} steps, got an input of shape {tuple(x.shape)}")
    windows = x.view(len(x) // steps, steps, *x.shape[1:])
    soft = surrogate if torch.is_grad_enabled() else None
    spikes, _ = _scan(windows, threshold, initial, level, Rule(1.0, signed, axis=1), soft, relative=True)
    return spikes.flatten(0, 1)


def _scan(
    x: Tensor,
    threshold: float | Tensor,
    initial: float | Tensor,
    level: float | Tensor,
    rule: Rule,
    surrogate: float | None,
    *,
    relative: bool,
) -> tuple[Tensor, Tensor]:
    """Spikes (int8 without a surrogate) and final potential; ``relative``: the surrogate counts in thresholds."""
    if surrogate is not None and not surrogate > 0:
        raise SpikeformError(f"the surrogate's width must be positive, got {surrogate}")
    theta = positive("threshold", threshold, x)
    at_threshold = not isinstance(level, Tensor) and level == 1.0
    fire = theta if at_threshold else positive("level", level, x) * theta
    v = operand(initial, x)
    one_step = x.select(rule.axis, 0).shape
    for name, each in (("threshold", theta), ("initial potential", v), ("level", fire)):
        if each.ndim > len(one_step) or any(
            n not in (1, m) for n, m in zip(reversed(each.shape), reversed(one_step), strict=False)
        ):
            raise SpikeformError(
                f"the {name} of shape {tuple(each.shape)} does not broadcast to one step of {tuple(one_step)}"
            )
    if surrogate is None:
        with torch.no_grad():
            return run(x, theta, v, fire, rule, torch.int8)
    width = theta.detach() * surrogate if relative else torch.full_like(theta, surrogate)
    return Scan.apply(x, theta, v, fire, width, rule)


def constant_input_spikes(
    x: Tensor,
    threshold: float | Tensor,
    steps: int,
    initial: float | Tensor = 0.0,
    *,
    ternary: bool = False,
    level: float | Tensor = 1.0,
) -> Tensor:
    """The spikes of IF for an input constant in time, without the loop.

    With ``k(t) = floor((t min(|x|, theta) + v0 + (1 - level) theta) / theta)`` it is ``s(t) = sign(x) (k(t) -
    k(t-1))``: above the threshold it fires every step. Equal to :func:`integrate_and_fire` in exact arithmetic; where
    the quotient meets an integer, rounding may move a spike by one step.

    It holds, unsigned (where ``x < 0`` never fires), for ``0 <= v0 + (1 - level) theta < theta``; ternary for ``v0 =
    0`` and ``1/2 <= level <= 1``: then a reset never ends where the opposite spike would fire.

    Args:
        x: Input of every step ``[..., C]``.
        threshold: Positive; a scalar or ``[C]``.
        steps: Time steps T >= 1.
        initial: ``v(0)``, units of ``x``.
        ternary: Signed spikes.
        level: The share of the threshold at which it fires.

    Returns:
        int8 ``[T, ..., C]``.

    Raises:
        SpikeformError: As :func:`integrate_and_fire`, or outside the range of the closed form.
    """
    positive_integer("steps", steps)
    theta, f, v0 = positive("threshold", threshold, x), positive("level", level, x), operand(initial, x)
    x, lead = x.to(theta.dtype), v0 + (1 - f) * theta
    fits = bool(((lead >= 0) & (lead < theta)).all())
    if not fits or (ternary and not bool(((v0 == 0) & (f >= 0.5)).all())):
        raise SpikeformError(
            "the closed form needs 0 <= initial + (1 - level) threshold < threshold, and for ternary spikes "
            "initial 0 and level at least 1/2; use integrate_and_fire"
        )
    drive = torch.minimum(x.abs() if ternary else x.clamp(min=0), theta)
    t = torch.arange(steps + 1, dtype=x.dtype, device=x.device).view(-1, *[1] * x.ndim)
    spikes = torch.floor((t * drive + lead) / theta).diff(dim=0)
    return (spikes * x.sign() if ternary else spikes).to(torch.int8)
