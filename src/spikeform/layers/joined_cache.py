"""Keys and values of one decoded token on their way into a cache, in a compiled graph: by one operator.

It turns them by their position too (rotary embedding), and the query with them; and the lengths of all layers' caches
move on in one operator.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch.fx import Graph

from spikeform.layers import nodes
from spikeform.layers.nodes import OPS, Node, call, match, value

ATEN = torch.ops.aten
COPY = ATEN.copy_.default
PUT, COPIED = ATEN.index_put.default, ATEN.index_copy.default  # with decompositions, and without
MUL, SLICE = ATEN.mul.Tensor, ATEN.slice.Tensor
HALVES = [(ATEN.neg.default, (SLICE, "x", "dim", "half", "behind")), (SLICE, "x", "dim", 0, "half")]
TURN = ATEN.add.Tensor, (MUL, "x", "cos"), (MUL, (ATEN.cat.default, HALVES, "axis"), "sin")
# By an attention: what packs its keys and values, the operators that put both into a cache (as they are, and turned),
# and which arguments these take of the two that pack.
APPENDS = {
    OPS.oat_attention.default: (
        OPS.oat_pack.default,
        (OPS.oat_append.default, OPS.oat_append_turned.default),
        lambda k, v: (k[1], v[1], *k[2:]) if k[2:] == v[2:] else None,
    ),
    OPS.gif_attention.default: (
        OPS.gif_pack.default,
        (OPS.gif_append.default, OPS.gif_append_turned.default),
        lambda k, v: (k[2], v[2], k[3], k[4], v[4]) if k[3] == v[3] else None,
    ),
}


def join_caches(graph: Graph) -> None:
    """For each attention that reads a cache of codes: one operator puts a token's keys and values there."""
    for node in list(graph.nodes):
        if node.target in APPENDS:
            _append(graph, node)
    _advance(graph)


class Put(NamedTuple):
    """One token's codes on their way into a cache that is an input of the graph: nodes."""

    cache: Node
    place: Node
    pack: Node
    put: Node
    copy: Node


def _put(node: Any, attention: Node, pack: Any) -> Put | None:
    """How ``attention`` comes by its keys or values, where it is so, and nobody else looks on."""
    target = getattr(node, "target", None)
    if target is None or node.kwargs:
        return None
    if target is PUT and len(node.args) == 3 and len(node.args[1]) == 3 and node.args[1][:2] == [None, None]:
        cache, (_, _, spot), packed = node.args
    elif target is COPIED and node.args[1] in (2, -2):
        cache, _, spot, packed = node.args
    else:
        return None
    copies = [user for user in node.users if user.target is COPY and user.args == (cache, node)]
    if len(copies) != 1 or set(node.users) != {attention, *copies}:
        return None
    if cache.op != "placeholder" or set(cache.users) != {node, *copies} or packed.target is not pack:
        return None
    to, x, place = value(cache), value(packed.args[0]), value(spot)
    one_token = x.ndim == to.ndim == 4 and x.shape[2] == 1 and place.shape == (1,) and place.dtype == torch.int64
    fits = to.dtype == value(packed).dtype and to.shape[:2] == x.shape[:2] and to.shape[3] == value(packed).shape[3]
    if not one_token or not fits or to.stride(3) != 1 or not nodes.joins(to) or len(packed.users) != 1:
        return None
    return Put(cache, spot, packed, node, copies[0])


class Turn(NamedTuple):
    """``x cos + (-second half, first half) sin`` of heads ``[B, H, 1, E]``: nodes."""

    x: Node
    cos: Node
    sin: Node


def _turn(node: Any) -> Turn | None:
    """How ``node`` is turned by its position (rotary embedding by halves), or None."""
    named: dict[str, Any] = {}
    if not match(TURN, node, named, {}) or not all(isinstance(named[name], torch.fx.Node) for name in Turn._fields):
        return None
    turn = Turn(*(named[name] for name in Turn._fields))
    x, *given = (value(n) for n in turn)
    size, half, behind = x.shape[-1], named["half"], named["behind"]
    known = isinstance(half, int) and isinstance(behind, int)
    if not known or size != 2 * half or behind < size or not {named["dim"], named["axis"]} <= {3, -1} or x.ndim != 4:
        return None
    alike = len({t.dtype for t in (x, *given, value(node))}) == 1
    fits = all(t.shape in ((1, 1, 1, size), (x.shape[0], 1, 1, size)) and t.stride(3) == 1 for t in given)
    return turn if alike and fits else None


def _is(node: Any, target: Any) -> bool:
    return getattr(node, "target", None) is target and not node.kwargs


def _spot(place: Node) -> Node:
    """The number ``[]`` to which ``place`` int64 ``[1]`` adds the first of a count from 0; else ``place``."""
    if _is(place, ATEN.add.Tensor) and len(place.args) == 2:
        count, start = place.args
        counts = getattr(count, "target", None) is torch.ops.prims.iota.default and count.args == (1,)
        if counts and count.kwargs.get("start") == 0 and isinstance(start, torch.fx.Node):
            return start if value(start).shape == () and value(start).dtype == torch.int64 else place
    return place


def _append(graph: Graph, attention: Node) -> None:
    """One operator for keys and values, before ``attention``, which then reads the cache itself."""
    pack, append, both = APPENDS[attention.target]
    keys, values = (_put(node, attention, pack) for node in attention.args[1:3])
    if keys is None or values is None or keys.place is not values.place or keys.cache is values.cache:
        return
    how = both(keys.pack.args, values.pack.args)
    if how is None or value(keys.pack.args[0]).shape != value(values.pack.args[0]).shape:
        return
    query, key = _turn(attention.args[0]), _turn(keys.pack.args[0])
    turns = query is not None and key is not None and _same(query, key) and set(attention.args[0].users) == {attention}
    given = (key.x if turns else keys.pack.args[0]), values.pack.args[0]
    args = keys.cache, values.cache, _spot(keys.place), *given, *how
    with graph.inserting_before(attention):
        put = call(graph, append[turns], (*args, *query) if turns else args)
    if turns:
        left = attention.args[0]
        attention.replace_input_with(left, put)
        _erase(graph, left)
    for found in (keys, values):
        attention.replace_input_with(found.put, found.cache)
        _erase(graph, found.copy)


def _erase(graph: Graph, node: Node) -> None:
    """``node``, and what was there for it alone."""
    if node.users or node.op != "call_function":
        return
    before = node.all_input_nodes
    graph.erase_node(node)
    for x in before:
        if not x._erased:
            _erase(graph, x)


def _same(query: Turn, key: Turn) -> bool:
    """Whether both are turned alike: their cos and sin may be views of one tensor."""
    base = [[x.args[0] if _is(x, ATEN.unsqueeze.default) else x for x in turn[1:]] for turn in (query, key)]
    of = value(query.x), value(key.x)
    return base[0] == base[1] and of[0].dtype == of[1].dtype and of[0].shape[::2] == of[1].shape[::2]


def _advance(graph: Graph) -> None:
    """One operator for all numbers that the graph counts up by the same step in their places."""
    found: dict[int, list[Node]] = {}
    for node in graph.nodes:
        if node.target is not COPY or node.users or len(node.args) != 2:
            continue
        counter, more = node.args
        if counter.op != "placeholder" or not _is(more, ATEN.add.Tensor) or more.args[0] is not counter:
            continue
        number = value(counter)
        alone = set(more.users) == {node} and isinstance(more.args[1], int)
        if alone and number.shape == () and number.dtype == torch.int64 and nodes.joins(number):
            found.setdefault(more.args[1], []).append(node)
    for step, copies in found.items():
        with graph.inserting_before(copies[-1]):
            call(graph, OPS.advance.default, ([node.args[0] for node in copies], step))
        for node in copies:
            _erase(graph, node)
