"""Timing: cases that take turns, so that what disturbs a machine disturbs all of them; and the parts of a model."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


def spread(values: list[float]) -> float:
    """Distance of the quartiles."""
    low, _, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else (0.0, 0.0, 0.0)
    return high - low


def taking_turns(cases: dict[str, Callable[[], float]], rounds: int) -> dict[str, dict[str, float]]:
    """Milliseconds of each case: median, spread and least of the rounds, after one that is not counted."""
    found: dict[str, list[float]] = {name: [] for name in cases}
    for done in range(rounds + 1):
        for name, run in cases.items():
            seconds = run()
            if done:
                found[name].append(1e3 * seconds)
    return {name: {"ms": statistics.median(v), "spread_ms": spread(v), "least_ms": min(v)} for name, v in found.items()}


@contextmanager
def seconds_inside(model: nn.Module, part_of: Callable[[str], str | None]) -> Iterator[dict[str, float]]:
    """Seconds inside the modules of each part, by the host's clock; a module inside another counts in both.

    Args:
        model: What runs meanwhile.
        part_of: The part of a module by its qualified name, or None.
    """
    spent: dict[str, float] = defaultdict(float)
    began: list[float] = []
    handles = []
    for name, module in model.named_modules():
        part = part_of(name)
        if part is None:
            continue

        def after(*_: Any, part: str = part) -> None:
            spent[part] += time.perf_counter() - began.pop()

        handles.append(module.register_forward_pre_hook(lambda *_: began.append(time.perf_counter())))
        handles.append(module.register_forward_hook(after))
    try:
        yield spent
    finally:
        for handle in handles:
            handle.remove()
