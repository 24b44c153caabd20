"""Fidelity: how close a spiking model's predictions are to those of the dense model it came from.

Both models read the same windows of the same stream once each, by the protocol of
:mod:`spikeform.evaluation.perplexity`. Shapes: B windows, W ids in a window, V vocabulary, D width, T steps.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spikeform.evaluation.perplexity import (
    check_batch_size,
    cut_windows,
    device_of,
    evaluating,
    exp,
    mean_and_stderr,
    protocol_of,
    text_config,
)


@dataclass(frozen=True)
class Fidelity:
    """What the spiking model kept of the dense one. Means are over the scored tokens.

    Attributes:
        perplexity: of the spiking model.
        dense_perplexity: of the dense model, on the same tokens.
        perplexity_ratio: perplexity / dense_perplexity; 1 is lossless.
        ratio_stderr: standard error of the ratio, from the windows' paired differences (nan with one window).
        kl: mean KL(dense || spiking) of the next-token distributions, nats per token; 0 is lossless.
        top1_agreement: share of tokens for which both models rank the same token first.
        cosine: module name of each decoder block -> mean cosine of its output (of a streaming model: the mean
            over its T streams) with the dense model's, over all tokens of the windows; and "final", the input of
            the language-model head.
        tokens: tokens scored.
        windows: windows read.
        window: ids in a window.
        protocol: how it was measured, in words.
    """

    perplexity: float
    dense_perplexity: float
    perplexity_ratio: float
    ratio_stderr: float
    kl: float
    top1_agreement: float
    cosine: dict[str, float]
    tokens: int
    windows: int
    window: int
    protocol: str

    def to_dict(self) -> dict[str, Any]:
        """The same as a plain dict, for JSON."""
        return asdict(self)


@torch.inference_mode()
def fidelity(
    spiking: nn.Module,
    dense: nn.Module,
    ids: Tensor,
    *,
    window: int = 512,
    batch_size: int = 4,
    max_tokens: int | None = None,
) -> Fidelity:
    """Compares a spiking causal language model with its dense original, token by token.

    Args:
        spiking: the converted model.
        dense: the model it came from. Conversion works in place, so load it again or copy it beforehand.
        ids: int64 ``[N]``, one stream of token ids; rows of a matrix are read one after another.
        window: ids in a window.
        batch_size: windows read at once. It changes the speed, not the numbers (beyond rounding).
        max_tokens: read at most this many ids of the stream (rounded down to whole windows); None reads all.

    Returns:
        The comparison; sums over tokens are kept in float64.

    Raises:
        ValueError: if both are one object, if their vocabularies or blocks differ, if ``ids`` is empty or
            shorter than a window, or if the window exceeds a model's context.
    """
    if spiking is dense:
        raise ValueError(
            "spiking and dense are the same object, as convert works in place: load the dense model again, "
            "or take copy.deepcopy(model) before converting"
        )
    check_batch_size(batch_size)
    windows_SW = cut_windows(ids, window, window, dense, spiking)
    if max_tokens is not None:
        if max_tokens < window:
            raise ValueError(f"max_tokens {max_tokens} is less than one window of {window} tokens")
        windows_SW = windows_SW[: max_tokens // window]
    names, dense_sites = sites_of(dense)
    _, spiking_sites = sites_of(spiking)
    if len(dense_sites) != len(spiking_sites):
        raise ValueError(
            f"spiking has {len(spiking_sites) - 1} decoder blocks, dense {len(dense_sites) - 1}: "
            "they are not one model before and after conversion"
        )
    device = device_of(spiking)
    cosine = torch.zeros(len(names), dtype=torch.float64, device=device)
    rows: list[Tensor] = []  # of each window: nll spiking, nll dense, kl, agreement; summed over its tokens
    with evaluating(dense, spiking):
        for batch_BW in windows_SW.split(batch_size):
            with record(dense_sites) as expected:
                dense_BWV = dense(input_ids=batch_BW.to(device_of(dense)), use_cache=False).logits
            with record(spiking_sites) as found:
                spiking_BWV = spiking(input_ids=batch_BW.to(device), use_cache=False).logits
            if dense_BWV.shape != spiking_BWV.shape:
                raise ValueError(
                    f"spiking predicts {spiking_BWV.shape[-1]} tokens, dense {dense_BWV.shape[-1]}: "
                    "they are not one model before and after conversion"
                )
            for i in range(len(names)):
                x, y = expected[i].to(device).float(), found[i].float()
                x, y = mean_of_streams(x, len(batch_BW)), mean_of_streams(y, len(batch_BW))
                cosine[i] += F.cosine_similarity(x, y, dim=-1).sum(dtype=torch.float64)
            for row_W, a_WV, b_WV in zip(batch_BW, dense_BWV, spiking_BWV, strict=True):
                rows.append(compare(a_WV[:-1].to(device), b_WV[:-1], row_W[1:].to(device)))
    nll, dense_nll, kl, agreement = (torch.stack(rows) / (window - 1)).T.tolist()
    nats, dense_nats = mean_and_stderr(nll)[0], mean_and_stderr(dense_nll)[0]
    gap, stderr = mean_and_stderr([a - b for a, b in zip(nll, dense_nll, strict=True)])
    return Fidelity(
        perplexity=exp(nats),
        dense_perplexity=exp(dense_nats),
        perplexity_ratio=exp(gap),
        ratio_stderr=exp(gap) * stderr,
        kl=mean_and_stderr(kl)[0],
        top1_agreement=mean_and_stderr(agreement)[0],
        cosine=dict(zip(names, (cosine / windows_SW.numel()).tolist(), strict=True)),
        tokens=len(windows_SW) * (window - 1),
        windows=len(windows_SW),
        window=window,
        protocol=protocol_of(window, None, len(windows_SW)),
    )


def mean_of_streams(x: Tensor, windows: int) -> Tensor:
    """A block's output ``[B, W, D]`` from that of T streams ``[B*T, W, D]``, batch-major: row b*T+t is step t of b."""
    return x if len(x) == windows else x.unflatten(0, (windows, -1)).mean(1)


def compare(dense_NV: Tensor, spiking_NV: Tensor, ids_N: Tensor) -> Tensor:
    """Sums over N predictions ``[4]``: nll spiking, nll dense, KL(dense || spiking), top-1 agreement.

    In float64: float32 is off by a percent at the 1e-6 nats where a good conversion lives. In a few rows at a
    time, which the processor's cache holds: twice as fast as all at once.
    """
    total = torch.zeros(4, dtype=torch.float64, device=spiking_NV.device)
    rows = max(1, 2**20 // dense_NV.shape[-1])
    for dense, spiking, ids in zip(dense_NV.split(rows), spiking_NV.split(rows), ids_N.split(rows), strict=True):
        log_p, log_q = dense.double().log_softmax(-1), spiking.double().log_softmax(-1)
        total[0] -= log_q.gather(1, ids[:, None]).sum()
        total[1] -= log_p.gather(1, ids[:, None]).sum()
        total[2] += kl_divergence(log_p, log_q).sum()
        total[3] += (dense.argmax(-1) == spiking.argmax(-1)).sum()
    return total


def kl_divergence(log_p_NV: Tensor, log_q_NV: Tensor) -> Tensor:
    """KL(p || q) = sum_v p·(log p - log q) of each row, nats ``[N]``; where p is 0 it adds nothing."""
    p_NV = log_p_NV.exp()
    gap_NV = (log_p_NV - log_q_NV).masked_fill_(p_NV == 0, 0)
    return gap_NV.mul_(p_NV).sum(-1)


def sites_of(model: nn.Module) -> tuple[list[str], list[nn.Module]]:
    """Names and modules whose output (of the last: input) is compared: the decoder blocks, and the head.

    Raises:
        ValueError: if the model has no list of as many blocks as its configuration says, or no head.
    """
    count = getattr(text_config(model), "num_hidden_layers", None)
    head = getattr(model, "get_output_embeddings", lambda: None)()
    for name, module in model.named_modules():
        if head is not None and isinstance(module, nn.ModuleList) and len(module) == count:
            return [f"{name}.{i}" for i in range(len(module))] + ["final"], [*module, head]
    raise ValueError(
        f"{type(model).__name__} has no list of {count} decoder blocks with a language-model head: "
        "fidelity compares causal language models; for a classifier use classification_agreement"
    )


@contextmanager
def record(sites: list[nn.Module]) -> Generator[dict[int, Tensor]]:
    """Collects, by position in ``sites``, each block's output and the head's input ``[B, W, D]``."""
    seen: dict[int, Tensor] = {}

    def after(i: int):
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            seen[i] = output[0] if isinstance(output, tuple) else output

        return hook

    def before(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        seen[len(sites) - 1] = inputs[0]

    handles = [site.register_forward_hook(after(i)) for i, site in enumerate(sites[:-1])]
    handles.append(sites[-1].register_forward_pre_hook(before))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
