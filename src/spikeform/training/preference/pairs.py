r"""Preference pairs: two responses to a prompt, one better than the other; from files, or from the Hub by name.

A file has one pair a line, in TRL's standard form, ``{"prompt": "…", "chosen": "…", "rejected": "…"}``; its responses
may also be chats, lists of ``{"role": …, "content": …}``. A folder made by :meth:`Pairs.save` holds ``train.jsonl``,
``held_out.jsonl`` and ``card.json``, which says how they were made.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from spikeform.checkpoint.atomic import staged
from spikeform.errors import ForeignFolderError, SpikeformError
from spikeform.training.errors import TrainingError

TRAIN, HELD_OUT, CARD = "train.jsonl", "held_out.jsonl", "card.json"
KEYS = ("prompt", "chosen", "rejected")
Pair = dict[str, str]


@dataclass(frozen=True)
class Pairs:
    """Pairs of text, those to learn from and those to measure on, which have other prompts.

    Args:
        train: ``prompt``, ``chosen`` and ``rejected``, and ``corruption`` where it is known.
        held_out: The same.
        card: Where they come from.
        end_token: Whether a response ends with the tokenizer's end token (a whole answer), or was cut.
    """

    train: list[Pair]
    held_out: list[Pair] = field(default_factory=list)
    card: dict[str, Any] = field(default_factory=dict)
    end_token: bool = True

    def save(self, folder: str | Path) -> None:
        """Write a folder, whole or not at all.

        Raises:
            ForeignFolderError: It exists and is not empty.
            SpikeformError: It cannot be written.
        """
        target = Path(folder).resolve()
        if target.exists() and (not target.is_dir() or any(target.iterdir())):
            raise ForeignFolderError(f"cannot write pairs to {target}: it is not an empty folder. Choose another")
        try:
            with staged(target) as made:
                for name, rows in ((TRAIN, self.train), (HELD_OUT, self.held_out)):
                    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
                    (made / name).write_text(text, encoding="utf-8")
                card = json.dumps(self.card | {"end_token": self.end_token}, indent=1)
                (made / CARD).write_text(card + "\n", encoding="utf-8")
        except OSError as error:
            raise SpikeformError(f"cannot write pairs to {target}: {error}") from error

    def source(self, rows: list[Pair]) -> dict[str, Any]:
        """What some of the pairs are, for the record."""
        digest = hashlib.sha256(json.dumps([[row[key] for key in KEYS] for row in rows]).encode()).hexdigest()
        return {"pairs": len(rows), "sha256": digest, "end_token": self.end_token, "card": self.card}


def load_pairs(source: str | Path, tokenizer: Any = None, *, held_out: float = 0.1, seed: int = 0) -> Pairs:
    """Read pairs.

    Args:
        source: A folder of :meth:`Pairs.save`, a ``.jsonl`` file, or the name of a data set on the Hugging Face Hub
            (``datasets.load_dataset``), whose split ``train…`` is learned from and ``test…`` measured on.
        tokenizer: Its chat template turns chats into text.
        held_out: Share of the prompts to keep for measuring, where the source has no such part.
        seed: Of that choice.

    Raises:
        TrainingError: There is no such source, the Hub cannot be reached, or its rows are no pairs.
    """
    path = Path(source)
    if path.is_dir():
        card = _card(path / CARD)
        parts = [_rows(_lines(path / name), str(path / name), tokenizer) for name in (TRAIN, HELD_OUT)]
        return Pairs(parts[0], parts[1], card, bool(card.pop("end_token", True)))
    if path.is_file():
        rows, rest, name = _lines(path), [], path.name
    elif path.suffix in (".jsonl", ".json") or str(source).startswith((".", "/", "~")):
        raise TrainingError(f"there are no preference pairs at {source}")
    else:
        rows, rest, name = *_from_hub(str(source)), str(source)
    chats = not isinstance(next(iter(rows), {}).get("chosen", ""), str)
    parts = [_rows(part, name, tokenizer) for part in (rows, rest)]
    if not parts[1] and held_out:
        parts = split_by_prompt(parts[0], held_out, seed)
    return Pairs(parts[0], parts[1], {"source": name}, not chats)  # a chat template writes the end itself


def split_by_prompt(rows: list[Pair], share: float, seed: int) -> list[list[Pair]]:
    """Pairs to learn from, and pairs of other prompts to measure on: about ``share`` of the prompts."""
    prompts = sorted({row["prompt"] for row in rows})
    random.Random(seed).shuffle(prompts)
    held = set(prompts[: round(share * len(prompts))])
    return [[row for row in rows if (row["prompt"] in held) == wanted] for wanted in (False, True)]


def _lines(file: Path) -> list[Any]:
    try:
        lines = file.read_text(encoding="utf-8").split("\n")
        return [json.loads(line) for line in lines if line.strip()]
    except FileNotFoundError:
        raise TrainingError(f"there is no {file}: give a .jsonl file, or a folder of pairs that was saved") from None
    except (OSError, ValueError) as error:
        raise TrainingError(f"{file} is no file of preference pairs, one JSON object a line: {error}") from None


def _card(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        found = None
    if not isinstance(found, dict):
        raise TrainingError(f"{file.parent} is no folder of preference pairs: its {CARD} is missing or damaged")
    return found


def _from_hub(name: str) -> tuple[list[Any], list[Any]]:
    try:
        import datasets
    except ImportError:
        raise TrainingError("pairs from the Hub need datasets: pip install 'spikeform[prefer]'") from None
    try:
        found = datasets.load_dataset(name)
    except Exception as error:  # the Hub's, the network's and the file formats' own errors
        reason = (str(error).strip() or type(error).__name__).split("\n")[0]
        raise TrainingError(
            f"no preference pairs {name!r}: no file or folder has that name, and the Hugging Face Hub gave none "
            f"({reason})"
        ) from error
    parts = {str(key): part for key, part in found.items()}

    def split(*beginnings: str) -> list[Any]:
        named = [parts[key] for key in sorted(parts) if key.startswith(beginnings)]
        return list(next((part for part in named if {"chosen", "rejected"} <= set(part.column_names)), []))

    rows = split("train")
    if not rows:
        raise TrainingError(f"{name} has no split train… with the columns prompt, chosen and rejected: {sorted(parts)}")
    return rows, split("test", "valid")


def _rows(rows: Iterable[Any], name: str, tokenizer: Any) -> list[Pair]:
    found = []
    for number, row in enumerate(rows, 1):
        responses = [row.get(key) for key in ("chosen", "rejected")] if isinstance(row, dict) else []
        if responses and all(isinstance(response, list) for response in responses):
            row = row | _of_chat(row, tokenizer)
        if not isinstance(row, dict) or not all(isinstance(row.get(key), str) and row[key] for key in KEYS):
            raise TrainingError(f"{name}, row {number}: a pair has a prompt, a chosen and a rejected response")
        kind = row.get("corruption")
        found.append({key: row[key] for key in KEYS} | ({"corruption": kind} if isinstance(kind, str) else {}))
    return found


def _of_chat(row: dict[str, Any], tokenizer: Any) -> Pair:
    """Text as the chat template writes it."""
    if not getattr(tokenizer, "chat_template", None):
        raise TrainingError("the pairs are chats, and the tokenizer has no chat template to write them with")
    asked = row.get("prompt")
    whole: list[list[Any]] = [row["chosen"], row["rejected"]]
    if isinstance(asked, str):
        asked = [{"role": "user", "content": asked}]
    if not isinstance(asked, list):
        asked = []
    if whole[0][: len(asked)] != asked:  # the responses alone
        whole = [asked + responses for responses in whole]
    elif not asked:  # the prompt is what both begin with
        while len(asked) < min(map(len, whole)) - 1 and whole[0][len(asked)] == whole[1][len(asked)]:
            asked = whole[0][: len(asked) + 1]
    prompt = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    texts = [tokenizer.apply_chat_template(messages, tokenize=False) for messages in whole]
    if not all(text.startswith(prompt) for text in texts):
        raise TrainingError("the tokenizer's chat template does not write a prompt as the beginning of its chat")
    first = getattr(tokenizer, "bos_token", None)
    chosen, rejected = (text[len(prompt) :] for text in texts)
    if first and prompt.startswith(first) and tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id:
        prompt = prompt[len(first) :]  # the tokenizer writes it too
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}
