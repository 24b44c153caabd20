"""Norms and gates of a compiled graph that are not of spikes, found from where they end: before GIF neurons.

They are no operators there. Inductor has taken them apart into sums and products before a pass sees the graph, and
would make a kernel of each: alone between products, which then cannot overlap. What their steps look like is said here
once. A step whose result goes elsewhere too would have to stay, and nothing be gained: that is none.

Sums and functions are fp32, and what they leave is rounded to the model's dtype: casts, where that is another.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from spikeform.layers.nodes import OPS, Node, Steps, match, value

ATEN, CAST = torch.ops.aten, torch.ops.prims.convert_element_type.default
MUL, ADD = ATEN.mul.Tensor, ATEN.add.Tensor


class Made(NamedTuple):
    """What makes a row, and can encode it.

    Attributes:
        encoder: The operator that makes the row's codes.
        source: Its first arguments.
        nodes: What nobody needs then: each comes before what it uses.
    """

    encoder: Any
    source: tuple
    nodes: list[Node]


def _wide(x: Steps, dtype: torch.dtype) -> Steps:
    return x if dtype == torch.float32 else (CAST, x, torch.float32)


def _narrow(y: Steps, dtype: torch.dtype) -> Steps:
    return y if dtype == torch.float32 else (CAST, y, dtype)


def _normed(dtype: torch.dtype) -> Steps:
    """``x rsqrt(mean(x^2) + eps)``."""
    x = _wide("x", dtype)
    mean = (ATEN.mean.dim, (ATEN.pow.Tensor_Scalar, x, 2), [-1], True)
    return _narrow((MUL, x, (ATEN.rsqrt.default, (ADD, mean, "eps"))), dtype)


def _silu(dtype: torch.dtype) -> Steps:
    """``gate / (1 + exp(-gate))``."""
    gate = _wide("gate", dtype)
    return _narrow((ATEN.div.Tensor, gate, (ADD, (ATEN.exp.default, (ATEN.neg.default, gate)), 1)), dtype)


def _swish(dtype: torch.dtype) -> Steps:
    """``gate sigmoid(gate)``, the same as versions of PyTorch may have it."""
    gate = _wide("gate", dtype)
    return _narrow((MUL, gate, (ATEN.sigmoid.default, gate)), dtype)


def plain(y: Node) -> Made | None:
    """The RMS norm or gate that ends in ``y``, as GIF neurons can have it, or None. Who uses ``y`` is not looked at."""
    row = value(y)
    if row.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return None
    for steps, factor in ((_normed, "weight"), (_silu, "up"), (_swish, "up")):
        first = steps(row.dtype)
        for order in ((first, factor), (factor, first)):
            named: dict[str, Any] = {}
            nodes: dict[Node, None] = {}
            if not match((MUL, *order), y, named, nodes):
                continue
            if any(user not in nodes for node in nodes if node is not y for user in node.users):
                return None
            return _normed_by(named, row, [*nodes]) if factor == "weight" else _gated_by(named, row, [*nodes])
    return None


def _is(node: Any, shape: torch.Size, row: Tensor) -> bool:
    return isinstance(node, torch.fx.Node) and (value(node).shape, value(node).dtype) == (shape, row.dtype)


def _normed_by(named: dict[str, Any], row: Tensor, nodes: list[Node]) -> Made | None:
    x, weight, eps = named["x"], named["weight"], named["eps"]
    if not (_is(x, row.shape, row) and _is(weight, row.shape[-1:], row) and isinstance(eps, float)):
        return None
    # The kernel has its weights before it waits for the one before it: no kernel of this graph may be making them.
    given = weight.op in ("placeholder", "get_attr")
    return Made(OPS.row_norm_gif.default, (x, weight, eps), nodes) if given else None


def _gated_by(named: dict[str, Any], row: Tensor, nodes: list[Node]) -> Made | None:
    gate, up = named["gate"], named["up"]
    known = _is(gate, row.shape, row) and _is(up, row.shape, row)
    return Made(OPS.row_gated_gif.default, (gate, up, "silu"), nodes) if known else None
