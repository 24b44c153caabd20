"""Calibration data: texts, token ids, or sequences sampled from the model itself."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from spikeform.errors import CalibrationError

MAX_WINDOW = 512
ABREAST, ELEMENTS = 8, 1 << 21  # windows, and elements of a hidden state, in a batch: a 7B model has 1 of 512 tokens
SAMPLED_SEQUENCES, SAMPLED_LENGTH, SAMPLE_SEED = 16, 128, 0


def context_length(model: PreTrainedModel) -> int:
    """Positions that the model was built for."""
    config = model.config.get_text_config()
    for name in ("max_position_embeddings", "n_positions"):
        value = getattr(config, name, None)
        if value:
            return int(value)
    return MAX_WINDOW


def windows(model: PreTrainedModel, calibration: Any, tokenizer: Any) -> tuple[list[Tensor], dict[str, Any]]:
    """Token windows ``[1, L]`` or ``[N, L]`` that fit the model's context, and a description of them.

    Texts longer than the context are split. With ``calibration=None`` the data are sampled from the model (causal
    language models: ancestral sampling; others: random tokens), from a fixed seed.

    Raises:
        CalibrationError: No text, empty text, no tokenizer, or ids that are no token ids of the model.
    """
    limit = min(context_length(model), MAX_WINDOW)
    if calibration is None:
        ids = sample(model, SAMPLED_SEQUENCES, min(SAMPLED_LENGTH, limit), SAMPLE_SEED)
        source = "sampled from the dense model" if _generates(model) else "random tokens"
        return [ids], {"source": source, "sequences": len(ids), "tokens": ids.numel(), "seed": SAMPLE_SEED}
    if isinstance(calibration, Tensor):
        if calibration.ndim not in (1, 2):
            raise CalibrationError(f"calibration ids must be [N, L] or [L], got shape {list(calibration.shape)}")
        rows = [row for row in (calibration if calibration.ndim > 1 else calibration[None])]
        source = "token ids"
    else:
        rows, source = _tokenize(calibration, tokenizer), "texts"
    parts = [part for row in rows for part in row.split(limit) if part.numel()]
    if not parts:
        raise CalibrationError("calibration holds no tokens: give at least one non-empty text, or None to sample some")
    vocabulary = _embedding(model).num_embeddings
    for part in parts:
        if part.is_floating_point() or int(part.min()) < 0 or int(part.max()) >= vocabulary:
            raise CalibrationError(
                f"calibration ids must be integers from 0 to {vocabulary - 1}, the model's vocabulary; "
                "was another model's tokenizer used?"
            )
    described = {"source": source, "sequences": len(parts), "tokens": sum(p.numel() for p in parts)}
    return _batched(parts, _embedding(model).embedding_dim), described


def _tokenize(texts: Sequence[str] | str, tokenizer: Any) -> list[Tensor]:
    texts = [texts] if isinstance(texts, str) else list(texts)
    if any(not isinstance(text, str) for text in texts):
        raise CalibrationError("calibration must be texts (a list of strings) or token ids (a tensor [N, L])")
    if not any(text.strip() for text in texts):
        raise CalibrationError("calibration holds no text: give at least one non-empty text, or None to sample some")
    if tokenizer is None:
        raise CalibrationError("calibration by texts needs a tokenizer: pass tokenizer=, or token ids [N, L]")
    return [torch.tensor(tokenizer(text)["input_ids"], dtype=torch.long) for text in texts if text.strip()]


def _batched(parts: list[Tensor], width: int) -> list[Tensor]:
    """Windows of one length side by side, so that no padding is needed: at most 8, fewer in a wide model."""
    groups: dict[int, list[Tensor]] = {}
    for part in parts:
        groups.setdefault(len(part), []).append(part.long())
    found = []
    for length, rows in sorted(groups.items()):
        size = max(1, min(ABREAST, ELEMENTS // (length * width)))
        found += [torch.stack(rows[i : i + size]) for i in range(0, len(rows), size)]
    return found


def _embedding(model: PreTrainedModel) -> nn.Embedding:
    return cast(nn.Embedding, model.get_input_embeddings())


def _generates(model: PreTrainedModel) -> bool:
    return model.can_generate() and not getattr(model.config, "is_encoder_decoder", False)


def cache_name(model: nn.Module) -> str:
    """What the model's ``forward`` and outputs call its cache: state-space models have a name of their own."""
    return "cache_params" if "cache_params" in inspect.signature(model.forward).parameters else "past_key_values"


def sample(model: PreTrainedModel, sequences: int, length: int, seed: int) -> Tensor:
    """Token ids ``[sequences, length]`` drawn from the model's own distribution at temperature 1."""
    device = _embedding(model).weight.device
    vocabulary = _embedding(model).num_embeddings
    generator = torch.Generator().manual_seed(seed)
    first = torch.randint(vocabulary, (sequences, 1 if _generates(model) else length), generator=generator).to(device)
    if not _generates(model):
        return first
    bos = getattr(model.config.get_text_config(), "bos_token_id", None)
    if isinstance(bos, int) and 0 <= bos < vocabulary:
        first[: sequences // 2] = bos
    training = model.training
    model.eval()
    ids, past, cache = first, None, cache_name(model)
    with torch.no_grad():
        while ids.shape[1] < length:
            out = model(input_ids=ids if past is None else ids[:, -1:], use_cache=True, **{cache: past})
            past = out[cache]
            p = torch.softmax(out.logits[:, -1].float(), -1).cpu()
            ids = torch.cat([ids, torch.multinomial(p, 1, generator=generator).to(device)], 1)
    model.train(training)
    return ids
