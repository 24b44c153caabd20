"""An orthogonal transform of channels that costs little: each becomes a sum of many, with signs.

    y = x H / sqrt(b),   H the Hadamard matrix of size b, the largest power of two that divides the channels

Channels that are seldom large, but then very large, become nearly normal, which few integers tell much better. A
matrix whose rows are turned likewise undoes it: ``turned(W) turned(x) = W x``. Sylvester's matrix is a Kronecker
product, so two small ones do: ``b (p + q)`` additions with ``b = p q`` (``b log2 b`` by butterflies), none of them a
multiplication.
"""

from __future__ import annotations

import torch
from torch import Tensor

Factors = tuple[Tensor, Tensor]


def block(channels: int) -> int:
    """``b``: the largest power of two that divides the channels."""
    return channels & -channels


def factors(channels: int, device: torch.device) -> Factors:
    """The two Hadamard matrices of 1 and -1, ``[p, p]`` and ``[q, q]``, fp32, for so many channels."""
    size = block(channels)
    left = 1 << (size.bit_length() // 2)
    with torch.inference_mode(False), torch.no_grad():  # they may meet a gradient later
        return sylvester(left, device), sylvester(size // left, device)


def turned(x: Tensor, matrices: Factors) -> Tensor:
    """``x`` ``[..., K]`` in the turned basis, in fp32 (fp64 stays fp64), whatever autocast wants."""
    left, right = matrices
    p, q = len(left), len(right)
    x = x if x.dtype == torch.float64 else x.float()
    with torch.autocast(x.device.type, enabled=False):
        y = x.reshape(*x.shape[:-1], x.shape[-1] // (p * q), p, q) @ right.to(x.dtype)
        # The two factors change places, which moves channels alike in inputs and in weights.
        y = y.transpose(-1, -2) @ left.to(x.dtype)
    return y.reshape(x.shape) * (p * q) ** -0.5


def sylvester(size: int, device: torch.device | None = None) -> Tensor:
    """The Hadamard matrix of a power of two, of 1 and -1, fp32 ``[size, size]``."""
    matrix = torch.ones(1, 1, device=device)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix
