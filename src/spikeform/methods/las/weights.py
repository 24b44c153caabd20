"""Integer weights: each row in steps of 1/127 of its largest weight, so that every product is a sum of integers."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from spikeform.conversion.report import ConversionReport
from spikeform.errors import ConversionError
from spikeform.layers import CodedLinear, SpikingLinear
from spikeform.methods.las.config import LAS
from spikeform.methods.las.convert import prepare
from spikeform.synapses.integer import IntegerWeight

_PEAK = 127


def row_codes(weight: Tensor) -> IntegerWeight:
    """``weight`` ``[N, K]`` as the nearest int8 codes, symmetric, one scale a row; a row of zeros has scale 1.

    Raises:
        ValueError: The weight is not finite.
    """
    weight = weight.detach().float()
    if not bool(weight.isfinite().all()):
        raise ValueError("a weight to be coded is not finite: check the dense model's weights")
    largest = weight.abs().amax(1)
    scale = largest / _PEAK
    scale = torch.where(scale > torch.finfo(torch.float32).tiny, scale, torch.ones_like(scale))
    codes = (weight / scale[:, None]).round().clamp(-_PEAK, _PEAK).to(torch.int8)
    zero = torch.full((1, len(weight)), _PEAK + 1, dtype=torch.int16, device=weight.device)
    return IntegerWeight(codes, scale[None], zero, None, bits=8)


def finish(model: PreTrainedModel, config: LAS, report: ConversionReport) -> None:
    """Where the config asks for it, code the weights: thresholds are set, and channel shifts folded into them.

    Raises:
        ConversionError: A weight is not finite.
    """
    if config.weight_bits == 16:
        return
    for name, layer in _real_layers(model):
        try:
            weight = row_codes(layer.weight)
        except ValueError as error:
            raise ConversionError(f"{name}: {error}") from None
        model.set_submodule(name, CodedLinear.from_spiking(layer, weight))
    report.follow(model)


def skeleton(model: PreTrainedModel, config: LAS) -> ConversionReport:
    """The modules of a checkpoint, their values not yet loaded."""
    report = prepare(model, config)
    if config.weight_bits == 8:
        for name, layer in _real_layers(model):
            blank = CodedLinear(layer.in_features, layer.out_features, layer.bias, layer.neuron, bits=8)
            model.set_submodule(name, blank)
        report.follow(model)
    return report


def _real_layers(model: PreTrainedModel) -> list[tuple[str, SpikingLinear]]:
    """Spiking layers whose weights are theirs alone: a tied head's belong to the embedding, which stays real."""
    tied = model.get_output_embeddings() if getattr(model.config, "tie_word_embeddings", False) else None
    return [(n, m) for n, m in model.named_modules() if isinstance(m, SpikingLinear) and m is not tied]
