"""Keys and values of one decoded token on their way into a cache, in a compiled graph: by the attention that reads it.

It turns the key by its position too (rotary embedding), and the query; and the lengths of all layers' caches move on in
one operator.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch.fx import Graph

from spikeform.layers import nodes
from spikeform.layers.chained import encodes
from spikeform.layers.nodes import OPS, Node, call, fixed, match, value

ATEN = torch.ops.aten
COPY = ATEN.copy_.default
PUT, COPIED = ATEN.index_put.default, ATEN.index_copy.default  # with decompositions, and without
MUL, SLICE = ATEN.mul.Tensor, ATEN.slice.Tensor
HALVES = [(ATEN.neg.default, (SLICE, "x", "dim", "half", "behind")), (SLICE, "x", "dim", 0, "half")]
TURN = ATEN.add.Tensor, (MUL, "x", "cos"), (MUL, (ATEN.cat.default, HALVES, "axis"), "sin")
# By an attention: what packs its keys and values, the operator that puts both into a cache before it attends to it, and
# whether what packs (two nodes' arguments) is what the attention (its arguments) believes to read.
APPENDS = {
    OPS.oat_attention.default: (
        OPS.oat_pack.default,
        OPS.oat_appended.default,
        lambda k, v, own: (k[1], v[1]) == own[6:8] and k[2:] == v[2:] == (own[9], *own[11:13]),
    ),
    OPS.gif_attention.default: (
        OPS.gif_pack.default,
        OPS.gif_appended.default,
        lambda k, v, own: (k[2], k[4], v[2], v[4]) == (*own[10:12], *own[13:15]) and k[3] == v[3] == own[15],
    ),
}


def join_caches(graph: Graph) -> None:
    """Each attention that reads a cache of codes puts a token's keys and values there itself."""
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
    if not all(fixed(t) for t in (to, x, place)):
        return None
    one_token = x.ndim == to.ndim == 4 and x.shape[2] == 1 and place.shape == (1,) and place.dtype == torch.int64
    fits = to.dtype == value(packed).dtype and to.shape[:2] == x.shape[:2] and to.shape[3] == value(packed).shape[3]
    if not one_token or not fits or to.stride(3) != 1 or not nodes.joins(to) or len(packed.users) != 1:
        return None
    return Put(cache, spot, packed, node, copies[0])


class Turn(NamedTuple):
    """``x cos + (-second half, first half) sin`` of heads ``[B, H, L, E]``: nodes."""

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
    fits = all(t.shape in [(n, 1, x.shape[2], size) for n in (1, x.shape[0])] and t.stride(3) == 1 for t in given)
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
    """One operator in the place of ``attention`` and of what puts keys and values into the cache that it reads."""
    pack, appended, agree = APPENDS[attention.target]
    keys, values = (_put(node, attention, pack) for node in attention.args[1:3])
    if keys is None or values is None or keys.place is not values.place or keys.cache is values.cache:
        return
    q, key, other, rest = attention.args[0], keys.pack.args[0], values.pack.args[0], attention.args[3:]
    fits = value(key).shape == value(other).shape and value(q).shape[2] == 1 and not attention.kwargs
    if not fits or not agree(keys.pack.args, values.pack.args, attention.args):
        return
    query, of_key, turn = _turn(q), _turn(key), (None, None)
    if query is not None and of_key is not None and _same(query, of_key):
        q, key, turn = query.x, of_key.x, query[1:]
    args = q, keys.cache, values.cache, *rest, _spot(keys.place), key, other, *turn
    with graph.inserting_before(attention):
        whole = call(graph, appended, args)
    if not encodes(whole):
        graph.erase_node(whole)
        return
    attention.replace_all_uses_with(whole)
    for node in (attention, keys.copy, values.copy):
        _erase(graph, node)


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
