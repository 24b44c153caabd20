"""SpikeLLM: which neuron sits where."""

from __future__ import annotations

from fnmatch import fnmatch
from typing import cast

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from spikeform.conversion.builder import Builder, walked
from spikeform.conversion.kinds import blocks, heads_of
from spikeform.conversion.report import ConversionReport
from spikeform.conversion.rotation import head_signs, restructure
from spikeform.conversion.weights import blank_rows, code_rows, tied_head
from spikeform.errors import ConversionError
from spikeform.layers import CodedLinear, SpikingAttention, SpikingLinear
from spikeform.layers.attention import NAME, install
from spikeform.methods.spikellm.config import SpikeLLM
from spikeform.neurons import GIF, Dynamic
from spikeform.spikes import Radix2

HEAD_BITS = 7  # of the head's neurons: the most whose signed codes are int8, as the weights are

_REAL = {
    "embedding": "a look-up: no product to spike through",
    "norm": "real, as the paper has it",
    "activation": "real, as the paper has it",
    "gated_mlp": "its product is real, as the paper has it",
    "unknown": "unknown module type",
    "state_space": "the core of a state-space mixer: convolution, scan and gate",
}


def prepare(model: PreTrainedModel, config: SpikeLLM) -> ConversionReport:
    """Put neurons before the products of every block; weights stay real, and no channel's steps are set yet."""
    everything = walked(model, config.skip)
    found = blocks(model)
    if not found:
        raise ConversionError(f"{type(model).__name__} has no stack of blocks, which SpikeLLM calibrates one by one")
    builder = _Builder(model, config, tuple(f"{name}." for name, _ in found))
    for name, module, kind in everything:
        builder.visit(name, module, kind)
    if any(row.kind == "attention" for row in builder.report.replaced):
        model.set_attn_implementation(NAME)
    return builder.report


def skeleton(model: PreTrainedModel, config: SpikeLLM) -> ConversionReport:
    """The modules of a finished checkpoint, their values not yet loaded."""
    if config.rotate:
        restructure(model)
    report = prepare(model, config)
    if config.codes:
        for name, block in blocks(model):
            put_codes(block, name, config)
    blank_rows(model, _spiking_head(model))
    report.follow(model)
    return report


def finish(model: PreTrainedModel, config: SpikeLLM, report: ConversionReport) -> None:
    """Code the head, where it spikes. Its neurons take the range of each token: nothing about it is calibrated.

    Raises:
        ConversionError: Its weights are not finite.
    """
    head = _spiking_head(model)
    for name in head:
        neuron = cast(SpikingLinear, model.get_submodule(name)).neuron
        if isinstance(neuron, GIF):
            neuron.set_times(torch.ones_like(neuron.times))
    code_rows(model, head)
    report.follow(model)


def _spiking_head(model: PreTrainedModel) -> list[str]:
    """Its name, or nothing."""
    head = model.get_output_embeddings()
    return [name for name, m in model.named_modules() if m is head and isinstance(m, SpikingLinear)]


def put_codes(block: nn.Module, name: str, config: SpikeLLM) -> None:
    """Every converted linear layer of ``block`` (``name``) becomes one of integer weights, still blank."""
    for child, layer in list(block.named_modules()):
        if isinstance(layer, SpikingLinear) and not isinstance(layer, CodedLinear):
            sizes, form = (layer.in_features, layer.out_features), (config.weight_bits, config.weight_steps)
            ternary = config.weight_form == "ternary"
            blank = CodedLinear(*sizes, layer.bias, layer.neuron, *form, ternary, site=f"{name}.{child}")
            block.set_submodule(child, blank)


class _Builder(Builder):
    """What SpikeLLM puts where."""

    def __init__(self, model: PreTrainedModel, config: SpikeLLM, inside: tuple[str, ...]) -> None:
        super().__init__(model, config, "spikellm")
        self.inside = inside
        self.head = model.get_output_embeddings()

    def stays_real(self, name: str, module: nn.Module, kind: str) -> str | None:
        """Why a module stays as it is, or None."""
        if kind in _REAL:
            return _REAL[kind] + (f" {type(module).__qualname__}" if kind == "unknown" else "")
        if any(fnmatch(name, pattern) for pattern in self.config.skip):
            return "named in skip"
        if module is self.head:
            if self.config.lm_head == "real":
                return "outside the blocks (lm_head is real)"
            tied = module is tied_head(self.model)
            return "outside the blocks, and tied to the embedding, whose weights stay real" if tied else None
        if not name.startswith(self.inside):
            return "outside the blocks"
        if kind == "attention" and getattr(module, "is_cross_attention", False):
            return "cross-attention is not converted"
        if kind == "attention" and not (self.config.attention and self.config.spikes):
            return "attention is false" if self.config.spikes else "activations are real (bits is 16)"
        return None

    def _gif(self, channels: tuple[int, ...], site: str, **options) -> GIF:
        return GIF(self.config.bits, channels, signed=self.config.signed, site=site, **options)

    def _linear(self, name: str, module: nn.Linear | Conv1D) -> tuple[nn.Module, str]:
        config = self.config
        features = module.weight.shape[0 if isinstance(module, Conv1D) else 1]
        if module is self.head:
            neuron = GIF(HEAD_BITS, (features,), steps=1, signed=config.signed, site=name) if config.spikes else None
            reason = f"GIF of {HEAD_BITS} bits" if config.spikes else "real activations"
            return SpikingLinear.from_dense(module, neuron), f"{reason}, 8-bit weights"
        neuron, reason = None, "real activations"
        if config.spikes:
            neuron = self._gif((features,), name, steps=config.steps, form=config.form, span=config.span)
            reason = f"GIF of {config.bits} bits"
        form = "partly binary" if config.weight_form == "partial_binary" else f"{config.weight_bits}-bit"
        form = "ternary" if config.weight_form == "ternary" else form
        return SpikingLinear.from_dense(module, neuron), f"{reason}, {form} weights"

    def _attention(self, name: str, module: nn.Module) -> tuple[nn.Module, str]:
        heads, size = heads_of(module)
        steps = min(self.config.steps, 2)  # the released code's rule
        spiking = SpikingAttention(
            self._gif((size,), f"{name}.query", steps=1),
            self._gif((heads, 1, size), f"{name}.key", steps=steps, axis=self.config.key_axis),
            self._gif((heads, 1, size), f"{name}.value", steps=steps),
            Dynamic(Radix2(self.config.probability_bits), f"{name}.probability"),
            None,
            None,
            name,
        )
        if self.config.rotate and self.config.rotate_heads:
            spiking.signs = head_signs(size, self.config.seed)
        install(module, spiking)
        return module, f"GIF on queries, keys and values, {self.config.probability_bits} bits of probability"
