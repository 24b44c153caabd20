"""What calibration measures: the spiking network beside its own QCFS network, on data that it does not learn from."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from spikeform.methods.fas.calibration.data import IGNORED, Batch
from spikeform.methods.fas.calibration.losses import divergence, following, teach
from spikeform.methods.fas.calibration.options import CalibrateOptions
from spikeform.neurons import StreamingNeuron


def device_of(model: Any) -> torch.device:
    """Where a model's input goes."""
    return next(model.parameters()).device


@torch.no_grad()
def measure(
    model: Any,
    neurons: list[StreamingNeuron],
    batches: Iterable[Batch],
    options: CalibrateOptions,
    extra: dict[str, Any],
) -> dict[str, float]:
    """Means over all tokens (a classifier: over sequences) of ``batches``.

    Returns:
        ``loss`` E with its parts ``alignment`` and ``kl`` (at temperature 1); ``agreement``, the share of places where
        both networks find the same likeliest. Of causal language models also ``perplexity`` and
        ``qcfs_perplexity``, of masked ones too if the batches have labels; of classifiers with labels ``accuracy``
        and ``qcfs_accuracy``.
    """
    sums = torch.zeros(8, dtype=torch.float64, device=device_of(model))
    classifies = False
    for batch in batches:
        lesson = teach(model, neurons, batch, extra)
        with following(model, neurons, batch, lesson, options, extra) as (logits, errors):
            pass
        classifies = logits.ndim == 2
        mask = batch.get("attention_mask")
        each = divergence(lesson.logits, logits)
        weight = torch.ones_like(each) if mask is None or classifies else mask.to(each.dtype)
        same = (logits.argmax(-1) == lesson.logits.argmax(-1)).to(each.dtype)
        places = weight.sum()
        means = [
            errors.total(options) * places,
            errors.alignment * places,
            (each * weight).sum(),
            (same * weight).sum(),
        ]
        sums += torch.stack([x.double() for x in (*means, places, *_scores(model, batch, logits, lesson.logits))])
    loss, alignment, kl, agreement, places, *scores = sums.tolist()
    found = {"loss": loss, "alignment": alignment, "kl": kl, "agreement": agreement}
    return {name: value / places for name, value in found.items()} | _named(scores, classifies)


def _scores(model: Any, batch: Batch, logits: Tensor, qcfs_logits: Tensor) -> list[Tensor]:
    """Nats (a classifier: right answers) of both networks, and at how many places."""
    labels = batch.get("labels")
    if logits.ndim == 2:
        if labels is None or labels.ndim != 1:
            return list(logits.new_zeros(3))
        right = [(z.argmax(-1) == labels).sum() for z in (logits, qcfs_logits)]
        return [*right, torch.ones_like(labels).sum()]
    if model.can_generate():
        ids, mask = batch["input_ids"], batch.get("attention_mask")
        labels = torch.full_like(ids, IGNORED)
        labels[:, :-1] = ids[:, 1:] if mask is None else ids[:, 1:].masked_fill(mask[:, 1:] == 0, IGNORED)
    if labels is None:
        return list(logits.new_zeros(3))
    nats = [
        F.cross_entropy(z.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORED, reduction="sum")
        for z in (logits, qcfs_logits)
    ]
    return [*nats, (labels != IGNORED).sum()]


def _named(scores: list[float], classifies: bool) -> dict[str, float]:
    here, qcfs, places = scores
    if not places:
        return {}
    if classifies:
        return {"accuracy": here / places, "qcfs_accuracy": qcfs / places}
    return {"perplexity": _exp(here / places), "qcfs_perplexity": _exp(qcfs / places)}


def _exp(nats: float) -> float:
    return math.exp(nats) if nats < 700 else math.inf
