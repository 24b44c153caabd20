"""What is minimised, and what is measured on held-out text."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from spikeform.conversion.kinds import mixers
from spikeform.training.errors import TrainingError
from spikeform.training.examples import IGNORED, Batch
from spikeform.training.options import TrainOptions

ELEMENTS = 1 << 26  # logits whose divergence is taken at once
SMALL = 1e-12


class Objective:
    """What is minimised: see :class:`spikeform.training.TrainOptions`.

    Args:
        options: The weights of its terms.
        extra: More arguments of the models'.
        model: A language model or a classifier, as it is before it is wrapped or compiled.
        teacher: The dense model, or None.
    """

    def __init__(
        self, options: TrainOptions, extra: dict[str, Any], model: nn.Module, teacher: nn.Module | None
    ) -> None:
        self.options, self.extra, self.teacher = options, extra, teacher
        self._blocks = [after_blocks(each) for each in (model, teacher) if each is not None]

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        """A scalar, its terms means over places.

        Args:
            model: The model, wrapped or compiled perhaps.
            batch: Its input and ``labels``: a target for each row of logits, -100 where none is predicted.

        Raises:
            TrainingError: Model and teacher differ in vocabulary, blocks or width.
        """
        options = self.options
        inputs = {name: tensor for name, tensor in batch.items() if name != "labels"} | self.extra
        if options.hidden:
            inputs["output_hidden_states"] = True
        out = model(**inputs)
        logits_NV, labels_N = _flat(out.logits), batch["labels"].flatten()
        terms = []
        if options.ce:
            terms.append(options.ce * F.cross_entropy(logits_NV.float(), labels_N, ignore_index=IGNORED))
        if self.teacher is not None and options.taught:
            with torch.no_grad():
                wanted = self.teacher(**inputs)
            if options.distil:
                here = labels_N != IGNORED
                apart = divergence(_flat(wanted.logits), logits_NV, here, options.temperature, options.reverse)
                terms.append(options.distil * apart)
            if options.hidden:
                found, target = (x.hidden_states[b] for x, b in zip((out, wanted), self._blocks, strict=True))
                apart = distance(found, target, inputs.get("attention_mask"), options.hidden_distance)
                terms.append(options.hidden * apart)
        if not (options.ce or options.distil):
            # Several processes wait for a gradient of every parameter that led to an output.
            terms.append(0.0 * logits_NV.float().sum())
        return sum(terms[1:], terms[0])


def divergence(wanted_NV: Tensor, logits_NV: Tensor, here_N: Tensor, temperature: float, reverse: float) -> Tensor:
    """``tau^2 [(1 - r) KL(T || S) + r KL(S || T)]`` of logits, in fp32, the mean over places.

    Args:
        wanted_NV: The teacher's logits, any dtype.
        logits_NV: The student's.
        here_N: Bool: the places that count.
        temperature: tau.
        reverse: r.

    Raises:
        TrainingError: The vocabularies differ.
    """
    if wanted_NV.shape != logits_NV.shape:
        raise TrainingError(
            f"the teacher predicts {wanted_NV.shape[-1]} tokens, the model {logits_NV.shape[-1]}: distil needs a "
            "teacher of the same vocabulary"
        )

    def summed(wanted_NV: Tensor, logits_NV: Tensor, here_N: Tensor) -> Tensor:
        log_p, log_q = ((x.float() / temperature).log_softmax(-1) for x in (wanted_NV, logits_NV))
        found_N = torch.zeros_like(log_q[:, 0])
        for share, a, b in ((1 - reverse, log_q, log_p), (reverse, log_p, log_q)):
            if share:
                found_N = found_N + share * F.kl_div(a, b, log_target=True, reduction="none").sum(-1)
        return found_N.masked_fill(~here_N, 0.0).sum()

    # Of a large vocabulary the fp32 terms of all places at once would be the largest tensors of the pass. And no
    # place is picked out by index: that would wait for the device.
    rows = max(1, ELEMENTS // logits_NV.shape[-1])
    parts = zip(wanted_NV.split(rows), logits_NV.split(rows), here_N.split(rows), strict=True)
    sums = [checkpoint(summed, *part, use_reentrant=False, preserve_rng_state=False) for part in parts]
    return temperature**2 * torch.stack(sums).sum() / here_N.sum()


def distance(
    found: Sequence[Tensor], wanted: Sequence[Tensor], mask_BN: Tensor | None, kind: str = "relative"
) -> Tensor:
    """``(1/L) sum_l ||h_S - h_T||^2 / ||h_T||^2`` of a token, in fp32, the mean over tokens.

    Args:
        found: The student's residual stream after each block, ``[B, N, D]``.
        wanted: The teacher's.
        mask_BN: 0 where there is padding, or None.
        kind: ``relative``; or ``cosine``, ``(1/L) sum_l (1 - cos(h_S, h_T))``.

    Raises:
        TrainingError: They differ in number or width.
    """
    if [x.shape for x in found] != [x.shape for x in wanted]:
        raise TrainingError(
            f"the teacher has {len(wanted)} blocks of width {wanted[0].shape[-1]}, the model {len(found)} of "
            f"{found[0].shape[-1]}: hidden needs a teacher of the same sizes"
        )
    apart_BN = torch.zeros(found[0].shape[:-1], device=found[0].device)
    for student, teacher in zip(found, wanted, strict=True):
        student, teacher = student.float(), teacher.float()
        if kind == "cosine":
            apart_BN = apart_BN + 1 - F.cosine_similarity(student, teacher, dim=-1)
        else:
            apart_BN = apart_BN + (student - teacher).square().sum(-1) / teacher.square().sum(-1).clamp_min(SMALL)
    apart_BN = apart_BN / len(found)
    if mask_BN is None:
        return apart_BN.mean()
    return apart_BN.masked_fill(mask_BN == 0, 0.0).sum() / (mask_BN != 0).sum()


def after_blocks(model: nn.Module) -> slice:
    """Which of the hidden states that a model tells are its residual stream after each block.

    State-space models tell that of each block, then once more the last one, normed. The others begin with the
    embedding, and tell the last block's with their last norm, where they have one.
    """
    return slice(None, -1) if mixers(model) else slice(1, None)


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
