"""The outlier twin of a model: the same function, with activation outliers built in.

Large language models have a few activation channels that are 10 to 1000 times larger than the others, and
spike codings differ most in how they bear them. Small models lack such channels. `outlier_twin` builds them
in, by rescaling chosen channels between a producer and its consumers:

    norm          gain (and bias) of a norm x s     input columns of all its consumers / s
    value         rows of the value projection x s  matching columns of the output projection / s
    feed_forward  rows of the up projection x s     matching columns of the down projection / s

The last holds where what lies between is linear in the scaled channel: a gated unit (SwiGLU, GeGLU), or a
ReLU, which is positively homogeneous. GELU is neither, so the plain GELU networks (GPT-2, GPT-NeoX, Phi,
BERT) have no feed_forward pair. Where the norm also feeds the residual stream (post-norm: BERT) or the
result of the model, or a head tied to the input embedding, there is no norm pair.

Powers of two only change exponents, so with the default factors every product and every sum of the twin
rounds as the model's own does: its outputs are equal bit by bit where the same kernels run. The exception
is Gemma, whose norm multiplies by 1 + weight: there the stored weight is rounded once.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

KINDS = ("norm", "value", "feed_forward")

# A model of a supported family, or a part of it. What attributes it has depends on the family; the type
# nn.Module says no more of an attribute than "a tensor or a module".
Part = Any


@dataclass(frozen=True)
class ScaledPair:
    """What was rescaled between one producer and its consumers.

    Attributes:
        kind: "norm", "value" or "feed_forward".
        producer: Name of the module whose output channels grew.
        consumers: Names of the modules whose input columns shrank.
        factors: Input channel of the consumers -> factor by which it grew.
    """

    kind: str
    producer: str
    consumers: tuple[str, ...]
    factors: dict[int, float]


@dataclass
class _Pair:
    """A place that can be rescaled: channel i is output `rows[i]`, and input columns `columns[i]`."""

    kind: str
    producer: Part
    consumers: list[Part]
    rows: list[int]
    columns: list[list[int]]


def outlier_twin(
    model: nn.Module,
    scales: Sequence[float] = (16.0, 128.0, 1024.0),
    channels: int = 3,
    seed: int = 0,
    kinds: Sequence[str] = KINDS,
) -> nn.Module:
    """Returns a copy of a dense model that computes the same and has outlier channels.

    Norm pairs of one width share their channels in all layers, as the outliers of large models do; the other
    pairs draw their own.

    Args:
        model: A dense Hugging Face model of a supported family. It is left as it is.
        scales: The factors, dealt to the channels in turn. Powers of two keep the function bit by bit; any
            other positive number keeps it up to rounding.
        channels: How many channels of each pair are rescaled.
        seed: Of the draw of the channels.
        kinds: Which kinds of pairs to use.

    Returns:
        The twin. Its attribute `outlier_pairs`, a tuple of `ScaledPair`, says which channels got which
        factor.

    Raises:
        ValueError: If the architecture is not supported, or none of `kinds` exists in it.
    """
    if not scales or any(not math.isfinite(s) or s <= 0 for s in scales):
        raise ValueError(f"scales must be finite and positive, not {tuple(scales)}")
    if channels < 1:
        raise ValueError(f"channels must be at least 1, not {channels}")
    if unknown := set(kinds) - set(KINDS):
        raise ValueError(f"unknown kinds {sorted(unknown)}: choose from {', '.join(KINDS)}")
    family = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
    if family not in _FAMILIES:
        raise ValueError(f"no outlier twin for {family!r}: supported are {', '.join(sorted(_FAMILIES))}")
    offset = 1.0 if family.startswith("gemma") else 0.0
    if offset and "norm" in kinds and next(model.parameters()).dtype != torch.float32:
        raise ValueError("Gemma's norms multiply by 1 + weight, which rescales in float32 only: use model.float()")

    twin: Part = copy.deepcopy(model)
    module_names = {module: name for name, module in twin.named_modules()}
    generator = torch.Generator().manual_seed(seed)
    shared: dict[int, list[int]] = {}
    done: list[ScaledPair] = []
    for pair in _FAMILIES[family](twin):
        if pair.kind not in kinds:
            continue
        width = len(pair.rows)
        if pair.kind == "norm" and width in shared:
            drawn = shared[width]
        else:
            drawn = torch.randperm(width, generator=generator)[:channels].tolist()
            if pair.kind == "norm":
                shared[width] = drawn
        factors: dict[int, float] = {}
        for turn, channel in enumerate(drawn):
            factor = float(scales[turn % len(scales)])
            _scale_output(pair.producer, pair.rows[channel], factor, offset)
            for consumer in pair.consumers:
                _divide_input(consumer, pair.columns[channel], factor)
            factors |= dict.fromkeys(pair.columns[channel], factor)
        consumers = tuple(module_names[consumer] for consumer in pair.consumers)
        done.append(ScaledPair(pair.kind, module_names[pair.producer], consumers, factors))
    if not done:
        raise ValueError(f"{type(model).__name__} has no pair of the kinds {', '.join(kinds)} to rescale")
    twin.outlier_pairs = tuple(done)
    return twin


def _is_conv1d(module: Part) -> bool:
    """Says whether the module is GPT-2's linear layer, whose weight is [in, out]."""
    return type(module).__name__ == "Conv1D"


@torch.no_grad()
def _scale_output(module: Part, row: int, factor: float, offset: float) -> None:
    """Multiplies one output channel of a norm or of a linear layer."""
    if _is_conv1d(module):
        module.weight[:, row] *= factor
    elif module.weight.ndim == 1:
        module.weight[row] = (module.weight[row] + offset) * factor - offset
    else:
        module.weight[row] *= factor
    if getattr(module, "bias", None) is not None:
        module.bias[row] *= factor


@torch.no_grad()
def _divide_input(module: Part, columns: list[int], factor: float) -> None:
    """Divides input columns of a linear layer."""
    if _is_conv1d(module):
        module.weight[columns] /= factor
    else:
        module.weight[:, columns] /= factor


def _norm(norm: Part, *consumers: Part) -> _Pair:
    channels = range(norm.weight.shape[0])
    return _Pair("norm", norm, list(consumers), list(channels), [[c] for c in channels])


def _value(value: Part, rows: Sequence[int], output: Part, head: int, groups: int = 1) -> _Pair:
    """A value projection, `rows` its value channels in order; one of them feeds `groups` query heads."""
    columns = [[(c // head * groups + g) * head + c % head for g in range(groups)] for c in range(len(rows))]
    return _Pair("value", value, [output], list(rows), columns)


def _feed_forward(up: Part, down: Part) -> _Pair:
    width = down.weight.shape[0 if _is_conv1d(down) else 1]
    return _Pair("feed_forward", up, [down], list(range(width)), [[c] for c in range(width)])


def _having(model: Part, *attributes: str) -> Iterator[Part]:
    """Yields the modules that have all these attributes: the layers, wherever the model keeps them."""
    for module in model.modules():
        if all(getattr(module, attribute, None) is not None for attribute in attributes):
            yield module


def _head(model: Part, norm_name: str) -> Iterator[_Pair]:
    """The final norm and the head, unless the head is tied, or absent: then the norm gives the result."""
    head = model.get_output_embeddings()
    base = getattr(model, model.base_model_prefix, None)
    if head is None or base is None or head.weight is model.get_input_embeddings().weight:
        return
    base = getattr(base, "decoder", base)
    norm = getattr(base, norm_name, None)
    projects = getattr(base, "project_out", None) is not None  # OPT-350m, between its last layer and its head
    if norm is not None and not projects:
        yield _norm(norm, head)


def _llama_like(model: Part) -> Iterator[_Pair]:
    """Pre-norm blocks, separate projections, gated network; norms on queries and keys are left alone."""
    for layer in _having(model, "input_layernorm", "self_attn", "mlp"):
        attention, mlp = layer.self_attn, layer.mlp
        # Gemma 2 and 3 also norm what attention returns: their norm before the network has a name of its own.
        before_mlp = getattr(layer, "pre_feedforward_layernorm", layer.post_attention_layernorm)
        yield _norm(layer.input_layernorm, attention.q_proj, attention.k_proj, attention.v_proj)
        yield _norm(before_mlp, mlp.gate_proj, mlp.up_proj)
        width = attention.v_proj.weight.shape[0]
        groups = attention.o_proj.weight.shape[1] // width
        yield _value(attention.v_proj, range(width), attention.o_proj, attention.head_dim, groups)
        yield _feed_forward(mlp.up_proj, mlp.down_proj)
    yield from _head(model, "norm")


def _gpt2(model: Part) -> Iterator[_Pair]:
    """GPT-2: queries, keys and values lie side by side in c_attn."""
    for layer in _having(model, "ln_1", "attn", "ln_2", "mlp"):
        width = layer.ln_1.weight.shape[0]
        yield _norm(layer.ln_1, layer.attn.c_attn)
        yield _norm(layer.ln_2, layer.mlp.c_fc)
        yield _value(layer.attn.c_attn, range(2 * width, 3 * width), layer.attn.c_proj, layer.attn.head_dim)
        if model.config.activation_function == "relu":
            yield _feed_forward(layer.mlp.c_fc, layer.mlp.c_proj)
    yield from _head(model, "ln_f")


def _opt(model: Part) -> Iterator[_Pair]:
    """OPT: pre-norm, except OPT-350m, whose norms feed the residual stream."""
    for layer in _having(model, "self_attn_layer_norm", "self_attn", "fc1", "fc2"):
        attention = layer.self_attn
        if model.config.do_layer_norm_before:
            yield _norm(layer.self_attn_layer_norm, attention.q_proj, attention.k_proj, attention.v_proj)
            yield _norm(layer.final_layer_norm, layer.fc1)
        width = attention.v_proj.weight.shape[0]
        yield _value(attention.v_proj, range(width), attention.out_proj, attention.head_dim)
        if model.config.activation_function == "relu":
            yield _feed_forward(layer.fc1, layer.fc2)
    yield from _head(model, "final_layer_norm")


def _gpt_neox(model: Part) -> Iterator[_Pair]:
    """GPT-NeoX: each head's query, key and value lie together in query_key_value."""
    for layer in _having(model, "input_layernorm", "attention", "mlp"):
        attention = layer.attention
        width = attention.dense.weight.shape[1]
        head = width // model.config.num_attention_heads
        rows = [c // head * 3 * head + 2 * head + c % head for c in range(width)]
        yield _norm(layer.input_layernorm, attention.query_key_value)
        yield _norm(layer.post_attention_layernorm, layer.mlp.dense_h_to_4h)
        yield _value(attention.query_key_value, rows, attention.dense, head)
        if model.config.hidden_act == "relu":
            yield _feed_forward(layer.mlp.dense_h_to_4h, layer.mlp.dense_4h_to_h)
    yield from _head(model, "final_layer_norm")


def _phi(model: Part) -> Iterator[_Pair]:
    """Phi: one norm feeds attention and network at once."""
    for layer in _having(model, "input_layernorm", "self_attn", "mlp"):
        attention, mlp = layer.self_attn, layer.mlp
        yield _norm(layer.input_layernorm, attention.q_proj, attention.k_proj, attention.v_proj, mlp.fc1)
        width = attention.v_proj.weight.shape[0]
        groups = attention.dense.weight.shape[1] // width
        yield _value(attention.v_proj, range(width), attention.dense, attention.head_dim, groups)
        if model.config.hidden_act == "relu":
            yield _feed_forward(mlp.fc1, mlp.fc2)
    yield from _head(model, "final_layernorm")


def _bert(model: Part) -> Iterator[_Pair]:
    """BERT: post-norm, so only the value and output projections (and a ReLU network) can be rescaled."""
    for layer in _having(model, "attention", "intermediate", "output"):
        value = layer.attention.self.value
        width = value.weight.shape[0]
        head = width // model.config.num_attention_heads
        yield _value(value, range(width), layer.attention.output.dense, head)
        if model.config.hidden_act == "relu":
            yield _feed_forward(layer.intermediate.dense, layer.output.dense)


_FAMILIES: dict[str, Callable[[Part], Iterator[_Pair]]] = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text"), _llama_like),
    "gpt2": _gpt2,
    "opt": _opt,
    "gpt_neox": _gpt_neox,
    "phi": _phi,
    "bert": _bert,
}
