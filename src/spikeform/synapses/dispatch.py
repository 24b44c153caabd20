"""Which executor runs a product, and why."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from torch.compiler import is_compiling

EXECUTORS = ("temporal", "collapsed", "event")
_forced: ContextVar[str | None] = ContextVar("spikeform_executor", default=None)


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


def explain(kind: str) -> tuple[str, str]:
    """The executor that a product would take now, and the reason.

    Args:
        kind: ``linear``, ``matmul`` or ``hadamard``.

    Returns:
        Name and reason.
    """
    forced = None if is_compiling() else _forced.get()
    if forced is not None:
        return forced, "chosen by spikeform.executor"
    return "collapsed", (
        f"the default for every {kind}: in plain PyTorch the event executor gathers the weights that it visits, and "
        "that was mostly slower on a CPU, at best 8% faster (benchmarks/results/executors-cpu.json)"
    )
