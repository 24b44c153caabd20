"""What streaming neurons compute with: inputs and parameters, checked once a call, in the dtype of the potential."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from spikeform.errors import SpikeformError


class Rule(NamedTuple):
    """How a scan runs: ``leak``, ``signed`` (fires -1 too), and the ``axis`` of time."""

    leak: float
    signed: bool
    axis: int


def potential_dtype(x: Tensor) -> torch.dtype:
    """fp32, or fp64 for fp64 input.

    Raises:
        SpikeformError: The input is not floating.
    """
    if not x.is_floating_point():
        raise SpikeformError(f"a neuron needs a floating input, got {x.dtype}; cast it first")
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def operand(value: float | Tensor, x: Tensor) -> Tensor:
    """A parameter as a tensor beside ``x``; numbers are filled in on the device, since a copy would wait for it."""
    dtype = potential_dtype(x)
    if isinstance(value, Tensor):
        return value.to(x.device, dtype)
    return torch.full((), value, dtype=dtype, device=x.device)


def positive(name: str, value: float | Tensor, x: Tensor) -> Tensor:
    """:func:`operand` of what must be positive and finite.

    A tensor is looked at on the CPU only: elsewhere that would wait for the device at every call, and whoever sets
    the parameter answers for it.

    Raises:
        SpikeformError: It is not positive and finite, or ``x`` is not floating.
    """
    good = True
    if not isinstance(value, Tensor):
        good = 0.0 < value < float("inf")
    elif value.device.type == "cpu" and value.numel() > 0 and not torch.compiler.is_compiling():
        least, most = value.detach().aminmax()
        good = float(least) > 0.0 and float(most) < float("inf")
    if not good:
        raise SpikeformError(f"the {name} must be positive and finite; calibrate it, or set it by hand")
    return operand(value, x)


def positive_integer(name: str, value: Any) -> int:
    """``value``, if it is an integer above 0.

    Raises:
        SpikeformError: It is not.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise SpikeformError(f"{name} must be a positive integer, got {value!r}")
    return value
