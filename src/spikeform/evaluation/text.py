"""What is measured on: text from files, token streams, and sequences sampled from a model itself."""

from __future__ import annotations

import gzip
import json
import lzma
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from spikeform.conversion.data import cache_name
from spikeform.evaluation.perplexity import (
    check_batch_size,
    check_context,
    context_of,
    device_of,
    evaluating,
    text_config,
)

PLAIN = (".txt", ".text", ".md", ".raw", ".tokens", "")


def data_root(folder: str | Path | None = None) -> Path:
    """The folder with evaluation data: the argument, else the environment variable SPIKEFORM_DATA.

    Raises:
        FileNotFoundError: if neither is given, or the folder does not exist.
    """
    given = folder or os.environ.get("SPIKEFORM_DATA")
    if not given:
        raise FileNotFoundError(
            "no evaluation data: set the environment variable SPIKEFORM_DATA to its folder, or pass it"
        )
    path = Path(given).expanduser()
    if not path.is_dir():
        raise FileNotFoundError(
            f"the evaluation data folder {path} does not exist: set SPIKEFORM_DATA to one that does"
        )
    return path


def load_text(path: str | Path) -> list[str]:
    """The documents of a file.

    Args:
        path: a plain text (``.txt``, ``.md``, ``.raw``, ``.tokens``: one document, unchanged), a ``.json``
            list of strings, or a ``.jsonl`` with a "text" in each line; each also as ``.xz`` or ``.gz``.

    Returns:
        The documents, at least one, none of them empty.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the kind of file is unknown, or it is truncated, not UTF-8, malformed or empty.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no text file {path}")
    suffixes = [suffix.lower() for suffix in path.suffixes]
    packing = suffixes.pop() if suffixes and suffixes[-1] in (".xz", ".gz") else ""
    kind = suffixes[-1] if suffixes else ""
    if kind not in (*PLAIN, ".json", ".jsonl") and not packing:
        raise ValueError(f"{path}: unknown kind of text {kind!r}: use .txt, .json or .jsonl, also as .xz or .gz")
    data = path.read_bytes()
    try:
        if packing:
            data = lzma.decompress(data) if packing == ".xz" else gzip.decompress(data)
        text = data.decode("utf-8")
    except (lzma.LZMAError, gzip.BadGzipFile, EOFError) as error:
        raise ValueError(f"{path} is damaged or truncated and cannot be decompressed: {error}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from None
    documents = {".json": from_json, ".jsonl": from_jsonl}.get(kind, lambda whole, _: [whole])(text, path)
    documents = [document for document in documents if document.strip()]
    if not documents:
        raise ValueError(f"{path} holds no text")
    return documents


def from_json(text: str, path: Path) -> list[str]:
    """The strings of a JSON list."""
    try:
        documents = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(documents, list) or not all(isinstance(document, str) for document in documents):
        raise ValueError(f"{path} is not a list of strings: a .json text file is one list with a string per document")
    return documents


def from_jsonl(text: str, path: Path) -> list[str]:
    """The "text" of each line."""
    documents = []
    for number, line in enumerate(text.split("\n"), 1):  # not splitlines: JSON may hold U+2028 as it is
        if not line.strip():
            continue
        try:
            documents.append(json.loads(line)["text"])
        except (json.JSONDecodeError, KeyError, TypeError):
            documents.append(None)
        if not isinstance(documents[-1], str):
            raise ValueError(f'{path}, line {number}: each line of a .jsonl must be an object with a string "text"')
    return documents


def tokenize(tokenizer: Any, documents: Sequence[str]) -> Tensor:
    r"""One stream of token ids: the documents joined by blank lines ("\n\n"), no special tokens added.

    Args:
        tokenizer: the model's Hugging Face tokenizer.
        documents: texts, as from :func:`load_text`.

    Returns:
        int64 ``[N]``.

    Raises:
        ValueError: if there is no text.
    """
    documents = [documents] if isinstance(documents, str) else list(documents)
    if not any(document.strip() for document in documents):
        raise ValueError("there is no text to tokenize: pass at least one document that is not empty")
    # verbose=False: a stream is longer than the context on purpose, so no warning about it.
    encoded = tokenizer("\n\n".join(documents), add_special_tokens=False, verbose=False)
    return torch.tensor(encoded["input_ids"], dtype=torch.int64)


def sample_ids(
    model: nn.Module, tokens: int, *, seed: int = 0, window: int | None = None, batch_size: int = 32
) -> Tensor:
    """Evaluation data that needs no text: sequences the dense model itself writes.

    Ancestral sampling at temperature 1, from the whole distribution, each sequence from the model's
    beginning-of-sequence token on and to its full length (an end-of-sequence token does not end it).

    On such data a model's own nats per token estimate its entropy, so its perplexity is lower than on human
    text; and log(perplexity_ratio) of a conversion estimates KL(dense || spiking), which is never below 0.

    Args:
        model: the dense causal language model.
        tokens: tokens wanted; rounded up to whole sequences.
        seed: of the sampling. One seed, one batch_size, one machine: the same sequences.
        window: ids in a sequence, the first included; None takes 512, or the model's context where shorter.
        batch_size: sequences sampled at once.

    Returns:
        int64 ``[S, window]`` on the CPU, S = ⌈tokens / window⌉. Measure on it with the same ``window``, so
        that each window is one sequence.

    Raises:
        ValueError: if ``tokens`` or ``window`` is below its least, ``window`` exceeds the model's context, or
            the model has no beginning-of-sequence token.
    """
    check_batch_size(batch_size)
    window = min(512, context_of(model) or 512) if window is None else window
    if tokens < 1 or window < 2:
        raise ValueError(f"tokens={tokens}, window={window}: sample at least 1 token, in windows of at least 2")
    check_context(model, window)
    bos = getattr(text_config(model), "bos_token_id", None)
    if bos is None:
        raise ValueError(
            "the model's config names no bos_token_id to begin a sample with: set it, or measure on a text"
        )
    generator = torch.Generator().manual_seed(seed)
    count = -(-tokens // window)
    ids_SW = torch.full((count, window), bos, dtype=torch.int64)
    with evaluating(model), torch.inference_mode():
        for rows_BW in ids_SW.split(batch_size):  # views: what is written here lands in ids_SW
            cache, name = None, cache_name(model)
            for i in range(window - 1):
                last_B1 = rows_BW[:, i : i + 1].to(device_of(model))
                out = model(input_ids=last_B1, use_cache=True, **{name: cache})
                cache = out[name]
                p_BV = out.logits[:, -1].double().softmax(-1).cpu()
                rows_BW[:, i + 1] = torch.multinomial(p_BV, 1, generator=generator)[:, 0]
    return ids_SW
