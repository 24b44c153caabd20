"""Smoothed gradient compensation (SpikingMamba, arXiv 2510.04595): a continuous path beside the spikes, while training.

The paper publishes no formula. Of the three modes here, ``grad`` and ``mix`` are the neuron's
(:mod:`spikeform.neurons.signed_integer`), and ``add`` belongs to the layer that receives the spikes:

    y = W (n V_th) + lambda P x        P [N, K], or of rank R, learns too

Nothing of it is left in the model afterwards. While lambda is above 0, ``mix`` and ``add`` train another function than
the one that remains, so their lambda falls to 0 before the end.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from spikeform.layers import SpikingLinear
from spikeform.neurons import SignedInteger
from spikeform.neurons.signed_integer import Compensation
from spikeform.training.options import TrainOptions

NAME = "compensation"  # of P, a child of its layer


def weight_at(options: TrainOptions, step: int, steps: int) -> float:
    """The weight lambda in a step, 0 .. ``steps`` - 1: constant with ``grad``, else falling in a line to 0."""
    if options.compensation == "grad":
        return options.compensation_weight
    return options.compensation_weight * max(0.0, 1 - step / (options.compensation_share * steps))


@contextmanager
def compensated(model: nn.Module, options: TrainOptions) -> Iterator[Compensation | None]:
    """The continuous path inside the block, for all signed-integer neurons; None where the options want none."""
    if options.compensation == "none":
        yield None
        return
    path = Compensation(options.compensation, options.compensation_weight, options.compensation_smooth)
    inside = path if path.mode != "add" else None
    neurons = [module for module in model.modules() if isinstance(module, SignedInteger)]
    layers = [m for m in model.modules() if isinstance(m, SpikingLinear) and isinstance(m.neuron, SignedInteger)]
    hooks = []
    try:
        for neuron in neurons:
            neuron.compensation = inside
        if path.mode == "add":
            generator = torch.Generator().manual_seed(options.seed)
            for layer in layers:
                layer.add_module(NAME, _matrix(layer, options.compensation_rank, generator))
                hooks.append(layer.register_forward_hook(_adds(path)))
        yield path
    finally:
        for hook in hooks:
            hook.remove()
        for layer in layers:
            layer._modules.pop(NAME, None)
        for neuron in neurons:
            neuron.compensation = None


def _matrix(layer: SpikingLinear, rank: int, generator: torch.Generator) -> nn.Module:
    """P of a layer, zero to begin with: a rank's first factor is random, so that the second one has a gradient."""
    wide, device = (layer.in_features, layer.out_features), layer.weight.device
    if not rank or rank >= min(wide):
        return _linear(torch.zeros(wide[1], wide[0], device=device))
    down = torch.randn(rank, wide[0], generator=generator) / wide[0] ** 0.5
    return nn.Sequential(_linear(down.to(device)), _linear(torch.zeros(wide[1], rank, device=device)))


def _linear(weight: Tensor) -> nn.Linear:
    made = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    made.weight = nn.Parameter(weight)
    return made


def _adds(path: Compensation) -> Any:
    def hook(layer: nn.Module, args: tuple, out: Tensor) -> Tensor | None:
        if not layer.training or not path.weight:
            return None
        matrix: Any = layer._modules[NAME]
        return out + path.weight * matrix(args[0]).to(out.dtype)

    return hook
