"""Norms whose square, inverse square root and product are spikes: kernel of :mod:`spikeform.neurons.fused`."""

from __future__ import annotations

import torch
from torch import Tensor

from spikeform.native.library import function
from spikeform.neurons.cpu.hg import bank
from spikeform.neurons.cpu.oat import population
from spikeform.neurons.cpu.real import KINDS


def hg_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    centred: bool,
    gain_offset: float,
    threshold: Tensor,
    limit: int,
    resolution: int,
    rounding: int,
    bits: int,
    nearest: bool,
    low: int,
    high: int,
) -> Tensor:
    """LayerNorm or RMSNorm over the last axis of ``[..., D]``, in the dtype of x; weight and bias ``[D]``."""
    run, kind = function("hg_norm", "piiipipifif" + "piiii" + "iiii" + "pi"), KINDS.get(x.dtype)
    weight_kind = 0 if weight is None else KINDS.get(weight.dtype)
    bias_kind = 0 if bias is None else KINDS.get(bias.dtype)
    if run is None or kind is None or weight_kind is None or bias_kind is None:
        neuron = population(threshold, limit, resolution, rounding)
        square, inverse_sqrt = (bank(name, bits, nearest, low, high) for name in ("square", "inverse_sqrt"))
        return _norm(x, weight, bias, eps, centred, gain_offset, neuron, square, inverse_sqrt)
    x, threshold = x.contiguous(), threshold.contiguous()
    weight = None if weight is None else weight.contiguous()
    bias = None if bias is None else bias.contiguous()
    out, size = torch.empty_like(x), x.shape[-1]
    run(
        x.data_ptr(),
        kind,
        x.numel() // max(size, 1),
        size,
        None if weight is None else weight.data_ptr(),
        weight_kind,
        None if bias is None else bias.data_ptr(),
        bias_kind,
        eps,
        centred,
        gain_offset,
        threshold.data_ptr(),
        threshold.numel(),
        limit,
        resolution,
        rounding,
        bits,
        nearest,
        low,
        high,
        out.data_ptr(),
        torch.get_num_threads(),
    )
    return out


def _norm(x, weight, bias, eps, centred, gain_offset, neuron, square, inverse_sqrt) -> Tensor:
    d = x.float()
    if centred:
        d = d - d.mean(-1, keepdim=True)
    scale = inverse_sqrt(square(d).decode().mean(-1, keepdim=True) + eps)
    y = neuron(d).decode() * scale.decode()
    if weight is not None:
        y = y * (weight.to(y.dtype) + gain_offset)
    if bias is not None:
        y = y + bias.to(y.dtype)
    return y.to(x.dtype)
