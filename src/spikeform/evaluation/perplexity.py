"""Perplexity by the GPTQ protocol (arXiv 2210.17323, its ``opt_eval``): the protocol is part of the number.

The text is one stream of N token ids. It is cut into non-overlapping windows of W ids, and an incomplete last
window is dropped. Each window is read alone, from an empty context. Its ids 1 to W-1 are predicted, each from
the ids before it in the window; id 0 of a window is context only. So S windows score S·(W-1) tokens, and

    nats per token = -1 / (S·(W-1)) · sum over windows and i=1..W-1 of log p(id_i | id_0 .. id_(i-1))
    perplexity     = exp(nats per token)
"""

from __future__ import annotations

import math
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class PerplexityResult:
    """A perplexity and what it was measured on.

    Attributes:
        perplexity: exp(nats).
        nats: mean negative log-likelihood of a scored token, in nats.
        stderr: standard error of ``nats`` over windows (nan with one window).
        tokens: tokens scored.
        windows: windows read.
        window: ids in a window.
        protocol: how it was measured, in words.
    """

    perplexity: float
    nats: float
    stderr: float
    tokens: int
    windows: int
    window: int
    protocol: str

    def to_dict(self) -> dict[str, Any]:
        """The same as a plain dict, for JSON."""
        return asdict(self)


@torch.inference_mode()
def perplexity(
    model: nn.Module, ids: Tensor, *, window: int = 512, batch_size: int = 4, stride: int | None = None
) -> PerplexityResult:
    """Perplexity of a causal language model on a stream of token ids.

    Args:
        model: a Hugging Face causal language model, dense or converted.
        ids: int64 ``[N]``, one stream of token ids; rows of a matrix are read one after another.
        window: ids in a window, W.
        batch_size: windows read at once. It changes the speed, not the number (beyond rounding).
        stride: None for the GPTQ protocol. Else windows begin every ``stride`` ids and, after the first,
            score only their last ``stride`` ids, each then with at least ``window - stride`` ids of context.
            That is another protocol with a lower perplexity, and the result says so.

    Returns:
        The result; sums over tokens are kept in float64.

    Raises:
        ValueError: if ``ids`` is empty or shorter than a window, or the window exceeds the model's context.
    """
    check_batch_size(batch_size)
    windows_SW = cut_windows(ids, window, window if stride is None else stride, model)
    first = 1 if stride is None else window - stride
    sums, tokens = [], 0
    with evaluating(model):
        for start in range(0, len(windows_SW), batch_size):
            batch_BW = windows_SW[start : start + batch_size].to(device_of(model))
            logits_BWV = model(input_ids=batch_BW, use_cache=False).logits
            for row, (row_W, row_WV) in enumerate(zip(batch_BW, logits_BWV, strict=True)):
                begin = max(first, 1) if start + row else 1
                nll_N = F.cross_entropy(row_WV[begin - 1 : -1].float(), row_W[begin:], reduction="none")
                sums.append((nll_N.double().sum(), window - begin))
                tokens += window - begin
    total = math.fsum(float(s) for s, _ in sums)
    _, stderr = mean_and_stderr([float(s) / n for s, n in sums])
    nats = total / tokens
    return PerplexityResult(
        exp(nats), nats, stderr, tokens, len(windows_SW), window, protocol_of(window, stride, len(windows_SW))
    )


def protocol_of(window: int, stride: int | None, windows: int) -> str:
    """The protocol in words, to stand beside every number measured by it."""
    if stride is None or stride == window:
        name, how = "gptq", f"non-overlapping windows of {window} tokens"
    else:
        name = "strided"
        how = f"windows of {window} tokens every {stride}, the last {stride} scored after the first window"
    count = window - 1 if name == "gptq" else stride
    return f"{name}: {how}, {count} predictions each, last incomplete window dropped, {windows} windows"


def cut_windows(ids: Tensor, window: int, stride: int, *models: nn.Module) -> Tensor:
    """The windows ``[S, W]`` of a stream, a view of it; checks it against the models' contexts.

    Raises:
        ValueError: as :func:`perplexity` says.
    """
    if not isinstance(ids, Tensor) or ids.is_floating_point() or ids.dtype == torch.bool:
        raise ValueError("ids must be an integer tensor of token ids [N]; make one with spikeform.tokenize")
    for name, value in (("window", window), ("stride", stride)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise ValueError(f"{name} is {value!r}: it must be a whole number of tokens")
    if window < 2:
        raise ValueError(f"window {window} predicts nothing: take at least 2 tokens")
    if not 1 <= stride <= window:
        raise ValueError(f"stride {stride} must lie between 1 and the window, {window}")
    for model in models:
        check_context(model, window)
    stream_N = ids.reshape(-1)
    if stream_N.numel() == 0:
        raise ValueError("ids is empty: there is no text to measure on")
    if stream_N.numel() < window:
        raise ValueError(
            f"ids has {stream_N.numel()} tokens, fewer than one window of {window}: pass more text or a smaller window"
        )
    vocabulary = min((v for v in map(vocabulary_of, models) if v), default=None)
    low, high = int(stream_N.min()), int(stream_N.max())
    if low < 0 or (vocabulary is not None and high >= vocabulary):
        raise ValueError(
            f"ids hold {low if low < 0 else high}, outside the model's vocabulary of {vocabulary}: "
            "tokenize the text with this model's own tokenizer"
        )
    return stream_N.unfold(0, window, stride)


def check_batch_size(batch_size: int) -> None:
    """Raises ValueError unless ``batch_size`` is a whole number of at least 1."""
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(f"batch_size is {batch_size!r}: it must be a whole number of at least 1")


def check_context(model: nn.Module, window: int) -> None:
    """Raises ValueError if ``window`` ids do not fit the model's context."""
    context = context_of(model)
    if context is not None and window > context:
        raise ValueError(
            f"window {window} is longer than the model's context of {context} tokens: pass window={context} or less"
        )


def context_of(model: nn.Module) -> int | None:
    """Positions the model was built for, or None where its configuration names none."""
    value = getattr(text_config(model), "max_position_embeddings", None)
    return value if isinstance(value, int) and value > 0 else None


def vocabulary_of(model: nn.Module) -> int | None:
    """Number of token ids the model knows, or None where its configuration does not say."""
    value = getattr(text_config(model), "vocab_size", None)
    return value if isinstance(value, int) else None


def text_config(model: nn.Module) -> Any:
    """The configuration of the model's text part (the configuration itself for a plain language model)."""
    config = getattr(model, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def device_of(model: nn.Module) -> torch.device:
    """Where the model's input goes."""
    return next(model.parameters()).device


@contextmanager
def evaluating(*models: nn.Module) -> Generator[None]:
    """Evaluation mode (no dropout) inside the block, and the mode before it afterwards."""
    training = [model for model in models if model.training]
    for model in training:
        model.eval()
    try:
        yield
    finally:
        for model in training:
            model.train()


def mean_and_stderr(values: list[float]) -> tuple[float, float]:
    """Mean, and its standard error: the sample deviation over √n (nan for one value)."""
    n = len(values)
    mean = math.fsum(values) / n
    if n < 2:
        return mean, math.nan
    return mean, math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (n - 1) / n)


def exp(nats: float) -> float:
    """The exponential, which answers infinity where it overflows."""
    try:
        return math.exp(nats)
    except OverflowError:
        return math.inf
