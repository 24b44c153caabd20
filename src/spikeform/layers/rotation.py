"""An orthogonal matrix that spreads every channel over all: what is large in one is then a little larger in each.

    M = diag(signs) (Hadamard(2^k) / 2^(k/2) (x) DCT(m)),   E = 2^k m,  m odd

The same M on queries and keys leaves their products as they are. Hadamard: Sylvester's construction; DCT: the
orthonormal discrete cosine transform of type II, which serves the odd factor of a size (E = 24: 8 x 3).
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from spikeform.neurons.hadamard import block, sylvester


@lru_cache(maxsize=32)
def mixing(size: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """The orthogonal matrix ``[size, size]`` of a size, before its signs. Shared: not to be written to."""
    even = block(size)
    odd = size // even
    place = torch.arange(odd, dtype=torch.float64)
    cosines = torch.cos(math.pi / odd * (place + 0.5) * place[:, None]) * math.sqrt(2 / odd)
    cosines[0] /= math.sqrt(2)
    return torch.kron(sylvester(even).double() / math.sqrt(even), cosines).to(device, dtype)


def head_matrix(signs: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """``M`` ``[E, E]`` of signs ``[E]``, each 1 or -1; orthogonal."""
    return signs.to(dtype)[:, None] * mixing(len(signs), signs.device, dtype)


def rotate_heads(x: Tensor, signs: Tensor) -> Tensor:
    """``x M`` for ``x`` ``[..., E]``, in fp32 (fp64 stays fp64)."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return (x.to(dtype) * signs.to(dtype)) @ mixing(len(signs), x.device, dtype)
