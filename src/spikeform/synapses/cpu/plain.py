"""The same products in PyTorch's own operations."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from spikeform.neurons.fused import gif_integers, oat_pack
from spikeform.synapses.fused import unpack_nibbles
from spikeform.synapses.sums import exact_sums

PIECE = 1024  # weight rows that are widened at a time


def real_product(values: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``values W^T + b``, summed in fp32 whatever the weights are; in the dtype of ``values``."""
    if values.dtype == weight.dtype:
        return F.linear(values, weight, None if bias is None else bias.to(values.dtype))
    values = values.float()
    parts = [F.linear(values, part.float()) for part in weight.split(PIECE)]
    out = torch.cat(parts, -1)
    return out if bias is None else out.add_(bias)


def oat_linear_int(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    threshold: Tensor,
    limit: int,
    resolution: int,
    rounding: int,
) -> Tensor:
    """See :data:`spikeform.synapses.fused.oat_linear_int`."""
    packed = oat_pack(x, threshold, limit, resolution, rounding)
    codes, branch, unit = packed >> 1, packed & 1, threshold / resolution
    out = x.new_zeros(())
    for r in range(len(threshold)):
        own = codes * (branch == r) if len(threshold) > 1 else codes
        out = out + exact_sums(own, weight, limit, 128).float() * scale * unit[r]
    return _finish(out, bias, x)


def gif_linear(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    top: Tensor,
    multiple: Tensor,
    levels: int,
    steps: int,
) -> Tensor:
    """See :data:`spikeform.synapses.fused.gif_linear`."""
    codes, unit = gif_integers(x, top, multiple, levels, steps)
    return _finish(exact_sums(codes, weight, peak=128).float() * scale * unit, bias, x)


def event_product(values: Tensor, rows: Tensor, scale: Tensor | None, width: int) -> Tensor:
    """See :data:`spikeform.synapses.fused.event_product`."""
    flat = values.reshape(-1, values.shape[-1])
    active = (flat != 0).any(0).nonzero().squeeze(1)
    visited = rows[active]
    if rows.dtype == torch.uint8:
        visited = unpack_nibbles(visited).to(torch.int8) - 8
    whole = values.dtype == visited.dtype == torch.int8  # exact in fp64, as in int32
    dtype = torch.float64 if whole else torch.float32
    out = (flat[:, active].to(dtype) @ visited.to(dtype)).float()
    return (out if scale is None else out * scale).view(*values.shape[:-1], width)


def _finish(out: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    return (out if bias is None else out + bias).to(x.dtype)
