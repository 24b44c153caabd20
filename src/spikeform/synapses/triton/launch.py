"""Small things that every launch of a kernel wants."""

from __future__ import annotations

from typing import Any

# Kernels of one stream may begin before the one before them has ended (programmatic dependent launch): they fetch
# weights meanwhile, and wait before they read or write anything else.
overlapped = False


def cdiv(total: int, part: int) -> int:
    """How many parts cover the total."""
    return -(-total // part)


def meta(**given: Any) -> dict[str, Any]:
    """What a kernel is compiled for, and how: constants that its signature knows as ``constexpr``."""
    return given | {"OVERLAP": overlapped, "launch_pdl": overlapped}


def next_power(n: int) -> int:
    """The least power of two that is not less than ``n``, for ``n`` of at least 1."""
    return 1 << (n - 1).bit_length()
