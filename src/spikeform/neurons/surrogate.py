"""Surrogate gradients: a step forward, a bump backward.

    triangle   max(0, width - |u|) / width^2                        (Esser et al. 2016)
    sigmoid    a s (1 - s),  s = 1 / (1 + exp(-a u)),  a = 4 / width
    arctan     a / 2 / (1 + (pi / 2 a u)^2),           a = 2 / width

Each has unit area and is centred on the threshold; at width 1 the last two are what is usual elsewhere (a = 4 and 2).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

SURROGATES = ("triangle", "sigmoid", "arctan")


def bump(u: Tensor, width: float, kind: str) -> Tensor:
    """The gradient of a step at ``u``."""
    if kind == "triangle":
        return (width - u.abs()).clamp_(min=0) / width**2
    if kind == "sigmoid":
        s = torch.sigmoid(4 / width * u)
        return 4 / width * s * (1 - s)
    return 1 / width / (1 + (math.pi / width * u).square())


class _Step(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, u: Tensor, width: float, strict: bool, kind: str) -> Tensor:
        ctx.save_for_backward(u)
        ctx.width, ctx.kind = width, kind
        return (u > 0 if strict else u >= 0).to(u.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (u,) = ctx.saved_tensors
        return grads[0] * bump(u, ctx.width, ctx.kind), None, None, None


def spike(u: Tensor, width: float = 1.0, *, strict: bool = False, kind: str = "triangle") -> Tensor:
    """Spike where the membrane is above the threshold, ``z = 1[u >= 0]``; differentiable by a bump.

    Args:
        u: Potential minus threshold, ``[...]``, floating.
        width: Half the base of the triangle, or what scales the other bumps, in units of ``u``.
        strict: ``u > 0`` instead of ``u >= 0``.
        kind: ``triangle``, ``sigmoid`` or ``arctan``.

    Returns:
        Zeros and ones, ``[...]``, the dtype of ``u``.
    """
    return _Step.apply(u, width, strict, kind)
