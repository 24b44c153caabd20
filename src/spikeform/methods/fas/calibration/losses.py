"""What calibration minimises: the distance of the spiking network from its own QCFS network.

    E = a sum_n E_n + k tau^2 KL(softmax(z_QCFS / tau) || softmax(z / tau));   E_n = MSE(mean_t y_n(t), QCFS_n)

with logits z, each a mean over the tokens that are no padding. Ours: each E_n may be divided by the mean square of
QCFS_n, so that no layer outweighs the others by its scale alone. Source: arXiv 2502.04405 (the two terms).

B sequences, L positions, C channels, T steps, V classes or tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spikeform.layers.streaming import average, paused
from spikeform.methods.fas.calibration.data import Batch
from spikeform.methods.fas.calibration.options import CalibrateOptions
from spikeform.neurons import StreamingNeuron
from spikeform.neurons.streaming import by_row
from spikeform.spikes import SpikeTrain

_SILENT = 1e-3  # of the threshold: a neuron whose outputs are smaller is measured as if they were this


class Lesson(NamedTuple):
    """What the QCFS network makes of a batch: its logits, and each neuron's train."""

    logits: Tensor
    trains: dict[StreamingNeuron, SpikeTrain]


class Errors(NamedTuple):
    """Sum over neurons of their errors, and KL per token (at the options' temperature, times its square)."""

    alignment: Tensor
    kl: Tensor

    def total(self, options: CalibrateOptions) -> Tensor:
        """E."""
        return options.alignment * self.alignment + options.kl * self.kl


@contextmanager
def listening(
    neurons: Iterable[StreamingNeuron], heard: Callable[[StreamingNeuron, SpikeTrain], None]
) -> Iterator[None]:
    """Show ``heard`` what each neuron sends, inside the block."""
    handles = [n.register_forward_hook(lambda neuron, _, train: heard(neuron, train)) for n in neurons]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def inputs_of(batch: Batch) -> Batch:
    """What of a batch the model is called with."""
    return {name: tensor for name, tensor in batch.items() if name != "labels"}


@torch.no_grad()
def teach(model: nn.Module, neurons: list[StreamingNeuron], batch: Batch, extra: dict[str, Any]) -> Lesson:
    """Run the QCFS network: the same weights, without time."""
    trains: dict[StreamingNeuron, SpikeTrain] = {}
    with paused(model), listening(neurons, trains.__setitem__):
        logits = model(**inputs_of(batch), **extra).logits
    return Lesson(logits, trains)


@contextmanager
def following(
    model: nn.Module,
    neurons: list[StreamingNeuron],
    batch: Batch,
    lesson: Lesson,
    options: CalibrateOptions,
    extra: dict[str, Any],
) -> Iterator[tuple[Tensor, Errors]]:
    """Run the spiking network: its logits, and how far it is from the QCFS network.

    A backward pass that computes blocks again belongs inside the block, where the neurons are still listened to.
    """
    mask, rows = batch.get("attention_mask"), len(batch["input_ids"])
    found: dict[StreamingNeuron, Tensor] = {}

    def heard(neuron: StreamingNeuron, train: SpikeTrain) -> None:
        steps = neuron.clock.steps
        y_BLC = average(by_row(train.decode(), rows * steps), steps)
        found[neuron] = _mismatch(y_BLC, by_row(lesson.trains[neuron].decode(), rows), mask, neuron, options.normalise)

    with listening(neurons, heard):
        logits = model(**inputs_of(batch), **extra).logits
        kl = mean_over(divergence(lesson.logits, logits, options.temperature), mask) * options.temperature**2
        yield logits, Errors(torch.stack(list(found.values())).sum(), kl)


def _mismatch(
    y_BLC: Tensor, wanted_BLC: Tensor, mask: Tensor | None, neuron: StreamingNeuron, normalise: bool
) -> Tensor:
    error = mean_over((y_BLC - wanted_BLC).square().mean(-1), mask)
    if not normalise:
        return error
    power = mean_over(wanted_BLC.square().mean(-1), mask)
    return error / torch.maximum(power, (_SILENT * neuron.threshold.detach().mean()).square())


def divergence(wanted: Tensor, found: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(wanted || found) of logits ``[..., V]``, in nats: fp32 ``[...]``."""
    log_p, log_q = ((logits.float() / temperature).log_softmax(-1) for logits in (wanted, found))
    return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)


def mean_over(each: Tensor, mask: Tensor | None) -> Tensor:
    """Mean of ``[B, L]`` over what ``mask`` ``[B, L]`` lets through, of ``[B]`` over all."""
    if mask is None or each.ndim < 2:
        return each.mean()
    weight = mask.to(each.dtype)
    return (each * weight).sum() / weight.sum()
