"""The one surrogate gradient: a step forward, a triangle backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class _TriangularStep(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, u: Tensor, width: float, strict: bool) -> Tensor:
        ctx.save_for_backward(u)
        ctx.width = width
        return (u > 0 if strict else u >= 0).to(u.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (u,) = ctx.saved_tensors
        return grads[0] * (ctx.width - u.abs()).clamp_(min=0) / ctx.width**2, None, None


def spike(u: Tensor, width: float = 1.0, *, strict: bool = False) -> Tensor:
    """Spike where the membrane is above the threshold, ``z = 1[u >= 0]``; differentiable by a triangle.

    ``dz/du = max(0, width - |u|) / width^2``: unit area, centred on the threshold (Esser et al. 2016; Stoeckl
    and Maass 2021 for few-spike neurons).

    Args:
        u: Potential minus threshold, ``[...]``, floating.
        width: Half the base of the triangle, in units of ``u``.
        strict: ``u > 0`` instead of ``u >= 0``.

    Returns:
        Zeros and ones, ``[...]``, the dtype of ``u``.
    """
    return _TriangularStep.apply(u, width, strict)
