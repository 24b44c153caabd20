"""Every neuron's steps per channel: from its own block's statistics, or planned for the whole model beforehand."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from spikeform.conversion.blocks import Block
from spikeform.errors import CalibrationError
from spikeform.layers import SpikingLinear
from spikeform.methods.spikellm import allocation, saliency
from spikeform.methods.spikellm.config import SpikeLLM
from spikeform.methods.spikellm.statistics import Heads, Inputs, Statistics, relative_error
from spikeform.neurons import GIF, recording, unseen

Plan = dict[str, Tensor]


def set_times(statistics: Statistics, config: SpikeLLM, planned: Plan | None) -> float:
    """Give every neuron of a block its steps (and static ranges).

    Args:
        statistics: Of the block.
        config: Of the conversion.
        planned: Steps by linear layer, where the budget is the whole model's; keys and values take the fraction.

    Returns:
        Mean steps of the linear layers' input channels.
    """
    share = 0.0 if config.saliency == "none" else config.salient
    times = []
    for name, scores in _linear_scores(statistics, config).items():
        neuron = _neuron(statistics.layers[name])
        found = planned[name] if planned is not None else allocation.fraction(scores, share, config.steps)
        neuron.set_times(found)
        times.append(found.float().flatten())
    for name, heads in statistics.heads.items():
        attention: Any = statistics.attentions[name]
        attention.query.set_times(torch.ones_like(attention.query.times))
        for role, scores in _head_scores(name, heads, config).items():
            neuron: Any = getattr(attention, role)
            neuron.set_times(allocation.fraction(scores, share, neuron.steps).view(neuron.channels))
            if neuron.axis == "channel":
                neuron.set_range(*(end.view(neuron.channels) for end in heads.ends()))
    return float(torch.cat(times).mean()) if times else 1.0


@torch.no_grad()
def plan(
    found: list[Block], dense: list[Tensor], config: SpikeLLM, balanced: Callable[[Block, Statistics], None] | None
) -> Plan:
    """Steps of every linear layer's input channels, from the dense model, all layers sharing one budget.

    Args:
        found: The model's blocks.
        dense: The first one's inputs.
        config: Of the conversion.
        balanced: Balances a block in place, from its statistics, so that channels are ranked as they will be coded;
            None: the block is left as it is.

    Returns:
        Steps by linear layer.
    """
    scores: dict[str, Tensor] = {}
    errors: dict[str, float] = {}
    fan_out: dict[str, float] = {}
    spikes: dict[str, Tensor] = {}
    sharing: dict[str, str] = {}  # of each layer, the one whose steps it takes
    for block in found:
        if balanced is not None:
            balanced(block, Statistics.of(block, dense))
        statistics = Statistics.of(block, dense)
        after = statistics.outputs
        found_scores = _linear_scores(statistics, config)
        for readers, inputs in _sharing(statistics, config):
            name, layers = readers[0], [statistics.layers[reader] for reader in readers]
            sharing |= dict.fromkeys(readers, name)
            scores[name] = found_scores[name]
            fan_out[name] = float(sum(layer.out_features for layer in layers))
            spikes[name] = inputs.drive * _neuron(layers[0]).levels / inputs.tokens
            if config.allocation == "sensitivity":
                errors[name] = _error(block, layers, dense, after)
        dense = after
    if config.allocation == "energy":
        times = allocation.energy(scores, spikes, fan_out, config.budget, config.steps)
    elif config.allocation == "sensitivity":
        times = allocation.sensitivity(scores, errors, fan_out, config.budget, config.steps)
    else:
        times = allocation.budget(scores, fan_out, config.budget, config.steps)
    return {reader: times[name] for reader, name in sharing.items()}


def _error(block: Block, layers: list[SpikingLinear], dense: list[Tensor], after: list[Tensor]) -> float:
    """Error of the block's output where these layers alone have one step a channel, relative to what the block adds."""
    unset = [_neuron(layer).times for layer in layers]
    for layer in layers:
        _neuron(layer).set_times(torch.ones_like(_neuron(layer).times))
    with recording(unseen):
        out = block.run_all(dense)
    for layer, times in zip(layers, unset, strict=True):
        _neuron(layer).times = times
    return relative_error(out, after, dense)


def _neuron(layer: SpikingLinear) -> GIF:
    assert isinstance(layer.neuron, GIF)
    return layer.neuron


def _linear_scores(statistics: Statistics, config: SpikeLLM) -> Plan:
    found: Plan = {}
    for names, inputs in _sharing(statistics, config):
        score = _score(inputs, [statistics.layers[name].weight for name in names], names[0], config)
        found |= dict.fromkeys(names, score)
    return found


def _sharing(statistics: Statistics, config: SpikeLLM) -> list[tuple[list[str], Inputs]]:
    """Layers that have one mask together, and their input."""
    if config.masks == "shared":
        return [(group.readers, group) for group in statistics.groups()]
    return [([name], group) for group in statistics.groups() for name in group.readers]


def _score(inputs: Inputs, weights: list[Tensor], site: str, config: SpikeLLM) -> Tensor:
    if config.saliency == "obs":
        return saliency.linear(inputs.gram, weights, inputs.tokens)
    if config.saliency == "diagonal":
        return saliency.diagonal(inputs.gram, weights, inputs.tokens)
    return _other(inputs.peaks, site, config)


def _head_scores(site: str, heads: Heads, config: SpikeLLM) -> Plan:
    if heads.key is None or heads.key_diagonal is None or heads.squares is None:
        raise CalibrationError(f"{site} saw no calibration input; leave it dense (skip)")
    if config.saliency == "obs":
        key = heads.key / heads.tokens
    elif config.saliency == "diagonal":
        key = heads.key_diagonal / heads.tokens
    else:
        key = _other(heads.peaks["key"], f"{site}.key", config)
        return {"key": key, "value": _other(heads.peaks["value"], f"{site}.value", config)}
    return {"key": key, "value": saliency.value(heads.squares, len(heads.key), heads.outputs)}


def weight_tier(site: str, weight: Tensor, gram: Tensor, config: SpikeLLM) -> Tensor | None:
    """Which tier of weight steps each input channel is of, uint8 ``[K]``: the most salient ones get the most steps.

    Args:
        site: The layer's name.
        weight: ``[N, K]``.
        gram: ``X^T X`` of its input, ``[K, K]``.
        config: Of the conversion.

    Returns:
        None where there is one tier.
    """
    if len(config.weight_steps) == 1:
        return None
    score = saliency.weight(weight, gram, config.damp)
    if config.saliency == "random":
        score = _other(score, f"{site}.weight", config)
    order = score.argsort(descending=True, stable=True)
    tier = torch.zeros(len(order), dtype=torch.uint8, device=order.device)
    begin = 0
    for index, share in reversed(list(enumerate(config.weight_salient, start=1))):
        end = begin + round(share * len(order))
        tier[order[begin:end]] = index
        begin = end
    return tier


def _other(peaks: Tensor, site: str, config: SpikeLLM) -> Tensor:
    """Largest magnitude, or (random, and none, where no channel is taken) a ranking of the site's own seed."""
    if config.saliency == "magnitude":
        return saliency.magnitude(peaks)
    seed = config.seed + zlib.crc32(site.encode())
    return saliency.random(seed, peaks.numel()).view(peaks.shape).to(peaks.device)
