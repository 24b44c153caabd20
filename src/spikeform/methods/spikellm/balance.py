"""Equivalent transformation in closed form: every pair's channels rescaled between activations and weights.

    s0 = x^alpha / w^(1 - alpha),  x = max |x_j|,  w = max_i |W_ij| / sqrt(sum_k (W_ik x_k)^2);   1 for query_key

per channel, over all layers that read it. The form is SmoothQuant's (arXiv 2211.10438), from which the released code
starts, with ``w = max_i |W_ij|`` of one of the layers. But each row has a scale of its own, so that a row's size must
not count; neither then does the order of the pairs, of which one's consumer is the other's producer. A second time it
changes nothing. It comes before saliency, so that channels are ranked as they will be coded (the released code ranks
before; but the mean square of what attention puts out, its saliency of values, changes with their scale).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from spikeform.conversion.pairs import Pair, scaled
from spikeform.layers import SpikingLinear
from spikeform.methods.spikellm.trainee import wide


@torch.no_grad()
def balance(block: nn.Module, name: str, pairs: Sequence[Pair], actmax: dict[str, Tensor], alpha: float) -> None:
    """Fold the scales of ``pairs`` into ``block``, in place; its function stays.

    Args:
        block: Its linear layers are :class:`SpikingLinear` with real weights.
        name: Its qualified name; names below are of the whole model.
        pairs: Those that lie inside the block.
        actmax: Largest magnitude of each input channel ``[K]`` of every linear layer.
        alpha: Exponent of the activations, 0 to 1.
    """
    prefix = f"{name}."
    layers = {f"{prefix}{n}" for n, m in block.named_modules() if isinstance(m, SpikingLinear)}
    params = {n: wide(p.detach()) for n, p in block.named_parameters()}
    # All scales of the block as it was: those of one pair must not hang on another's.
    scales = [(pair, _scale(pair, prefix, layers, params, actmax, alpha)) for pair in pairs]
    for pair, scale in scales:
        params = scaled(pair, scale, params, prefix)
    for key, parameter in block.named_parameters():
        parameter.copy_(params[key])


def _scale(
    pair: Pair, prefix: str, layers: set[str], params: dict[str, Tensor], actmax: dict[str, Tensor], alpha: float
) -> Tensor:
    device = params[f"{pair.producer_name.removeprefix(prefix)}.weight"].device
    readers = [n for n in pair.consumer_names if n in layers]
    if pair.kind == "query_key" or not readers:
        return torch.ones(pair.channels, device=device)
    peaks, shares = [], []
    for reader in readers:
        peak = actmax[reader].to(device).double()
        peaks.append(peak)
        shares.append(share(params[f"{reader.removeprefix(prefix)}.weight"], peak))
    return start(pair.largest(torch.stack(peaks).amax(0)), pair.largest(torch.stack(shares).amax(0)), alpha)


def share(weight: Tensor, peak: Tensor) -> Tensor:
    """``max_i |W_ij| / sqrt(sum_k (W_ik x_k)^2)`` of each input channel, fp64 ``[K]``.

    Args:
        weight: ``[N, K]``.
        peak: Largest magnitude of each input channel, ``[K]``.
    """
    wide_weight = weight.double().abs()
    row = (wide_weight * peak.double()).square().sum(1, keepdim=True).sqrt()
    return (wide_weight / torch.where(row > 0, row, 1.0)).amax(0)


def start(act: Tensor, weight: Tensor, alpha: float) -> Tensor:
    """``act^alpha / weight^(1 - alpha)`` of each channel's largest magnitudes, fp32 ``[channels]``, both fp64.

    A channel that is zero in one of them is given the other channels' median product; one zero in both, 1. Worked out
    in fp64, so that a channel rescaled by a power of two gets the same fp32 number, so much larger.
    """
    product = (act * weight)[(act > 0) & (weight > 0)]
    if not len(product):
        return torch.ones_like(act, dtype=torch.float32)
    typical, dead = product.median(), (act == 0) & (weight == 0)
    act = torch.where(act > 0, act, typical / weight)
    weight = torch.where(weight > 0, weight, typical / act)
    return torch.where(dead, 1.0, act**alpha / weight ** (1 - alpha)).float()
