"""QCFS, quantisation-clip-floor-shift: the activation whose fine-tuned network becomes a spiking one.

    codes(x) = floor(L clip(x / theta, 0, 1) + 1/2);   QCFS(x) = theta / L codes(x)

The gradient of the floor is 1 (straight through), so inside the clip ``dQCFS/dx = 1`` and ``dQCFS/dtheta = (QCFS -
x) / theta``; above it 0 and 1; below it 0 and 0. With L = T this is the rate of an integrate-and-fire neuron that
starts at half its threshold, for an input constant in time. Signed: the same on ``|x|``, with the sign of ``x``.
Source: arXiv 2303.04347 (Bu et al. 2022), as used by arXiv 2502.04405.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from spikeform.neurons.operands import operand, positive, positive_integer


class _RoundHalfAway(torch.autograd.Function):
    """To the nearest integer, halves away from zero; the gradient passes straight through."""

    @staticmethod
    def forward(ctx: Any, u: Tensor) -> Tensor:
        return torch.copysign(torch.floor(u.abs() + 0.5), u)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0]


def qcfs_codes(x: Tensor, threshold: float | Tensor, levels: int, *, signed: bool = False) -> Tensor:
    """``floor(L clip(x / theta, 0, 1) + 1/2)``, differentiable in ``x`` and ``threshold``.

    Args:
        x: Input ``[..., C]``, floating.
        threshold: Positive, units of ``x``; broadcasts to ``[..., C]`` (a scalar, ``[C]``).
        levels: L, at least 1.
        signed: Codes carry the sign of ``x``, halves round away from zero.

    Returns:
        Integer values 0..L (signed: -L..L), ``[..., C]``, fp32 (fp64 for fp64 input); one unit is worth ``theta / L``.

    Raises:
        SpikeformError: Input not floating, threshold not positive and finite, or levels not a positive integer.
    """
    theta = positive("threshold", threshold, x)
    share = (x.to(theta.dtype) / theta).clamp(-1.0 if signed else 0.0, 1.0)
    return _RoundHalfAway.apply(positive_integer("levels", levels) * share)


def qcfs(x: Tensor, threshold: float | Tensor, levels: int, *, signed: bool = False) -> Tensor:
    """``theta / L floor(L clip(x / theta, 0, 1) + 1/2)``: the value; arguments and errors as :func:`qcfs_codes`."""
    codes = qcfs_codes(x, threshold, levels, signed=signed)
    return codes * (operand(threshold, x) / levels)
