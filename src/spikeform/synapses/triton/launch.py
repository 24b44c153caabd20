"""Small things that every launch of a kernel wants."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

# Kernels of one stream may begin before the one before them has ended (programmatic dependent launch): they fetch
# weights meanwhile, and wait before they read or write anything else.
overlapped = True


def cdiv(total: int, part: int) -> int:
    """How many parts cover the total."""
    return -(-total // part)


def meta(**given: Any) -> dict[str, Any]:
    """What a kernel is compiled for, and how: constants that its signature knows as ``constexpr``."""
    return given | {"OVERLAP": overlapped, "launch_pdl": overlapped}


def next_power(n: int) -> int:
    """The least power of two that is not less than ``n``, for ``n`` of at least 1."""
    return 1 << (n - 1).bit_length()


class Strip(NamedTuple):
    """How a product of one row is cut.

    Attributes:
        n: Output features of a program.
        k: Elements (of packed or int8 weights: words of four bytes) of a step.
        warps: Warps of a program.
        stages: Steps in flight.
        ahead: Bytes of each row of a weight that a program asks for before it waits for its input, besides tiles that
            are then on their way; 0: none.
    """

    n: int
    k: int
    warps: int
    stages: int
    ahead: int = 0


def ahead(cut: Strip, weight: Tensor) -> int:
    """How many bytes of each row are asked for: none where its alignment forbids it."""
    aligned = weight.shape[-1] * weight.element_size() % 256 == 0 and weight.data_ptr() % 16 == 0
    return cut.ahead if aligned else 0
