"""What a compiled graph has put together for one decoded row, from product to product, as one operator: on a CPU.

There a product of a few megabytes takes as long as twenty calls of an operator. So operators that
:mod:`spikeform.layers.joined` leaves, with those that append to caches and attend to them, become a list of steps
(:mod:`.chained_steps`, ``csrc/chain.cpp``), and what lies between them stays in the library's memory. Of most models
that leaves one operator, but for what begins and ends a pass.
"""

from __future__ import annotations

import json
from operator import getitem
from typing import Any

import torch
from torch.fx import Graph

from spikeform.layers import nodes
from spikeform.layers.chained_steps import NONE, STEPS, Room, dtype_of, possible
from spikeform.layers.nodes import OPS, Node, call, value

ATEN = torch.ops.aten
ALIGNED = 64  # bytes
FLAT = {ATEN.reshape.default, ATEN.view.default, ATEN._unsafe_view.default, ATEN.select.int, ATEN.alias.default}
VIEWS = {ATEN.transpose.int, ATEN.permute.default, ATEN.unsqueeze.default}


def chains(node: Node) -> bool:
    """Whether an operator is of those that have steps."""
    return node.target in STEPS and value(node.all_input_nodes[0]).device.type in nodes.CHAINED


def encodes(node: Node) -> bool:
    """Whether a row that this operator makes can be encoded behind it, where that is a step."""
    return value(node).device.type not in nodes.CHAINED or possible(node)


def _flat(node: Node) -> bool:
    """Whether it is another shape of all of the same memory."""
    if node.target not in FLAT:
        return False
    x = value(node.args[0])
    return x.is_contiguous() and x.numel() == value(node).numel()


def chain(graph: Graph) -> None:
    """Make one operator of those that have steps, as far as nothing else needs what is between them."""
    current = Chain(graph)
    for node in list(graph.nodes):
        if chains(node) and current.steps and dtype_of(node) != current.dtype:
            current.end(node)
            current = Chain(graph)
        if current.takes(node):
            continue
        schema = getattr(node.target, "_schema", None)
        needs = any(x in current.known for x in node.all_input_nodes)
        if node.op == "output" or needs or (schema is not None and schema.is_mutable):
            current.end(node)
            current = Chain(graph)


class Chain:
    """Steps that follow each other in a graph.

    Attributes:
        steps: Lists of numbers, nodes that the operator is given, and Rooms.
        known: Where nodes are that are made by steps, or are views of those.
        written: Nodes, of those given, whose memory steps change.
        dtype: Of rows.
    """

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.steps: list[list[Any]] = []
        self.known: dict[Node, Room] = {}
        self.written: dict[Node, None] = {}
        self.dtype: torch.dtype | None = None
        self.encoders: dict[Node, Any] = {}  # what a product has to know of them
        self._rooms: list[tuple[Any, int]] = []  # of which node each is, or None, and its bytes
        self._members: dict[Node, None] = {}
        self._at: Node = None

    def takes(self, node: Node) -> bool:
        """Whether the node is now part of it."""
        self._at = node
        if node.op != "call_function" or not node.args:
            return False
        step, first = STEPS[node.target] if chains(node) else None, node.args[0]
        if step is not None:
            if not step(self, node, *node.args):
                return False
            self.dtype = dtype_of(node)
        elif node.target is getitem and first in self._members:
            pass  # a result of a product, which knows its place
        elif first in self.known and (node.target in VIEWS or _flat(node)):
            self.known[node] = self.known[first]
        else:
            return False
        self._members[node] = None
        return True

    def place(self, node: Node | None) -> Any:
        """Where a tensor is that a step reads in one piece."""
        if node is None:
            return NONE
        if not value(node).is_contiguous():
            with self.graph.inserting_before(self._at):
                return call(self.graph, ATEN.clone.default, (node,), memory_format=torch.contiguous_format)
        while node not in self.known and _flat(node):
            node = node.args[0]
        return self.known.get(node, node)

    def strided(self, node: Node | None) -> Any:
        """The same of a tensor whose strides the step is told."""
        return NONE if node is None else self.known.get(node, node)

    def room(self, node: Node | None, size: int) -> Room:
        """Where a step leaves so many bytes: ``node``, or what only the next step reads."""
        self._rooms.append((node, -(-size // ALIGNED) * ALIGNED))
        found = Room(len(self._rooms) - 1)
        if node is not None:
            self.known[node] = found
        return found

    def end(self, before: Node) -> None:
        """Put the operator before a node, in the place of all that it does."""
        if not self.steps:
            return
        left = {x for x in self.known if any(user not in self._members for user in x.users)}
        for node in reversed(self._members):
            if node in left and node.target in VIEWS | FLAT:
                left.add(node.args[0])
        outs = [node for node, _ in self._rooms if node in left]
        program, given = self._program(outs)
        with self.graph.inserting_before(before):
            made, at = call(self.graph, OPS.chain.default, (given, [*self.written], program)), 0
            for node in outs:
                size = value(node).numel()
                part = made if len(outs) == 1 else call(self.graph, ATEN.slice.Tensor, (made, 0, at, at + size))
                node.replace_all_uses_with(call(self.graph, ATEN.view.default, (part, list(value(node).shape))))
                at += size
        for node in reversed(self._members):
            if not node.users:
                self.graph.erase_node(node)
        for node in self._members:
            if not node._erased:
                before.prepend(node)  # a view that others see

    def _program(self, outs: list[Node]) -> tuple[str, list[Node]]:
        """The steps in numbers, and what the operator is given beside what it writes to."""
        met = dict.fromkeys(x for step in self.steps for x in step if isinstance(x, torch.fx.Node))
        given = [x for x in met if x not in self.written]
        places = {x: place for place, x in enumerate([*given, *self.written, *outs])}
        last = {x: i for i, step in enumerate(self.steps) for x in step if isinstance(x, Room)}
        offsets: dict[Room, int] = {}
        spare: dict[int, list[int]] = {}
        end = 0
        numbers: list[int] = []
        for i, (code, *fields) in enumerate(self.steps):
            rooms = [x for x in dict.fromkeys(fields) if isinstance(x, Room) and self._rooms[x.number][0] not in outs]
            for room in rooms:
                size = self._rooms[room.number][1]
                if room not in offsets and spare.get(size):
                    offsets[room] = spare[size].pop()
                elif room not in offsets:
                    offsets[room], end = end, end + size
            numbers += [code, len(fields) + 2]
            for x in fields:
                if isinstance(x, Room):
                    numbers.append(-2 - offsets[x] if x in offsets else places[self._rooms[x.number][0]])
                else:
                    numbers.append(places[x] if isinstance(x, torch.fx.Node) else int(x))
            for room in rooms:
                if last[room] == i:
                    spare.setdefault(self._rooms[room.number][1], []).append(offsets[room])
        program = {
            "dtype": str(self.dtype).removeprefix("torch."),
            "sizes": [value(node).numel() for node in outs],
            "room": end,
            "count": len(self.steps),
            "steps": numbers,
        }
        return json.dumps(program, separators=(",", ":")), given
