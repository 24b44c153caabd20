"""What the weights of converted linear layers take: bytes as a file holds them, beside bf16."""

from __future__ import annotations

from typing import Any

from torch import nn

from spikeform.layers import CodedLinear, SpikingLinear
from spikeform.layers.packed import pack

BF16 = 2  # bytes


def weight_row(layer: SpikingLinear) -> dict[str, Any]:
    """Form and size of one layer's weights.

    Args:
        layer: Of a converted model.

    Returns:
        ``weight_bits`` of one step (of a ternary one 2, of real weights those of their dtype), ``weight_form``,
        ``weight_steps``: share of the input channels for each T, ``bytes`` of all that the layer keeps in a file but
        its neuron's, and ``bf16_bytes`` of the dense layer in bf16.
    """
    parameters = layer.out_features * layer.in_features + (layer.bias.numel() if layer.bias is not None else 0)
    size = {"bytes": stored_bytes(layer), "bf16_bytes": BF16 * parameters}
    if not isinstance(layer, CodedLinear):
        bits = 8 * layer.weight.element_size()
        return {"weight_bits": bits, "weight_form": "real", "weight_steps": {1: 1.0}, **size}
    whole = layer.integer_weight()
    tiers = whole.tiers
    shares = [1.0] if whole.tier is None else [float((whole.tier == r).float().mean()) for r in range(len(tiers))]
    return {
        "weight_bits": 2 if whole.ternary else whole.bits,
        "weight_form": "ternary" if whole.ternary else "affine",
        "weight_steps": dict(zip(tiers, shares, strict=True)),
        **size,
    }


def stored_bytes(layer: SpikingLinear) -> int:
    """Bytes of a layer's tensors in a file, without its neuron's."""
    kept = {**layer._parameters, **layer._buffers}
    if isinstance(layer, CodedLinear):
        kept |= pack(layer.integer_weight())
    return sum(x.numel() * x.element_size() for x in kept.values() if x is not None)


def coded_size(model: nn.Module) -> dict[str, Any] | None:
    """All linear layers that a conversion put in; None where none of them has integer weights.

    Returns:
        ``layers``, ``bytes``, ``bf16_bytes`` and their ``ratio``.
    """
    found = [module for module in model.modules() if isinstance(module, SpikingLinear)]
    if not any(isinstance(layer, CodedLinear) for layer in found):
        return None
    rows = [weight_row(layer) for layer in found]
    held, bf16 = (sum(row[key] for row in rows) for key in ("bytes", "bf16_bytes"))
    return {"layers": len(rows), "bytes": held, "bf16_bytes": bf16, "ratio": held / bf16}
