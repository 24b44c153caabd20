"""The three products of a spiking network. Each picks an executor and tells the observer what ran."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from spikeform.spikes import SpikeTrain
from spikeform.spikes.trace import Product, observer
from spikeform.synapses import collapsed, event, temporal
from spikeform.synapses.dispatch import explain
from spikeform.synapses.integer import IntegerWeight
from spikeform.synapses.parts import scaled

_MODULES = {"temporal": temporal, "collapsed": collapsed, "event": event}


def linear(
    train: SpikeTrain | Tensor, weight: Tensor | IntegerWeight, bias: Tensor | None = None, *, site: str = ""
) -> Tensor:
    """Spike train x weight: ``y = sum_t s(t) W^T + b = (sum_t s(t)) W^T + b``.

    Args:
        train: ``[..., K]``; or real input, where the integer weights are the spikes: ``y = sum_t x s_W(t)^T + b``.
        weight: ``[N, K]``. Real: products in fp32. Integer: codes are accumulated exactly, per sub-neuron, and the
            result is the same bit for bit in every executor (the unit must not differ from channel to channel).
            A train through which gradients flow meets the real value of an integer weight instead.
        bias: ``[N]``, added once.
        site: Name reported to the observer.

    Returns:
        ``[..., N]`` real.

    Raises:
        ValueError: Shapes do not fit, or both input and weight are real.
    """
    if train.shape[-1] != weight.shape[-1]:
        raise ValueError(f"{site or 'linear'}: the train has {train.shape[-1]} channels, the weight {weight.shape[-1]}")
    if isinstance(weight, Tensor) and isinstance(train, SpikeTrain) and train.exact and not weight.is_floating_point():
        weight = IntegerWeight.of(weight)
    name, _ = explain("linear")
    run = _MODULES[name]
    if not isinstance(train, SpikeTrain):
        out = _spiking_weight(train, weight, run, site)
    elif not isinstance(weight, IntegerWeight):
        out, sent = run.linear(train, weight)
        _tell_linear(train, weight.shape[0], sent, site)
    elif differentiable(train):
        out = F.linear(train.decode(), weight.dequantise().to(train.quantum.dtype))
        _tell_linear(train, weight.shape[0], None, site)
    else:
        sums, sent = run.integer_linear(train, weight)
        out = scaled(sums, train, weight)
        _tell_linear(train, weight.shape[0], sent, site)
    return out if bias is None else out + bias


def differentiable(train: SpikeTrain) -> bool:
    """Whether a gradient is to flow through the train: then its products stay in real numbers."""
    return torch.is_grad_enabled() and (train.codes.requires_grad or train.quantum.requires_grad)


def _tell_linear(train: SpikeTrain, features: int, sent: tuple[Tensor, ...] | None, site: str) -> None:
    listener = observer()
    if listener is not None:
        listener(Product(site, "linear", (train,), (features,), train.codes.numel() * features, sent))


def _spiking_weight(x: Tensor, weight: Tensor | IntegerWeight, run: Any, site: str) -> Tensor:
    if not isinstance(weight, IntegerWeight):
        raise ValueError(f"{site or 'linear'}: input and weight are both real, and nothing spikes; use F.linear")
    x = x if x.dtype == torch.float64 else x.float()
    sums, sent = run.weight_sums(x, weight)
    terms = [part * scale.to(x.dtype) for part, scale in zip(sums, weight.scale, strict=True)]
    listener = observer()
    if listener is not None:
        rows = x.numel() // max(x.shape[-1], 1)
        listener(Product(site, "weights", (weight.train(),), (rows,), weight.codes.numel() * rows, sent))
    return sum(terms[1:], terms[0])


def matmul(
    a: SpikeTrain,
    b: SpikeTrain,
    *,
    transpose_b: bool = False,
    mask: Tensor | None = None,
    connected: Tensor | None = None,
    site: str = "",
) -> Tensor:
    """Spike train x spike train, the spike-equivalent dot product of LAS (arXiv 2505.09659, eq. 13).

    With running sums ``S_A(t)``, ``S_B(t)``: ``O(t) = S_A(t) S_B(t) - S_A(t-1) S_B(t-1)``, which telescopes to
    ``sum_t O(t) = S_A(T) S_B(T)``. Run as events it is ``A(t) S_B(t) + S_A(t-1) B(t)``.

    Args:
        a: ``[..., M, K]``.
        b: ``[..., K, N]``, or ``[..., N, K]`` with ``transpose_b``. Where both trains are exact, and units of B do not
            differ along K, the product runs on integers, the same in every executor.
        transpose_b: Transpose the last two axes of ``b``.
        mask: Bool, broadcasts to ``[..., M, N]``: the outputs that are wanted. Told to the observer, not applied.
        connected: Bool, broadcasts to ``[..., M, K]``: where A has neurons at all (an attention mask; elsewhere
            ``a`` is silent). Told to the observer, not applied.
        site: Name reported to the observer.

    Returns:
        ``[..., M, N]`` real.
    """
    name, _ = explain("matmul")
    units = _units(a, b, transpose_b)
    if units is None:
        out, sent = _MODULES[name].matmul(a, b, transpose_b)
    else:
        sums, sent = _MODULES[name].integer_matmul(a, b, transpose_b)
        out = sums.to(a.quantum.dtype) * units[0] * units[1]
    listener = observer()
    if listener is not None:
        inner = a.shape[-1]
        fan_out = (out.shape[-1], out.shape[-2])
        listener(Product(site, "matmul", (a, b), fan_out, out.numel() * inner, sent, mask, transpose_b, connected))
    return out


def _units(a: SpikeTrain, b: SpikeTrain, transpose_b: bool) -> tuple[Tensor, Tensor] | None:
    """What an integer of each operand is worth, where the product can run on integers; they broadcast to it."""
    if not (a.exact and b.exact):
        return None
    left, right = a.common_quantum(), b.common_quantum()
    if left is None or right is None:
        return None
    if transpose_b:
        return left, right.transpose(-1, -2) if right.ndim > 1 else right
    return (left, right) if right.ndim < 2 or right.shape[-2] == 1 else None


def hadamard(a: SpikeTrain, b: SpikeTrain, *, site: str = "") -> Tensor:
    """Elementwise product of two trains (broadcasting), by the same telescoping rule as :func:`matmul`.

    Args:
        a: ``[...]``.
        b: Broadcasts with ``a``.
        site: Name reported to the observer.

    Returns:
        Real tensor of the broadcast shape.
    """
    name, _ = explain("hadamard")
    out, sent = _MODULES[name].hadamard(a, b)
    listener = observer()
    if listener is not None:
        fan_out = (max(out.numel() // max(a.codes.numel(), 1), 1), max(out.numel() // max(b.codes.numel(), 1), 1))
        listener(Product(site, "hadamard", (a, b), fan_out, out.numel(), sent))
    return out
