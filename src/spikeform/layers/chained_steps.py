"""The steps of a chain of operators: what ``csrc/chain.cpp`` is told of each, field by field as it has them."""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from spikeform.layers.cpu.attention import hidden_from, sizes_of
from spikeform.layers.nodes import OPS, Node, value
from spikeform.neurons.cpu.hg import PLACES
from spikeform.neurons.cpu.real import KINDS as REAL
from spikeform.synapses.cpu.products import KINDS

if TYPE_CHECKING:
    from spikeform.layers.chained import Chain

PRODUCT, APPEND, ATTENTION = range(3)
AS_IT_IS, HG_NORM, HG_GATED, RMS_NORM, GATED = range(5)  # what makes a row
NONE = -1  # the place of no tensor
APPENDED = {OPS.oat_appended.default, OPS.gif_appended.default}
ATTENTIONS = {OPS.oat_attention.default, OPS.gif_attention.default, *APPENDED}


class Room(NamedTuple):
    """Memory between steps, by its number."""

    number: int


class Encoder(NamedTuple):
    """What a product is told of the row that it meets.

    Attributes:
        made: What makes it.
        how: GIF or not; limit, resolution and rounding, or levels and steps; populations.
        tables: Of each matrix, or one for all: thresholds or multiples.
        shifts: The same, or none at all.
    """

    made: list[Any]
    how: list[int]
    tables: Sequence[Node]
    shifts: Sequence[Node]


def dtype_of(node: Node) -> torch.dtype | None:
    """Of the rows that an operator with a step meets; a product meets codes."""
    if node.target is OPS.row_product.default:
        return node.args[6]
    return value(node.args[0]).dtype


def possible(node: Node) -> bool:
    """Whether the library can do what an operator does: attend to one token of one sequence, or make a row."""
    if node.target not in ATTENTIONS:
        return all(value(x).dtype in (*REAL, torch.int8) for x in node.all_input_nodes)
    (q, *held), mask = map(value, node.args[:3]), node.args[3]
    one = q.dtype in REAL and q.shape[0] == q.shape[2] == 1 and all(x.stride(-1) == 1 for x in (q, *held))
    masked = mask is None or (value(mask).dtype in REAL and value(mask).stride(-1) == 1)
    if node.target in APPENDED:  # key and value, cos and sin
        tokens = [value(x) for x in node.args[-4:] if x is not None]
        one = one and all(x.dtype == q.dtype and x.stride(-1) == 1 for x in tokens)
    rotates = node.target not in (OPS.oat_attention.default, OPS.oat_appended.default) and node.args[5] is not None
    return one and masked and not rotates


def _bits(x: float) -> int:
    """Of an fp32 number."""
    return struct.unpack("i", struct.pack("f", x))[0]


def _row(made: int, x: Any, row: torch.Tensor, function: str = "silu", other: Any = NONE, **more: Any) -> list[Any]:
    """What makes a row like ``row``: fields of a step."""
    norm = {"weight": NONE, "bias": NONE, "weight_kind": 0, "bias_kind": 0, "centred": 0, "eps": 0, "offset": 0}
    gates = {"bits": 1, "nearest": 1, "low": 0, "high": 1}
    neuron = {"threshold": NONE, "populations": 0, "limit": 0, "resolution": 1, "rounding": 0}
    fields = norm | gates | neuron | more
    assert len(fields) == len(norm | gates | neuron)
    return [made, x, other, REAL[row.dtype], row.shape[-1], PLACES[function], *fields.values()]


def _population(chain: Chain, threshold: Node, limit: int, resolution: int, rounding: int) -> dict[str, Any]:
    own = {"threshold": chain.place(threshold), "populations": value(threshold).numel()}
    return own | {"limit": limit, "resolution": resolution, "rounding": rounding}


def _kind(x: Node | None) -> int:
    return 0 if x is None else REAL[value(x).dtype]


def _oat(chain: Chain, node: Node, made: list[Any], thresholds, shifts, limit, resolution, rounding, _parts) -> bool:
    how = [0, limit, resolution, rounding, value(thresholds[0]).numel()]
    chain.encoders[node] = Encoder(made, how, thresholds, shifts)
    return True


def _gif(chain: Chain, node: Node, made: list[Any], multiples, levels, steps, _packed) -> bool:
    chain.encoders[node] = Encoder(made, [1, levels, steps, 0, 1], multiples, ())
    return True


def _row_oat(chain: Chain, node: Node, x: Node, *population: Any) -> bool:
    return _oat(chain, node, _row(AS_IT_IS, chain.place(x), value(x)), *population)


def _row_gif(chain: Chain, node: Node, x: Node, *groups: Any) -> bool:
    return _gif(chain, node, _row(AS_IT_IS, chain.place(x), value(x)), *groups)


def _row_norm(chain: Chain, node: Node, x, weight, bias, eps, centred, offset, threshold, *rest: Any) -> bool:
    limit, resolution, rounding, bits, nearest, low, high, *population = rest
    norm = {"weight": chain.place(weight), "bias": chain.place(bias)}
    norm |= {"weight_kind": _kind(weight), "bias_kind": _kind(bias)}
    norm |= {"centred": centred, "eps": _bits(eps), "offset": _bits(offset)}
    gates = {"bits": bits, "nearest": nearest, "low": low, "high": high}
    neuron = _population(chain, threshold, limit, resolution, rounding)
    made = _row(HG_NORM, chain.place(x), value(x), **norm, **gates, **neuron)
    return _oat(chain, node, made, *population)


def _row_gated(chain: Chain, node: Node, gate, up, function, bits, nearest, low, high, threshold, *rest: Any) -> bool:
    limit, resolution, rounding, *population = rest
    gates = {"bits": bits, "nearest": nearest, "low": low, "high": high}
    neuron = _population(chain, threshold, limit, resolution, rounding)
    other = chain.place(up)
    made = _row(HG_GATED, chain.place(gate), value(gate), function, other, **gates, **neuron)
    return _oat(chain, node, made, *population)


def _row_norm_gif(chain: Chain, node: Node, x: Node, weight: Node, eps: float, *groups: Any) -> bool:
    norm = {"weight": chain.place(weight), "weight_kind": _kind(weight), "eps": _bits(eps)}
    return _gif(chain, node, _row(RMS_NORM, chain.place(x), value(x), **norm), *groups)


def _row_gated_gif(chain: Chain, node: Node, gate: Node, up: Node, function: str, *groups: Any) -> bool:
    made = _row(GATED, chain.place(gate), value(gate), function, chain.place(up))
    return _gif(chain, node, made, *groups)


def _row_attention(chain: Chain, node: Node, q: Node, *args: Any) -> bool:
    row = value(q)
    left = chain.room(None, row.nbytes)
    _oat_attends(chain, left, q, *args[:-6])
    return _oat(chain, node, _row(AS_IT_IS, left, row.reshape(-1)), *args[-6:])


def _product(chain: Chain, node: Node, codes: Node, weights, scales, zeros, biases, residual, dtype, *_: Any) -> bool:
    encoder = chain.encoders.pop(codes)
    kinds = {KINDS[value(weight).dtype] for weight in weights}
    parts = {user.args[1]: user for user in node.users}
    fields = [*encoder.made, *encoder.how, *kinds, chain.place(residual), REAL[dtype], len(weights)]

    def of(given: Sequence[Node], i: int) -> Node | None:
        return given[min(i, len(given) - 1)] if given else None  # one neuron may be that of all matrices

    for i, weight in enumerate(weights):
        bias, rows = of(biases, i), value(weight).shape[0]
        given = weight, of(scales, i), of(zeros, i), bias
        fields += [*map(chain.place, given), _kind(bias), chain.place(of(encoder.tables, i))]
        fields += [chain.place(of(encoder.shifts, i)), rows, chain.room(parts.get(i), rows * dtype.itemsize)]
    chain.steps.append([PRODUCT, *fields])
    return True


def _append(chain: Chain, gif: bool, q: Node, caches, tables, how, place, key, value_, cos, sin) -> Any:
    """Where the query is then: what is turned has another place."""
    k, v = value(key), value(value_)
    size, width = k.shape[-1], k.element_size()
    strides = [value(x).stride(axis) * value(x).element_size() for x in caches for axis in (1, 2)]
    turned = None if cos is None else chain.room(None, value(q).nbytes)
    fields = [gif, REAL[k.dtype], size, k.shape[1], 0 if turned is None else value(q).shape[1]]
    fields += [*map(chain.strided, caches), chain.place(place), value(caches[0]).shape[2], *strides]
    fields += [chain.strided(key), k.stride(1) * width, chain.strided(value_), v.stride(1) * width]
    fields += [NONE, 0] if turned is None else [chain.strided(q), value(q).stride(1) * width]
    chain.written |= dict.fromkeys(caches)
    fields += [NONE if turned is None else turned, *map(chain.strided, (cos, sin)), *map(chain.place, tables), *how]
    chain.steps.append([APPEND, *fields])
    return chain.strided(q) if turned is None else turned


def _attends(chain: Chain, gif: bool, left: Room, q, where: Any, k, v, mask, scaling: float, more: list[Any]) -> None:
    """``where``: the query, in one piece if it is not ``q`` itself."""
    masked, query = None if mask is None else value(mask), value(q)
    query = query.new_empty(query.shape) if isinstance(where, Room) else query
    sizes = sizes_of(query, value(k), value(v), masked, query.dtype)
    hidden = -1.0 if masked is None else hidden_from(masked)
    places = [where, *map(chain.strided, (k, v, mask))]
    chain.steps.append([ATTENTION, *sizes, gif, *places, left, _bits(scaling), _bits(hidden), *more])


def _oat_attends(chain: Chain, left: Room, q, k, v, mask, scaling, *given: Any) -> None:
    thresholds, (limit, peak, resolution, rounding, *gates), token = given[:4], given[4:12], given[12:]
    wide, populations, where = value(k).dtype == torch.int32, value(thresholds[0]).numel(), chain.strided(q)
    if token:
        how = [limit, resolution, rounding, populations, wide, 0]
        where = _append(chain, False, q, (k, v), thresholds[1:3], how, *token)
    more = [*map(chain.place, thresholds), populations, limit, peak, resolution, rounding, *gates, wide]
    _attends(chain, False, left, q, where, k, v, mask, scaling, more)


def _oat_attention(chain: Chain, node: Node, *args: Any) -> bool:
    if not possible(node):
        return False
    _oat_attends(chain, chain.room(node, value(node).nbytes), *args)
    return True


def _gif_attention(chain: Chain, node: Node, q, k, v, mask, scaling, _signs, top, multiple, steps, *rest: Any) -> bool:
    if not possible(node):
        return False
    _, k_multiple, k_steps, _, v_multiple, v_steps, levels, peak, *token = rest
    where = chain.strided(q)
    if token:
        where = _append(chain, True, q, (k, v), (k_multiple, v_multiple), [levels, k_steps, 0, 1, 0, v_steps], *token)
    tables = [*map(chain.place, (top, k_multiple, v_multiple, multiple))]
    more = [*tables, 1, levels, peak, steps, 0, 0, 0, 0, 0, 0]
    _attends(chain, True, chain.room(node, value(node).nbytes), q, where, k, v, mask, scaling, more)
    return True


STEPS: dict[Any, Callable[..., bool]] = {
    OPS.row_oat.default: _row_oat,
    OPS.row_norm.default: _row_norm,
    OPS.row_gated.default: _row_gated,
    OPS.row_gif.default: _row_gif,
    OPS.row_norm_gif.default: _row_norm_gif,
    OPS.row_gated_gif.default: _row_gated_gif,
    OPS.row_attention.default: _row_attention,
    OPS.row_product.default: _product,
    OPS.row_appended.default: _row_attention,
    OPS.oat_attention.default: _oat_attention,
    OPS.oat_appended.default: _oat_attention,
    OPS.gif_attention.default: _gif_attention,
    OPS.gif_appended.default: _gif_attention,
}
