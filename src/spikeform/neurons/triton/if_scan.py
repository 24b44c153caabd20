"""Integrate-and-fire over time as one kernel each way: the potential stays in a register.

The equations are those of :mod:`spikeform.neurons.scan`; time is the middle axis of ``[B, T, N]``. Each lane owns one
neuron of one sequence. Forward: T inputs in, T spikes out, the same bits as the loop in PyTorch, since a product with a
spike is exact and so is insensitive to fusing. Backward: the spikes of the window are found again and kept as bits,
then the potential is unwound in reverse, ``v(t-1) = u(t) - x(t)``; it meets the forward one up to rounding, which
the surrogate, being continuous, passes on as rounding.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

if TYPE_CHECKING:
    from spikeform.neurons.operands import Rule

BLOCK = 512  # four neurons a thread: 16-byte loads, and the backward kernel still fits its registers
UNROLL = tl.constexpr(8)  # loads of so many steps fly at once; 64 steps in one piece compile for minutes
INT32_END = 2**31


@triton.jit
def _lanes(total, inner, STEPS: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr):
    """Element of one step, where its first step lies in ``[B, T, N]`` (the next lies ``inner`` on), and what exists."""
    program = tl.program_id(0)
    if WIDE:
        program = program.to(tl.int64)
    element = program * BLOCK + tl.arange(0, BLOCK)
    return element, element + element // inner * inner * (STEPS - 1), element < total


@triton.jit
def _forward(
    x,
    theta,
    initial,
    fire,
    spikes,
    potential,
    total,
    inner,
    n_theta,
    n_initial,
    n_fire,
    STEPS: tl.constexpr,
    SIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDE: tl.constexpr,
):
    element, at, live = _lanes(total, inner, STEPS, BLOCK, WIDE)
    theta_e = tl.load(theta + element % n_theta, live, other=1.0)
    fire_e = tl.load(fire + element % n_fire, live, other=1.0)
    v = tl.load(initial + element % n_initial, live, other=0.0)
    for _ in tl.range(0, STEPS, loop_unroll_factor=UNROLL):
        v += tl.load(x + at, live, other=0.0).to(tl.float32)
        s = (v >= fire_e).to(tl.float32)
        if SIGNED:
            s -= (v <= -fire_e).to(tl.float32)
        v -= theta_e * s
        tl.store(spikes + at, s.to(spikes.dtype.element_ty), live)
        at += inner
    tl.store(potential + element, v, live)


@triton.jit
def _backward(
    x,
    theta,
    initial,
    fire,
    width,
    grad_spikes,
    grad_potential,
    grad_x,
    grad_theta,
    grad_initial,
    grad_fire,
    total,
    inner,
    n_theta,
    n_initial,
    n_fire,
    n_width,
    STEPS: tl.constexpr,
    SIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDE: tl.constexpr,
):
    element, at, live = _lanes(total, inner, STEPS, BLOCK, WIDE)
    theta_e = tl.load(theta + element % n_theta, live, other=1.0)
    fire_e = tl.load(fire + element % n_fire, live, other=1.0)
    width_e = tl.load(width + element % n_width, live, other=1.0)
    v = tl.load(initial + element % n_initial, live, other=0.0)
    fired = (element * 0).to(tl.int64)
    fired_negative = fired
    for t in tl.range(0, STEPS, loop_unroll_factor=UNROLL):
        v += tl.load(x + at, live, other=0.0).to(tl.float32)
        s = (v >= fire_e).to(tl.int64)
        fired |= s << t
        if SIGNED:
            negative = (v <= -fire_e).to(tl.int64)
            fired_negative |= negative << t
            s -= negative
        v -= theta_e * s.to(tl.float32)
        at += inner
    steep = 1.0 / (width_e * width_e)
    g_v = tl.load(grad_potential + element, live, other=0.0)
    d_theta = g_v * 0.0
    d_fire = d_theta
    for i in tl.range(0, STEPS, loop_unroll_factor=UNROLL):
        at -= inner
        t = STEPS - 1 - i
        s = (((fired >> t) & 1) - ((fired_negative >> t) & 1)).to(tl.float32)
        u = v + theta_e * s
        a = tl.load(grad_spikes + at, live, other=0.0).to(tl.float32) - theta_e * g_v
        d_theta -= s * g_v
        slope = tl.maximum(width_e - tl.abs(u - fire_e), 0.0) * steep
        if SIGNED:
            negative_slope = tl.maximum(width_e - tl.abs(u + fire_e), 0.0) * steep
            d_fire -= a * (slope - negative_slope)
            slope += negative_slope
        else:
            d_fire -= a * slope
        g_v += a * slope
        tl.store(grad_x + at, g_v.to(grad_x.dtype.element_ty), live)
        v = u - tl.load(x + at, live, other=0.0).to(tl.float32)
    tl.store(grad_theta + element, d_theta, live)
    tl.store(grad_initial + element, g_v, live)
    tl.store(grad_fire + element, d_fire, live)


def _cyclic(parameter: Tensor, one_step: torch.Size) -> Tensor:
    """A parameter as a flat tensor that element ``e`` of a step reads at ``e`` modulo its length."""
    while parameter.ndim > 0 and parameter.shape[0] == 1:
        parameter = parameter[0]
    if parameter.shape != one_step[len(one_step) - parameter.ndim :]:
        parameter = parameter.expand(one_step)
    return parameter.contiguous()


def _shape(x: Tensor, rule: Rule) -> tuple[torch.Size, dict]:
    one_step = x.select(rule.axis, 0).shape
    total, steps = one_step.numel(), x.shape[rule.axis]
    inner = total if rule.axis == 0 else total // x.shape[0]
    wide = total * steps >= INT32_END - BLOCK * steps
    sizes = {"total": total, "inner": inner, "STEPS": steps, "SIGNED": rule.signed, "BLOCK": BLOCK, "WIDE": wide}
    return one_step, sizes


def forward(
    x: Tensor, theta: Tensor, initial: Tensor, fire: Tensor, rule: Rule, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Spikes in ``dtype``, shaped as ``x``, and the final potential, fp32; see :func:`spikeform.neurons.scan.run`."""
    one_step, sizes = _shape(x, rule)
    x = x.contiguous()
    theta, initial, fire = (_cyclic(p, one_step) for p in (theta, initial, fire))
    spikes = torch.empty(x.shape, dtype=dtype, device=x.device)
    potential = torch.empty(one_step, dtype=torch.float32, device=x.device)
    counts = {"n_theta": theta.numel(), "n_initial": initial.numel(), "n_fire": fire.numel()}
    grid = (triton.cdiv(sizes["total"], BLOCK),)
    with torch.cuda.device_of(x):
        _forward[grid](x, theta, initial, fire, spikes, potential, **counts, **sizes)
    return spikes, potential


def backward(
    saved: tuple[Tensor, ...], grad_spikes: Tensor | None, grad_potential: Tensor, rule: Rule
) -> tuple[Tensor, ...]:
    """Gradients of the input, and of theta, initial and fire for each element of one step.

    Args:
        saved: x, theta, initial, fire and width.
        grad_spikes: Of the loss by the spikes; None for none.
        grad_potential: Of the loss by the final potential.
        rule: How the scan ran.
    """
    one_step, sizes = _shape(saved[0], rule)
    x = saved[0].contiguous()
    theta, initial, fire, width = (_cyclic(p, one_step) for p in saved[1:])
    given = torch.zeros_like(x) if grad_spikes is None else grad_spikes.contiguous()
    grad_x = torch.empty_like(x)
    g_theta, g_initial, g_fire = (torch.empty(one_step, dtype=torch.float32, device=x.device) for _ in range(3))
    counts = {"n_theta": theta.numel(), "n_initial": initial.numel(), "n_fire": fire.numel(), "n_width": width.numel()}
    at = x, theta, initial, fire, width, given, grad_potential.contiguous()
    grid = (triton.cdiv(sizes["total"], BLOCK),)
    with torch.cuda.device_of(x):
        _backward[grid](*at, grad_x, g_theta, g_initial, g_fire, **counts, **sizes)
    return grad_x, g_theta, g_initial, g_fire
