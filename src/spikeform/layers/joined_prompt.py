"""Attention with GIF neurons on a prompt that begins a cache, in a compiled graph.

One operator turns queries and keys by their positions, encodes them and the values, and attends. It gives back what the
cache then holds: no copies of keys and values lie between.
"""

from __future__ import annotations

from operator import getitem
from typing import Any

import torch
from torch.fx import Graph

from spikeform.layers import joined_cache, nodes
from spikeform.layers.nodes import OPS, Node, call, fixed, value
from spikeform.synapses.rows import SKINNY

CLONE = torch.ops.aten.clone.default


def join_prompts(graph: Graph) -> None:
    """One operator for each attention of GIF neurons on keys that no cache held before."""
    looked: dict[tuple, list[Node]] = {}
    for node in list(graph.nodes):
        if node.target is OPS.gif_attention.default:
            _join(graph, node, looked)


def _packed(node: Any, attention: Node) -> Node | None:
    """The operator that packs what ``attention`` reads, if nobody else has it but who is told at the end."""
    pack = node.args[0] if node.target is CLONE and len(node.args[0].users) == 1 else node
    ends = {user for user in node.users if user.op == "output"}
    return pack if pack.target is OPS.gif_pack.default and set(node.users) == {attention, *ends} else None


def _tiles(graph: Graph, mask: Node | None, length: int, size: int, looked: dict[tuple, list[Node]]) -> list[Node]:
    """What a mask does to tiles of such an attention, found once in a graph: see ``mask_tiles``."""
    if mask is None:
        return []
    from spikeform.layers.triton.operands import padded  # Triton, which only a GPU has for certain
    from spikeform.layers.triton.prefill import form_of

    form = form_of(length, padded(size), False)
    if (mask, length, form) not in looked:
        made = call(graph, OPS.mask_tiles.default, (mask, length, form.rows, form.keys))
        looked[mask, length, form] = [call(graph, getitem, (made, i)) for i in range(2)]
    return looked[mask, length, form]


def _join(graph: Graph, attention: Node, looked: dict[tuple, list[Node]]) -> None:
    query, keys, values, mask, scaling, signs, _, q_multiple, q_steps, *rest = attention.args
    if signs is not None or keys is values or len(query.users) > 1:
        return
    if not all(fixed(value(node)) for node in (query, keys, values)) or value(query).shape[2] <= SKINNY:
        return
    packs = [pack for node in (keys, values) if (pack := _packed(node, attention)) is not None]
    if len(packs) < 2:
        return
    turned, turned_key = joined_cache._turn(query), joined_cache._turn(packs[0].args[0])
    if turned is None or turned_key is None or not joined_cache._same(turned, turned_key):
        return
    q, k, v = value(turned.x), value(turned_key.x), value(packs[1].args[0])
    if q.device.type not in nodes.DEVICES or k.shape != v.shape or k.dtype != v.dtype or q.shape[3] % 8:
        return
    how = [pack.args[1:] for pack in packs]
    _, k_multiple, k_steps, _, v_multiple, v_steps, levels, _peak = rest
    if [x[1:] for x in how] != [(k_multiple, levels, k_steps), (v_multiple, levels, v_steps)]:
        return
    given = turned.x, turned_key.x, packs[1].args[0], turned.cos, turned.sin, mask, scaling
    tables = q_multiple, q_steps, k_multiple, k_steps, v_multiple, v_steps, *rest[-2:]
    with graph.inserting_before(attention):
        outs = call(
            graph, OPS.gif_prompt.default, (*given, *tables, *_tiles(graph, mask, q.shape[2], q.shape[3], looked))
        )
        parts = [call(graph, getitem, (outs, i)) for i in range(3)]
    attention.replace_all_uses_with(parts[0])
    graph.erase_node(attention)
    for node, part in zip((keys, values), parts[1:], strict=True):
        node.replace_all_uses_with(part)
    for node in (query, keys, values):
        joined_cache._erase(graph, node)
