"""SpikeLLM: which neuron sits where."""

from __future__ import annotations

from fnmatch import fnmatch

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from spikeform.conversion.kinds import blocks, heads_of, walk
from spikeform.conversion.report import ConversionReport, Row
from spikeform.conversion.rotation import head_signs, restructure
from spikeform.errors import ConfigError, ConversionError
from spikeform.layers import CodedLinear, SpikingAttention, SpikingLinear
from spikeform.layers.attention import NAME, install
from spikeform.methods.spikellm.config import SpikeLLM
from spikeform.neurons import GIF, Dynamic
from spikeform.spikes import Radix2

_REAL = {
    "embedding": "a look-up: no product to spike through",
    "norm": "real, as the paper has it",
    "activation": "real, as the paper has it",
    "gated_mlp": "its product is real, as the paper has it",
    "unknown": "unknown module type",
}


def prepare(model: PreTrainedModel, config: SpikeLLM) -> ConversionReport:
    """Put neurons before the products of every block; weights stay real, and no channel's steps are set yet."""
    walked = list(walk(model))
    for pattern in config.skip:
        if not any(fnmatch(name, pattern) for name, _, _ in walked):
            raise ConfigError(f"skip: {pattern!r} names no module of {type(model).__name__} that computes something")
    found = blocks(model)
    if not found:
        raise ConversionError(f"{type(model).__name__} has no stack of blocks, which SpikeLLM calibrates one by one")
    builder = _Builder(model, config, tuple(f"{name}." for name, _ in found))
    for name, module, kind in walked:
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
        report.rows = [_coded(row) if row.kind == "linear" and row.replaced_by else row for row in report.rows]
    return report


def put_codes(block: nn.Module, name: str, config: SpikeLLM) -> None:
    """Every converted linear layer of ``block`` (``name``) becomes one of integer weights, still blank."""
    for child, layer in list(block.named_modules()):
        if isinstance(layer, SpikingLinear) and not isinstance(layer, CodedLinear):
            sizes, form = (layer.in_features, layer.out_features), (config.weight_bits, config.weight_steps)
            ternary = config.weight_form == "ternary"
            blank = CodedLinear.blank(*sizes, layer.bias, layer.neuron, *form, ternary, site=f"{name}.{child}")
            block.set_submodule(child, blank)


def _coded(row: Row) -> Row:
    return Row(row.name, row.kind, CodedLinear.__name__, row.reason)


class _Builder:
    """Builds each spiking layer, and writes the report as it goes."""

    def __init__(self, model: PreTrainedModel, config: SpikeLLM, inside: tuple[str, ...]) -> None:
        self.model, self.config, self.inside = model, config, inside
        self.report = ConversionReport("spikellm")
        self.skeleton = any(p.device.type == "meta" for p in model.parameters())

    def visit(self, name: str, module: nn.Module, kind: str) -> None:
        reason = self._stays_real(name, module, kind)
        if reason is not None:
            self.report.rows.append(Row(name, kind, None, reason))
            return
        layer, reason = getattr(self, f"_{kind}")(name, module)
        if not self.skeleton:  # the neurons go where the layer is
            layer.to(next((p.device for p in module.parameters()), self.model.device))
        if layer is not module:
            self.model.set_submodule(name, layer)
        spiking = layer if layer is not module else module.spiking  # attention keeps its module, and gains a child
        self.report.rows.append(Row(name, kind, type(spiking).__name__, reason))

    def _stays_real(self, name: str, module: nn.Module, kind: str) -> str | None:
        if kind in _REAL:
            return _REAL[kind] + (f" {type(module).__qualname__}" if kind == "unknown" else "")
        if any(fnmatch(name, pattern) for pattern in self.config.skip):
            return "named in skip"
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
