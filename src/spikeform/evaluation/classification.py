"""Agreement of a spiking classifier with the dense one it came from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from spikeform.evaluation.fidelity import kl_divergence
from spikeform.evaluation.perplexity import device_of, evaluating


@dataclass(frozen=True)
class ClassificationAgreement:
    """What a spiking classifier kept of the dense one. Means are over examples.

    Attributes:
        agreement: share of examples given the same class by both.
        kl: mean KL(dense || spiking) of the class distributions, nats per example.
        accuracy: of the spiking model, None without labels.
        dense_accuracy: of the dense model, None without labels.
        examples: examples compared.
    """

    agreement: float
    kl: float
    accuracy: float | None
    dense_accuracy: float | None
    examples: int

    def to_dict(self) -> dict[str, Any]:
        """The same as a plain dict, for JSON."""
        return asdict(self)


@torch.inference_mode()
def classification_agreement(
    spiking: nn.Module, dense: nn.Module, batches: Iterable[Mapping[str, Tensor]]
) -> ClassificationAgreement:
    """Compares two sequence classifiers on the same batches.

    Args:
        spiking: the converted classifier, whose output has ``logits`` ``[B, C]``.
        dense: the classifier it came from.
        batches: what the tokenizer returns (``input_ids``, ``attention_mask``, ...), each with
            ``labels`` ``[B]`` or none with them.

    Returns:
        The comparison.

    Raises:
        ValueError: if both are one object, there is no batch, or only some batches have labels.
    """
    if spiking is dense:
        raise ValueError(
            "spiking and dense are the same object, as convert works in place: load the dense model again, "
            "or take copy.deepcopy(model) before converting"
        )
    agreed = right = dense_right = examples = labelled = 0
    kl = 0.0
    with evaluating(spiking, dense):
        for batch in batches:
            inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
            a_BC, b_BC = (
                m(**{k: v.to(device_of(m)) for k, v in inputs.items()}).logits.cpu().double() for m in (dense, spiking)
            )
            if a_BC.dim() != 2 or a_BC.shape != b_BC.shape:
                raise ValueError(
                    f"logits of shape {list(a_BC.shape)} and {list(b_BC.shape)}: both models must classify "
                    "whole sequences [batch, classes]; for a language model use fidelity"
                )
            kl += float(kl_divergence(a_BC.log_softmax(-1), b_BC.log_softmax(-1)).sum())
            a_B, b_B = a_BC.argmax(-1), b_BC.argmax(-1)
            agreed += int((a_B == b_B).sum())
            examples += len(a_B)
            if batch.get("labels") is not None:
                labels_B = batch["labels"].cpu().reshape(-1)
                right += int((b_B == labels_B).sum())
                dense_right += int((a_B == labels_B).sum())
                labelled += len(labels_B)
    if not examples:
        raise ValueError("batches is empty: there is nothing to compare")
    if labelled not in (0, examples):
        raise ValueError(f"{labelled} of {examples} examples have labels: give labels to all batches, or to none")
    return ClassificationAgreement(
        agreement=agreed / examples,
        kl=kl / examples,
        accuracy=right / examples if labelled else None,
        dense_accuracy=dense_right / examples if labelled else None,
        examples=examples,
    )
