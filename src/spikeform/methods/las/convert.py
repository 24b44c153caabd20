"""LAS: which neuron sits where."""

from __future__ import annotations

from fnmatch import fnmatch
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from spikeform.conversion.builder import Builder, walked
from spikeform.conversion.kinds import activation_function, heads_of, kind_of, norm_form
from spikeform.conversion.report import ConversionReport
from spikeform.errors import ConfigError, ConversionError
from spikeform.layers import SpikingActivation, SpikingAttention, SpikingGatedMLP, SpikingLinear, SpikingNorm
from spikeform.layers.attention import NAME, install
from spikeform.methods.las.config import LAS, MULTIPLIED, ROLES
from spikeform.neurons import MT, OAT, FewSpikeHG, FixedPointHG, Neuron, few_spike_bank

_REAL = {
    "embedding": "a look-up: no product to spike through",
    "unknown": "unknown module type",
    "state_space": "the core of a state-space mixer: convolution, scan and gate",
}


def prepare(model: PreTrainedModel, config: LAS) -> ConversionReport:
    """Replace what LAS knows; leave and report the rest. Thresholds are not set yet."""
    builder = _Builder(model, config)
    for name, module, kind in walked(model, config.skip):
        builder.visit(name, module, kind)
    for pattern in config.thresholds or {}:
        if pattern not in ROLES and not any(fnmatch(site, pattern) for site in builder.sites):
            raise ConfigError(f"thresholds: {pattern!r} is neither a role ({', '.join(ROLES)}) nor matches a site")
    if any(row.kind == "attention" for row in builder.report.replaced):
        model.set_attn_implementation(NAME)
    return builder.report


class _Builder(Builder):
    """What LAS puts where."""

    def __init__(self, model: PreTrainedModel, config: LAS) -> None:
        super().__init__(model, config, "las")
        self.coding, self.bits = config.make_coding(), config.make_bit_coding()
        self.head = model.get_output_embeddings()
        self.tied = bool(getattr(model.config, "tie_word_embeddings", False))
        self.sites: list[str] = []

    def stays_real(self, name: str, module: nn.Module, kind: str) -> str | None:
        """Why a module stays as it is, or None."""
        if kind in _REAL:
            return _REAL[kind] + (f" {type(module).__qualname__}" if kind == "unknown" else "")
        if any(fnmatch(name, pattern) for pattern in self.config.skip):
            return "named in skip"
        if module is self.head and not self.config.lm_head:
            return "the output head stays real (lm_head is false)"
        if kind == "norm" and not self.config.norms:
            return "norms is false"
        if kind == "activation" and not self.config.activations:
            return "activations is false"
        if kind == "attention" and getattr(module, "is_cross_attention", False):
            return "cross-attention is not converted"
        return None

    def _oat(self, role: str, site: str, channels: tuple[int, ...] | None = None) -> MT:
        exponents = self.config.units == "power_of_two" and role in MULTIPLIED
        neuron = (OAT if self.config.outlier else MT)(self.coding, None, self.config.rounding, site, exponents)
        neuron.role = role
        self.sites.append(site)
        # Channels of values and of the up projection may differ by orders of magnitude with no effect on the
        # function: each is weighed by its own scale when one threshold pair must serve them all.
        neuron.balance_channels = role in ("value", "up")
        if channels is not None and self.config.per_channel:
            neuron.channel_shift = torch.zeros(channels, dtype=torch.int8)
        return neuron

    def _hg(self, function: str, site: str) -> Neuron:
        if self.config.nonlinear == "few_spike":
            if self.skeleton:  # the fitted values are in the checkpoint
                return FewSpikeHG.blank(function, self.config.steps, site=site)
            return few_spike_bank(function, self.config.steps, site=site)
        return FixedPointHG(function, self.bits, self.config.rounding, site=site)

    def _linear(self, name: str, module: nn.Linear | Conv1D) -> tuple[nn.Module, str]:
        is_head = module is self.head
        features = module.weight.shape[0 if isinstance(module, Conv1D) else 1]
        tied = is_head and self.tied  # a tied weight belongs to the embedding too: nothing may be folded into it
        neuron = self._oat("lm_head" if is_head else "linear", name, None if tied else (features,))
        if neuron.channel_shift is not None and module.weight.dtype == torch.float16:
            raise ConversionError(
                f"{name}: per_channel folds powers of two into the weights, which overflows float16; load the model "
                "with dtype=torch.bfloat16 or torch.float32"
            )
        layer = SpikingLinear.from_dense(module, neuron)
        if layer.weight.device.type != "meta":
            neuron.channel_weight = layer.weight.detach().float().square().sum(0)
        coded = self.config.weight_bits == 8 and not tied
        return layer, type(neuron).__name__ + (", 8-bit weights" if coded else "")

    def _norm(self, name: str, module: Any) -> tuple[nn.Module, str]:
        eps, centred, offset = norm_form(module)
        layer = SpikingNorm(
            module.weight,
            getattr(module, "bias", None),
            eps,
            centred,
            offset,
            self._oat("norm", name),
            self._hg("square", f"{name}.square"),
            self._hg("inverse_sqrt", f"{name}.inverse_sqrt"),
        )
        return layer, "HG square and inverse square root, OAT Hadamard product"

    def _activation(self, name: str, module: nn.Module) -> tuple[nn.Module, str]:
        function = activation_function(module)
        return SpikingActivation(self._hg(function, name)), f"HG {function}"

    def _gated_mlp(self, name: str, module: Any) -> tuple[nn.Module, str]:
        # Whether act_fn will spike is known only from the same rules that its own visit applies.
        act_kind = kind_of(module.act_fn)
        spikes = act_kind == "activation" and self.stays_real(f"{name}.act_fn", module.act_fn, act_kind) is None
        act = None if spikes else self._oat("act", f"{name}.act")
        up = self._oat("up", f"{name}.up")
        layer = SpikingGatedMLP(module.gate_proj, module.up_proj, module.down_proj, module.act_fn, up, act)
        return layer, "spike-equivalent Hadamard product"

    def _attention(self, name: str, module: nn.Module) -> tuple[nn.Module, str]:
        heads, size = heads_of(module)
        channels = (heads, 1, size)
        spiking = SpikingAttention(
            self._oat("query", f"{name}.query"),
            self._oat("key", f"{name}.key", channels),
            self._oat("value", f"{name}.value", channels),
            self._oat("probability", f"{name}.probability"),
            self._hg("exp", f"{name}.exp") if self.config.softmax else None,
            self._hg("reciprocal", f"{name}.reciprocal") if self.config.softmax else None,
            name,
        )
        install(module, spiking)
        softmax = ", HG softmax" if self.config.softmax else ""
        return module, f"OAT on queries, keys, values and probabilities{softmax}"
