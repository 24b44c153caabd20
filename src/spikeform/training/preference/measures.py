"""What preference tuning is judged by: pairs ranked rightly, perplexity, and how much the model spikes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from spikeform.evaluation.perplexity import device_of, evaluating, perplexity
from spikeform.spikes.trace import Firing, Product, observe
from spikeform.training.errors import TrainingError
from spikeform.training.preference.pairs import Pair, Pairs

Z = 1.959963984540054  # of a 95% interval


@dataclass(frozen=True)
class Ranking:
    """Log-probabilities of the responses of pairs.

    Args:
        summed_N2: Of the chosen and the rejected response of each pair, summed over tokens: fp64 ``[N, 2]``.
        tokens_N2: Their tokens.
        kinds: What was done to each rejected one, where it is known.
    """

    summed_N2: Tensor
    tokens_N2: Tensor
    kinds: tuple[str, ...]

    def wins(self, per_token: bool = False) -> Tensor:
        """Whether the chosen response is the likelier one: bool ``[N]``; a tie is lost."""
        found_N2 = self.summed_N2 / self.tokens_N2 if per_token else self.summed_N2
        return found_N2[:, 0] > found_N2[:, 1]

    def to_dict(self) -> dict[str, Any]:
        """Accuracies with 95% intervals (Wilson), summed and per token, and by what was done to the rejected one."""
        found: dict[str, Any] = {"pairs": len(self.kinds)}
        for name, per_token in (("summed", False), ("per_token", True)):
            wins = self.wins(per_token)
            right = int(wins.sum())
            found[name] = {"accuracy": round(right / len(wins), 6), "interval": wilson(right, len(wins))}
            kinds = sorted({kind for kind in self.kinds if kind})
            for kind in kinds:
                of_kind = wins[torch.tensor([kind == other for other in self.kinds])]
                found[name].setdefault("by_corruption", {})[kind] = round(float(of_kind.double().mean()), 6)
        return found


def token_ids(pair: Pair, tokenizer: Any, end_token: bool) -> tuple[list[int], list[int], list[int]]:
    """Prompt, chosen and rejected response as TRL cuts them: where the tokens of either text leave the prompt's.

    Without ``end_token`` a response that was cut gets no end token.
    """
    end = tokenizer.eos_token if end_token else ""
    prompt = tokenizer(pair["prompt"])["input_ids"]
    both = []
    for name in ("chosen", "rejected"):
        text = pair[name] if pair[name].endswith(end) else pair[name] + end
        both.append(tokenizer(pair["prompt"] + text)["input_ids"])
    length = min(_common(prompt, ids) for ids in both)
    return prompt[:length], both[0][length:], both[1][length:]


def _common(a: list[int], b: list[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


@torch.no_grad()
def rank(
    model: Any, pairs: list[Pair], tokenizer: Any, *, end_token: bool = True, max_length: int = 512, batch_size: int = 8
) -> Ranking:
    """Log-probabilities of all responses, in fp32, sums in fp64.

    Args:
        model: A causal language model, measured in evaluation mode as it is: a spiking one spikes.
        pairs: At least one.
        tokenizer: The model's.
        end_token: See :class:`Pairs`.
        max_length: Tokens of prompt and response; longer ones are cut at the end.
        batch_size: Pairs at once.

    Raises:
        TrainingError: There are no pairs, or a prompt alone fills ``max_length``.
    """
    if not pairs:
        raise TrainingError("there are no pairs to measure on")
    sequences = []
    for pair in pairs:
        prompt, *responses = token_ids(pair, tokenizer, end_token)
        if len(prompt) >= max_length or not all(responses):
            raise TrainingError(
                f"a pair has no response within max_length={max_length} tokens after its prompt of {len(prompt)}: give "
                "a larger max_length, or drop the pair"
            )
        sequences += [(len(prompt), (prompt + response)[:max_length]) for response in responses]
    # Rows of like length side by side; each pair's two stay where they belong.
    order = sorted(range(len(sequences)), key=lambda i: len(sequences[i][1]))
    summed, tokens = (torch.zeros(len(sequences), dtype=torch.float64) for _ in range(2))
    with evaluating(model):
        for start in range(0, len(order), 2 * batch_size):
            numbers = order[start : start + 2 * batch_size]
            summed[numbers] = response_log_probs(model, [sequences[i] for i in numbers])
            for i in numbers:
                tokens[i] = len(sequences[i][1]) - max(1, sequences[i][0])
    return Ranking(summed.view(-1, 2), tokens.view(-1, 2), tuple(pair.get("corruption", "") for pair in pairs))


def response_log_probs(model: Any, sequences: list[tuple[int, list[int]]], left: bool = False) -> Tensor:
    """Summed log-probability of the end of each sequence: fp64 ``[B]``.

    Args:
        model: A causal language model.
        sequences: For each, the tokens of its prompt, and all its tokens.
        left: Pad at the left.
    """
    longest = max(len(ids) for _, ids in sequences)
    ids_BL, mask_BL = (torch.zeros(len(sequences), longest, dtype=torch.long) for _ in range(2))
    wanted_BL = torch.zeros(len(sequences), longest, dtype=torch.bool)
    for row, (prompt, ids) in enumerate(sequences):
        start = longest - len(ids) if left else 0
        ids_BL[row, start : start + len(ids)] = torch.tensor(ids)
        mask_BL[row, start : start + len(ids)] = 1
        wanted_BL[row, start + max(1, prompt) : start + len(ids)] = True
    device = device_of(model)
    logits_BLV = model(input_ids=ids_BL.to(device), attention_mask=mask_BL.to(device), use_cache=False).logits
    nats_BL = F.cross_entropy(logits_BLV[:, :-1].float().transpose(1, 2), ids_BL[:, 1:].to(device), reduction="none")
    return -(nats_BL.double().cpu() * wanted_BL[:, 1:]).sum(-1)


class Firings:
    """Counts what neurons send: an observer (:func:`spikeform.spikes.trace.observe`)."""

    def __init__(self) -> None:
        self.neurons = self.spikes = self.active = 0

    def __call__(self, event: Product | Firing) -> None:
        """Count one population."""
        if isinstance(event, Firing):
            count = event.train.count()
            self.neurons += count.numel()
            self.spikes += int(count.sum())
            self.active += int((count != 0).sum())


def text_measures(model: Any, ids: Tensor, window: int) -> dict[str, float]:
    """Perplexity on a text; of a spiking model, while it read that text, spikes per neuron and the share that spiked.

    Args:
        model: A causal language model.
        ids: Token ids ``[N]``.
        window: Tokens of a window; see :func:`spikeform.evaluation.perplexity`.
    """
    counted = Firings()
    with observe(counted):
        found = {"perplexity": perplexity(model, ids, window=window).perplexity}
    if counted.neurons:
        found["spikes_per_neuron"] = counted.spikes / counted.neurons
        found["density"] = counted.active / counted.neurons
    return {name: float(f"{value:.6g}") for name, value in found.items()}


def measure(
    model: Any, pairs: Pairs, tokenizer: Any, ids: Tensor | None, max_length: int, batch_size: int, window: int
) -> tuple[Ranking | None, dict[str, Any]]:
    """All measures of a model at rest: its ranking of the held-out pairs, and everything as a dict."""
    ranking, found = None, {}
    if pairs.held_out:
        sizes = {"max_length": max_length, "batch_size": batch_size}
        ranking = rank(model, pairs.held_out, tokenizer, end_token=pairs.end_token, **sizes)
        found["preference"] = ranking.to_dict()
    if ids is not None:
        found |= text_measures(model, ids, window)
    return ranking, found


def wilson(right: int, count: int) -> list[float]:
    """95% interval of a share, by Wilson's score."""
    p, z2 = right / count, Z * Z / count
    middle, half = p + z2 / 2, Z * math.sqrt(p * (1 - p) / count + z2 / (4 * count))
    return [round((middle + sign * half) / (1 + z2), 6) for sign in (-1, 1)]


def mcnemar(before: Tensor, after: Tensor) -> dict[str, Any]:
    """McNemar's exact test of two models on the same pairs: those won by one of them alone, and the two-sided p."""
    lost, won = int((before & ~after).sum()), int((~before & after).sum())
    n = lost + won
    tail = sum(math.comb(n, k) for k in range(min(lost, won) + 1))
    return {"lost": lost, "won": won, "p": float(f"{min(1.0, 2 * tail / 2**n):.3g}")}
