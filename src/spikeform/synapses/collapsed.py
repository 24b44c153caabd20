"""The collapsed executor: sum over time first, then one product. Every windowed neuron allows it, exactly."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from spikeform.spikes import SpikeTrain

Sent = tuple[Tensor, ...] | None


def linear(train: SpikeTrain, weight: Tensor) -> tuple[Tensor, Sent]:
    """One GEMM on the decoded values; on the integer codes where the weight is integer."""
    if not weight.is_floating_point():
        return scale(integer_sums(train, weight), train), None
    return F.linear(train.decode(), weight.to(train.quantum.dtype)), None


def integer_sums(train: SpikeTrain, weight: Tensor) -> list[Tensor]:
    """Exact ``codes @ weight^T`` per sub-neuron, as fp64 integers (exact below 2^53; BLAS has no int GEMM)."""
    codes, wide = train.codes.double(), weight.double()
    return [F.linear(part, wide) for part in by_branch(codes, train)]


def by_branch(values: Tensor, train: SpikeTrain) -> list[Tensor]:
    """``values`` of each sub-neuron, zero elsewhere."""
    if train.branch is None:
        return [values]
    return [values * (train.branch == r) for r in range(train.quantum.shape[0])]


def scale(sums: list[Tensor], train: SpikeTrain) -> Tensor:
    """``sum_r quantum[r] * sums[r]``: the one place where integer sums become real."""
    if train.quantum.ndim != 1:
        raise ValueError(
            "integer weights need one quantum for all channels; fold the channel shifts into the weights first"
        )
    out = torch.zeros_like(sums[0])
    for quantum, part in zip(train.quantum.double(), sums, strict=True):
        out = out + quantum * part
    return out.to(train.quantum.dtype)


def matmul(a: SpikeTrain, b: SpikeTrain, transpose_b: bool) -> tuple[Tensor, Sent]:
    """``S_A(T) S_B(T)``."""
    right = b.decode()
    return a.decode() @ (right.transpose(-1, -2) if transpose_b else right), None


def hadamard(a: SpikeTrain, b: SpikeTrain) -> tuple[Tensor, Sent]:
    """``S_A(T) * S_B(T)``."""
    return a.decode() * b.decode(), None
