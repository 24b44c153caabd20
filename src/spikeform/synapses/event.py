"""The event executor: sum over time first, then visit only the weight rows whose integer is not zero.

Plain PyTorch: a few rows at a time, gather the columns that any of them uses. Fused kernels take its place
where there are any; the meaning stays.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from spikeform.spikes import SpikeTrain
from spikeform.synapses.collapsed import by_branch, hadamard, scale
from spikeform.synapses.integer import IntegerWeight
from spikeform.synapses.parts import integer_sums

Sent = tuple[Tensor, ...] | None
ROWS = 4  # visited together: the union of their active columns is gathered once

__all__ = ["hadamard", "integer_linear", "integer_matmul", "linear", "matmul", "weight_sums"]


def linear(train: SpikeTrain, weight: Tensor) -> tuple[Tensor, Sent]:
    """Gathered products over the active input channels of each group of rows."""
    if weight.is_floating_point():
        return _rows(train.decode(), weight.to(train.quantum.dtype)), None
    wide = weight.double()
    return scale([_rows(part, wide) for part in by_branch(train.codes.double(), train)], train), None


def matmul(a: SpikeTrain, b: SpikeTrain, transpose_b: bool) -> tuple[Tensor, Sent]:
    """The same over the rows of A; B's rows of silent columns are never read."""
    return _batched(a.decode(), b.decode(), transpose_b), None


def integer_linear(train: SpikeTrain, weight: IntegerWeight) -> tuple[list[list[Tensor]], Sent]:
    """Gathered products of integers, in fp64."""
    return integer_sums(train, train.centred(), weight, lambda codes, w, *_: _rows(codes, w, torch.float64)), None


def integer_matmul(a: SpikeTrain, b: SpikeTrain, transpose_b: bool) -> tuple[Tensor, Sent]:
    """The same over the rows of A in integers, in fp64."""
    left, right = (x.common_integers(x.centred()).double() for x in (a, b))
    return _batched(left, right, transpose_b), None


def weight_sums(x: Tensor, weight: IntegerWeight) -> tuple[list[Tensor], Sent]:
    """Real input and spiking weights: the columns of what is zero in ``x`` are never read."""
    pairs = [(c, weight.part(r)) for r, c in enumerate(weight.columns)]
    return [_rows(x if c is None else x[..., c], codes, x.dtype) for c, codes in pairs], None


def _batched(left: Tensor, right: Tensor, transposed: bool) -> Tensor:
    weight = right if transposed else right.transpose(-1, -2)
    lead = torch.broadcast_shapes(left.shape[:-2], weight.shape[:-2])
    left = left.expand(*lead, *left.shape[-2:]).flatten(0, -3) if lead else left[None]
    weight = weight.expand(*lead, *weight.shape[-2:]).flatten(0, -3) if lead else weight[None]
    out = torch.stack([_rows(x, w) for x, w in zip(left, weight, strict=True)])
    return out.view(*lead, *out.shape[-2:])


def _rows(values: Tensor, weight: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """``values @ weight^T``, skipping the input channels that are zero in a group of rows; computed in ``dtype``."""
    flat = values.reshape(-1, values.shape[-1])
    out = [_visit(group, weight, dtype) for group in flat.split(ROWS)]
    if not out:
        return F.linear(values.to(dtype), weight.to(dtype))
    return torch.cat(out).view(*values.shape[:-1], weight.shape[0])


def _visit(group: Tensor, weight: Tensor, dtype: torch.dtype | None) -> Tensor:
    active = (group != 0).any(0).nonzero().squeeze(1)
    return F.linear(group[:, active].to(dtype), weight[:, active].to(dtype))
