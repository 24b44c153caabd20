"""Nodes of a graph that ``torch.compile`` made: what they stand for, and how one is added."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph
from torch.fx.node import map_arg

from spikeform.layers import fused as layers
from spikeform.neurons import fused as neurons
from spikeform.synapses import fused, rows

OPS = torch.ops.spikeform  # as these define them
DEFINED = neurons, fused, rows, layers
Node = Any  # of torch.fx: what its arguments are is known from its operator
DEVICES = {"cuda"}  # whose operators are put together


def value(node: Any) -> Tensor:
    """The fake tensor that stands for what a node gives."""
    return node.meta["val"]


def call(graph: Graph, target: Any, args: tuple) -> Node:
    """A new node, and what stands for its result."""
    node = graph.call_function(target, args)
    given = map_arg(args, value)
    mode = getattr(value(node.all_input_nodes[0]), "fake_mode", None)
    with nullcontext() if mode is None else mode:
        node.meta["val"] = target(*given)
    return node
