"""Which module types spikeform knows, by qualified type name: one table for every family.

Types are matched exactly. A subclass may compute something else, so it counts as unknown, is left dense and is
reported. Names, not classes, so that no family is imported before a model of it is there.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel

_ACT = "transformers.activations."
_TORCH_ACT = "torch.nn.modules.activation."


class FeedForward(NamedTuple):
    """Names of a feed-forward block's parts.

    Attributes:
        act: Its activation.
        linear: The linear layer that consumes it.
        gated: Whether the activation gates another projection in between.
    """

    act: str
    linear: str
    gated: bool


def _family(name: str, *classes: str) -> list[str]:
    return [f"transformers.models.{name}.modeling_{name}.{cls}" for cls in classes]


LINEAR = {"torch.nn.modules.linear.Linear", "transformers.pytorch_utils.Conv1D"}

LAYER_NORM = {"torch.nn.modules.normalization.LayerNorm"}
RMS_NORM = {
    "torch.nn.modules.normalization.RMSNorm",
    *_family("llama", "LlamaRMSNorm"),
    *_family("mistral", "MistralRMSNorm"),
    *_family("qwen2", "Qwen2RMSNorm"),
    *_family("qwen3", "Qwen3RMSNorm"),
    *_family("mamba", "MambaRMSNorm"),
    *_family("mamba2", "Mamba2RMSNorm"),
}
RMS_NORM_OFFSET = set(_family("gemma", "GemmaRMSNorm"))  # stores gain - 1

ACTIVATIONS = {
    _TORCH_ACT + "ReLU": "relu",
    _TORCH_ACT + "SiLU": "silu",
    _TORCH_ACT + "Tanh": "tanh",
    _ACT + "SiLUActivation": "silu",
    _ACT + "GELUActivation": "gelu",
    _ACT + "NewGELUActivation": "gelu_tanh",
    _ACT + "GELUTanh": "gelu_tanh",
    _ACT + "FastGELUActivation": "gelu_tanh",
    _ACT + "AccurateGELUActivation": "gelu_tanh",
    _ACT + "QuickGELUActivation": "gelu_quick",
}

GATED_MLP = {
    *_family("llama", "LlamaMLP"),
    *_family("mistral", "MistralMLP"),
    *_family("qwen2", "Qwen2MLP"),
    *_family("qwen3", "Qwen3MLP"),
    *_family("gemma", "GemmaMLP"),
}

ATTENTION = {
    *_family("gpt2", "GPT2Attention"),
    *_family("opt", "OPTAttention"),
    *_family("llama", "LlamaAttention"),
    *_family("mistral", "MistralAttention"),
    *_family("qwen2", "Qwen2Attention"),
    *_family("qwen3", "Qwen3Attention"),
    *_family("gpt_neox", "GPTNeoXAttention"),
    *_family("phi", "PhiAttention"),
    *_family("gemma", "GemmaAttention"),
    *_family("bert", "BertSelfAttention"),
}

# Where a feed-forward block keeps its activation and the linear layer that consumes it: names below the block.
FEED_FORWARD = {
    **dict.fromkeys(_family("gpt2", "GPT2MLP"), ("act", "c_proj")),
    **dict.fromkeys(_family("opt", "OPTDecoderLayer"), ("activation_fn", "fc2")),
    **dict.fromkeys(_family("gpt_neox", "GPTNeoXMLP"), ("act", "dense_4h_to_h")),
    **dict.fromkeys(_family("phi", "PhiMLP"), ("activation_fn", "fc2")),
    **dict.fromkeys(_family("bert", "BertLayer"), ("intermediate.intermediate_act_fn", "output.dense")),
    **dict.fromkeys(GATED_MLP, ("act_fn", "down_proj")),
}


# State-space mixers: ``in_proj`` and ``out_proj`` are called; parts named here are read without being called.
MIXERS = {
    **dict.fromkeys(_family("mamba", "MambaMixer"), ("dt_proj", "act")),
    **dict.fromkeys(_family("mamba2", "Mamba2Mixer"), ("act",)),
}

# Modules with parameters of their own that are no computation of theirs (BERT's head keeps its decoder's bias).
CONTAINERS = set(_family("bert", "BertLMPredictionHead"))


def kind_of(module: nn.Module) -> str:
    """The kind of a module, by its exact type.

    Returns:
        ``linear``, ``norm``, ``activation``, ``gated_mlp``, ``attention``, ``embedding``, ``unknown``, or
        ``container``, which computes nothing that a table here would have to name. (:func:`walk` also knows
        ``state_space``, the core of a state-space mixer.)
    """
    name = type_name(module)
    if name in LINEAR:
        return "linear"
    if name in LAYER_NORM or name in RMS_NORM or name in RMS_NORM_OFFSET:
        return "norm"
    if name in ACTIVATIONS or name == _TORCH_ACT + "GELU":
        return "activation"
    if name in GATED_MLP:
        return "gated_mlp"
    if name in ATTENTION:
        return "attention"
    if isinstance(module, nn.Embedding):
        return "embedding"
    if name in CONTAINERS:
        return "container"
    computes = bool(module._parameters) or name.startswith((_ACT, _TORCH_ACT)) or name.endswith("Attention")
    # A block that only wraps known children (BertAttention around BertSelfAttention) is a container.
    wraps = any(kind_of(child) == "attention" for child in module.children())
    return "unknown" if computes and not wraps else "container"


def activation_function(module: nn.Module) -> str:
    """Name of the function an activation module computes."""
    if isinstance(module, nn.GELU):
        return "gelu_tanh" if module.approximate == "tanh" else "gelu"
    return ACTIVATIONS[type_name(module)]


def norm_form(module: Any) -> tuple[float, bool, float]:
    """``(eps, centred, gain offset)`` of a known norm."""
    name = type_name(module)
    eps = getattr(module, "variance_epsilon", None)
    eps = module.eps if eps is None else eps
    if eps is None:  # torch's RMSNorm takes the machine epsilon of what it is given
        eps = torch.finfo(torch.get_default_dtype() if module.weight is None else module.weight.dtype).eps
    return float(eps), name in LAYER_NORM, 1.0 if name in RMS_NORM_OFFSET else 0.0


def walk(model: PreTrainedModel) -> Iterator[tuple[str, nn.Module, str]]:
    """``(name, module, kind)`` of every module that computes something, parents before children.

    The list is taken before anything is replaced, so that the caller may replace as it goes. A module that the
    model uses in several places is named in each of them.
    """
    everything = list(model.named_modules(remove_duplicate=False))
    inside = tuple(f"{name}." for name, module in everything if type_name(module) in MIXERS)
    unheard = {f"{name}.{part}" for name, module in everything for part in MIXERS.get(type_name(module), ())}
    for name, module in everything:
        kind = kind_of(module)
        if name in unheard or (kind == "unknown" and f"{name}.".startswith(inside)):
            kind = "state_space"
        if kind != "container":
            yield name, module, kind


def mixers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The state-space mixers of the model, by name, in order."""
    return [(name, module) for name, module in model.named_modules() if type_name(module) in MIXERS]


def type_name(module: nn.Module) -> str:
    """The qualified name of its type, by which the tables here know it."""
    return f"{type(module).__module__}.{type(module).__qualname__}"


def feed_forward_pairs(model: nn.Module) -> Iterator[FeedForward]:
    """The activation, and the linear layer that consumes it, of every feed-forward block of a known type."""
    for name, module in model.named_modules():
        kind = type_name(module)
        if kind in FEED_FORWARD:
            act, linear = (f"{name}.{part}" for part in FEED_FORWARD[kind])
            yield FeedForward(act, linear, kind in GATED_MLP)


def blocks(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The repeated blocks of the model, in order: the children of its longest ModuleList of one type."""
    lists = [
        (name, child)
        for name, child in model.named_modules()
        if isinstance(child, nn.ModuleList) and len({type(m) for m in child}) == 1
    ]
    if not lists:
        return []
    name, found = max(lists, key=lambda item: sum(p.numel() for p in item[1].parameters()))
    return [(f"{name}.{i}", block) for i, block in enumerate(found)]


def heads_of(attention: Any) -> tuple[int, int]:
    """Key/value heads and head size of an attention module."""
    config = attention.config
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    for name in ("head_dim", "attention_head_size", "head_size"):
        if getattr(attention, name, None):
            return int(heads), int(getattr(attention, name))
    return int(heads), config.hidden_size // config.num_attention_heads
