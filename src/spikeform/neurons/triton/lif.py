"""LIF neurons over T steps as one kernel each way: a membrane stays in a register.

The backward kernel finds the potentials again from the currents, T of them at once in registers, so that training keeps
the currents alone. Equations: :mod:`spikeform.neurons.lif`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from spikeform.neurons.cpu import lif as plain
from spikeform.neurons.triton.codes import to_integer
from spikeform.neurons.triton.tiles import run

BLOCK = 512
PI = tl.constexpr(3.141592653589793)


@triton.jit
def _place(total, BLOCK: tl.constexpr):
    element = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    return element, element < total


@triton.jit
def step(v, current, tau, threshold, LEAKS: tl.constexpr, SIGNED: tl.constexpr):
    """Potential before the reset, and what is sent."""
    u = v + tl.div_rn(current - v, v * 0.0 + tau) if LEAKS else v + current
    s = (u >= threshold).to(tl.float32)
    if SIGNED:
        s -= (u <= -threshold).to(tl.float32)
    return u, s


@triton.jit
def after(u, s, threshold, HARD: tl.constexpr):
    """The membrane after the spikes ``s``: reset to zero (HARD), or less by the threshold for each."""
    if HARD:
        return u * (1.0 - tl.abs(s))
    else:
        return u - threshold * s


@triton.jit
def _bump(u, width, KIND: tl.constexpr):
    """The surrogate's slope; kinds in the order of :data:`spikeform.neurons.surrogate.SURROGATES`."""
    if KIND == 0:
        return tl.maximum(width - tl.abs(u), 0.0) / (width * width)
    elif KIND == 1:
        s = 1.0 / (1.0 + tl.exp(-4.0 / width * u))
        return 4.0 / width * s * (1.0 - s)
    else:
        scaled = PI / width * u
        return 1.0 / width / (1.0 + scaled * scaled)


@triton.jit
def _forward(
    current,
    out,
    total,
    tau,
    threshold,
    STEPS: tl.constexpr,
    VARYING: tl.constexpr,
    LEAKS: tl.constexpr,
    HARD: tl.constexpr,
    SIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    at, live = _place(total, BLOCK)
    now = tl.load(current + at, live, other=0.0)
    v = now * 0.0
    for t in tl.static_range(STEPS):
        if VARYING and t > 0:
            now = tl.load(current + at, live, other=0.0)
        u, s = step(v, now, tau, threshold, LEAKS, SIGNED)
        v = after(u, s, threshold, HARD)
        if out.dtype.element_ty == tl.int8:
            tl.store(out + at, to_integer(s, tl.int8), live)
        else:
            tl.store(out + at, s, live)
        at += total


@triton.jit
def _backward(
    grad,
    current,
    out,
    total,
    tau,
    threshold,
    STEPS: tl.constexpr,
    VARYING: tl.constexpr,
    LEAKS: tl.constexpr,
    HARD: tl.constexpr,
    SIGNED: tl.constexpr,
    KIND: tl.constexpr,
    BLOCK: tl.constexpr,
):
    at, live = _place(total, BLOCK)
    first = at
    now = tl.load(current + at, live, other=0.0)
    v = now * 0.0
    before = ()
    sent = ()
    for t in tl.static_range(STEPS):
        if VARYING and t > 0:
            now = tl.load(current + at, live, other=0.0)
        u, s = step(v, now, tau, threshold, LEAKS, SIGNED)
        v = after(u, s, threshold, HARD)
        before += (u,)
        sent += (s,)
        at += total
    share = 1.0 / tau if LEAKS else 1.0
    later = now * 0.0  # the gradient of V(t)
    whole = later
    for back in tl.static_range(STEPS):
        at -= total
        u = before[STEPS - 1 - back]
        slope = _bump(u - threshold, threshold, KIND)
        if SIGNED:
            slope += _bump(u + threshold, threshold, KIND)
        if HARD:
            later *= 1.0 - tl.abs(sent[STEPS - 1 - back])
        now = tl.load(grad + at, live, other=0.0) * slope + later
        if VARYING:
            tl.store(out + at, now * share, live)
        whole += now
        later = now * (1.0 - 1.0 / tau) if LEAKS else now
    if not VARYING:
        tl.store(out + first, whole * share, live)


def lif_spikes(
    current: Tensor, steps: int, tau: float, threshold: float, hard: bool, signed: bool, narrow: bool
) -> Tensor:
    """Spikes ``[T, ...]``; see :mod:`spikeform.neurons.fused`."""
    if current.dtype != torch.float32:
        return plain.lif_spikes(current, steps, tau, threshold, hard, signed, narrow)
    current = current.contiguous()
    total = current[0].numel()
    out = torch.empty((steps, *current.shape[1:]), dtype=torch.int8 if narrow else torch.float32, device=current.device)
    if total:
        run(
            _forward,
            (triton.cdiv(total, BLOCK),),
            *(current, out, total, tau, threshold),
            STEPS=steps,
            VARYING=len(current) > 1,
            LEAKS=tau > 0,
            HARD=hard,
            SIGNED=signed,
            BLOCK=BLOCK,
        )
    return out


def lif_gradient(
    grad: Tensor, current: Tensor, tau: float, threshold: float, hard: bool, signed: bool, kind: int
) -> Tensor:
    """The gradient of the currents; see :mod:`spikeform.neurons.fused`."""
    if current.dtype != torch.float32:
        return plain.lif_gradient(grad, current, tau, threshold, hard, signed, kind)
    grad, current = grad.contiguous(), current.contiguous()
    out, total = torch.empty_like(current), current[0].numel()
    if total:
        run(
            _backward,
            (triton.cdiv(total, BLOCK),),
            *(grad, current, out, total, tau, threshold),
            STEPS=len(grad),
            VARYING=len(current) > 1,
            LEAKS=tau > 0,
            HARD=hard,
            SIGNED=signed,
            KIND=kind,
            BLOCK=BLOCK,
        )
    return out
