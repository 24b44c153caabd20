"""The collapsed executor: sum over time first, then one product. Every windowed neuron allows it, exactly."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from spikeform.spikes import SpikeTrain
from spikeform.synapses.integer import IntegerWeight
from spikeform.synapses.parts import integer_sums as sums_by_part
from spikeform.synapses.sums import exact_product, exact_sums

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


def integer_linear(train: SpikeTrain, weight: IntegerWeight) -> tuple[list[list[Tensor]], Sent]:
    """One exact integer product for each group of channels."""
    return sums_by_part(train, train.centred(), weight, exact_sums), None


def integer_matmul(a: SpikeTrain, b: SpikeTrain, transpose_b: bool) -> tuple[Tensor, Sent]:
    """``S_A(T) S_B(T)`` in integers; a zero-point of each channel of B is taken off as a row of its own."""
    left = a.common_integers(a.centred())
    if transpose_b and b.zero is not None and b.zero.ndim > 1 and b.zero.shape[-2] == 1:
        right, zero = b.common_integers(b.codes), b.common_integers(b.zero_of_branch())
        bias = left.double() @ zero.expand(*zero.shape[:-2], 1, -1).double().transpose(-1, -2)
        return exact_product(left, right.transpose(-1, -2), a.coding.limit, b.coding.limit).double() - bias, None
    right = b.common_integers(b.centred())
    peak = None if right.dtype == torch.int32 else b.coding.limit  # wide: a zero of each channel, beyond the limit
    return exact_product(left, right.transpose(-1, -2) if transpose_b else right, a.coding.limit, peak), None


def weight_sums(x: Tensor, weight: IntegerWeight) -> tuple[list[Tensor], Sent]:
    """Real ``x [..., K]`` times the integers of each tier of a spiking weight: ``[..., N]`` each."""
    pairs = [(c, weight.part(r)) for r, c in enumerate(weight.columns)]
    return [F.linear(x if c is None else x[..., c], codes.to(x.dtype)) for c, codes in pairs], None
