"""The functions that hierarchically gated neurons compute, by name, in one table."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def _quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


def _fast_gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1.0 + torch.tanh(x * math.sqrt(2.0 / math.pi) * (1.0 + 0.044715 * x * x)))


FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "exp": torch.exp,
    "reciprocal": torch.reciprocal,
    "square": torch.square,
    "inverse_sqrt": torch.rsqrt,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "gelu_fast": _fast_gelu,
    "gelu_quick": _quick_gelu,
    "silu": F.silu,
    "relu": F.relu,
    "tanh": torch.tanh,
}
