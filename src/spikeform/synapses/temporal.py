"""The temporal executor: one step at a time, literal spikes. It is the definition; the others must agree."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from spikeform.spikes import SpikeTrain
from spikeform.synapses.collapsed import by_branch, scale
from spikeform.synapses.integer import IntegerWeight
from spikeform.synapses.parts import integer_sums
from spikeform.synapses.sums import exact_sums

Sent = tuple[Tensor, ...]


def linear(train: SpikeTrain, weight: Tensor) -> tuple[Tensor, Sent]:
    """``sum_t s(t) W^T``, spike by spike step; integer weights accumulate integers per sub-neuron."""
    spikes = train.unroll()
    sent = (train.coding.sent(spikes),)
    if weight.is_floating_point():
        wide = weight.to(train.quantum.dtype)
        parts = [F.linear(step, wide) for step in train.step_values()]
        return torch.stack(parts).sum(0) if len(parts) > 1 else parts[0], sent
    wide = weight.double()
    sums = None
    for step, w in zip(spikes, train.coding.weights(), strict=True):
        parts = [F.linear(part, wide) for part in by_branch(step.double() * w, train)]
        sums = parts if sums is None else [s + p for s, p in zip(sums, parts, strict=True)]
    assert sums is not None  # a window has at least one step
    return scale(sums, train), sent


def _telescope(a: SpikeTrain, b: SpikeTrain, product: Callable[[Tensor, Tensor], Tensor]) -> tuple[Tensor, Sent]:
    """``sum_t A(t) S_B(t) + S_A(t-1) B(t)``; the shorter window is silent in its last steps."""
    sent = a.coding.sent(a.unroll()), b.coding.sent(b.unroll())
    return _telescoped(a.step_values(), b.step_values(), product), sent


def _telescoped(steps_a: Tensor, steps_b: Tensor, product: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    sum_a, sum_b = torch.zeros_like(steps_a[0]), torch.zeros_like(steps_b[0])
    out = product(sum_a, sum_b)
    for t in range(max(len(steps_a), len(steps_b))):
        if t < len(steps_b):
            out = out + product(sum_a, steps_b[t])
            sum_b = sum_b + steps_b[t]
        if t < len(steps_a):
            out = out + product(steps_a[t], sum_b)
            sum_a = sum_a + steps_a[t]
    return out


def matmul(a: SpikeTrain, b: SpikeTrain, transpose_b: bool) -> tuple[Tensor, Sent]:
    """The spike-equivalent dot product, step by step."""
    return _telescope(a, b, lambda x, y: x @ (y.transpose(-1, -2) if transpose_b else y))


def hadamard(a: SpikeTrain, b: SpikeTrain) -> tuple[Tensor, Sent]:
    """The spike-equivalent elementwise product, step by step."""
    return _telescope(a, b, lambda x, y: x * y)


def integer_linear(train: SpikeTrain, weight: IntegerWeight) -> tuple[list[list[Tensor]], Sent]:
    """Integers accumulate step by step, in each group of channels; the zero's bias current flows in the first."""
    sums = None
    for step in train.steps():
        parts = [[s.double() for s in tiers] for tiers in integer_sums(train, step, weight, exact_sums)]
        if sums is not None:
            parts = [[s + p for s, p in zip(*pair, strict=True)] for pair in zip(sums, parts, strict=True)]
        sums = parts
    assert sums is not None  # a window has at least one step
    return sums, (train.coding.sent(train.unroll()),)


def integer_matmul(a: SpikeTrain, b: SpikeTrain, transpose_b: bool) -> tuple[Tensor, Sent]:
    """The spike-equivalent dot product, step by step, in integers."""
    steps_a, steps_b = (x.common_integers(x.steps()).double() for x in (a, b))
    out = _telescoped(steps_a, steps_b, lambda x, y: x @ (y.transpose(-1, -2) if transpose_b else y))
    return out, (a.coding.sent(a.unroll()), b.coding.sent(b.unroll()))


def weight_sums(x: Tensor, weight: IntegerWeight) -> tuple[list[Tensor], Sent]:
    """Real input, spiking weights: ``y += x s(t)^T``, one step of the weight's spikes at a time."""
    train, sums = weight.train(), []
    for r, columns in enumerate(weight.columns):
        inner = x if columns is None else x[..., columns]
        steps = [F.linear(inner, spikes.to(x.dtype)) for spikes in train.coding.unroll(weight.part(r))]
        sums.append(torch.stack(steps).sum(0))
    return sums, (train.coding.sent(train.unroll()),)
