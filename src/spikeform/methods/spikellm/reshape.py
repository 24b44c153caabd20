"""The equivalent dense model that is converted: channels balanced, then the residual stream and the values rotated.

Rotation mixes channels and so cannot undo that some of them are scaled up; what can be rescaled is balanced before.
This order, and balancing at all, are ours.
"""

from __future__ import annotations

import copy
import inspect
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from spikeform.conversion.pairs import apply, pairs
from spikeform.conversion.parts import is_conv1d
from spikeform.conversion.rotation import restructure, rotate
from spikeform.methods.spikellm.balance import share, start
from spikeform.methods.spikellm.config import SpikeLLM

BALANCED = ("value", "feed_forward")  # a norm's gain is folded into what follows it, so rotation sees no scale there


@torch.no_grad()
def reshape(model: PreTrainedModel, config: SpikeLLM, batches: list[Tensor]) -> None:
    """Rotate ``model`` in place where the config says so; its function stays.

    Args:
        model: Dense.
        config: Of the conversion.
        batches: Token ids ``[N, L]`` each: the largest input of each channel is found on them.

    Raises:
        ConversionError: The family cannot be rotated.
    """
    if not config.rotate:
        return
    tensors = {id(t): t for t in chain(model.parameters(), model.buffers())}
    restructure(copy.deepcopy(model, tensors))  # the modules alone: what cannot be rotated is refused before it changes
    chosen = [pair for pair in pairs(model) if pair.kind in BALANCED]
    peaks = _peaks(model, [consumer for pair in chosen for consumer in pair.consumers], batches)
    for pair in chosen:
        act = torch.stack([pair.largest(peaks[consumer]) for consumer in pair.consumers]).amax(0)
        shares = [pair.largest(share(_weight(consumer), peaks[consumer])) for consumer in pair.consumers]
        apply(pair, start(act.double(), torch.stack(shares).amax(0), config.alpha))
    rotate(model, config.seed, values=config.rotate_heads)


def _weight(layer: Any) -> Tensor:
    """``[N, K]``."""
    return layer.weight.T if is_conv1d(layer) else layer.weight


def _peaks(model: PreTrainedModel, layers: list[nn.Module], batches: list[Tensor]) -> dict[nn.Module, Tensor]:
    """Largest magnitude of each input channel of ``layers``."""
    peaks: dict[nn.Module, Tensor] = {}

    def see(layer: nn.Module, args: tuple) -> None:
        peak = args[0].abs().flatten(0, -2).amax(0).float()
        peaks[layer] = torch.maximum(peaks.get(layer, peak), peak)

    handles = [layer.register_forward_pre_hook(see) for layer in dict.fromkeys(layers)]
    training = model.training
    model.eval()
    device = model.get_input_embeddings().weight.device
    extra = {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}
    try:
        for ids in batches:
            model(input_ids=ids.to(device), **extra)
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    return peaks
