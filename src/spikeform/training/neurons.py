"""The spiking parts of a model, as training sees them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from spikeform.layers.streaming import neurons_of, paused


def thresholds(model: nn.Module) -> list[nn.Parameter]:
    """Their thresholds, each once."""
    return list({id(neuron.threshold): neuron.threshold for neuron in neurons_of(model)}.values())


@contextmanager
def trained_as_qcfs(model: nn.Module) -> Iterator[None]:
    """One dense pass, every weight and threshold trained, inside the block; all as it was afterwards.

    What calibration fits (scale and initial potential) has no part in that pass, so it gets no gradient.
    """
    wanted = {parameter: parameter.requires_grad for parameter in model.parameters()}
    fixed = {id(parameter) for neuron in neurons_of(model) for parameter in (neuron.scale, neuron.initial)}
    training = model.training
    try:
        for parameter in wanted:
            parameter.requires_grad_(id(parameter) not in fixed)
        with paused(model):
            yield
    finally:
        for parameter, needs in wanted.items():
            parameter.requires_grad_(needs)
        model.zero_grad(set_to_none=True)
        model.train(training)
