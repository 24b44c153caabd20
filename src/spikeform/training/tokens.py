"""Text as token ids on disk: tokenised once, then memory-mapped, so that it costs neither time nor memory again."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from spikeform.errors import CalibrationError
from spikeform.training.errors import TrainingError

PIECE, PIECES = 1 << 15, 64  # characters of a piece, pieces given to the tokenizer at once
_BREAK = re.compile(r"\n\n+(?=\S)")
Progress = Callable[[int, int], None]


@dataclass
class Tokens:
    """One stream of token ids.

    Attributes:
        ids: ``[N]``, unsigned integers; a memory map where it comes from files.
        source: What they are, for the record: file names, sha256, number of tokens.
    """

    ids: np.ndarray
    source: dict[str, Any] = field(default_factory=dict)


def from_ids(ids: Tensor) -> Tokens:
    """Token ids that the caller has: ``[N]``, or rows that are read one after another."""
    if ids.is_floating_point() or ids.dtype == torch.bool or not ids.numel() or int(ids.min()) < 0:
        raise TrainingError("token ids must be a tensor of integers from 0 on, [N] or [R, N], not empty")
    array = ids.reshape(-1).cpu().numpy()
    digest = hashlib.sha256(array.astype("<i8").tobytes()).hexdigest()
    return Tokens(array, {"files": None, "sha256": digest, "tokens": len(array)})


def from_files(files: Sequence[Path], tokenizer: Any, cache: Path, progress: Progress | None = None) -> Tokens:
    r"""The files' documents, joined by blank lines as by :func:`spikeform.evaluation.tokenize`.

    Long documents are cut at blank lines for the tokenizer's sake. The ids are kept in ``cache`` under a name made
    of the files' content and the tokenizer, and read from there by any later run.

    Raises:
        ValueError: A file is missing, damaged or holds no text.
    """
    hashes = {file.name: _sha256(file) for file in files}
    key = hashlib.sha256(json.dumps([list(hashes.items()), tokenizer_mark(tokenizer)]).encode()).hexdigest()[:16]
    path = cache / f"tokens-{key}.bin"
    dtype = np.dtype("<u2" if len(tokenizer) <= 1 << 16 else "<u4")
    if not path.is_file():
        cache.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".partial-{os.getpid()}")
        with partial.open("wb") as stream:
            for part in _encoded(files, tokenizer, progress):
                stream.write(np.asarray(part, dtype).tobytes())
        os.replace(partial, path)
    if not path.stat().st_size:
        raise CalibrationError(f"{files[0]}: the tokenizer makes no token of its text")
    ids = np.memmap(path, dtype, "r")
    return Tokens(ids, {"files": [f.name for f in files], "sha256": hashes, "tokens": len(ids)})


def from_texts(texts: Sequence[str], tokenizer: Any) -> Tokens:
    """As :func:`from_files`, of documents in memory, which are not kept."""
    if not any(text.strip() for text in texts):
        raise TrainingError("there is no text to train on: give at least one document that is not empty")
    ids = [i for part in _in_batches(_pieces(texts), tokenizer) for i in part]
    array = np.asarray(ids, np.int64)
    digest = hashlib.sha256("\n\n".join(texts).encode()).hexdigest()
    return Tokens(array, {"files": None, "sha256": digest, "tokens": len(array)})


def tokenizer_mark(tokenizer: Any) -> str:
    """A mark of what a tokenizer makes of text; another tokenizer has another."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    content = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()


def _encoded(files: Sequence[Path], tokenizer: Any, progress: Progress | None) -> Iterator[list[int]]:
    from spikeform.evaluation import load_text

    for number, file in enumerate(files):
        documents = load_text(file)
        more = number + 1 < len(files)
        yield from _in_batches(_pieces([*documents, ""] if more else documents), tokenizer)
        if progress is not None:
            progress(number + 1, len(files))


def _pieces(documents: Sequence[str]) -> Iterator[str]:
    """The documents with blank lines between them, in pieces that begin after a blank line where there is one."""
    last = len(documents) - 1
    for number, document in enumerate(documents):
        text = document + ("\n\n" if number < last else "")
        begin = 0
        while len(text) - begin > 2 * PIECE:
            found = _BREAK.search(text, begin + PIECE, begin + 2 * PIECE)
            end = found.end() if found else begin + PIECE
            yield text[begin:end]
            begin = end
        yield text[begin:]


def _in_batches(pieces: Iterator[str], tokenizer: Any) -> Iterator[list[int]]:
    batch: list[str] = []
    for piece in pieces:
        batch.append(piece)
        if len(batch) == PIECES:
            yield from _encode(batch, tokenizer)
            batch = []
    if batch:
        yield from _encode(batch, tokenizer)


def _encode(batch: list[str], tokenizer: Any) -> list[list[int]]:
    # verbose=False: a stream is longer than the context on purpose, so no warning about it.
    return tokenizer(batch, add_special_tokens=False, verbose=False, return_attention_mask=False)["input_ids"]


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
