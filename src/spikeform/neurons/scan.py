"""The one implementation of integrate-and-fire over time, with its adjoint, behind everything in :mod:`.if_`.

Forward, from ``v(0)``, with leak ``l``, threshold ``theta`` (what a spike takes away) and firing level ``f``:

    u(t) = l v(t-1) + x(t);   s(t) = H(u(t) - f) [- H(-u(t) - f)];   v(t) = u(t) - theta s(t)

Backward, with ``g(t) = dE/ds(t)``, ``G(t) = dE/dv(t)`` and the triangles ``p(t), m(t)`` of the two steps H, from G(T):

    a = g - theta G;   dE/du = G + a (p + m);   dE/df -= a (p - m);   dE/dtheta -= s G;   G(t-1) = l dE/du

``dE/dx(t) = dE/du(t)`` and ``dE/dv(0) = G(0)``. Nothing but the input is kept: the potentials are computed again.
The triangle is that of :func:`spikeform.neurons.surrogate.spike`.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from spikeform.neurons.operands import Rule

FUSED_STEPS = 64  # the kernels keep a window's spikes in one 64-bit word


@cache
def fused_kernels() -> ModuleType | None:
    """The Triton kernels; None, with a warning, where triton is not installed."""
    try:
        from spikeform.neurons.triton import if_scan
    except ModuleNotFoundError as error:
        if error.name != "triton":
            raise
        warnings.warn(
            "triton is not installed: integrate-and-fire runs step by step in PyTorch, several times slower on a GPU; "
            "pip install triton",
            stacklevel=2,
        )
        return None
    return if_scan


def _kernels(x: Tensor, rule: Rule) -> ModuleType | None:
    fits = x.is_cuda and x.dtype != torch.float64 and rule.leak == 1.0 and x.shape[rule.axis] <= FUSED_STEPS
    return fused_kernels() if fits and x.numel() > 0 else None


def _walk(x: Tensor, theta: Tensor, initial: Tensor, fire: Tensor, rule: Rule) -> Iterator[tuple[Tensor, ...]]:
    """Per step: potential before the reset, spikes (floating: comparing into bools is slower), potential after it."""
    v = initial
    for current in x.unbind(rule.axis):
        u = (v if rule.leak == 1.0 else v * rule.leak) + current.to(theta.dtype)
        s = torch.ge(u, fire, out=torch.empty_like(u))
        if rule.signed:
            s = s.sub_(torch.le(u, -fire, out=torch.empty_like(u)))
        v = u - theta * s
        yield u, s, v


def _triangle(distance: Tensor, width: Tensor, steep: Tensor) -> Tensor:
    """``max(0, width - |distance|) / width^2``, in the memory of ``distance``."""
    return torch.sub(width, distance.abs_(), out=distance).clamp_(min=0).mul_(steep)


def _adjoint(saved: tuple[Tensor, ...], grad_spikes: Tensor | None, G: Tensor, rule: Rule) -> tuple[Tensor, ...]:
    """Gradients of the input, and of theta, initial and fire for each element of one step."""
    x, theta, initial, fire, width = saved
    walked = [(u, s) for u, s, _ in _walk(x, theta, initial, fire, rule)]
    grad_x, grad_theta, grad_fire = torch.empty_like(x), torch.zeros_like(G), torch.zeros_like(G)
    steep = width.square().reciprocal()
    while walked:
        u, s = walked.pop()
        t = len(walked)
        grad_theta.addcmul_(s, G, value=-1)
        a = -theta * G if grad_spikes is None else grad_spikes.select(rule.axis, t).addcmul(theta, G, value=-1)
        if rule.signed:
            negative = _triangle(u + fire, width, steep)
            slope = _triangle(u.sub_(fire), width, steep)
            grad_fire.addcmul_(a, slope - negative, value=-1)
            G = G.addcmul(a, slope.add_(negative))
        else:
            toward = _triangle(u.sub_(fire), width, steep).mul_(a)
            grad_fire -= toward
            G = toward.add_(G)
        grad_x.select(rule.axis, t).copy_(G)
        if rule.leak != 1.0:
            G = G * rule.leak
    return grad_x, grad_theta, G, grad_fire


def run(
    x: Tensor, theta: Tensor, initial: Tensor, fire: Tensor, rule: Rule, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Spikes in ``dtype``, of the shape of ``x``, and the final potential; arguments as :class:`Scan`."""
    kernels = _kernels(x, rule)
    if kernels is not None:
        return kernels.forward(x, theta, initial, fire, rule, dtype)
    spikes, v = torch.empty_like(x, dtype=dtype), initial
    for t, (_, s, after) in enumerate(_walk(x, theta, initial, fire, rule)):
        spikes.select(rule.axis, t).copy_(s)
        v = after
    return spikes, v


class Scan(torch.autograd.Function):
    """The scan and its adjoint as one node of the graph.

    Inputs: ``x``, time on ``rule.axis``; ``theta``, ``initial``, ``fire`` and ``width`` (half the base of the
    triangle; a constant) in the dtype of the potential, each broadcasting to one step of ``x``. Outputs: spikes of the
    shape of ``x`` and the final potential, both in that dtype.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, theta: Tensor, initial: Tensor, fire: Tensor, width: Tensor, rule: Rule
    ) -> tuple[Tensor, Tensor]:
        """Run it; keep the input alone."""
        ctx.save_for_backward(x, theta, initial, fire, width)
        ctx.rule = rule
        ctx.set_materialize_grads(False)
        return run(x, theta, initial, fire, rule, theta.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """The adjoint, summed over what each parameter was broadcast along."""
        return _backward(ctx, *grads)


@once_differentiable
def _backward(ctx: Any, grad_spikes: Tensor | None, G: Tensor | None) -> tuple[Tensor | None, ...]:
    x, theta, initial, fire, _ = saved = ctx.saved_tensors
    if G is None:
        G = torch.zeros_like(x.select(ctx.rule.axis, 0), dtype=theta.dtype)
    kernels = _kernels(x, ctx.rule)
    grad_x, *each = (_adjoint if kernels is None else kernels.backward)(saved, grad_spikes, G, ctx.rule)
    summed = [grad.sum_to_size(like.shape) for grad, like in zip(each, (theta, initial, fire), strict=True)]
    return grad_x, *summed, None, None
