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

Sent = tuple[Tensor, ...] | None
ROWS = 4  # visited together: the union of their active columns is gathered once

__all__ = ["hadamard", "linear", "matmul"]


def linear(train: SpikeTrain, weight: Tensor) -> tuple[Tensor, Sent]:
    """Gathered products over the active input channels of each group of rows."""
    if weight.is_floating_point():
        return _rows(train.decode(), weight.to(train.quantum.dtype)), None
    wide = weight.double()
    return scale([_rows(part, wide) for part in by_branch(train.codes.double(), train)], train), None


def matmul(a: SpikeTrain, b: SpikeTrain, transpose_b: bool) -> tuple[Tensor, Sent]:
    """The same over the rows of A; B's rows of silent columns are never read."""
    left, right = a.decode(), b.decode()
    weight = right if transpose_b else right.transpose(-1, -2)
    lead = torch.broadcast_shapes(left.shape[:-2], weight.shape[:-2])
    left = left.expand(*lead, *left.shape[-2:]).flatten(0, -3) if lead else left[None]
    weight = weight.expand(*lead, *weight.shape[-2:]).flatten(0, -3) if lead else weight[None]
    out = torch.stack([_rows(x, w) for x, w in zip(left, weight, strict=True)])
    return out.view(*lead, *out.shape[-2:]), None


def _rows(values: Tensor, weight: Tensor) -> Tensor:
    """``values @ weight^T``, skipping the input channels that are zero in a group of rows."""
    flat = values.reshape(-1, values.shape[-1])
    out = [_visit(group, weight) for group in flat.split(ROWS)]
    return torch.cat(out).view(*values.shape[:-1], weight.shape[0]) if out else F.linear(values, weight)


def _visit(group: Tensor, weight: Tensor) -> Tensor:
    active = (group != 0).any(0).nonzero().squeeze(1)
    return F.linear(group[:, active], weight[:, active])
