"""Preference pairs that a dense model makes itself: its own continuation of a prompt against a worse one."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from spikeform.conversion.data import context_length, sample
from spikeform.evaluation.perplexity import device_of, evaluating
from spikeform.training.errors import TrainingError
from spikeform.training.preference.corruption import corrupt, words
from spikeform.training.preference.options import PairOptions
from spikeform.training.preference.pairs import Pair, Pairs, split_by_prompt

LEAST_WORDS = 4  # of a response


def preference_pairs(
    model: Any, tokenizer: Any, texts: Sequence[str] | None = None, options: PairOptions | None = None
) -> Pairs:
    """Make pairs, the same for the same seed (on one machine).

    A prompt is a window of a text, or of the model's own samples; the chosen response is how the dense model, or the
    text, goes on; the rejected one is that response made worse, see :class:`PairOptions`. A prompt ends with a word,
    and so does a response.

    Args:
        model: The dense model, a causal language model.
        tokenizer: Its own.
        texts: Documents to take prompts from; None: samples of the model's.
        options: How many, how long, how they are made worse.

    Returns:
        Pairs; train and held-out ones have other prompts, and a foreign response comes from the same part.

    Raises:
        TrainingError: The texts are too short, too few or not the model's, or the model's responses too dull.
    """
    options = options or PairOptions()
    if options.chosen == "text" and texts is None:
        raise TrainingError("responses that are the text's own need texts: give some, or chosen='sampled'")
    longest = context_length(model) if getattr(model.config, "max_position_embeddings", None) else None
    if longest is not None and options.prompt_tokens + options.response_tokens > longest:
        raise TrainingError(f"prompt and response are longer than the model's context of {longest} tokens")
    ids = _windows(model, tokenizer, texts, options)
    rows = _chosen(model, tokenizer, ids, options)
    found = dict(sorted(rows.items()))  # one response a prompt
    if len(found) < 2:
        raise TrainingError(
            f"only {len(found)} of {len(ids)} continuations have a prompt and at least {LEAST_WORDS} words: give other "
            "texts or more response_tokens"
        )
    plain: list[Pair] = [{"prompt": prompt, "chosen": chosen} for prompt, chosen in found.items()]
    parts = split_by_prompt(plain, options.held_out, options.seed)
    rng = random.Random(options.seed)
    made = [_with_rejected(part, options, rng) for part in parts]
    if not made[0]:
        raise TrainingError("no response could be made worse: all its words are the same. Give more response_tokens")
    names = ("train", "held_out")
    card = {
        "model": getattr(model.config, "_name_or_path", "") or type(model).__name__,
        "prompts": "the model's own samples" if texts is None else f"{len(texts)} texts",
        "options": options.to_dict(),
        "dropped": len(ids) - sum(map(len, made)),
        "corruptions": {
            n: dict(Counter(row["corruption"] for row in part)) for n, part in zip(names, made, strict=True)
        },
    }
    return Pairs(made[0], made[1], card, end_token=False)


def _windows(model: Any, tokenizer: Any, texts: Sequence[str] | None, options: PairOptions) -> Tensor:
    """``[count, L]``: disjoint windows of prompts, and of what follows them where that is the response."""
    if texts is None:
        starts = range(0, options.count, options.batch_size)
        sizes = [min(options.batch_size, options.count - start) for start in starts]
        parts = [sample(model, n, options.prompt_tokens, options.seed + i).cpu() for i, n in enumerate(sizes)]
        return torch.cat(parts)
    length = options.prompt_tokens + (options.response_tokens if options.chosen == "text" else 0)
    rows = [torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]) for text in texts]
    found = [row[: len(row) // length * length].view(-1, length) for row in rows if len(row) >= length]
    windows = torch.cat(found) if found else torch.empty(0, length)
    if len(windows) < options.count:
        raise TrainingError(
            f"the texts hold {len(windows)} windows of {length} tokens, and {options.count} pairs are wanted: give "
            "more text, or a smaller count"
        )
    if int(windows.max()) >= model.get_input_embeddings().num_embeddings:
        raise TrainingError("the texts hold a token outside the model's vocabulary: use this model's tokenizer")
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(options.seed))
    return windows[order[: options.count]]


@torch.no_grad()
def _chosen(model: Any, tokenizer: Any, ids: Tensor, options: PairOptions) -> dict[str, str]:
    """Chosen response of each prompt, cut at whole words."""
    if options.chosen == "sampled":
        device, done = device_of(model), []
        # generate() draws from the global generators, which are left as they were.
        with evaluating(model), torch.random.fork_rng():
            torch.manual_seed(options.seed)
            for batch in ids.split(options.batch_size):
                done.append(
                    model.generate(
                        batch.to(device),
                        attention_mask=torch.ones_like(batch).to(device),
                        do_sample=True,
                        temperature=options.temperature,
                        top_k=0,
                        top_p=1.0,
                        min_new_tokens=options.response_tokens,  # the end token cannot be drawn
                        max_new_tokens=options.response_tokens,
                        pad_token_id=0,  # nothing is padded
                    ).cpu()
                )
        ids = torch.cat(done)
    found = {}
    for row in ids:
        prompt, whole = (
            tokenizer.decode(part, skip_special_tokens=True) for part in (row[: options.prompt_tokens], row)
        )
        asked = "".join(words(prompt)[:-1])  # its last word may go on
        response = "".join(words(whole[len(asked) :])[:-1])
        if asked.strip() and whole.startswith(asked) and len(words(response)) >= LEAST_WORDS:
            found[asked] = response
    return found


def _with_rejected(rows: list[Pair], options: PairOptions, rng: random.Random) -> list[Pair]:
    responses = [row["chosen"] for row in rows]
    unigrams = [word for response in responses for word in words(response)]
    made = []
    for row in rows:
        worse = corrupt(row["chosen"], responses, unigrams, options, rng)
        if worse is not None:
            made.append(row | {"rejected": worse[0], "corruption": worse[1]})
    return made
