"""What a network does in real numbers beside its linear layers: attention, gated products, scans, functions.

Nothing here is a product of spike trains, so no event tells of it; hooks read it off the shapes. They stand next to
the modules, inside other hooks: those of a streaming network repeat what is computed once, after it was. Of attention
``softmax(Q K^T) V`` both products count, two MACs for each visible pair of tokens and each channel of the
context: what a causal or padding mask hides is counted nowhere, as for products of trains. Scans are counted by
:mod:`spikeform.energy.mixers`.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from spikeform.conversion.kinds import kind_of
from spikeform.layers import SpikingLinear

_OUTPUTS = ("o_proj", "c_proj", "out_proj", "dense")  # the linear layer behind the context, where attention has it


@dataclass
class RealTally:
    """One module's sums over all its calls.

    Attributes:
        site: The module's name.
        kind: ``attention``, ``gated_mlp``, ``scan``, ``activation``, ``norm``, ``linear``, or ``gated_linear``, which
            receives real values that spikes let pass or not.
        macs: MACs of both products of attention, or of a scan.
        multiplications: Products of a gated feed-forward block, before its down projection; of a mixer's gate.
        functions: Values of exp (attention), an activation function or a norm; counted, not priced.
        elements: Real activations that products read: inputs of linear layers, queries, keys and values; of a mixer
            the inputs of its convolution and of its scan.
        zeros: Inputs of a ``gated_linear`` that no spike let pass; counted, not credited.
    """

    site: str
    kind: str
    macs: int = 0
    multiplications: int = 0
    functions: int = 0
    elements: int = 0
    zeros: int = 0


def real_hooks(tallies: dict[str, RealTally], model: nn.Module) -> list[RemovableHandle]:
    """Fill ``tallies`` whenever ``model`` runs, until the handles that this returns are removed."""
    handles: list[RemovableHandle] = []
    for name, module in model.named_modules():
        kind = "gated_linear" if isinstance(module, SpikingLinear) and module.neuron is None else kind_of(module)
        if kind not in ("attention", "gated_mlp", "activation", "norm", "linear", "gated_linear"):
            continue
        if kind == "attention":
            if getattr(module, "spiking", None) is None and not getattr(module, "is_cross_attention", False):
                handles += _attention(tallies.setdefault(name, RealTally(name, kind)), module)
            continue
        tally = tallies.setdefault(name, RealTally(name, kind))
        if kind == "gated_mlp":
            handles.append(module.get_submodule("down_proj").register_forward_pre_hook(_adds(tally, "multiplications")))
        elif kind in ("linear", "gated_linear"):
            handles.append(module.register_forward_pre_hook(_adds(tally, "elements")))
        else:
            handles.append(module.register_forward_pre_hook(_adds(tally, "functions")))
    return handles


def _adds(tally: RealTally, field: str) -> Any:
    """A pre-hook that adds the size of the input to a field."""

    def before(_module: nn.Module, args: tuple) -> None:
        setattr(tally, field, getattr(tally, field) + args[0].numel())
        if tally.kind == "gated_linear":
            tally.zeros += int((args[0] == 0).sum())

    return before


def _attention(tally: RealTally, module: nn.Module) -> list[RemovableHandle]:
    behind = next((child for name, child in module.named_children() if name in _OUTPUTS), None)
    signature = inspect.signature(module.forward)
    context: list[torch.Size] = []
    handles = []

    def reached(_module: nn.Module, args: tuple) -> None:
        context.append(args[0].shape)

    def projected(_module: nn.Module, _args: tuple, output: Tensor) -> None:
        tally.elements += output.numel()

    def after(_module: nn.Module, args: tuple, options: dict, output: Any) -> None:
        first = output if isinstance(output, Tensor) else output[0]
        rows, length, width = context.pop() if behind is not None else first.shape
        bound = signature.bind_partial(*args, **options).arguments
        pairs, seen = _visible(module, bound | bound.get("kwargs", {}), length)
        tally.macs += 2 * rows * width * pairs // seen
        tally.functions += rows * _heads(module) * pairs // seen

    for child in module.children():
        if child is behind:
            handles.append(child.register_forward_pre_hook(reached))
        elif isinstance(weight := getattr(child, "weight", None), Tensor) and weight.ndim == 2:
            handles.append(child.register_forward_hook(projected, prepend=True))
    return [*handles, module.register_forward_hook(after, with_kwargs=True, prepend=True)]


def _visible(module: Any, options: Mapping[str, Any], length: int) -> tuple[int, int]:
    """Visible pairs of tokens, and in how many rows and heads they were counted."""
    mask = options.get("attention_mask")
    if isinstance(mask, Tensor) and mask.ndim == 4:
        visible = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
        return int(visible.sum(dtype=torch.int64)), mask.shape[0] * mask.shape[1]
    cache = next((options[name] for name in ("past_key_values", "layer_past") if options.get(name) is not None), None)
    keys = length if cache is None else cache.get_seq_length(module.layer_idx)
    if not getattr(module, "is_causal", False):
        return length * keys, 1
    return length * (keys - length) + length * (length + 1) // 2, 1


def _heads(module: Any) -> int:
    return int(module.config.num_attention_heads)
