"""int8 weights: each row in steps of 1/127 of its largest weight, so that every product is a sum of integers."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from spikeform.conversion.report import ConversionReport
from spikeform.errors import ConversionError
from spikeform.layers import CodedLinear, SpikingLinear
from spikeform.synapses.integer import IntegerWeight

BITS, _PEAK = 8, 127
ROWS = 1024  # coded at once: in fp32 a weight is twice as large as in bf16, and there are two of it

Prepare = Callable[[PreTrainedModel, Any], ConversionReport]


def row_codes(weight: Tensor) -> IntegerWeight:
    """``weight`` ``[N, K]`` as the nearest int8 codes, symmetric, one scale a row; a row of zeros has scale 1.

    Raises:
        ValueError: The weight is not finite.
    """
    coded = [_coded(rows.float()) for rows in weight.detach().split(ROWS)]
    codes, scale = (torch.cat(parts) for parts in zip(*coded, strict=True))
    zero = torch.full((1, len(weight)), _PEAK + 1, dtype=torch.int16, device=weight.device)
    return IntegerWeight(codes, scale[None], zero, None, bits=BITS)


def _coded(weight: Tensor) -> tuple[Tensor, Tensor]:
    if not bool(weight.isfinite().all()):
        raise ValueError("a weight to be coded is not finite: check the dense model's weights")
    scale = weight.abs().amax(1) / _PEAK
    scale = torch.where(scale > torch.finfo(torch.float32).tiny, scale, torch.ones_like(scale))
    return (weight / scale[:, None]).round_().clamp_(-_PEAK, _PEAK).to(torch.int8), scale


def code_rows(model: PreTrainedModel, names: Iterable[str]) -> None:
    """Give the layers of these names int8 weights in place of their own (:func:`row_codes`), one after the other.

    What is replaced is let go at once, so the model grows by one layer at most.

    Raises:
        ConversionError: A weight is not finite.
    """
    for name in names:
        layer: Any = model.get_submodule(name)
        try:
            weight = row_codes(layer.weight)
        except ValueError as error:
            raise ConversionError(f"{name}: {error}") from None
        model.set_submodule(name, CodedLinear.from_spiking(layer, weight, name))


def blank_rows(model: PreTrainedModel, names: Iterable[str]) -> None:
    """What :func:`code_rows` makes of these layers, its values not there yet."""
    for name in names:
        layer: Any = model.get_submodule(name)
        sizes = layer.in_features, layer.out_features
        model.set_submodule(name, CodedLinear(*sizes, layer.bias, layer.neuron, BITS, site=name))


def tied_head(model: PreTrainedModel) -> nn.Module | None:
    """The output head, where its weights are those of the embedding, which stays real."""
    return model.get_output_embeddings() if getattr(model.config, "tie_word_embeddings", False) else None


def finish(model: PreTrainedModel, config: Any, report: ConversionReport) -> None:
    """The end of a conversion: where ``config.weight_bits`` is 8, the weights of all spiking layers are coded.

    Thresholds are set by then, and scales of channels folded into the weights.

    Raises:
        ConversionError: A weight is not finite.
    """
    if config.weight_bits == BITS:
        code_rows(model, _real_layers(model))
        report.follow(model)


def skeleton(prepare: Prepare) -> Prepare:
    """The modules of a checkpoint that ends so, their values not yet loaded, from those that conversion begins with."""

    def build(model: PreTrainedModel, config: Any) -> ConversionReport:
        report = prepare(model, config)
        if config.weight_bits == BITS:
            blank_rows(model, _real_layers(model))
            report.follow(model)
        return report

    return build


def _real_layers(model: PreTrainedModel) -> list[str]:
    """Spiking layers, by name, whose weights are theirs alone: a tied head's belong to the embedding, which is real."""
    tied = tied_head(model)
    return [n for n, m in model.named_modules() if isinstance(m, SpikingLinear) and m is not tied]
