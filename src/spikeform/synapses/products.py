"""The three products of a spiking network. Each picks an executor and tells the observer what ran."""

from __future__ import annotations

from torch import Tensor

from spikeform.spikes import SpikeTrain
from spikeform.spikes.trace import Product, observer
from spikeform.synapses import collapsed, event, temporal
from spikeform.synapses.dispatch import explain

_MODULES = {"temporal": temporal, "collapsed": collapsed, "event": event}


def linear(train: SpikeTrain, weight: Tensor, bias: Tensor | None = None, *, site: str = "") -> Tensor:
    """Spike train x weight: ``y = sum_t s(t) W^T + b = (sum_t s(t)) W^T + b``.

    Args:
        train: ``[..., K]``.
        weight: ``[N, K]``. Real: products in fp32. Integer: codes are accumulated exactly, per sub-neuron, and
            the result is the same bit for bit in every executor (the train's quantum must be scalar).
        bias: ``[N]``, added once.
        site: Name reported to the observer.

    Returns:
        ``[..., N]`` real.

    Raises:
        ValueError: Shapes do not fit.
    """
    if train.shape[-1] != weight.shape[-1]:
        raise ValueError(f"{site or 'linear'}: the train has {train.shape[-1]} channels, the weight {weight.shape[-1]}")
    name, _ = explain("linear")
    out, sent = _MODULES[name].linear(train, weight)
    listener = observer()
    if listener is not None:
        features = weight.shape[0]
        listener(Product(site, "linear", (train,), (features,), train.codes.numel() * features, sent))
    return out if bias is None else out + bias


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
        b: ``[..., K, N]``, or ``[..., N, K]`` with ``transpose_b``.
        transpose_b: Transpose the last two axes of ``b``.
        mask: Bool, broadcasts to ``[..., M, N]``: the outputs that are wanted. Told to the observer, not applied.
        connected: Bool, broadcasts to ``[..., M, K]``: where A has neurons at all (an attention mask; elsewhere
            ``a`` is silent). Told to the observer, not applied.
        site: Name reported to the observer.

    Returns:
        ``[..., M, N]`` real.
    """
    name, _ = explain("matmul")
    out, sent = _MODULES[name].matmul(a, b, transpose_b)
    listener = observer()
    if listener is not None:
        inner = a.shape[-1]
        fan_out = (out.shape[-1], out.shape[-2])
        listener(Product(site, "matmul", (a, b), fan_out, out.numel() * inner, sent, mask, transpose_b, connected))
    return out


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
