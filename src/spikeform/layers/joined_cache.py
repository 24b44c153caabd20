"""Keys and values of one decoded token on their way into a cache, in a compiled graph: by one operator."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch.fx import Graph

from spikeform.layers import nodes
from spikeform.layers.nodes import OPS, Node, call, value

COPY = torch.ops.aten.copy_.default
PUT, COPIED = torch.ops.aten.index_put.default, torch.ops.aten.index_copy.default  # with decompositions, and without
# By an attention: what packs its keys and values, the operator that puts both into a cache, and which arguments that
# takes of the two that pack.
APPENDS = {
    OPS.oat_attention.default: (
        OPS.oat_pack.default,
        OPS.oat_append.default,
        lambda k, v: (k[1], v[1], *k[2:]) if k[2:] == v[2:] else None,
    ),
    OPS.gif_attention.default: (
        OPS.gif_pack.default,
        OPS.gif_append.default,
        lambda k, v: (k[2], v[2], k[3], k[4], v[4]) if k[3] == v[3] else None,
    ),
}


def join_caches(graph: Graph) -> None:
    """For each attention that reads a cache of codes: one operator puts a token's keys and values there."""
    for node in list(graph.nodes):
        if node.target in APPENDS:
            _append(graph, node)


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
    if not one_token or not fits or to.stride(3) != 1 or to.device.type not in nodes.DEVICES or len(packed.users) != 1:
        return None
    return Put(cache, spot, packed, node, copies[0])


def _append(graph: Graph, attention: Node) -> None:
    """One operator for keys and values, before ``attention``, which then reads the cache itself."""
    pack, append, both = APPENDS[attention.target]
    keys, values = (_put(node, attention, pack) for node in attention.args[1:3])
    if keys is None or values is None or keys.place is not values.place or keys.cache is values.cache:
        return
    how = both(keys.pack.args, values.pack.args)
    if how is None or value(keys.pack.args[0]).shape != value(values.pack.args[0]).shape:
        return
    with graph.inserting_before(attention):
        given = keys.pack.args[0], values.pack.args[0]
        call(graph, append, (keys.cache, values.cache, keys.place, *given, *how))
    for found in (keys, values):
        attention.replace_input_with(found.put, found.cache)
        for node in (found.copy, found.put, found.pack):
            graph.erase_node(node)
