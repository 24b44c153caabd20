"""The functions that hierarchically gated neurons compute, by name, in one table."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def _quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "exp": torch.exp,
    "reciprocal": torch.reciprocal,
    "square": torch.square,
    "inverse_sqrt": torch.rsqrt,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "gelu_quick": _quick_gelu,
    "silu": F.silu,
    "relu": F.relu,
    "tanh": torch.tanh,
}
