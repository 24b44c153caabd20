"""Responses made worse, one way at a time, each with a strength. A word carries the white space before it."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence

from spikeform.training.preference.options import CORRUPTIONS, PairOptions

TRIES = 8  # draws before a corruption is given up that leaves a response as it is


def words(text: str) -> list[str]:
    """Words with the white space before them; joined they are the text, but for white space at its end."""
    return re.findall(r"\s*\S+", text)


def corrupt(
    response: str, others: Sequence[str], unigrams: Sequence[str], options: PairOptions, rng: random.Random
) -> tuple[str, str] | None:
    """A worse response, and the name of what was done to it.

    Args:
        response: The chosen one.
        others: Responses to other prompts.
        unigrams: Words, each as often as it occurs.
        options: Weights and strengths.
        rng: Draws.

    Returns:
        None where the response stayed as it is (all its words are the same, say).
    """
    kind = rng.choices(CORRUPTIONS, [getattr(options, name) for name in CORRUPTIONS])[0]
    for _ in range(TRIES):
        if kind == "foreign":
            worse = rng.choice(others)
        elif kind == "shuffle":
            worse = "".join(_shuffled(words(response), options, rng))
        elif kind == "replace":
            worse = "".join(_replaced(words(response), options.replace_share, unigrams, rng))
        else:
            worse = "".join(_repeated(words(response), options.repeat_share, rng))
        if worse != response:
            return worse, kind
    return None


def _chosen_few(count: int, share: float, rng: random.Random) -> list[bool]:
    """Each with a probability, and one of them for sure."""
    sure = rng.randrange(count)
    return [i == sure or rng.random() < share for i in range(count)]


def _shuffled(said: list[str], options: PairOptions, rng: random.Random) -> list[str]:
    parts = [said[i : i + options.shuffle_words] for i in range(0, len(said), options.shuffle_words)]
    lost = _chosen_few(len(parts), options.shuffle_share, rng)
    return [
        word for part, now in zip(parts, lost, strict=True) for word in (rng.sample(part, len(part)) if now else part)
    ]


def _replaced(said: list[str], share: float, unigrams: Sequence[str], rng: random.Random) -> list[str]:
    lost = _chosen_few(len(said), share, rng)
    return [rng.choice(unigrams) if now else word for word, now in zip(said, lost, strict=True)]


def _repeated(said: list[str], share: float, rng: random.Random) -> list[str]:
    span = max(1, round(share * len(said)))
    start = rng.randrange(max(1, len(said) - 2 * span + 1))
    again = said[start : start + span]
    return (said[: start + span] + again + said[start + 2 * span :])[: len(said)]
