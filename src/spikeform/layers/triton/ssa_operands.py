"""Spiking self-attention on a GPU: what both of its kernels are given, and their neurons.

A product that a spike hangs on is not to be fused into a sum: launches say so.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from spikeform.neurons.triton.codes import rounded
from spikeform.neurons.triton.lif import after, step

LEAST = 16  # of each size of a product of tensor cores
PLANE = tl.constexpr(2048.0)  # integers up to here are fp16


class Given(NamedTuple):
    """What :mod:`spikeform.layers.fused` says of the operator, as kernels take it.

    Args:
        q: ``[B, H, L, E]``, the last axis dense.
        k: ``[B, G, L, E]``, likewise.
        v: Likewise.
        seen: uint8 ``[B, L]``, or None.
        state: ``[T, B, G, E, E]`` of heads that see all tokens, or None: no cache.
        recent: ``[2, T, B, G, W, E]`` of the others, or None: no cache, or there are none.
        number: ``[B + 1]``, or None.
        gains: Of queries, keys, values and the output.
        windows: Of each key/value head, those without one (0) last.
        rule: tau, the threshold, and that of the output.
        steps: T.
        neuron: Whether neurons leak, are reset to zero, and fire -1 too.
        normalise: Whether counts are divided by the keys that a query sees.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    seen: Tensor | None
    state: Tensor | None
    recent: Tensor | None
    number: Tensor | None
    gains: tuple[Tensor, Tensor, Tensor, Tensor]
    windows: tuple[int, ...]
    rule: tuple[float, float, float]
    steps: int
    neuron: tuple[bool, bool, bool]
    normalise: bool

    @property
    def share(self) -> int:
        """Query heads of a key/value head."""
        return self.q.shape[1] // self.k.shape[1]

    @property
    def local(self) -> int:
        """Key/value heads that have a window."""
        return sum(window > 0 for window in self.windows)

    @property
    def width(self) -> int:
        """Earlier tokens in the largest window: W."""
        return max(*self.windows, 1) - 1

    @property
    def how(self) -> dict[str, Any]:
        """Constants of kernels that have neurons."""
        return {
            "STEPS": self.steps,
            "NEURON": self.neuron,
            "NORMALISE": self.normalise,
            "LOCAL": self.local,
            "enable_fp_fusion": False,
        }


@triton.jit
def currents(x, gain, live):
    """``g I`` of the inputs at ``x``, whose gains are at ``gain``; fp32."""
    return tl.load(x, live, other=0.0).to(tl.float32) * tl.load(gain).to(tl.float32)


@triton.jit
def fire(v, current, tau, threshold, NEURON: tl.constexpr):
    """The membrane after a step, and what is sent. NEURON: whether it leaks, is reset to zero, fires -1 too."""
    u, s = step(v, current, tau, threshold, NEURON[0], NEURON[2])
    return after(u, s, threshold, NEURON[1]), s


@triton.jit
def sent(v, counts, divisor, gain, tau, threshold, NEURON: tl.constexpr, NORMALISE: tl.constexpr):
    """:func:`fire` of the output neurons, whose current is what a query gathers, divided by the keys that it sees."""
    if NORMALISE:
        counts = tl.div_rn(counts, counts * 0.0 + divisor)
    return fire(v, counts * gain, tau, threshold, NEURON)


@triton.jit
def mean(out, at, total, live, STEPS: tl.constexpr):
    """Store the mean over the steps."""
    tl.store(out + at, rounded(tl.div_rn(total, total * 0.0 + STEPS), out.dtype.element_ty), live)
