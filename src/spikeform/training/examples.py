"""What is trained on: windows of a token stream, masked windows, labelled sentences; and their order.

The n-th sequence of a run follows from the seed and n alone. So a resumed run sees what the stopped one would have
seen, on any number of devices, and nothing of the order has to be saved.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from spikeform.training.errors import TrainingError
from spikeform.training.tokens import Tokens

IGNORED = -100  # a label that is not predicted
MASKED_SHARE = 0.15
Batch = dict[str, Tensor]


class Examples(Protocol):
    """Sequences that can be visited in any order."""

    count: int
    shifts: int  # places at which the windows may begin; 1 where examples are what they are

    def batch(self, numbers: np.ndarray, shift: np.ndarray, keys: np.ndarray) -> Batch:
        """The examples ``numbers``, windows moved by ``shift`` tokens; ``keys`` seed what is random in each."""
        ...


class Windows:
    """Windows ``[B, W]`` of a stream, the next token of each to be predicted.

    Args:
        tokens: The stream.
        window: W.
    """

    def __init__(self, tokens: Tokens, window: int) -> None:
        self.ids, self.width, self.shifts = tokens.ids, window, window
        self.count = len(self.ids) // window
        if self.count == 0:
            raise TrainingError(
                f"the text has {len(self.ids)} tokens, fewer than one window of {window}: give more text or a smaller "
                "window"
            )

    def rows(self, numbers: np.ndarray, shift: np.ndarray) -> np.ndarray:
        """int64 ``[B, W]``."""
        # A window that would run over the end of the text, because of its shift, ends there.
        begin = np.minimum(numbers * self.width + shift, len(self.ids) - self.width)
        return self.ids[begin[:, None] + np.arange(self.width)].astype(np.int64)

    def batch(self, numbers: np.ndarray, shift: np.ndarray, keys: np.ndarray) -> Batch:
        """``input_ids`` and ``labels``: the ids one place to the left."""
        ids = torch.from_numpy(self.rows(numbers, shift))
        labels = torch.full_like(ids, IGNORED)
        labels[:, :-1] = ids[:, 1:]
        return {"input_ids": ids, "labels": labels}


class MaskedWindows(Windows):
    """Windows [CLS], W - 2 tokens, [SEP], of which 15% of the tokens, rounded, are to be predicted.

    Of these 80% are replaced by [MASK], 10% by any other token, 10% stay (Devlin et al. 2019, arXiv 1810.04805).

    Args:
        tokens: The stream.
        window: W.
        tokenizer: Names the special tokens.
    """

    def __init__(self, tokens: Tokens, window: int, tokenizer: Any) -> None:
        special: dict[str, Any] = {
            name: getattr(tokenizer, f"{name}_token_id", None) for name in ("cls", "sep", "mask")
        }
        if absent := [name for name, number in special.items() if number is None]:
            raise TrainingError(f"the tokenizer has no {absent[0]} token, which masked language modelling needs")
        if window < 8:
            raise TrainingError(f"window {window} is too short to mask 15% of it: take at least 8")
        super().__init__(tokens, window - 2)
        self.special = special
        self.ordinary = np.setdiff1d(np.arange(len(tokenizer)), tokenizer.all_special_ids)
        self.masked = round(MASKED_SHARE * self.width)

    def batch(self, numbers: np.ndarray, shift: np.ndarray, keys: np.ndarray) -> Batch:
        """``input_ids``, and ``labels``: the ids at the predicted places, -100 elsewhere."""
        rows = self.rows(numbers, shift)
        chance = uniform(keys, self.width + 2 * self.masked)
        order, shown, others = np.split(chance, [self.width, self.width + self.masked], axis=1)
        places = np.argpartition(order, self.masked, axis=1)[:, : self.masked]
        targets = np.take_along_axis(rows, places, 1)
        others = self.ordinary[(others * len(self.ordinary)).astype(np.int64)]
        inputs = np.where(shown < 0.8, self.special["mask"], np.where(shown < 0.9, others, targets))
        labels = np.full_like(rows, IGNORED)
        np.put_along_axis(labels, places, targets, 1)
        np.put_along_axis(rows, places, inputs, 1)
        edge = np.full((len(rows), 1), IGNORED)
        first, last = (np.full_like(edge, self.special[name]) for name in ("cls", "sep"))
        return {
            "input_ids": torch.from_numpy(np.concatenate((first, rows, last), 1)),
            "labels": torch.from_numpy(np.concatenate((edge, labels, edge), 1)),
        }


class Sentences:
    """Labelled sentences, each batch padded to its longest.

    Args:
        texts: The sentences.
        labels: A class for each.
        tokenizer: With a padding token.
        window: Longer sentences are cut at their end.
        classes: Classes of the model.
    """

    shifts = 1

    def __init__(self, texts: Sequence[str], labels: Sequence[int], tokenizer: Any, window: int, classes: int) -> None:
        if tokenizer.pad_token is None:
            raise TrainingError("the tokenizer has no padding token: set tokenizer.pad_token")
        if not texts or len(texts) != len(labels):
            raise TrainingError(f"{len(texts)} sentences with {len(labels)} labels: give one label to each")
        if max(labels) >= classes:
            raise TrainingError(
                f"there is a label {max(labels)}, but the model knows only {classes} classes, from 0 on"
            )
        self.ids = tokenizer(list(texts), truncation=True, max_length=window)["input_ids"]
        self.labels, self.pad, self.count = np.asarray(labels, np.int64), tokenizer.pad_token_id, len(texts)

    def batch(self, numbers: np.ndarray, shift: np.ndarray, keys: np.ndarray) -> Batch:
        """``input_ids``, ``attention_mask`` ``[B, S]`` and ``labels`` ``[B]``."""
        rows = [self.ids[number] for number in numbers]
        ids = np.full((len(rows), max(map(len, rows))), self.pad, np.int64)
        mask = np.zeros_like(ids)
        for i, row in enumerate(rows):
            ids[i, : len(row)], mask[i, : len(row)] = row, 1
        return {
            "input_ids": torch.from_numpy(ids),
            "attention_mask": torch.from_numpy(mask),
            "labels": torch.from_numpy(self.labels[numbers]),
        }


class Stream(Dataset):
    """All sequences of a run, one after another: each epoch in another order, its windows cut at another place.

    Args:
        examples: What is visited.
        total: Sequences of the whole run.
        seed: Of order, cuts and masks.
    """

    def __init__(self, examples: Examples, total: int, seed: int) -> None:
        self.examples, self.total, self.seed = examples, total, seed
        self._orders: dict[int, tuple[np.ndarray, int]] = {}

    def __len__(self) -> int:
        return self.total

    def __getitem__(self, index: int) -> Batch:
        """One sequence, as a batch of one."""
        return self.__getitems__([index])

    def __getitems__(self, indices: list[int]) -> Batch:
        """A whole batch at once, which is what makes this fast."""
        epochs, places = np.divmod(np.asarray(indices, np.int64), self.examples.count)
        numbers, shift = np.empty_like(places), np.empty_like(places)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            order, begin = self._order(int(epoch))
            numbers[here], shift[here] = order[places[here]], begin
        return self.examples.batch(numbers, shift, keys_of(self.seed, np.asarray(indices)))

    def _order(self, epoch: int) -> tuple[np.ndarray, int]:
        if epoch not in self._orders:
            rng = np.random.default_rng((self.seed, epoch, 0))
            self._orders = {k: v for k, v in self._orders.items() if k == epoch - 1}  # a batch may span two
            self._orders[epoch] = rng.permutation(self.examples.count), int(rng.integers(self.examples.shifts))
        return self._orders[epoch]


def held_out_batches(examples: Examples, size: int, rank: int = 0, devices: int = 1) -> Iterator[Batch | None]:
    """All examples in their own order, cut at the beginning of the text, with the same masks each time.

    Of every ``devices`` batches the ``rank``-th one; None where there is none left for this one.
    """
    for start in range(0, examples.count, size * devices):
        numbers = np.arange(start, min(start + size * devices, examples.count))[rank * size : (rank + 1) * size]
        yield examples.batch(numbers, np.zeros_like(numbers), keys_of(0, numbers)) if len(numbers) else None


def keys_of(seed: int, numbers: np.ndarray) -> np.ndarray:
    """uint64 ``[B]``: a random key for each number."""
    return _mixed(_mixed(np.array([seed], np.uint64)) + numbers.astype(np.uint64))


def uniform(keys: np.ndarray, count: int) -> np.ndarray:
    """``[B, count]`` in [0, 1): for each key its own, the same each time (SplitMix64, Steele et al. 2014)."""
    places = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    return (_mixed(keys[:, None] + places) >> np.uint64(11)) * 2.0**-53


def _mixed(x: np.ndarray) -> np.ndarray:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
