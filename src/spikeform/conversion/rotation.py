"""Rotation of a pre-norm model's residual stream, and of its heads: the same function without outlier channels.

The residual stream meets the rest of the model in three ways: embeddings and output projections write to it, and
norms read it. Once a norm's gain (and offset) is folded into the layers that consume it, an RMS norm commutes with
every orthogonal Q, so Q can be written into all weights around it. A LayerNorm also subtracts the mean; where all
writers are centred beforehand the mean is zero, and what remains is an RMS norm. Values are a linear path of their
own, one rotation per block, between the value and the output projection.

After QuaRot (arXiv 2404.00456) and SliceGPT (arXiv 2401.15024), without their rotations at run time: only queries
and keys are rotated then (:func:`head_signs`), after RoPE.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from spikeform.conversion.kinds import kind_of, norm_form
from spikeform.conversion.parts import Block, Heads, Part, Read, family_name, family_of, final_read, is_conv1d, trunk_of
from spikeform.errors import ConversionError
from spikeform.layers.rotation import head_matrix, mixing

__all__ = ["head_matrix", "head_signs", "restructure", "rotate"]


def head_signs(size: int, seed: int) -> Tensor:
    """Random signs int8 ``[size]``, each 1 or -1: what defines the rotation of queries and keys."""
    return _signs(size, torch.Generator().manual_seed(seed))


def restructure(model: Any) -> Any:
    """Give a model the modules and parameters of a rotated one, in place; its values are not yet right.

    Each LayerNorm that reads the residual stream becomes ``nn.RMSNorm``; the layers after it have a bias where it had
    one; the head has a weight of its own (``config.tie_word_embeddings`` is False). Works on the meta device, and
    changes nothing the second time.

    Args:
        model: A dense pre-norm causal language model of a supported family.

    Returns:
        ``model``.

    Raises:
        ConversionError: The family is unknown or not pre-norm, or the model has no head, or is converted already.
    """
    reads = _stream(model).reads
    _untie(model)
    names = {module: name for name, module in model.named_modules()}
    for norm, consumers in reads:
        if getattr(norm, "bias", None) is not None:
            for consumer in consumers:
                _give_bias(consumer)
        eps, centred, _ = norm_form(norm)
        if centred:
            like = norm.weight if norm.weight is not None else consumers[0].weight
            new = nn.RMSNorm(norm.normalized_shape, eps, device=like.device, dtype=like.dtype).train(norm.training)
            new.weight.requires_grad_(like.requires_grad)
            model.set_submodule(names[norm], new)
    return model


@torch.no_grad()
def rotate(model: Any, seed: int = 0, values: bool = True) -> Any:
    """Rotate a model in place: the same function but for rounding, and the gain of every norm read is 1.

    The arithmetic is fp64; each weight is rounded to its own dtype once.

    Args:
        model: As for :func:`restructure`.
        seed: Of the signs.
        values: Rotate the values of each head, too.

    Returns:
        ``model``, restructured.

    Raises:
        ConversionError: As :func:`restructure`.
    """
    stream = _stream(model)
    folded = [_gain_and_offset(norm) for norm, _ in stream.reads]
    restructure(model)
    generator = torch.Generator().manual_seed(seed)
    signs = _signs(stream.size, generator)
    for (norm, consumers), (gain, offset) in zip(stream.reads, folded, strict=True):
        for consumer in consumers:
            weight = _weight(consumer)
            exact = weight.double()
            if offset is not None:
                consumer.bias.copy_(consumer.bias.double() + exact @ offset)
            weight.copy_(_rotated(exact * gain, signs))
        if not stream.centred:  # a LayerNorm's place is taken by a new norm
            norm.weight.fill_(1.0 - norm_form(norm)[2])
    for table in stream.embeddings:
        table.weight.copy_(_write(table.weight.double(), signs, stream.centred))
    for writer in stream.writers:
        weight = _weight(writer)
        weight.copy_(_write(weight.double().T, signs, stream.centred).T)
        if writer.bias is not None:
            writer.bias.copy_(_write(writer.bias.double(), signs, stream.centred))
    for block in stream.blocks if values else ():
        _rotate_values(block.value, block.output, _signs(block.value.size, generator))
    return model


class _Stream(NamedTuple):
    """All that touches the residual stream, ``size`` wide; ``centred``: its norms subtract the mean.

    The outputs of ``writers`` and the rows of ``embeddings`` add up to it, and ``reads`` read it.
    """

    size: int
    centred: bool
    reads: list[Read]
    embeddings: list[Part]
    writers: list[Part]
    blocks: list[Block]


def _stream(model: Any) -> _Stream:
    family, name = family_of(model), family_name(model)
    blocks, final = list(family.blocks(model)), final_read(model)
    if not blocks or any(block.post_norm or not block.reads for block in blocks):
        raise ConversionError(
            f"{name!r} cannot be rotated: norms stand in its residual stream, or read more than it; use rotate=False"
        )
    if final is None:
        raise ConversionError(f"{type(model).__name__} cannot be rotated: it has no final norm before an output head")
    reads = [*(read for block in blocks for read in block.reads), final]
    trunk = trunk_of(model)
    embeddings: list[Part] = [getattr(trunk, part) for part in family.embeddings]
    writers = [layer for block in blocks for layer in (block.output, block.down)]
    project_in = getattr(trunk, "project_in", None)
    if project_in is not None:  # OPT: the token embedding, its first, is narrower than the stream
        embeddings, writers = embeddings[1:], [*writers, project_in]
    linears = [*writers, *(layer for read in reads for layer in read.consumers)]
    others = _others(linears, "linear") | _others([read.norm for read in reads], "norm")
    if others:
        raise ConversionError(
            f"{', '.join(sorted(others))} cannot be rotated: rotate the dense model, before it is converted"
        )
    return _Stream(embeddings[0].weight.shape[1], norm_form(final.norm)[1], reads, embeddings, writers, blocks)


def _others(modules: list[Part], kind: str) -> set[str]:
    return {type(module).__name__ for module in modules if kind_of(module) != kind}


def _rotated(x: Tensor, signs: Tensor) -> Tensor:
    """``x head_matrix(signs)`` along the last axis, by sums and differences: the stream may be thousands wide."""
    size = signs.numel()
    power = size & -size
    y = (x * signs.to(x)).unflatten(-1, (power, size // power)) @ mixing(size // power, x.device, x.dtype)
    width = 1
    while width < power:
        a, b = y.unflatten(-2, (-1, 2, width)).unbind(-3)
        y = torch.stack((a + b, a - b), -3).flatten(-4, -2)
        width *= 2
    return y.flatten(-2) / math.sqrt(power)


def _signs(size: int, generator: torch.Generator) -> Tensor:
    # On the CPU whatever the default device is, so that a seed means the same everywhere.
    return torch.randint(0, 2, (size,), generator=generator, device="cpu").mul_(2).sub_(1).to(torch.int8)


def _weight(linear: Part) -> Tensor:
    """A view ``[out, in]`` of a linear layer's weight."""
    return linear.weight.T if is_conv1d(linear) else linear.weight


def _gain_and_offset(norm: Part) -> tuple[Tensor, Tensor | None]:
    """A norm's gain and offset, in fp64."""
    bias = getattr(norm, "bias", None)
    if norm.weight is None:
        return torch.ones((), dtype=torch.float64), None
    return norm.weight.double() + norm_form(norm)[2], None if bias is None else bias.double()


def _write(outputs: Tensor, signs: Tensor, centred: bool) -> Tensor:
    """What is written to the stream along the last axis ``[..., size]``, centred and rotated."""
    return _rotated(outputs - outputs.mean(-1, keepdim=True) if centred else outputs, signs)


def _rotate_values(value: Heads, output: Part, signs: Tensor) -> None:
    """Rotate each value head, and undo it in the columns of the output projection that meet it."""
    weight = _weight(value.module)
    for start in value.starts:
        rows = slice(start, start + value.size)
        weight[rows] = _rotated(weight[rows].double().T, signs).T.to(weight.dtype)
        if value.module.bias is not None:
            bias = value.module.bias
            bias[rows] = _rotated(bias[rows].double(), signs).to(bias.dtype)
    columns = _weight(output)
    columns.copy_(_rotated(columns.double().unflatten(1, (-1, value.size)), signs).flatten(1))


def _give_bias(linear: Part) -> None:
    if linear.bias is None:
        weight = linear.weight
        linear.bias = nn.Parameter(weight.new_zeros(linear.out_features), weight.requires_grad)


def _untie(model: Any) -> None:
    """A weight of its own for the head, and no word left that says otherwise."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head.weight is embedding.weight:
        head.weight = nn.Parameter(head.weight.detach().clone(), head.weight.requires_grad)
    for part in _models(model):
        part.config.tie_word_embeddings = False
        part.all_tied_weights_keys = {}


def _models(model: Any) -> Iterator[Any]:
    """The model and the transformers models within it: each has a config and a list of tied weights."""
    return (module for module in model.modules() if hasattr(module, "all_tied_weights_keys"))
