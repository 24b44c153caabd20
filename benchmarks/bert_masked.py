"""Masked language modelling: the embedded BERT's architecture, its training batches and its held-out figures.

A row is [CLS], 126 tokens of the stream, [SEP]. 19 of the 126 (15%) are predicted: of these 80% are replaced by
[MASK], 10% by any token, and 10% stay. A fixed number in each row keeps shapes static. Masks are drawn anew in
each step from the seed and the step alone.
"""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from bert_data import SPECIAL
from torch import nn

VOCABULARY, CONTEXT = 8192, 128
WINDOW = CONTEXT - 2  # tokens of the text in a row
PREDICTED = round(0.15 * WINDOW)
PROTOCOL = (
    f"rows of [CLS], {WINDOW} tokens, [SEP], non-overlapping over the concatenated text; {PREDICTED} tokens of "
    "each are predicted (80% masked, 10% replaced, 10% kept; one draw from seed 0 on the CPU); saved weights "
    "(rounded to bfloat16), computed in float32"
)


def build(pad: int) -> nn.Module:
    """Returns a freshly initialised BertForMaskedLM with a tied decoder and no dropout."""
    from transformers import BertConfig, BertForMaskedLM

    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=192,
        num_hidden_layers=5,
        num_attention_heads=6,
        intermediate_size=768,
        max_position_embeddings=CONTEXT,
        hidden_act="gelu",
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        pad_token_id=pad,
        tie_word_embeddings=True,
    )
    return BertForMaskedLM(config)


def mask(ids: torch.Tensor, generator: torch.Generator, tokenizer) -> tuple[torch.Tensor, ...]:
    """Makes masked rows of plain ones.

    Args:
        ids: Token ids [B, 126].
        generator: On the device of ids.
        tokenizer: Names the special tokens.

    Returns:
        The rows [B, 128], the positions in them that are predicted [B, 19], and the tokens there [B, 19].
    """
    rows, width = ids.shape
    draw = {"generator": generator, "device": ids.device}
    positions = torch.rand(rows, width, **draw).topk(PREDICTED).indices
    targets = ids.gather(1, positions)
    chance = torch.rand(rows, PREDICTED, **draw)
    others = torch.randint(len(SPECIAL), VOCABULARY, (rows, PREDICTED), **draw)
    shown = torch.where(chance < 0.9, others, targets).masked_fill(chance < 0.8, tokenizer.mask_token_id)
    first, last = (ids.new_full((rows, 1), token) for token in (tokenizer.cls_token_id, tokenizer.sep_token_id))
    return torch.cat((first, ids.scatter(1, positions, shown), last), 1), positions + 1, targets


def predict(model: nn.Module, rows: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Returns the logits [B, 19, V] at the predicted positions; the head runs there alone."""
    hidden = model.bert(input_ids=rows).last_hidden_state
    return model.cls(hidden.gather(1, positions[..., None].expand(-1, -1, hidden.shape[-1])))


@torch.no_grad()
def held_out(model: nn.Module, ids: np.ndarray, tokenizer, device: str, every: int = 1, batch: int = 256) -> dict:
    """Measures a held-out text by PROTOCOL; a last part shorter than a row is left out.

    Args:
        model: The masked language model.
        ids: The token ids of the whole text.
        tokenizer: Names the special tokens.
        device: Where the model is.
        every: Measure only each so many-th row; its masks are the same as among all.
        batch: Rows in one forward pass.

    Returns:
        nats_per_token, accuracy, perplexity, predicted_tokens, windows.
    """
    windows = torch.from_numpy(np.asarray(ids[: len(ids) // WINDOW * WINDOW], dtype=np.int64)).view(-1, WINDOW)
    drawn = [part[::every] for part in mask(windows, torch.Generator().manual_seed(0), tokenizer)]
    loss = right = 0.0
    for parts in zip(*(part.split(batch) for part in drawn), strict=True):
        rows, positions, targets = (part.to(device) for part in parts)
        logits = predict(model, rows, positions).float()
        loss += F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum").item()
        right += (logits.argmax(-1) == targets).sum().item()
    predicted = drawn[2].numel()
    return {
        "nats_per_token": round(loss / predicted, 5),
        "accuracy": round(right / predicted, 5),
        "perplexity": round(math.exp(loss / predicted), 4),
        "predicted_tokens": predicted,
        "windows": len(drawn[0]),
    }
