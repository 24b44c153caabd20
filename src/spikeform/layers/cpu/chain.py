"""Steps of one decoded row by one call of the library: kernels of :mod:`spikeform.layers.fused`."""

from __future__ import annotations

import json
from array import array
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from spikeform.native.library import function


class Program(NamedTuple):
    """What :mod:`spikeform.layers.chained` writes of a chain: its steps, and what is left when they are done."""

    dtype: torch.dtype
    sizes: list[int]
    room: int
    count: int
    steps: array


@lru_cache(maxsize=64)
def _read(program: str) -> Program:
    found = json.loads(program)
    dtype, steps = getattr(torch, found["dtype"]), array("q", found["steps"])
    return Program(dtype, found["sizes"], found["room"], found["count"], steps)


def left_by(program: str) -> tuple[torch.dtype, list[int]]:
    """The dtype and the numbers of elements of what a chain leaves."""
    found = _read(program)
    return found.dtype, found.sizes


def chain(given: Sequence[Tensor], caches: Sequence[Tensor], program: str) -> Tensor:
    """Take all steps; ``[n]``, what they leave, one behind the other.

    Raises:
        IndexError: A cache is full. Nothing was done.
    """
    dtype, sizes, room, count, steps = _read(program)
    run = function("chain", "piiipi", "i")
    assert run is not None  # without the library nothing is chained
    out = torch.empty(sum(sizes), dtype=dtype)
    places = array("q", [x.data_ptr() for x in given])
    places.extend([x.data_ptr() for x in caches])
    at = out.data_ptr()
    for size in sizes:
        places.append(at)
        at += size * dtype.itemsize
    address, length = steps.buffer_info()
    full = run(address, length, count, room, places.buffer_info()[0], torch.get_num_threads())
    if full:
        raise IndexError(f"a token does not fit into a cache of {full} places: make it with a larger max_cache_len")
    return out


def advance(counters: Sequence[Tensor], by: int) -> None:
    """Add to integers ``[]``, each a tensor of its own, in their places."""
    run = function("advance", "pii")
    assert run is not None
    places = array("q", [x.data_ptr() for x in counters])  # which lives as long as the call
    run(places.buffer_info()[0], len(counters), by)
