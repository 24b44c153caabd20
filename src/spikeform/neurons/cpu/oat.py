"""Multi-threshold populations: kernels of :mod:`spikeform.neurons.fused`."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from spikeform.native.library import function
from spikeform.neurons.cpu.real import KINDS
from spikeform.neurons.oat import MT, OAT, ROUNDINGS
from spikeform.spikes import Coding


@dataclass(frozen=True)
class Levels(Coding):
    """A coding of which only its largest code and the codes to a threshold matter."""

    most: int
    to_threshold: int

    @property
    def limit(self) -> int:
        """Largest magnitude of a code."""
        return self.most

    @property
    def resolution(self) -> int:
        """Code units in one threshold."""
        return self.to_threshold


def population(threshold: Tensor, limit: int, resolution: int, rounding: int, shift: Tensor | None = None) -> MT:
    """The neuron that the operators' parameters describe; ``shift`` is folded into what follows."""
    kind = OAT if len(threshold) == 2 else MT
    neuron = kind(Levels(min(limit.bit_length(), 16), limit, resolution), None, ROUNDINGS[rounding])
    neuron.threshold, neuron.channel_shift, neuron.folded = threshold, shift, True
    return neuron


def oat_values(
    x: Tensor, threshold: Tensor, shift: Tensor | None, limit: int, resolution: int, rounding: int, narrow: bool
) -> Tensor:
    """``decode(encode(x))`` ``[..., K]``, in the dtype of x where ``narrow``, else fp32; ``shift`` int8 ``[K]``."""
    run, kind = function("oat_values", "piiippiiiipii"), KINDS.get(x.dtype)
    if run is None or kind is None:
        values = population(threshold, limit, resolution, rounding, shift)(x).decode()
        return values.to(x.dtype) if narrow else values
    x, threshold = x.contiguous(), threshold.contiguous()
    out = torch.empty_like(x) if narrow or kind == 0 else torch.empty_like(x, dtype=torch.float32)
    shift = None if shift is None else shift.contiguous()
    run(
        x.data_ptr(),
        kind,
        x.numel(),
        x.shape[-1] if x.ndim else 1,
        None if shift is None else shift.data_ptr(),
        threshold.data_ptr(),
        threshold.numel(),
        limit,
        resolution,
        rounding,
        out.data_ptr(),
        kind if narrow else 0,
        torch.get_num_threads(),
    )
    return out


def oat_pack(x: Tensor, threshold: Tensor, limit: int, resolution: int, rounding: int) -> Tensor:
    """``2 code + sub-neuron`` ``[..., K]``: int16 where the limit is below 2^14, else int32."""
    run, kind = function("oat_pack", "piipiiiipii"), KINDS.get(x.dtype)
    if run is None or kind is None:
        neuron = population(threshold, limit, resolution, rounding)
        return neuron.pack(neuron(x))
    x, threshold, wide = x.contiguous(), threshold.contiguous(), limit >= 2**14
    out = torch.empty_like(x, dtype=torch.int32 if wide else torch.int16)
    run(
        x.data_ptr(),
        kind,
        x.numel(),
        threshold.data_ptr(),
        threshold.numel(),
        limit,
        resolution,
        rounding,
        out.data_ptr(),
        wide,
        torch.get_num_threads(),
    )
    return out
