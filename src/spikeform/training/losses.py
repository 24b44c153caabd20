"""What is minimised, and what is measured on held-out text."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spikeform.training.examples import IGNORED, Batch


def loss_of(model: nn.Module, batch: Batch, extra: dict[str, Any], teacher: nn.Module | None, distil: float) -> Tensor:
    """Cross entropy, and ``distil`` times KL(teacher || model), means over the predicted places.

    Args:
        model: A language model or a classifier.
        batch: Its input and ``labels``: a target for each row of logits, -100 where none is predicted.
        extra: More arguments of the model's.
        teacher: The dense model, or None.
        distil: Weight of the second term.
    """
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"} | extra
    logits_NV, labels_N = _flat(model(**inputs).logits), batch["labels"].flatten()
    loss = F.cross_entropy(logits_NV.float(), labels_N, ignore_index=IGNORED)
    if teacher is None or not distil:
        return loss
    with torch.no_grad():
        wanted_NV = _flat(teacher(**inputs).logits)
    here = labels_N != IGNORED
    log_p, log_q = (x[here].float().log_softmax(-1) for x in (wanted_NV, logits_NV))
    return loss + distil * F.kl_div(log_q, log_p, log_target=True, reduction="batchmean")


@torch.no_grad()
def sums_of(model: nn.Module, batches: Iterable[Batch | None], extra: dict[str, Any], go_on: Callable[[], bool]) -> Any:
    """Sums over all predicted places: nats, places predicted, places where the likeliest is right.

    Args:
        model: In evaluation mode.
        batches: As of :func:`spikeform.training.examples.held_out_batches`.
        extra: More arguments of the model's.
        go_on: Asked before each batch; False ends it.

    Returns:
        fp64 ``[3]``, or None if it was ended.
    """
    device = next(model.parameters()).device
    sums = torch.zeros(3, dtype=torch.float64)
    for batch in batches:
        if not go_on():
            return None
        if batch is None:
            continue
        batch = {name: tensor.to(device) for name, tensor in batch.items()}
        labels = batch.pop("labels").flatten()
        logits = _flat(model(**batch, **extra).logits)
        here = labels != IGNORED
        logits, labels = logits[here].float(), labels[here]
        nats = F.cross_entropy(logits, labels, reduction="none").double().sum()
        right = (logits.argmax(-1) == labels).sum()
        sums += torch.stack((nats, right.new_tensor(len(labels)).double(), right.double())).cpu()
    return sums


def metrics_of(task: str, sums: Tensor) -> dict[str, float]:
    """``held_out_loss`` in nats, and ``perplexity``, or for a classifier ``accuracy``."""
    nats, places, right = sums.tolist()
    loss = nats / places
    if task == "classify":
        return {"held_out_loss": loss, "accuracy": right / places}
    return {"held_out_loss": loss, "perplexity": math.exp(min(loss, 700))}


def _flat(logits: Tensor) -> Tensor:
    return logits.reshape(-1, logits.shape[-1])
