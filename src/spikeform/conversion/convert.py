"""One call turns a dense model into a spiking one, in place."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from spikeform.conversion.calibrate import Progress
from spikeform.conversion.quantizer import attach
from spikeform.conversion.registry import method_of
from spikeform.conversion.transform import transform
from spikeform.conversion.weights import BITS, finish
from spikeform.errors import ConfigError, ConversionError
from spikeform.layers.streaming import clock_of


def convert(
    model: PreTrainedModel,
    config: Any,
    calibration: Any = None,
    tokenizer: Any = None,
    *,
    workdir: str | Path | None = None,
    progress: Progress | None = None,
) -> PreTrainedModel:
    """Convert ``model`` in place, and return it.

    Args:
        model: A dense transformers model.
        config: ``spikeform.LAS(...)`` …
        calibration: Texts, or token ids ``[N, L]``; None samples sequences from the model itself.
        tokenizer: Needed for texts.
        workdir: Folder in which finished calibration blocks are kept, so that an interrupted call resumes.
        progress: Called with ``(blocks done, blocks)``.

    Returns:
        ``model``, with ``spikeform_report`` and ``config.quantization_config`` set: ``save_pretrained`` and
        ``from_pretrained`` round-trip.

    Raises:
        ConfigError: ``config`` is not a spikeform config.
        ConversionError: The model is converted already, or nothing in it could be replaced.
        CalibrationError: The calibration data cannot be used.
    """
    method_of(config)  # refuses what is no config before anything else is looked at
    if not isinstance(model, PreTrainedModel):
        raise ConversionError(f"convert takes a transformers model, got {type(model).__name__}")
    existing = getattr(model.config, "quantization_config", None)
    if is_converted(model):
        raise ConversionError("the model is converted already; load the dense model to convert it anew")
    if existing is not None and existing is not config:
        raise ConversionError(f"the model is quantized already ({type(existing).__name__}); load it unquantized")
    if any(parameter.device.type == "meta" for parameter in model.parameters()):
        raise ConversionError("the model lies on the meta device and has no values: load its weights first")
    with torch.inference_mode(False):  # training and saved tensors want tensors that may have gradients
        report = transform(model, config, calibration, tokenizer, workdir, progress)
    attach(model, config, report)
    return model


def set_steps(model: PreTrainedModel, steps: int) -> PreTrainedModel:
    """Change the time steps of a converted streaming model, in place.

    Args:
        model: Converted by a streaming method.
        steps: T; 0 is the network of QCFS activations, which knows no time.

    Returns:
        ``model``; its config says the new steps, and is saved so.

    Raises:
        ConversionError: The model does not stream.
        ConfigError: ``steps`` is out of the method's range.
    """
    clock = clock_of(model)
    if clock is None:
        raise ConversionError(f"{type(model).__name__} does not stream: set_steps takes a model converted with FAS")
    report: Any = model.spikeform_report
    attach(model, replace(model.config.quantization_config, steps=steps), report)
    clock.steps = steps
    return model


def set_weight_bits(model: PreTrainedModel, bits: int = 8) -> PreTrainedModel:
    """Give a converted model int8 weights, one scale an output row, in place: after it was trained, say.

    What the option ``weight_bits=8`` does at the end of a conversion. There is no way back.

    Args:
        model: Converted by a method with that option, its weights real.
        bits: 8.

    Returns:
        ``model``; its config says the new bits.

    Raises:
        ConversionError: The method has no such option, the weights are integers already, or one is not finite.
        ConfigError: ``bits`` is not 8, or another option of the model excludes it.
    """
    if bits != BITS:
        raise ConfigError(f"set_weight_bits gives int8 weights: bits must be {BITS}, got {bits!r}")
    config: Any = getattr(model.config, "quantization_config", None)
    knows = is_converted(model) and method_of(config).finish is finish
    if not knows or config.weight_bits != 16:
        said = "its weights are integers already" if knows else "it has no such option"
        raise ConversionError(f"{type(model).__name__}: {said}; set_weight_bits takes a model with weight_bits=16")
    config = replace(config, weight_bits=bits)
    report: Any = model.spikeform_report
    finish(model, config, report)
    attach(model, config, report)
    return model


def is_converted(model: PreTrainedModel) -> bool:
    """Whether spikeform converted the model."""
    return hasattr(model, "spikeform_report")
