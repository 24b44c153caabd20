"""The compiled library for the CPU, where there is one."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import torch  # noqa: F401  # before the library, so that one OpenMP runtime, PyTorch's, serves both

PLACE = Path(__file__).parent / "_spikeform.so"
SOURCES = Path(__file__).parent / "csrc"
BUILD = "python -m spikeform.native.build"
KINDS = {"p": ctypes.c_void_p, "i": ctypes.c_int64, "f": ctypes.c_float}


@lru_cache(maxsize=1)
def _load() -> tuple[ctypes.CDLL | None, str]:
    if not PLACE.exists():
        return None, f"it is not built: run `{BUILD}` where there is a C++ compiler"
    try:
        found = ctypes.CDLL(str(PLACE))
    except OSError as error:
        return None, f"{PLACE} does not load (`{BUILD}` builds it anew): {error}"
    # Of other sources its functions may take other arguments.
    from spikeform.native.build import digest  # here: `-m` must find it unimported

    if SOURCES.is_dir() and _sources_of(found) != digest(SOURCES):
        return None, f"{PLACE} was built from other sources than those beside it: run `{BUILD}`"
    return found, "built at installation"


def _sources_of(found: ctypes.CDLL) -> str:
    tell = getattr(found, "spikeform_sources", None)
    if tell is None:
        return ""
    tell.argtypes, tell.restype = [], ctypes.c_char_p
    return tell().decode()


def library() -> ctypes.CDLL | None:
    """The library, or None: then PyTorch's own operations run."""
    return _load()[0]


def why() -> str:
    """Why there is a library, or none."""
    return _load()[1]


@cache
def function(name: str, arguments: str, result: str = "") -> Callable[..., Any] | None:
    """A function of the library, or None where there is no library; kept, so that a call costs microseconds.

    Args:
        name: Its C name without the prefix ``spikeform_``.
        arguments: A letter each: ``p`` a pointer (``tensor.data_ptr()``, or None), ``i`` int64_t, ``f`` float.
        result: A letter, or nothing for void.
    """
    found = library()
    if found is None:
        return None
    call = getattr(found, f"spikeform_{name}")
    call.argtypes = [KINDS[kind] for kind in arguments]
    call.restype = KINDS[result] if result else None
    return call


def level(wanted: int = -1) -> int:
    """The instruction set that the library uses: 0 portable, 1 AVX2, 2 AVX-512 with VNNI; -1 without the library.

    Args:
        wanted: Set it, as far as the machine has it (tests do); -1: leave it.
    """
    call = function("level", "i", "i")
    return -1 if call is None else call(wanted)
