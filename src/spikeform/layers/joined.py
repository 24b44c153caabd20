"""Products of one decoded row, or of many, in a compiled graph, put together: fewer launches, the same numbers.

Layers call an operator each: those of :mod:`spikeform.synapses.fused` encode their input, and multiply. A model that
decodes token by token is a chain of such calls, and what lies between the products of weights takes as long as half of
them. A pass over the graph that ``torch.compile`` made (Inductor, on a GPU) sees what a layer cannot:

- products of one row and of one kind become one encoder and one product of several matrices; of many rows those of
  GIF neurons do, whose matrices then meet one encoding;
- a norm, a gate times its other factor, or attention, that goes nowhere else encodes what it leaves: of spikes, or
  plain ones before GIF neurons;
- where the next thing is such a norm, a residual is added by the product, and so is a gate's function put on it where
  GIF neurons come next;
- keys and values of one token are turned by their position (so are queries), encoded and put into their cache by the
  operator that attends to it, and the lengths of all caches move on in one;
- those of a prompt before GIF neurons are turned and encoded by the operator that attends, too.

On a CPU all that becomes one operator, as far as nothing else is in between (:mod:`spikeform.layers.chained`).

Modules, checkpoints and models that are not compiled know nothing of it; what a hook changes is in the graph. Sums are
the same in the same order. A norm sums its squares in another: a code may differ where a last bit decides.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from operator import getitem
from typing import Any, NamedTuple

import torch
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch._ops import OpOverload
from torch.fx import Graph

from spikeform.layers import chained, chained_steps, joined_cache, joined_plain, joined_prompt, nodes
from spikeform.layers.chained import chain
from spikeform.layers.joined_cache import join_caches
from spikeform.layers.joined_plain import Made, plain
from spikeform.layers.joined_prompt import join_prompts
from spikeform.layers.nodes import DEFINED, OPS, Node, call, value
from spikeform.native.operators import NAMESPACE
from spikeform.synapses.cpu.products import KINDS, WIDEST
from spikeform.synapses.rows import SKINNY, limbs_of, rows_of

ADD = torch.ops.aten.add.Tensor


class Product(NamedTuple):
    """A product of one row, or of many, in the graph, taken apart.

    Attributes:
        node: It.
        x: What it encodes.
        encoder: The operator that encodes a row for several matrices.
        neuron: Its arguments that differ from matrix to matrix, a tuple of nodes for each list.
        how: Its other arguments.
        weight: The matrix, and its scale, zero-points and bias where it has them.
        sums: Branches and limbs.
    """

    node: Node
    x: Node
    encoder: Any
    neuron: tuple[Node | None, ...]
    how: tuple
    weight: tuple[Node | None, ...]
    sums: tuple[int, int]

    @property
    def kind(self) -> Hashable:
        """What products of one launch have in common."""
        thresholds = value(self.neuron[0]).numel() if self.encoder is OPS.row_oat.default else 0
        given = tuple(x is None for x in self.neuron + self.weight)
        return self.x, self.encoder, self.how, thresholds, given, value(self.weight[0]).dtype, value(self.node).dtype


def _oat(node: Node, x, weight, bias, threshold, shift, limit, resolution, rounding, _single) -> Product:
    how = limit, resolution, rounding, 4 // value(weight).element_size()
    return Product(node, x, OPS.row_oat.default, (threshold, shift), how, (weight, None, None, bias), (1, 1))


def _oat_int(node: Node, x, weight, scale, bias, threshold, limit, resolution, rounding) -> Product:
    sums = value(threshold).numel(), limbs_of(limit)
    how = limit, resolution, rounding, 4
    return Product(node, x, OPS.row_oat.default, (threshold, None), how, (weight, scale, None, bias), sums)


def _gif(node: Node, x, weight, scale, packed, zero, bias, _top, multiple, levels, steps) -> Product:
    small = packed is not None and rows_of(value(x)) == 1
    how = levels, steps, small
    matrix = (packed, scale, zero, bias) if small else (weight, scale, None, bias)
    return Product(node, x, OPS.row_gif.default, (multiple,), how, matrix, (1, 1))


PRODUCTS: dict[Any, Callable[..., Product]] = {
    OPS.oat_linear.default: _oat,
    OPS.oat_linear_int.default: _oat_int,
    OPS.gif_linear.default: _gif,
}
PRODUCERS = {
    OPS.hg_norm.default: OPS.row_norm.default,
    OPS.hg_gated.default: OPS.row_gated.default,
    OPS.oat_attention.default: OPS.row_attention.default,
    OPS.oat_appended.default: OPS.row_appended.default,
}
ATTENTIONS = OPS.oat_attention.default, OPS.oat_appended.default
VIEWS = {torch.ops.aten.reshape.default, torch.ops.aten.view.default, torch.ops.aten._unsafe_view.default}


def product_of(node: Node) -> Product | None:
    """A product of one row that its kernels take, or of many with GIF neurons; or None."""
    make = PRODUCTS.get(node.target)
    if make is None or node.kwargs:
        return None
    x = value(node.args[0])
    if not nodes.joins(x) or not nodes.fixed(x) or not x.numel():
        return None
    found = make(node, *node.args)
    weight = value(found.weight[0])
    gif = found.encoder is OPS.row_gif.default
    if rows_of(x) > 1 and (x.device.type not in nodes.DEVICES or not gif or rows_of(x) <= SKINNY):
        return None
    whole = weight.shape[1] * weight.element_size() % 4 == 0 and x.shape[-1] % 4 == 0
    known = weight.dtype in KINDS and x.shape[-1] <= WIDEST
    return found if whole and known and weight.is_contiguous() else None


class Joined(CustomGraphPass):
    """The pass; see the module. What was compiled with one is compiled for those that are equal.

    Args:
        model: A number that the model has alone.
        together: Whether anything is put together.
    """

    def __init__(self, model: int, together: bool = True) -> None:
        self.model, self.together = model, together

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Joined) and vars(self) == vars(other)

    def __hash__(self) -> int:
        return hash((self.model, self.together))

    def __call__(self, graph: Graph) -> None:
        """Put together what can be, in place."""
        if not self.together:
            return
        groups: dict[Hashable, list[Product]] = {}
        order = {node: place for place, node in enumerate(graph.nodes)}
        for node in graph.nodes:
            found = product_of(node)
            if found is None:
                continue
            group = groups.setdefault(found.kind, [])
            if not group or all(_early(x, group[0].node, order) for x in (*found.neuron, *found.weight)):
                group.append(found)
        join_caches(graph)
        join_prompts(graph)
        made = [_made(group[0].x, group) for group in groups.values()]
        normed = {found.source[0] for found in made if found and found.encoder is OPS.row_norm_gif.default}
        for group in groups.values():
            _join(graph, group, order, normed)
        chain(graph)
        _known(graph)

    def uuid(self) -> bytes:
        """Graphs that were compiled with this pass are kept apart from others."""
        modules = *DEFINED, chained, chained_steps, joined_cache, joined_plain, joined_prompt, nodes
        how = repr((self.together, nodes.joins(torch.empty(0))))
        return get_hash_for_files((__file__, *(module.__file__ for module in modules))) + how.encode()


def _early(node: Node | None, first: Node, order: dict[Node, int]) -> bool:
    """Whether ``node`` is there before ``first``, or can be: it is made of the graph's inputs alone."""
    if node is None or node.op in ("placeholder", "get_attr") or order.get(node, len(order)) < order[first]:
        return True
    return node.op == "call_function" and all(_early(x, first, order) for x in node.all_input_nodes)


def _hoist(node: Node | None, first: Node, order: dict[Node, int]) -> None:
    if node is None or node.op != "call_function" or order[node] < order[first]:
        return
    for x in node.all_input_nodes:
        _hoist(x, first, order)
    first.prepend(node)
    order[node] = order[first] - 1


def _join(graph: Graph, group: list[Product], order: dict[Node, int], normed: set[Node]) -> None:
    first, x = group[0], group[0].node.args[0]  # as it is now: it may have been put together itself
    for member in group[1:]:
        for node in (*member.neuron, *member.weight):
            _hoist(node, first.node, order)
    several = group if _differ(group) else group[:1]
    lists = [[p.neuron[i] for p in several if p.neuron[i] is not None] for i in range(len(first.neuron))]
    matrices = [[p.weight[i] for p in group if p.weight[i] is not None] for i in range(4)]
    residual, total = _residual(group, order, normed)
    encoder, source, made = first.encoder, (x,), _made(x, group)
    if made is not None:
        encoder, source = made.encoder, _activated(made)
    y = value(first.node)
    last = residual, y.dtype, list(y.shape[:-1]), *first.sums
    with graph.inserting_before(first.node):
        codes = call(graph, encoder, (*source, *lists, *first.how))
        outs = call(graph, OPS.row_product.default, (codes, *matrices, *last))
        parts = [call(graph, getitem, (outs, i)) for i in range(len(group))]
    order |= dict.fromkeys(parts, order[first.node])
    for member, part in zip(group, parts, strict=True):
        replaced = member.node if total is None else total
        replaced.replace_all_uses_with(part)
        if total is not None:
            graph.erase_node(total)
        graph.erase_node(member.node)
    if made is not None:
        for node in made.nodes:
            graph.erase_node(node)


def _differ(group: list[Product]) -> bool:
    """Whether the neurons may: those of one step have one unit all."""
    first = group[0]
    if first.encoder is OPS.row_gif.default and first.how[1] == 1:
        return False
    return any(member.neuron != first.neuron for member in group)


def _made(x: Node, group: list[Product]) -> Made | None:
    """What makes the row ``x`` for these products alone, and can encode it; or None."""
    if set(x.users) != {p.node for p in group}:
        return None
    if group[0].encoder is OPS.row_gif.default:
        return plain(x)
    made = x.args[0] if x.target in VIEWS and len(x.args[0].users) == 1 else x
    if made.target not in PRODUCERS or made.kwargs or not chained.encodes(made):
        return None
    if made.target in ATTENTIONS:
        if len(group) > 1 or group[0].neuron[1] is not None or not value(made).numel() == value(x).numel() > 0:
            return None
    elif x is not made:
        return None
    return Made(PRODUCERS[made.target], made.args, [*dict.fromkeys((x, made))])  # a view of it, if any, before it


def _activated(made: Made) -> tuple:
    """The source of ``made``; the function of one row's gate that goes nowhere else is left to the product before.

    There it is computed once a channel. Each program that encodes GIF neurons' input computes it for the whole row.
    """
    if made.encoder is not OPS.row_gated_gif.default or value(made.source[0]).device.type in nodes.CHAINED:
        return made.source
    gate, up, function = made.source
    if gate.target is not getitem or set(gate.users) - set(made.nodes) or rows_of(value(gate)) > 1:
        return made.source
    makes = gate.args[0]
    known = makes.target is OPS.row_product.default and len(makes.args) == 10  # no function yet
    if not known or value(makes.args[1][0]).dtype.is_floating_point:
        return made.source
    makes.args = (*makes.args, function, gate.args[1])
    return gate, up, ""


def _residual(group: list[Product], order: dict[Node, int], normed: set[Node]) -> tuple[Node | None, Node | None]:
    """What is added to the only product, and the sum: where a norm follows, and no other kernel would add it.

    ``normed``: what plain norms meet that encode.
    """
    node = group[0].node
    if len(group) > 1 or len(node.users) > 1:
        return None, None
    total = next(iter(node.users), None)
    if total is None or total.target is not ADD or total.kwargs or len(total.all_input_nodes) < 2:
        return None, None
    other = total.args[1] if total.args[0] is node else total.args[0]
    same = {(value(n).shape, value(n).dtype) for n in (node, other, total)}
    seen = {total, *(user for user in total.users if user.target in VIEWS)}
    norm = any(n in normed or any(user.target is OPS.hg_norm.default for user in n.users) for n in seen)
    return (other, total) if norm and len(same) == 1 and order[other] < order[node] else (None, None)


def _known(graph: Graph) -> None:
    """Tell Inductor that the graph's operators of this package are kernels, before it meets them.

    It finds out by itself at the first node of each. But there PyTorch 2.11 writes what made the node's arguments, and
    what made those, as text for its log, read or not; what has two uses is in it twice, so that each layer before the
    node makes it three times as long. In a model as it was, these nodes are in the first layer. Here the only norm that
    no product follows is the last of all, and compiling takes four times as long for each layer more.
    """
    from torch._inductor.lowering import lowerings, make_fallback  # two seconds, unless one compiles already

    for target in dict.fromkeys(node.target for node in graph.nodes):
        if isinstance(target, OpOverload) and target.namespace == NAMESPACE and target not in lowerings:
            make_fallback(target)
