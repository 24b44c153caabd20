"""The work of a conversion: replace modules, find thresholds, fold."""

from __future__ import annotations

import copy
from itertools import chain
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from spikeform.conversion.calibrate import Progress, calibrate
from spikeform.conversion.data import windows
from spikeform.conversion.registry import Method, method_of
from spikeform.conversion.report import ConversionReport
from spikeform.errors import ConversionError
from spikeform.layers import SpikingLinear
from spikeform.layers.streaming import paused
from spikeform.neurons import MT, Neuron, ThresholdNeuron


def transform(
    model: PreTrainedModel,
    config: Any,
    calibration: Any = None,
    tokenizer: Any = None,
    workdir: str | Path | None = None,
    progress: Progress | None = None,
) -> ConversionReport:
    """Make a dense ``model`` spike, in place. Arguments and errors as of :func:`spikeform.convert`."""
    method = method_of(config)
    if any(isinstance(module, Neuron) for module in model.modules()):
        raise ConversionError("an earlier conversion of this model failed half way; load the dense model anew")
    batches, described = [], {}
    if calibration is not None or not _all_given(model, config):
        batches, described = windows(model, calibration, tokenizer)
    if method.reshape is not None:
        method.reshape(model, config, batches)
    report = method.prepare(model, config)
    if not any(row.kind in method.core for row in report.replaced):
        raise ConversionError(
            f"nothing in {type(model).__name__} could be converted: no {' or '.join(method.core)} of a known type is "
            "left (see skip); the model is unchanged in function but should be loaded anew"
        )
    if method.calibrate is not None:
        facts = dict(method.calibrate(model, batches, config, workdir, progress))
        report.saturation = facts.pop("saturation", report.saturation)
        report.calibration = described | facts
        report.follow(model)
    else:
        _thresholds(model, method, config, batches, described, report, workdir, progress)
    for module in model.modules():
        if isinstance(module, SpikingLinear):
            module.fold()
        if isinstance(module, MT):
            module.settle()
    if method.finish is not None:
        method.finish(model, config, report)
    return report


def _thresholds(
    model: PreTrainedModel,
    method: Method,
    config: Any,
    batches: list[Tensor],
    described: dict[str, Any],
    report: ConversionReport,
    workdir: str | Path | None,
    progress: Progress | None,
) -> None:
    """Given by the config, or found in histograms of what the neurons receive."""
    neurons = [n for n in model.modules() if isinstance(n, ThresholdNeuron)]
    if not [n for n in neurons if not method.given(n, config)]:
        report.calibration = {"source": "thresholds given in the config"}
        return
    fit: Any = method.fit
    with paused(model):
        report.saturation = calibrate(
            model, batches, lambda n, h: fit(n, h, config), workdir, config.to_dict(), progress
        )
    report.calibration = described


def _all_given(model: PreTrainedModel, config: Any) -> bool:
    """Whether the config gives every threshold, so that nothing has to be sampled."""
    if not (getattr(config, "thresholds", None) or getattr(config, "threshold", None)):
        return False
    shared = {id(t): t for t in chain(model.parameters(), model.buffers())}
    trial = copy.deepcopy(model, shared)  # the modules, not the tensors
    method = method_of(config)
    method.prepare(trial, config)
    return all(method.given(n, config) for n in trial.modules() if isinstance(n, ThresholdNeuron))
