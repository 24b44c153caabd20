"""Which executor runs a product, and why."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from spikeform.spikes import SpikeTrain

EXECUTORS = ("temporal", "collapsed", "event")
_forced: ContextVar[str | None] = ContextVar("spikeform_executor", default=None)

# The event executor in plain PyTorch gathers the weight columns that it visits. Measured on two CPU cores
# (benchmarks/executors.py): the gather costs more than the dense product saves until this share is zero.
EVENT_MIN_ZEROS = 0.9
EVENT_MAX_ROWS = 4


@contextmanager
def executor(name: str) -> Iterator[None]:
    """Run every product in the block with one executor.

    Args:
        name: ``temporal`` (one step at a time, literal spikes: the definition), ``collapsed`` (time summed
            first, then one product) or ``event`` (time summed first, then only what is not zero).

    Raises:
        ValueError: Unknown name.
    """
    if name not in EXECUTORS:
        raise ValueError(f"no executor named {name!r}; choose one of {', '.join(EXECUTORS)}")
    token = _forced.set(name)
    try:
        yield
    finally:
        _forced.reset(token)


def explain(kind: str, train: SpikeTrain) -> tuple[str, str]:
    """The executor that a product would take now, and the reason.

    Args:
        kind: ``linear``, ``matmul`` or ``hadamard``.
        train: Its first operand, ``[..., K]``.

    Returns:
        Name and reason.
    """
    forced = _forced.get()
    if forced is not None:
        return forced, "chosen by spikeform.executor"
    if kind != "linear":
        return "collapsed", f"a {kind} has no weight rows to skip"
    rows = train.codes.numel() // max(train.codes.shape[-1], 1)
    if rows > EVENT_MAX_ROWS:
        return "collapsed", f"{rows} rows: the zeros of more than {EVENT_MAX_ROWS} rows hardly coincide"
    zeros = 1 - int(train.codes.count_nonzero()) / max(train.codes.numel(), 1)
    if zeros < EVENT_MIN_ZEROS:
        return "collapsed", f"{zeros:.0%} of the integers are zero, below {EVENT_MIN_ZEROS:.0%}"
    return "event", f"{zeros:.0%} of the integers are zero at {rows} rows"
