"""Nodes of a graph that ``torch.compile`` made: what they stand for, how some are found, and how one is added."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph
from torch.fx.node import map_arg

from spikeform.layers import fused as layers
from spikeform.native import library
from spikeform.neurons import fused as neurons
from spikeform.synapses import fused, rows

OPS = torch.ops.spikeform  # as these define them
DEFINED = neurons, fused, rows, layers
Node = Any  # of torch.fx: what its arguments are is known from its operator
Steps = Any  # an operator and its arguments, steps themselves; a list of steps; a name, of anything; or a constant
DEVICES = {"cuda"}  # whose operators are put together, and then have kernels each
CHAINED = {"cpu"}  # where what is put together becomes one operator (:mod:`spikeform.layers.chained`), of the library


def value(node: Any) -> Tensor:
    """The fake tensor that stands for what a node gives."""
    return node.meta["val"]


def fixed(tensor: Tensor) -> bool:
    """Whether its shape is known before the graph runs."""
    return all(isinstance(n, int) for n in tensor.shape)


def joins(x: Tensor) -> bool:
    """Whether operators on the device of ``x`` are put together."""
    return x.device.type in DEVICES or (x.device.type in CHAINED and library() is not None)


def match(steps: Steps, node: Any, named: dict[str, Any], nodes: dict[Node, None]) -> bool:
    """Whether ``node`` is made by such steps; what names stand for, and nodes, are then added."""
    if isinstance(steps, str):
        return named.setdefault(steps, node) == node
    if isinstance(steps, list) and isinstance(node, list | tuple) and len(node) == len(steps):
        return all(match(step, given, named, nodes) for step, given in zip(steps, node, strict=True))
    if not isinstance(steps, tuple):
        return steps == node
    operator, *args = steps
    if not isinstance(node, torch.fx.Node) or node.target is not operator or node.kwargs or len(node.args) != len(args):
        return False
    nodes.pop(node, None)  # what is met again comes behind all that use it
    nodes[node] = None
    return all(match(arg, given, named, nodes) for arg, given in zip(args, node.args, strict=True))


def call(graph: Graph, target: Any, args: tuple, **how: Any) -> Node:
    """A new node, and what stands for its result."""
    node = graph.call_function(target, args, how)
    given = map_arg(args, value)
    mode = getattr(value(node.all_input_nodes[0]), "fake_mode", None)
    with nullcontext() if mode is None else mode:
        node.meta["val"] = target(*given, **how)
    return node
