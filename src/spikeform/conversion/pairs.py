"""Pairs of layers between which channels can be rescaled without changing what the model computes.

    norm          a norm's gain and bias / s             input columns of all its consumers x s
    value         rows of the value projection / s       matching columns of the output projection x s
    feed_forward  rows of the up projection / s          matching columns of the down projection x s
    query_key     rows of the key projection x s         matching rows of the query projection / s

The third holds where what lies between is linear in the scaled channel: a gated unit (SwiGLU, GeGLU), or a ReLU,
which is positively homogeneous. GELU is neither. Where the norm also feeds the residual stream (post-norm: BERT)
or the result of the model, or a head tied to the input embedding, there is no norm pair. The last holds because a
score is a sum over the channels of query times key; RoPE turns channel i together with ``i + rotary / 2``, so these
two share one s, and so do the query heads of one key head. Norms on queries and keys (Qwen3) would undo it.

This is the learnable equivalent transformation of OmniQuant (arXiv 2308.13137, Section 3.3), with the ties that
RoPE and grouped queries need. The outlier twin uses the same pairs.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, nn

from spikeform.conversion.parts import Block, Heads, Part, Read, family_of, final_read, is_conv1d
from spikeform.errors import ConversionError

KINDS = ("norm", "value", "feed_forward", "query_key")
Channels = tuple[tuple[int, ...], ...]


@dataclass(eq=False)
class Pair:
    """A place that can be rescaled by one factor per channel.

    Attributes:
        kind: ``norm``, ``value``, ``feed_forward`` or ``query_key``.
        producer: The module whose outputs channel i is: ``rows[i]``.
        consumers: The modules whose input columns channel i is, or whose output rows for ``query_key``:
            ``columns[i]``, the same in each.
        rows: Output rows of the producer of each channel: one, but for ``query_key``.
        columns: Columns (``query_key``: rows) of the consumers: several where query heads share a value head.
        producer_name: Qualified name of the producer.
        consumer_names: Qualified names of the consumers.
        gain_offset: Added to the producer's stored gain, if it is a norm (Gemma stores gain - 1).
    """

    kind: str
    producer: Part
    consumers: list[Part]
    rows: Channels
    columns: Channels
    producer_name: str = ""
    consumer_names: tuple[str, ...] = ()
    gain_offset: float = 0.0
    _indices: dict = field(default_factory=dict, init=False, repr=False)

    @property
    def channels(self) -> int:
        """How many factors the pair takes."""
        return len(self.rows)

    def index(self, side: str, size: int, device: torch.device) -> Tensor:
        """The channel ``[size]`` of each of the producer's outputs (``rows``) or of the consumers' ``columns``.

        What belongs to no channel is given ``channels``, one past the last.
        """
        key = (side, size, device)
        if key not in self._indices:
            groups = getattr(self, side)
            flat = torch.tensor([place for group in groups for place in group])
            counts = torch.tensor([len(group) for group in groups])
            index = torch.full((size,), self.channels)
            index[flat] = torch.repeat_interleave(torch.arange(self.channels), counts)
            self._indices[key] = index.to(device)
        return self._indices[key]

    def largest(self, columns: Tensor) -> Tensor:
        """Largest of some non-negative measure of the consumers' columns ``[K]``, per channel ``[channels]``."""
        index = self.index("columns", columns.numel(), columns.device)
        return columns.new_zeros(self.channels + 1).scatter_reduce(0, index, columns, "amax")[:-1]


def pairs(model: nn.Module) -> list[Pair]:
    """All pairs of a model of a supported family, dense or converted, block by block, the head's last.

    Raises:
        ConversionError: The family is not known.
    """
    family = family_of(model)
    found = [pair for block in family.blocks(model) for pair in _of_block(block)]
    final, whole = final_read(model), cast(Any, model)
    if final is not None:
        head, embedding = whole.get_output_embeddings(), whole.get_input_embeddings()
        # OPT-350m projects between its last norm and its head; a tied head cannot change alone.
        if final.consumers == [head] and head.weight is not embedding.weight:
            found.append(_norm(final))
    names = {module: name for name, module in model.named_modules()}
    for pair in found:
        pair.producer_name = names[pair.producer]
        pair.consumer_names = tuple(names[consumer] for consumer in pair.consumers)
        pair.gain_offset = family.gain_offset if pair.kind == "norm" else 0.0
    return found


def scaled(pair: Pair, scale: Tensor, params: dict[str, Tensor], prefix: str = "") -> dict[str, Tensor]:
    """Rescaled parameters, for ``torch.func.functional_call``; differentiable in ``scale`` and in ``params``.

    Args:
        pair: Of a floating-point model.
        scale: ``[channels]``, not zero; positive for ``feed_forward``, where a ReLU may lie between.
        params: Parameters by name. Those of earlier pairs may have been rescaled already.
        prefix: What the names in ``params`` lack: with ``"model.layers.0."`` they are relative to that block.

    Returns:
        A new dict: ``params`` with the pair's weights and biases replaced, each in its own dtype.

    Raises:
        ConversionError: ``scale`` has another shape, or ``params`` lacks a parameter of the pair.
    """
    if tuple(scale.shape) != (pair.channels,):
        raise ConversionError(
            f"{pair.kind} pair of {pair.producer_name}: scale has shape {list(scale.shape)}, not [{pair.channels}]"
        )
    result, swapped = dict(params), pair.kind == "query_key"
    _scale_output(pair, pair.producer, _key(pair.producer_name, prefix), "rows", scale, not swapped, result)
    for consumer, name in zip(pair.consumers, pair.consumer_names, strict=True):
        if swapped:
            _scale_output(pair, consumer, _key(name, prefix), "columns", scale, True, result)
        else:
            _scale_input(pair, consumer, _key(name, prefix), scale, result)
    return result


@torch.no_grad()
def apply(pair: Pair, scale: Tensor) -> None:
    """Rescale in place: what :func:`scaled` computes, bit for bit.

    Raises:
        ConversionError: ``scale`` has another shape or holds a number that cannot be undone, or the weights are
            integers.
    """
    usable = scale.isfinite() & (scale > 0 if pair.kind == "feed_forward" else scale != 0)
    if not bool(usable.all()):
        needed = "positive" if pair.kind == "feed_forward" else "other than zero"
        raise ConversionError(f"{pair.kind} pair of {pair.producer_name}: scales must be finite and {needed}")
    named = zip((pair.producer_name, *pair.consumer_names), (pair.producer, *pair.consumers), strict=True)
    params = {_key(name, "") + k: p for name, m in named for k, p in m.named_parameters(recurse=False)}
    for name, new in scaled(pair, scale, params).items():
        params[name].copy_(new)


def _key(name: str, prefix: str) -> str:
    if not name.startswith(prefix):
        raise ConversionError(f"{name} is not below {prefix!r}: rescale the pair with parameters of the whole model")
    return f"{name.removeprefix(prefix)}."


def _factors(pair: Pair, side: str, scale: Tensor, size: int) -> Tensor:
    """The factor of each row or column ``[size]``: its channel's, or 1."""
    return torch.cat((scale, scale.new_ones(1)))[pair.index(side, size, scale.device)]


def _scale_output(pair: Pair, module: Part, key: str, side: str, scale: Tensor, divide: bool, params: dict) -> None:
    weight, bias = _float(params, f"{key}weight"), params.get(f"{key}bias")
    factors = _factors(pair, side, scale.to(weight.device), weight.shape[1 if is_conv1d(module) else 0])

    def times(x: Tensor, factor: Tensor) -> Tensor:
        return x / factor if divide else x * factor

    if weight.ndim == 1:
        new = times(weight + pair.gain_offset, factors) - pair.gain_offset
    else:
        new = times(weight, factors if is_conv1d(module) else factors[:, None])
    params[f"{key}weight"] = new.to(weight.dtype)
    if bias is not None:
        params[f"{key}bias"] = times(bias, factors).to(bias.dtype)


def _scale_input(pair: Pair, module: Part, key: str, scale: Tensor, params: dict) -> None:
    weight = _float(params, f"{key}weight")
    factors = _factors(pair, "columns", scale.to(weight.device), weight.shape[0 if is_conv1d(module) else 1])
    params[f"{key}weight"] = (weight * (factors[:, None] if is_conv1d(module) else factors)).to(weight.dtype)


def _float(params: dict[str, Tensor], name: str) -> Tensor:
    weight = params.get(name)
    if weight is None or not weight.is_floating_point():
        raise ConversionError(f"{name} is no real parameter: rescale before the weights become integers")
    return weight


def _of_block(block: Block) -> list[Pair]:
    value, output = block.value, block.output
    found = [_norm(read) for read in block.reads]
    shared = len(block.query.starts) // len(value.starts)
    columns = tuple(
        tuple((g * shared + r) * value.size + e for r in range(shared))
        for g in range(len(value.starts))
        for e in range(value.size)
    )
    rows = tuple((start + e,) for start in value.starts for e in range(value.size))
    found.append(Pair("value", value.module, [output], rows, columns))
    if not block.normed:
        tied = _tied(block.rotary, value.size)
        rows = tuple(tuple(start + e for e in group) for start in block.key.starts for group in tied)
        columns = tuple(
            tuple(start + e for start in _group(block.query, g, shared) for e in group)
            for g in range(len(block.key.starts))
            for group in tied
        )
        found.append(Pair("query_key", block.key.module, [block.query.module], rows, columns))
    if block.homogeneous:
        channels = _each(block.down.weight.shape[0 if is_conv1d(block.down) else 1])
        found.append(Pair("feed_forward", block.up, [block.down], channels, channels))
    return found


def _norm(read: Read) -> Pair:
    channels = _each(read.norm.weight.shape[0])
    return Pair("norm", read.norm, list(read.consumers), channels, channels)


@cache
def _each(width: int) -> Channels:
    """Every row or column a channel of its own."""
    return tuple((i,) for i in range(width))


@cache
def _tied(rotary: int, size: int) -> Channels:
    """The dimensions of a head that share one factor: RoPE's partners; what it leaves alone is free."""
    half = rotary // 2
    return (*((i, i + half) for i in range(half)), *((i,) for i in range(rotary, size)))


def _group(query: Heads, group: int, shared: int) -> range:
    """Where the query heads of one key head start."""
    return query.starts[group * shared : (group + 1) * shared]
