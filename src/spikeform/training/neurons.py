"""The spiking parts of a model, as training sees them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatch

from torch import nn

from spikeform.layers import SpikingLinear
from spikeform.layers.self_attention import SpikingSelfAttention
from spikeform.layers.streaming import neurons_of, paused
from spikeform.neurons import SignedInteger, StreamingNeuron
from spikeform.neurons.lif import LIF
from spikeform.neurons.signed_integer import Compensation
from spikeform.training.compensation import compensated
from spikeform.training.errors import TrainingError
from spikeform.training.options import TrainOptions


def learning_neurons(model: nn.Module) -> list[StreamingNeuron | SignedInteger | LIF]:
    """The neurons that gradients pass, each once."""
    return [module for module in model.modules() if isinstance(module, StreamingNeuron | SignedInteger | LIF)]


def thresholds(model: nn.Module) -> list[nn.Parameter]:
    """Their thresholds, or gains, which are the same in other words: those that learn, each once."""
    found = [
        neuron.gain if isinstance(neuron, LIF) else neuron.threshold
        for neuron in learning_neurons(model)
        if getattr(neuron, "learns", True)
    ]
    return list({id(parameter): parameter for parameter in found}.values())


def norm_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Gains and offsets of all norms, those with a gate too."""
    norms = [module for module in model.modules() if "norm" in type(module).__name__.lower()]
    return [parameter for norm in norms for parameter in norm._parameters.values() if parameter is not None]


@contextmanager
def trainable(model: nn.Module, options: TrainOptions) -> Iterator[Compensation | None]:
    """Weights and thresholds learn inside the block, but for those that ``options.freeze`` names.

    A streaming model is one dense pass there, its network of QCFS activations; what calibration fits (scale and initial
    potential) has no part in that pass, so it gets no gradient. Thresholds of channels are taken out of the weights.
    All is as it was afterwards, but for what was learned, and for fp32.

    Yields:
        The continuous path beside the spikes, or None.

    Raises:
        TrainingError: A pattern of ``options.freeze`` names no parameter.
    """
    wanted = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    folded = [layer for layer in model.modules() if isinstance(layer, SpikingLinear) and _folded(layer)]
    training = model.training
    nn.Module.float(model)  # transformers forbids it to models that it takes for quantised
    try:
        for layer in model.modules():
            if isinstance(layer, SpikingLinear):
                layer.event_rows = None  # a copy of weights that now change
        for layer in folded:
            layer.unfold()
        with compensated(model, options) as path, paused(model):
            fixed = {id(p) for neuron in neurons_of(model) for p in (neuron.scale, neuron.initial)}
            fixed |= {id(n.threshold) for n in model.modules() if isinstance(n, SignedInteger) and not n.learns}
            fixed |= _frozen(model, options.freeze)
            for parameter in model.parameters():
                parameter.requires_grad_(id(parameter) not in fixed)
            yield path
    finally:
        for layer in folded:
            layer.fold()
        attend(model, 1.0)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(wanted[name])
        model.zero_grad(set_to_none=True)
        model.train(training)


def attend(model: nn.Module, share: float) -> None:
    """Let the first ``share`` of the layers of spiking attention spike; the others attend as the dense model does."""
    layers = [module for module in model.modules() if isinstance(module, SpikingSelfAttention)]
    for i, layer in enumerate(layers):
        layer.paused = i >= max(1, round(share * len(layers)))


def _folded(layer: SpikingLinear) -> bool:
    return isinstance(layer.neuron, SignedInteger) and layer.neuron.folded


def _frozen(model: nn.Module, patterns: tuple[str, ...]) -> set[int]:
    """Ids of the parameters that patterns name; a tied one has several names."""
    named = list(model.named_parameters(remove_duplicate=False))
    for pattern in patterns:
        if not any(fnmatch(name, pattern) for name, _ in named):
            raise TrainingError(f"freeze: {pattern!r} names no parameter of {type(model).__name__}")
    return {id(p) for name, p in named if any(fnmatch(name, pattern) for pattern in patterns)}
