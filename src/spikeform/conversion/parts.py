"""Where each family keeps the parts of its blocks: one table for whatever moves weights between layers.

Names of attributes, not types, so that a converted model (``SpikingLinear`` under the names of the linear layers)
is read like the dense one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from spikeform.errors import ConversionError

# A model of a supported family, or a part of it. What attributes it has depends on the family; the type
# nn.Module says no more of an attribute than "a tensor or a module".
Part = Any


class Heads(NamedTuple):
    """Heads in the output of a linear layer: head h is its rows ``starts[h]`` to ``starts[h] + size - 1``."""

    module: Part
    starts: range
    size: int


class Read(NamedTuple):
    """A norm and the linear layers that alone consume what it returns."""

    norm: Part
    consumers: list[Part]


@dataclass
class Block:
    """One transformer block.

    Attributes:
        reads: Its norms and their consumers. Empty where a norm feeds the residual stream.
        query: The H query heads.
        key: The G key heads; query head h meets key head ``h // (H / G)``.
        value: The G value heads.
        output: The projection of attention's output: its input is the H heads side by side.
        up: The linear layer whose output, through an activation or times a gate, is the input of ``down``.
        down: The linear layer back to the residual stream.
        homogeneous: Whether a positive factor on an output of ``up`` reaches ``down`` unchanged.
        rotary: How many dimensions of a head, the first, RoPE turns: i together with ``i + rotary / 2``.
        normed: Whether queries and keys are normalised.
        post_norm: Whether a norm stands between a linear layer's output and the residual stream, or in it.
    """

    reads: list[Read]
    query: Heads
    key: Heads
    value: Heads
    output: Part
    up: Part
    down: Part
    homogeneous: bool
    rotary: int = 0
    normed: bool = False
    post_norm: bool = False


class Family(NamedTuple):
    """How a family is built.

    Attributes:
        blocks: Yields the blocks of a model, in order.
        embeddings: Names of the modules whose outputs add up to the input of the first block.
        norm: Name of the final norm.
        gain_offset: Added to a norm's stored gain (Gemma stores gain - 1).
    """

    blocks: Callable[[Part], Iterator[Block]]
    embeddings: tuple[str, ...]
    norm: str
    gain_offset: float = 0.0


def family_name(model: Part) -> str:
    """The model type that the model's config names, or its class where it has none."""
    return getattr(getattr(model, "config", None), "model_type", type(model).__name__)


def family_of(model: Part) -> Family:
    """The table of a model's family.

    Raises:
        ConversionError: The family is not known.
    """
    name = family_name(model)
    if name not in FAMILIES:
        raise ConversionError(f"the parts of {name!r} are not known: supported are {', '.join(sorted(FAMILIES))}")
    return FAMILIES[name]


def trunk_of(model: Part) -> Part | None:
    """The module that holds the embeddings and the final norm; None where the model is not built around one."""
    base = getattr(model, model.base_model_prefix, None)
    return None if base is None else getattr(base, "decoder", base)  # OPT has one more level


def final_read(model: Part) -> Read | None:
    """The final norm and what consumes it: the head, or OPT's projection before the head. None: no such pair."""
    head, trunk = model.get_output_embeddings(), trunk_of(model)
    norm = getattr(trunk, family_of(model).norm, None)
    if head is None or norm is None:
        return None
    projection = getattr(trunk, "project_out", None)
    return Read(norm, [head if projection is None else projection])


def is_conv1d(module: Part) -> bool:
    """Whether the module is GPT-2's linear layer, whose weight is ``[in, out]``."""
    return type(module).__name__ == "Conv1D"


def _having(model: Part, *attributes: str) -> Iterator[Part]:
    """The modules that have all these attributes: the blocks, wherever the model keeps them."""
    for module in model.modules():
        if all(getattr(module, attribute, None) is not None for attribute in attributes):
            yield module


def _heads(module: Part, size: int) -> Heads:
    """Heads that stand side by side and fill the output of a linear layer."""
    return Heads(module, range(0, module.weight.shape[0], size), size)


def _llama_like(model: Part) -> Iterator[Block]:
    """Pre-norm blocks, separate projections, gated network. Gemma 2 and 3 also norm what a layer returns."""
    for layer in _having(model, "input_layernorm", "self_attn", "mlp"):
        attention, mlp, size = layer.self_attn, layer.mlp, layer.self_attn.head_dim
        before_mlp = getattr(layer, "pre_feedforward_layernorm", None)
        yield Block(
            [
                Read(layer.input_layernorm, [attention.q_proj, attention.k_proj, attention.v_proj]),
                Read(before_mlp or layer.post_attention_layernorm, [mlp.gate_proj, mlp.up_proj]),
            ],
            _heads(attention.q_proj, size),
            _heads(attention.k_proj, size),
            _heads(attention.v_proj, size),
            attention.o_proj,
            mlp.up_proj,
            mlp.down_proj,
            homogeneous=True,
            rotary=size,
            normed=getattr(attention, "q_norm", None) is not None,
            post_norm=before_mlp is not None,
        )


def _gpt2(model: Part) -> Iterator[Block]:
    """GPT-2: queries, keys and values lie side by side in c_attn."""
    for layer in _having(model, "ln_1", "attn", "ln_2", "mlp"):
        joint, size, width = layer.attn.c_attn, layer.attn.head_dim, layer.ln_1.weight.shape[0]
        query, key, value = (Heads(joint, range(i * width, (i + 1) * width, size), size) for i in range(3))
        yield Block(
            [Read(layer.ln_1, [joint]), Read(layer.ln_2, [layer.mlp.c_fc])],
            query,
            key,
            value,
            layer.attn.c_proj,
            layer.mlp.c_fc,
            layer.mlp.c_proj,
            homogeneous=model.config.activation_function == "relu",
            # A norm of the encoder's states would stand beside these two.
            post_norm=getattr(layer, "crossattention", None) is not None,
        )


def _opt(model: Part) -> Iterator[Block]:
    """OPT: pre-norm, except OPT-350m, whose norms feed the residual stream."""
    before = model.config.do_layer_norm_before
    for layer in _having(model, "self_attn_layer_norm", "self_attn", "fc1", "fc2"):
        attention, size = layer.self_attn, layer.self_attn.head_dim
        reads = [
            Read(layer.self_attn_layer_norm, [attention.q_proj, attention.k_proj, attention.v_proj]),
            Read(layer.final_layer_norm, [layer.fc1]),
        ]
        yield Block(
            reads if before else [],
            _heads(attention.q_proj, size),
            _heads(attention.k_proj, size),
            _heads(attention.v_proj, size),
            attention.out_proj,
            layer.fc1,
            layer.fc2,
            homogeneous=model.config.activation_function == "relu",
            post_norm=not before,
        )


def _gpt_neox(model: Part) -> Iterator[Block]:
    """GPT-NeoX: each head's query, key and value lie together in query_key_value."""
    for layer in _having(model, "input_layernorm", "attention", "mlp"):
        joint, size = layer.attention.query_key_value, layer.attention.head_size
        query, key, value = (Heads(joint, range(i * size, joint.weight.shape[0], 3 * size), size) for i in range(3))
        yield Block(
            [Read(layer.input_layernorm, [joint]), Read(layer.post_attention_layernorm, [layer.mlp.dense_h_to_4h])],
            query,
            key,
            value,
            layer.attention.dense,
            layer.mlp.dense_h_to_4h,
            layer.mlp.dense_4h_to_h,
            homogeneous=model.config.hidden_act == "relu",
            rotary=layer.attention.rotary_ndims,
        )


def _phi(model: Part) -> Iterator[Block]:
    """Phi: one norm feeds attention and network at once."""
    for layer in _having(model, "input_layernorm", "self_attn", "mlp"):
        attention, mlp, size = layer.self_attn, layer.mlp, layer.self_attn.head_dim
        yield Block(
            [Read(layer.input_layernorm, [attention.q_proj, attention.k_proj, attention.v_proj, mlp.fc1])],
            _heads(attention.q_proj, size),
            _heads(attention.k_proj, size),
            _heads(attention.v_proj, size),
            attention.dense,
            mlp.fc1,
            mlp.fc2,
            homogeneous=model.config.hidden_act == "relu",
            rotary=attention.rotary_ndims,
            normed=attention.qk_layernorm,
        )


def _bert(model: Part) -> Iterator[Block]:
    """BERT: post-norm."""
    for layer in _having(model, "attention", "intermediate", "output"):
        attention = layer.attention.self
        size = attention.attention_head_size
        yield Block(
            [],
            _heads(attention.query, size),
            _heads(attention.key, size),
            _heads(attention.value, size),
            layer.attention.output.dense,
            layer.intermediate.dense,
            layer.output.dense,
            homogeneous=model.config.hidden_act == "relu",
            post_norm=True,
        )


_LLAMA = Family(_llama_like, ("embed_tokens",), "norm")
FAMILIES: dict[str, Family] = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3"), _LLAMA),
    **dict.fromkeys(("gemma", "gemma2", "gemma3_text"), _LLAMA._replace(gain_offset=1.0)),
    "gpt2": Family(_gpt2, ("wte", "wpe"), "ln_f"),
    "opt": Family(_opt, ("embed_tokens", "embed_positions"), "final_layer_norm"),
    "gpt_neox": Family(_gpt_neox, ("embed_in",), "final_layer_norm"),
    "phi": Family(_phi, ("embed_tokens",), "final_layernorm"),
    "bert": Family(_bert, (), ""),
}
