"""Which executor runs a product, and why."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from importlib.util import find_spec

import torch
from torch import Tensor
from torch.compiler import assume_constant_result, is_compiling

from spikeform.native import library, why
from spikeform.neurons.neuron import recorder
from spikeform.spikes.trace import observer

EXECUTORS = ("temporal", "collapsed", "event")
FUSED = (torch.float32, torch.bfloat16)  # what kernels take
_forced: ContextVar[str | None] = ContextVar("spikeform_executor", default=None)


@contextmanager
def executor(name: str) -> Iterator[None]:
    """Run every product in the block with one executor.

    Args:
        name: ``temporal`` (one step at a time, literal spikes: the definition), ``collapsed`` (time summed
            first, then one product) or ``event`` (time summed first, then only what is not zero). Each as trains and
            products, one after the other: fused kernels (:func:`fusible`) run where none is named.

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


def forced() -> str | None:
    """The executor that :func:`executor` asks for, or None. A compiled pass is not asked."""
    return None if is_compiling() else _forced.get()


def explain(kind: str) -> tuple[str, str]:
    """The executor that a product of a train takes now, and the reason.

    Args:
        kind: ``linear``, ``matmul`` or ``hadamard``.

    Returns:
        Name and reason.
    """
    name = forced()
    if name is not None:
        return name, "chosen by spikeform.executor"
    return "collapsed", (
        f"the default for every {kind}: integers are seldom zero often enough; spikeform.tune measures where they are"
    )


def fusible(x: Tensor, *parameters: Tensor | None) -> bool:
    """Whether a neuron and what follows it may run as one operator: the same meaning, no train in between.

    So it is where there is a kernel for the device, the input is fp32 or bf16, no executor is asked for by name, nobody
    calibrates or observes, and no gradient is wanted.

    Args:
        x: The neuron's input.
        parameters: What else a gradient might be wanted for.
    """
    # Asked several times a layer for each token: the cheapest questions come first, and each is asked once.
    if torch.is_grad_enabled() and (x.requires_grad or any(t is not None and t.requires_grad for t in parameters)):
        return False
    if forced() is not None or recorder() is not None or observer() is not None:
        return False
    return x.dtype in FUSED and kernels("cpu" if x.is_cpu else x.device.type)[0]


@assume_constant_result
def kernels(device: str) -> tuple[bool, str]:
    """Whether there are fused kernels for a type of device, and why.

    Args:
        device: ``cpu``, ``cuda`` …
    """
    if device == "cpu":
        return library() is not None, f"the compiled library: {why()}"
    if device == "cuda":
        return find_spec("triton") is not None, "Triton kernels, where Triton is installed"
    return False, f"no kernels for {device}"
