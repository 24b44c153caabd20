"""Seeing what flows: synapses and neurons tell an active observer what they did.

Counting, rasters and tests listen here; with no observer a call costs one look-up. It lies on the ground floor
because neurons report too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

from torch import Tensor
from torch.compiler import is_compiling

from spikeform.spikes import SpikeTrain


@dataclass(frozen=True)
class Product:
    """One synaptic product that ran.

    Args:
        site: Where: the module's qualified name, plus ``.scores``, ``.context`` … for products without a weight.
        kind: ``linear`` (train x weight), ``weights`` (real input x spiking weight), ``matmul`` (train x train),
            ``hadamard`` (elementwise, two trains), or attention of spikes without softmax, both products in one:
            ``attention`` (every query meets the keys that it sees) or ``recurrence`` (it reads their running sum).
        operands: The spike trains, one for ``linear`` and ``weights`` (the weight's own, ``[N, K]``), three for
            ``attention`` and ``recurrence`` (``[T, B, heads, L, E]``: queries, keys, values, of one step a row), two
            otherwise (in the order of the product).
        fan_out: For each operand, how many accumulations one spike of it causes: output features of a
            ``linear``; rows of the input of ``weights``; columns of B for A, and rows of A for B, of a ``matmul``; 1
            for ``hadamard``; at most L of ``attention`` and E of ``recurrence``.
        macs: Multiply-accumulates of the same product in a dense network (of a ``recurrence`` with its cache of keys).
        sent: Spikes that the executor really sent, per operand: 0-d tensors, only from the temporal executor.
        mask: For ``matmul``, bool ``[..., M, N]``: which outputs are wanted (a causal mask), or None for all.
        connected: For ``matmul``, bool ``[..., M, K]``: where A has neurons at all (the causal mask on attention
            probabilities), or None for everywhere. A spike of B in row k reaches the rows m where this holds.
        transposed: For ``matmul``, whether B is given as ``[..., N, K]``.
    """

    site: str
    kind: str
    operands: tuple[SpikeTrain, ...]
    fan_out: tuple[int, ...]
    macs: int
    sent: tuple[Tensor, ...] | None = None
    mask: Tensor | None = None
    transposed: bool = False
    connected: Tensor | None = None


@dataclass(frozen=True)
class Firing:
    """One neuron population that fired.

    Args:
        site: The neuron's qualified name.
        function: What it computes: ``identity`` (OAT, MT), ``exp``, ``reciprocal``, ``square``, ``gelu`` …
        train: What it sent.
        x: Its input (the summed membrane potential).
        saturated: Elements whose magnitude was above the largest threshold: a 0-d tensor.
    """

    site: str
    function: str
    train: SpikeTrain
    x: Tensor
    saturated: Tensor


Observer = Callable[["Product | Firing"], None]
_observer: ContextVar[Observer | None] = ContextVar("spikeform_observer", default=None)


@contextmanager
def observe(observer: Observer) -> Iterator[None]:
    """Tell ``observer`` of every product and firing in the block. Not nested: the innermost one listens."""
    token = _observer.set(observer)
    try:
        yield
    finally:
        _observer.reset(token)


def observer() -> Observer | None:
    """The active observer, or None."""
    return None if is_compiling() else _observer.get()  # what is compiled is not watched
