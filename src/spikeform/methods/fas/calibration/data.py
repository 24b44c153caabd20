"""Sequences to calibrate on, and batches of them padded on the right."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from spikeform.conversion.data import context_length, windows
from spikeform.errors import CalibrationError
from spikeform.layers.streaming import paused

HELD_OUT_SHARE, HELD_OUT_TOKENS = 0.1, 16384
IGNORED = -100  # a label that says nothing
Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Examples:
    """Sequences ``{"input_ids": [S], ...}``, and what they are for the record."""

    rows: list[Batch]
    source: dict[str, Any] = field(default_factory=dict)

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        return max(len(row["input_ids"]) for row in self.rows)

    def split(self) -> tuple[Examples, Examples]:
        """What is calibrated on, and the held-out part: the last tenth, of at most 16384 tokens.

        Raises:
            CalibrationError: There is one sequence only.
        """
        if len(self.rows) < 2:
            raise CalibrationError(
                "calibration needs at least two sequences, one of them held out: give more text, or a smaller window"
            )
        most, tokens, cut = max(1, int(len(self.rows) * HELD_OUT_SHARE)), 0, len(self.rows)
        while len(self.rows) - cut < most and tokens < HELD_OUT_TOKENS:
            cut -= 1
            tokens += len(self.rows[cut]["input_ids"])
        return Examples(self.rows[:cut], self.source), Examples(self.rows[cut:], self.source)

    def in_order(self, size: int, device: torch.device) -> Iterator[Batch]:
        """All of them, in batches."""
        for begin in range(0, len(self.rows), size):
            yield collate(self.rows[begin : begin + size], device)

    def shuffled(self, step: int, size: int, seed: int, device: torch.device) -> Batch:
        """The batch of a step: it follows from the seed and the step alone, so that a resumed run sees the same."""
        chosen, count = [], len(self.rows)
        for epoch in range(step * size // count, ((step + 1) * size - 1) // count + 1):
            order = torch.randperm(count, generator=torch.Generator().manual_seed((seed << 24) + epoch))
            first = epoch * count
            chosen += order[max(0, step * size - first) : (step + 1) * size - first].tolist()
        return collate([self.rows[i] for i in chosen], device)


def collate(rows: list[Batch], device: torch.device) -> Batch:
    """Rows side by side ``[B, S]``; with an ``attention_mask`` where they differ in length, or have one."""
    length = max(len(row["input_ids"]) for row in rows)
    masked = any(len(row["input_ids"]) < length or "attention_mask" in row for row in rows)
    batch = {}
    for name in rows[0]:
        padding = IGNORED if name == "labels" else 0
        batch[name] = torch.stack([_padded(row[name], length, padding) for row in rows])
    if masked and "attention_mask" not in batch:
        batch["attention_mask"] = torch.stack([_padded(torch.ones_like(r["input_ids"]), length, 0) for r in rows])
    return {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}


def _padded(row: Tensor, length: int, value: int) -> Tensor:
    return torch.nn.functional.pad(row, (0, length - len(row)), value=value) if row.ndim else row


def read(model: PreTrainedModel, data: Any, tokenizer: Any, window: int) -> Examples:
    """Sequences from texts, token ids ``[N, L]`` or ``[N]``, or batches as a tokenizer makes them; None: sampled.

    Raises:
        CalibrationError: They cannot be used; the message says why.
    """
    if data is None or isinstance(data, str | Tensor) or _are_texts(data):
        with paused(model):  # if they are sampled, then from the network of QCFS activations
            batches, described = windows(model, data, tokenizer)
        rows = [{"input_ids": part.cpu()} for batch in batches for row in batch for part in row.split(window)]
        rows = [row for row in rows if len(row["input_ids"]) > 1]
    else:
        rows, described = list(_rows(model, data, min(window, context_length(model)))), {"source": "batches"}
    if not rows:
        raise CalibrationError("calibration holds no sequence of two tokens or more: give more text")
    digest = hashlib.sha256()
    for row in rows:
        digest.update(row["input_ids"].numpy().tobytes())
    source = {"sequences": len(rows), "tokens": sum(len(row["input_ids"]) for row in rows)}
    return Examples(rows, described | source | {"sha256": digest.hexdigest()})


def _are_texts(data: Any) -> bool:
    return isinstance(data, list | tuple) and all(isinstance(text, str) for text in data)


def _rows(model: PreTrainedModel, batches: Any, window: int) -> Iterator[Batch]:
    if not isinstance(batches, Iterable):
        raise CalibrationError("calibration data must be texts, token ids [N, L], or batches with input_ids [B, S]")
    embedding: Any = model.get_input_embeddings()
    for batch in batches:
        ids = batch.get("input_ids") if isinstance(batch, Mapping) else None
        if not isinstance(ids, Tensor) or ids.ndim != 2 or ids.is_floating_point():
            raise CalibrationError("each calibration batch must be a mapping with token ids input_ids [B, S]")
        if int(ids.min()) < 0 or int(ids.max()) >= embedding.num_embeddings:
            raise CalibrationError(
                f"calibration ids must be integers from 0 to {embedding.num_embeddings - 1}, the model's vocabulary; "
                "was another model's tokenizer used?"
            )
        for i in range(len(ids)):
            row = {name: values[i].cpu() for name, values in batch.items() if isinstance(values, Tensor)}
            seen = row.get("attention_mask", torch.ones_like(row["input_ids"])).nonzero()
            end = int(seen[-1]) + 1 if len(seen) else 0
            if not 0 < end <= window:
                raise CalibrationError(
                    f"a calibration sequence has {end} tokens: from 1 to {window} are allowed (see window, and the "
                    "model's context)"
                )
            yield {name: values[:end] if values.ndim else values for name, values in row.items()}
