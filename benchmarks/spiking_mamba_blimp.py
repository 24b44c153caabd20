"""BLiMP without lm-evaluation-harness, pair by pair, for machines that lack it; the same pairs come out right.

As the harness does: a sentence, with a space before it, is read after the tokenizer's end-of-text token, and of each
pair the one with the higher sum of log probabilities is the model's choice; a tie counts as right. The answers of
two models to the same pairs can then be compared pair by pair.
"""

from __future__ import annotations

import json
import math
import tarfile
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

IGNORED = -100


class Pairs:
    """The tokenised pairs of the archive.

    Args:
        archive: ``blimp.tar.xz``: one ``.jsonl`` a paradigm.
        tokenizer: Of the model.
        limit: Pairs of each paradigm, the first ones; None takes all.

    Attributes:
        rows: Token ids of all sentences, good and bad in turn, each after the end-of-text token.
        sizes: Pairs of each paradigm, by name, in the order of ``rows``.
    """

    def __init__(self, archive: Path, tokenizer: Any, limit: int | None = None) -> None:
        sentences, self.sizes = [], {}
        with tarfile.open(archive) as opened:
            for member in sorted(opened.getmembers(), key=lambda m: m.name):
                file = opened.extractfile(member) if member.name.endswith(".jsonl") else None
                if file is None:
                    continue
                lines = [json.loads(line) for line in file.read().decode("utf-8").splitlines()[:limit]]
                self.sizes[Path(member.name).stem] = len(lines)
                sentences += [" " + line[key] for line in lines for key in ("sentence_good", "sentence_bad")]
        if not sentences:
            raise ValueError(f"{archive} holds no pairs: a .tar.xz with one .jsonl a paradigm is wanted")
        encoded = tokenizer(sentences, add_special_tokens=False)["input_ids"]
        self.rows = [[tokenizer.eos_token_id, *ids] for ids in encoded]


@torch.no_grad()
def answers(model: nn.Module, pairs: Pairs, batch_size: int = 512) -> Tensor:
    """Whether the model takes the good sentence of each pair: bool ``[pairs]``, on the CPU."""
    device = next(model.parameters()).device
    order = sorted(range(len(pairs.rows)), key=lambda i: len(pairs.rows[i]))  # little padding
    sums = torch.zeros(len(order), dtype=torch.float64)
    for start in range(0, len(order), batch_size):
        numbers = order[start : start + batch_size]
        longest = len(pairs.rows[numbers[-1]])
        ids = torch.zeros(len(numbers), longest, dtype=torch.int64)
        labels = torch.full_like(ids, IGNORED)
        for i, number in enumerate(numbers):
            row = torch.tensor(pairs.rows[number])
            ids[i, : len(row)] = row
            labels[i, : len(row) - 1] = row[1:]
        # Padding stands at the end, where no causal model looks at it.
        logits = model(input_ids=ids.to(device), use_cache=False).logits.float()
        nats = F.cross_entropy(
            logits.flatten(0, 1), labels.to(device).flatten(), reduction="none", ignore_index=IGNORED
        )
        sums[numbers] = -nats.view(len(numbers), longest).double().sum(1).cpu()
    return sums[::2] >= sums[1::2]


def accuracy(right: Tensor, pairs: Pairs) -> dict[str, float]:
    """Mean over the paradigms, each weighing the same, its standard error, and the number of pairs."""
    shares = [(part.double().mean().item(), len(part)) for part in right.split(list(pairs.sizes.values()))]
    variance = math.fsum(share * (1 - share) / max(size - 1, 1) for share, size in shares)
    return {
        "acc": math.fsum(share for share, _ in shares) / len(shares),
        "acc_stderr": math.sqrt(variance) / len(shares),
        "n": len(right),
    }


def difference(right: Tensor, other: Tensor, pairs: Pairs) -> dict[str, float]:
    """Mean over the paradigms of ``right`` less ``other``, in points, and its standard error from the pairs."""
    gaps = (right.double() - other.double()).split(list(pairs.sizes.values()))
    variance = math.fsum(gap.var().item() / len(gap) if len(gap) > 1 else 0.0 for gap in gaps)
    mean = math.fsum(gap.mean().item() for gap in gaps) / len(gaps)
    return {"points": 100 * mean, "stderr": 100 * math.sqrt(variance) / len(gaps)}
