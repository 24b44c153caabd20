"""One call turns a dense model into a spiking one, in place."""

from __future__ import annotations

import copy
from itertools import chain
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from spikeform.conversion.calibrate import Progress, calibrate
from spikeform.conversion.data import windows
from spikeform.conversion.registry import method_of
from spikeform.errors import ConversionError
from spikeform.layers import SpikingLinear
from spikeform.neurons import MT


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
    method = method_of(config)
    if not isinstance(model, PreTrainedModel):
        raise ConversionError(f"convert takes a transformers model, got {type(model).__name__}")
    existing = getattr(model.config, "quantization_config", None)
    if is_converted(model):
        raise ConversionError("the model is converted already; load the dense model to convert it anew")
    if existing is not None and existing is not config:
        raise ConversionError(f"the model is quantized already ({type(existing).__name__}); load it unquantized")
    batches, described = [], {}
    if calibration is not None or not _all_given(model, config):
        batches, described = windows(model, calibration, tokenizer)
    report = method.prepare(model, config)
    if not any(row.kind == "linear" for row in report.replaced):
        raise ConversionError(
            f"nothing in {type(model).__name__} could be converted: no linear layer of a known type is left "
            "(see skip); the model is unchanged in function but should be loaded anew"
        )
    neurons = [n for n in model.modules() if isinstance(n, MT)]
    open_sites = [n for n in neurons if not method.given(n, config)]
    if open_sites:
        report.saturation = calibrate(
            model,
            batches,
            lambda n, h: method.fit(n, h, config),
            _per_channel,
            workdir,
            config.to_dict(),
            progress,
        )
        report.calibration = described
    else:
        report.calibration = {"source": "thresholds given in the config"}
    for module in model.modules():
        if isinstance(module, SpikingLinear):
            module.fold()
        if isinstance(module, MT):
            module.channel_weight, module.balance_channels = None, False
    attach(model, config, report)
    return model


def _all_given(model: PreTrainedModel, config: Any) -> bool:
    """Whether the config gives every threshold, so that nothing has to be sampled."""
    if not getattr(config, "thresholds", None):
        return False
    shared = {id(t): t for t in chain(model.parameters(), model.buffers())}
    trial = copy.deepcopy(model, shared)  # the modules, not the tensors
    method = method_of(config)
    method.prepare(trial, config)
    return all(method.given(n, config) for n in trial.modules() if isinstance(n, MT))


def _per_channel(neuron: MT) -> bool:
    return neuron.channel_shift is not None or neuron.channel_weight is not None or neuron.balance_channels


def is_converted(model: PreTrainedModel) -> bool:
    """Whether spikeform converted the model."""
    return hasattr(model, "spikeform_report")


def attach(model: PreTrainedModel, config: Any, report: Any) -> None:
    """Give a converted model what transformers needs to save it, and what users ask it."""
    from spikeform.conversion.quantizer import SpikeformQuantizer

    model.config.quantization_config = config
    marks: Any = model
    marks.spikeform_report = report
    marks.hf_quantizer = SpikeformQuantizer(config, pre_quantized=True)
    marks.is_quantized = True
    marks.quantization_method = config.quant_method
