"""A sequence classifier on the body of a language model: what fine-tuning on a task begins with."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from spikeform.conversion import convert, method_of
from spikeform.conversion.calibrate import calibrate
from spikeform.conversion.data import windows
from spikeform.conversion.quantizer import attach
from spikeform.layers.streaming import neurons_of
from spikeform.training.errors import TrainingError


def with_classifier(
    model: PreTrainedModel, classes: int, tokenizer: Any, texts: Sequence[str] = (), seed: int = 0
) -> PreTrainedModel:
    """The body of ``model``, with a new head for ``classes``.

    Args:
        model: A dense language model, or one converted with FAS: its weights and thresholds are taken over.
        classes: Of the new head.
        tokenizer: The model's.
        texts: A converted model's thresholds outside the body (the pooler's) are found on these.
        seed: Of the new head.

    Returns:
        Another model; a converted one as its QCFS network (steps 0).

    Raises:
        TrainingError: There is no sequence classifier of this family.
    """
    config = copy.deepcopy(model.config)
    vars(config).pop("quantization_config", None)
    config.num_labels, config.architectures = classes, None
    config.pad_token_id = config.pad_token_id if config.pad_token_id is not None else tokenizer.pad_token_id
    torch.manual_seed(seed)
    try:
        made = AutoModelForSequenceClassification.from_config(config).float()
    except ValueError as error:
        raise TrainingError(f"{type(model).__name__} has no sequence classifier in transformers") from error
    chosen = getattr(model.config, "quantization_config", None) if neurons_of(model) else None
    if chosen is not None:
        convert(made, replace(chosen, steps=0, threshold=1.0))  # any threshold: the body's follow
    body = made.base_model.load_state_dict(model.base_model.state_dict(), strict=False)
    if body.unexpected_keys:
        raise TrainingError(f"the classifier's body has no {body.unexpected_keys[0]}")
    if chosen is not None:
        _find_the_others(made, model, replace(chosen, steps=0), texts, tokenizer)
    return made.eval()


def _find_the_others(made: PreTrainedModel, model: PreTrainedModel, config: Any, texts: Any, tokenizer: Any) -> None:
    """Thresholds of the neurons that the body did not bring along."""
    known = {f"{model.base_model_prefix}.{name}" for name, _ in model.base_model.named_modules()}
    new = {
        name: neuron for name, neuron in made.named_modules() if neuron in set(neurons_of(made)) and name not in known
    }
    for neuron in new.values():
        neuron.threshold.data.fill_(float("nan"))
    batches, described = windows(made, list(texts) or None, tokenizer)
    report: Any = made.spikeform_report
    fit: Any = method_of(config).fit  # a streaming method has one
    report.saturation = calibrate(made, batches, lambda neuron, seen: fit(neuron, seen, config)) if new else {}
    report.calibration = described if new else {"source": "thresholds of the language model"}
    report.history = list(getattr(model.spikeform_report, "history", []))
    attach(made, config, report)
