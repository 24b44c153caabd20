"""Learned few-spike HG neurons: kernel of :mod:`spikeform.neurons.fused`."""

from __future__ import annotations

import torch
from torch import Tensor

from spikeform.native.library import function
from spikeform.neurons.cpu.real import KINDS
from spikeform.neurons.few_spike import FewSpikeHG


def few_spike_values(x: Tensor, gates: Tensor, theta: Tensor, h: Tensor, d: Tensor) -> Tensor:
    """``f(x)`` ``[...]`` as the bank's spikes carry it, in the dtype of x; gates ``[R + 1]``, the others ``[R, T]``."""
    run, kind = function("few_spike_values", "piippppiipi"), KINDS.get(x.dtype)
    if run is None or kind is None:
        return FewSpikeHG("", gates, theta, h, d)(x).decode().to(x.dtype)
    x, gates, theta, h, d = (part.contiguous() for part in (x, gates, theta, h, d))
    out = torch.empty_like(x)
    run(
        x.data_ptr(),
        kind,
        x.numel(),
        gates.data_ptr(),
        theta.data_ptr(),
        h.data_ptr(),
        d.data_ptr(),
        *theta.shape,
        out.data_ptr(),
        torch.get_num_threads(),
    )
    return out
