"""SpikeLLM block by block: which channels get more steps, then the weights; a finished block is kept for a resume.

Two streams run through the model: what the dense blocks make of the text, and what the converted blocks before this
one send it. A block's saliency and weights are found on the second; omniquant learns to answer it with the first.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from spikeform.conversion.blocks import Block, Store, capture
from spikeform.conversion.calibrate import Progress
from spikeform.conversion.kinds import blocks
from spikeform.conversion.pairs import Pair, pairs
from spikeform.layers import CodedLinear, SpikingLinear
from spikeform.methods.spikellm.balance import balance
from spikeform.methods.spikellm.config import SpikeLLM
from spikeform.methods.spikellm.convert import put_codes
from spikeform.methods.spikellm.gptq import gptq, partial_binary
from spikeform.methods.spikellm.grids import encode
from spikeform.methods.spikellm.masks import Plan, plan, set_times, weight_tier
from spikeform.methods.spikellm.omniquant import train_block
from spikeform.methods.spikellm.statistics import Inputs, Statistics, relative_error
from spikeform.neurons import recording, unseen


@torch.no_grad()
def calibrate(
    model: PreTrainedModel,
    batches: list[Tensor],
    config: SpikeLLM,
    workdir: str | Path | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Find every channel's steps and every converted layer's weights.

    Args:
        model: Prepared; its blocks are changed one after the other.
        batches: Token ids ``[N, L]`` each.
        config: Of the conversion.
        workdir: Folder for finished blocks; a later call with the same model, data and config resumes there.
        progress: Called with ``(blocks done, blocks)``.

    Returns:
        Facts for the report: mean steps of a channel, and each block's error on the calibration data, relative to
        the mean square of what the dense block adds to its input.

    Raises:
        CalibrationError: The data cannot be used, or the work folder belongs to another run.
    """
    store = Store(workdir, batches, config.to_dict(), model) if workdir is not None else None
    training = model.training
    model.eval()
    found = [Block(name, module, []) for name, module in blocks(model)]
    dense = capture(model, batches, found, unseen)
    inside = _pairs_by_block(model, found, config) if config.transforms else {}

    def balanced(block: Block, statistics: Statistics) -> None:
        peaks = {name: inputs.peaks for name, inputs in statistics.inputs.items()}
        balance(block.module, block.name, inside.get(block.name, []), peaks, config.alpha)

    planned = None
    if config.spikes and config.allocation != "fraction":
        planned = plan(found, dense, config, balanced if config.transforms else None)
    spiking, facts = [x.clone() for x in dense], []
    for index, block in enumerate(found):
        with recording(unseen):
            targets = block.run_all(dense)
        kept = store.restore(index) if store is not None else None
        if kept is None:
            if config.transforms and planned is None:
                balanced(block, Statistics.of(block, spiking))
            fact, out = _convert(block, dense, spiking, targets, inside.get(block.name, []), config, planned)
            if store is not None:
                store.save(index, block.module.state_dict(), fact)
        else:
            if config.codes:
                put_codes(block.module, block.name, config)
            _load(block.module, kept[0])
            fact, out = kept[1], block.run_all(spiking)
        facts.append(fact)
        dense, spiking = targets, out
        if progress is not None:
            progress(index + 1, len(found))
    model.train(training)
    return {"blocks": facts}


def _pairs_by_block(model: PreTrainedModel, found: list[Block], config: SpikeLLM) -> dict[str, list[Pair]]:
    """The pairs that lie inside each block, all of whose consumers are converted.

    Where keys have static ranges per channel their scale does not matter: the queries carry it.
    """
    result: dict[str, list[Pair]] = {}
    for pair in pairs(model):
        if pair.kind == "query_key" and config.key_axis == "channel":
            continue
        names = [pair.producer_name, *pair.consumer_names]
        converted = all(isinstance(consumer, SpikingLinear) for consumer in pair.consumers)
        for block in found:
            if converted and all(name.startswith(f"{block.name}.") for name in names):
                result.setdefault(block.name, []).append(pair)
    return result


def _convert(
    block: Block,
    dense: list[Tensor],
    spiking: list[Tensor],
    targets: list[Tensor],
    inside: list[Pair],
    config: SpikeLLM,
    planned: Plan | None,
) -> tuple[dict[str, Any], list[Tensor]]:
    """All of one block; returns its facts, and what it sends now."""
    statistics = Statistics.of(block, spiking)
    facts = {"steps": set_times(statistics, config, planned)} if config.spikes else {}
    tiers = {
        name: weight_tier(name, layer.weight, statistics.inputs[name].gram, config)
        for name, layer in statistics.layers.items()
    }
    clips: dict[str, tuple[Tensor, Tensor]] = {}
    if config.transforms or config.clips:
        clips = train_block(block.module, block.name, inside, spiking, targets, block.calls, config, tiers)
    if config.weight_bits != 16:
        _weights(block, spiking, statistics, config, tiers, clips)
    out = block.run_all(spiking)
    return facts | {"error": relative_error(out, targets, dense)}, out


def _weights(
    block: Block,
    spiking: list[Tensor],
    statistics: Statistics,
    config: SpikeLLM,
    tiers: dict[str, Tensor | None],
    clips: dict[str, tuple[Tensor, Tensor]],
) -> None:
    """Integer weights for every linear layer, in the order in which they run."""
    form = {"bits": config.weight_bits, "tiers": config.weight_steps, "ternary": config.weight_form == "ternary"}
    for group in statistics.groups():
        inputs = _again(block, spiking, group) if config.pipeline == "gptq" else group
        for name in group.readers:
            layer = block.module.get_submodule(name.removeprefix(f"{block.name}."))
            assert isinstance(layer, SpikingLinear)
            options = {"damp": config.damp, "block_size": config.block_size, "act_order": config.act_order}
            if config.weight_form == "partial_binary":
                layer.weight.copy_(partial_binary(layer.weight, inputs.gram, 1 - config.weight_salient[0], **options))
                continue
            if config.pipeline == "gptq":
                coded = gptq(layer.weight, inputs.gram, **form, tier=tiers[name], **options, sweeps=config.sweeps)
            else:
                coded = encode(layer.weight, **form, tier=tiers[name], clip=clips.get(name))
            block.module.set_submodule(
                name.removeprefix(f"{block.name}."), CodedLinear.from_spiking(layer, coded, name)
            )


def _again(block: Block, spiking: list[Tensor], group: Inputs) -> Inputs:
    """The group's input as the layers before it, already of integer weights, now send it."""
    return Statistics.of(block, spiking, group.readers).inputs[group.readers[0]]


def _load(module: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Put a finished block's tensors back, blank ones (of a shape that only the file knows) too."""
    device = next(module.parameters()).device
    for name, tensor in tensors.items():
        parent, _, key = name.rpartition(".")
        owner = module.get_submodule(parent)
        if key in owner._buffers:
            owner._buffers[key] = tensor.to(device)
    module.load_state_dict(tensors)
