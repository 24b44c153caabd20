"""Fixed-point HG neurons: kernels of :mod:`spikeform.neurons.fused`."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from spikeform.native.library import function as compiled
from spikeform.neurons.cpu.oat import population
from spikeform.neurons.cpu.real import KINDS
from spikeform.neurons.functions import FUNCTIONS
from spikeform.neurons.hg import FixedPointHG
from spikeform.spikes import Radix2

PLACES = {name: place for place, name in enumerate(FUNCTIONS)}


@lru_cache(maxsize=64)
def bank(function: str, bits: int, nearest: bool, low: int, high: int) -> FixedPointHG:
    """The neuron that the operators' parameters describe."""
    return FixedPointHG(function, Radix2(bits), "nearest" if nearest else "floor", low, high)


def hg_values(x: Tensor, function: str, bits: int, nearest: bool, low: int, high: int) -> Tensor:
    """``f(x)`` ``[...]`` as spikes carry it, in the dtype of x."""
    run, kind = compiled("hg_values", "piiiiiiipi"), KINDS.get(x.dtype)
    if run is None or kind is None:
        return bank(function, bits, nearest, low, high)(x).decode().to(x.dtype)
    x = x.contiguous()
    out = torch.empty_like(x)
    place, threads = PLACES[function], torch.get_num_threads()
    run(x.data_ptr(), kind, x.numel(), place, bits, nearest, low, high, out.data_ptr(), threads)
    return out


def hg_gated(
    gate: Tensor,
    up: Tensor,
    function: str,
    bits: int,
    nearest: bool,
    low: int,
    high: int,
    threshold: Tensor,
    limit: int,
    resolution: int,
    rounding: int,
) -> Tensor:
    """``HG(gate) * OAT(up)`` ``[...]``, in the dtype of gate."""
    run, kind = compiled("hg_gated", "ppiiiiiiipiiiipi"), KINDS.get(gate.dtype)
    if run is None or kind is None or up.dtype != gate.dtype:
        fired = bank(function, bits, nearest, low, high)(gate).decode()
        return (fired * population(threshold, limit, resolution, rounding)(up).decode()).to(gate.dtype)
    gate, up, threshold = gate.contiguous(), up.contiguous(), threshold.contiguous()
    out = torch.empty_like(gate)
    run(
        gate.data_ptr(),
        up.data_ptr(),
        kind,
        gate.numel(),
        PLACES[function],
        bits,
        nearest,
        low,
        high,
        threshold.data_ptr(),
        threshold.numel(),
        limit,
        resolution,
        rounding,
        out.data_ptr(),
        torch.get_num_threads(),
    )
    return out
