"""Labelled sentences, for sequence classifiers: from a TSV file, and as padded batches."""

from __future__ import annotations

import gzip
import lzma
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spikeform.evaluation.perplexity import check_batch_size

UNPACK = {".xz": lzma.decompress, ".gz": gzip.decompress}


def load_labelled(path: str | Path, text: str = "sentence", label: str = "label") -> tuple[list[str], list[int]]:
    """Sentences and their classes, as GLUE's single-sentence tasks give them (SST-2, CoLA with a header).

    Args:
        path: a ``.tsv``, also as ``.tsv.xz`` or ``.tsv.gz``: UTF-8, a header that names the columns, then one
            example a line, columns separated by tabs. There is no quoting: a quotation mark is text.
        text: the column of the sentence.
        label: the column of the class, an integer from 0 on.

    Returns:
        The sentences, without the blanks around them, and as many labels; at least one.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is no TSV by its name, damaged, without the columns or without examples, or a line has
            another number of columns, no sentence, or a label that is no class.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path} of labelled sentences")
    unpack = UNPACK.get(path.suffix.lower())
    if Path(path.stem if unpack else path.name).suffix.lower() != ".tsv":
        raise ValueError(f"{path}: labelled sentences are read from .tsv, .tsv.xz or .tsv.gz")
    try:
        data = path.read_bytes()
        lines = (unpack(data) if unpack else data).decode("utf-8").split("\n")
    except (lzma.LZMAError, gzip.BadGzipFile, EOFError) as error:
        raise ValueError(f"{path} is damaged or truncated and cannot be decompressed: {error}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from None
    header = lines[0].removeprefix("\ufeff").rstrip("\r").split("\t")
    if missing := [column for column in (text, label) if column not in header]:
        raise ValueError(f"{path} has no column {' and no '.join(missing)}: its header is {header}")
    texts, labels = [], []
    for number, line in enumerate(lines[1:], 2):
        if not line.strip():
            continue
        fields = line.rstrip("\r").split("\t")
        if len(fields) != len(header):
            raise ValueError(f"{path}, line {number}: {len(fields)} columns, but the header names {len(header)}")
        sentence, given = fields[header.index(text)].strip(), fields[header.index(label)].strip()
        if not sentence:
            raise ValueError(f"{path}, line {number}: there is no {text}")
        if not (given.isascii() and given.isdigit()):
            raise ValueError(f"{path}, line {number}: the {label} {given!r} is no class: use 0, 1, ...")
        texts.append(sentence)
        labels.append(int(given))
    if not texts:
        raise ValueError(f"{path} holds no labelled sentences")
    return texts, labels


def labelled_batches(
    tokenizer: Any,
    texts: Sequence[str],
    labels: Sequence[int] | None = None,
    batch_size: int = 32,
    *,
    max_length: int | None = None,
    device: torch.device | str = "cpu",
) -> Iterator[dict[str, Tensor]]:
    """Batches for a sequence classifier, in the order given, each padded to its longest sentence.

    Args:
        tokenizer: the model's Hugging Face tokenizer, with a padding token.
        texts: the sentences.
        labels: a class for each, or None.
        batch_size: sentences in a batch, the last one may have fewer.
        max_length: ids at most, special tokens included; longer sentences are cut at their end. None takes the
            tokenizer's ``model_max_length``.
        device: where the tensors are put.

    Yields:
        What the tokenizer returns, tensors ``[B, S]``, and with ``labels`` int64 ``[B]`` where given: as
        :func:`classification_agreement` takes them.

    Raises:
        ValueError: at the first batch, if there are no texts, not as many labels, no padding token, or
            ``batch_size`` is below 1.
    """
    check_batch_size(batch_size)
    if isinstance(texts, str) or not texts:
        raise ValueError("there are no sentences to classify: pass a list with at least one")
    if labels is not None and len(labels) != len(texts):
        raise ValueError(f"{len(texts)} sentences, but {len(labels)} labels: give one label to each")
    if tokenizer.pad_token is None:
        raise ValueError("the tokenizer has no padding token: set tokenizer.pad_token")
    for start in range(0, len(texts), batch_size):
        part = list(texts[start : start + batch_size])
        encoded = tokenizer(part, padding=True, truncation=True, max_length=max_length, return_tensors="pt")
        batch = {name: tensor.to(device) for name, tensor in encoded.items()}
        if labels is not None:
            batch["labels"] = torch.tensor(list(labels[start : start + batch_size]), device=device)
        yield batch
