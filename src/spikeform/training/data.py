"""From what a user has (files, texts, ids, labelled sentences) to examples of a task."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from spikeform.evaluation.perplexity import check_context, vocabulary_of
from spikeform.training import tokens
from spikeform.training.errors import TrainingError
from spikeform.training.examples import Examples, MaskedWindows, Sentences, Windows
from spikeform.training.options import TrainOptions


@dataclass(frozen=True)
class Data:
    """Examples, and what they are for the record."""

    examples: Examples
    source: dict[str, Any]


def read(data: Any, options: TrainOptions, tokenizer: Any, model: Any, cache: Path) -> Data:
    """Examples of ``options.task``.

    Raises:
        TrainingError: The data are of no known kind, too short, or do not fit the model.
        ValueError: A file is missing or damaged, or the window exceeds the model's context.
    """
    check_context(model, options.window)
    files, texts = _sorted_out(data)
    if options.task == "classify":
        return _labelled(files, options, tokenizer, model)
    if isinstance(data, Tensor):
        stream = tokens.from_ids(data)
    else:
        stream = tokens.from_files(files, tokenizer, cache) if files else tokens.from_texts(texts, tokenizer)
    known, highest = vocabulary_of(model), int(stream.ids.max())
    if known is not None and highest >= known:
        raise TrainingError(
            f"the text holds the token {highest}, outside the model's vocabulary of {known}: use this model's tokenizer"
        )
    if options.task == "masked":
        return Data(MaskedWindows(stream, options.window, tokenizer), stream.source)
    return Data(Windows(stream, options.window), stream.source)


def _sorted_out(data: Any) -> tuple[list[Path], list[str]]:
    """Paths, or else texts. A lone string is a path; a list of strings is texts."""
    if isinstance(data, Tensor):
        return [], []
    if isinstance(data, str | Path):
        return [Path(data)], []
    items = list(data) if isinstance(data, Sequence) else []
    if items and all(isinstance(item, Path) for item in items):
        return items, []
    if items and all(isinstance(item, str) for item in items):
        return [], items
    raise TrainingError("data must be a path, a list of Paths, a list of texts, or a tensor of token ids")


def _labelled(files: list[Path], options: TrainOptions, tokenizer: Any, model: Any) -> Data:
    from spikeform.evaluation.labelled import load_labelled

    if not files:
        raise TrainingError("classify is trained on files of labelled sentences: give a path, or a list of Paths")
    texts: list[str] = []
    labels: list[int] = []
    for file in files:
        more_texts, more_labels = load_labelled(file)
        texts += more_texts
        labels += more_labels
    examples = Sentences(texts, labels, tokenizer, options.window, model.config.num_labels)
    digest = hashlib.sha256(json.dumps([texts, labels]).encode()).hexdigest()
    return Data(examples, {"files": [f.name for f in files], "sha256": digest, "sentences": len(texts)})
