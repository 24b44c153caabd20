"""Clocks, memory and bytes, as :mod:`spikeform.report.bench` needs them."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LogitsProcessor


class Clock(LogitsProcessor):
    """Points in time, by the device's own clock; as a logits processor, one for every token that is written."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._points: list[Any] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Mark the time; scores stay as they are."""
        self.mark()
        return scores

    def mark(self) -> None:
        """One more point, after all that was asked of the device so far."""
        if self._device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._points.append(event)
        else:
            self._points.append(time.perf_counter())

    def gaps(self) -> list[float]:
        """Seconds between neighbours."""
        pairs = itertools.pairwise(self._points)
        if self._device.type != "cuda":
            return [b - a for a, b in pairs]
        torch.cuda.synchronize(self._device)
        return [a.elapsed_time(b) / 1e3 for a, b in pairs]


@contextmanager
def memory(device: torch.device, found: list[int]) -> Iterator[None]:
    """Append the most bytes that the block needed beside what was held before; nothing where it is not known."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield
        found.append(torch.cuda.max_memory_allocated(device) - before)
        return
    before = _resident("VmRSS") if _forget_peak() else None
    yield
    after = _resident("VmHWM")
    if before is not None and after is not None:
        found.append(max(after - before, 0))


def _forget_peak() -> bool:
    """Let Linux count the peak of this process's memory anew; whether it does."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _resident(name: str) -> int | None:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:")), None)


def held_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers, shared ones once."""
    tensors = {id(x): x for x in itertools.chain(model.parameters(), model.buffers()) if x.device.type != "meta"}
    return sum(x.numel() * x.element_size() for x in tensors.values())


def spread(values: list[float]) -> float:
    """Distance of the quartiles."""
    if len(values) < 2:
        return 0.0
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return high - low
