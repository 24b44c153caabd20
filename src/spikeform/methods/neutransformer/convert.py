"""NeuTransformer: which neuron sits where."""

from __future__ import annotations

from fnmatch import fnmatch
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from spikeform.conversion.builder import Builder, walked
from spikeform.conversion.kinds import feed_forward_pairs, heads_of
from spikeform.conversion.report import ConversionReport
from spikeform.errors import ConversionError
from spikeform.layers import SpikingLinear
from spikeform.layers.attention import install
from spikeform.layers.self_attention import NAME, SpikingSelfAttention
from spikeform.methods.neutransformer.config import NeuTransformer
from spikeform.methods.neutransformer.models import become
from spikeform.neurons import SignedInteger

OUTPUT = {"GPT2Attention": "c_proj", "LlamaAttention": "o_proj"}  # what receives the spikes of attention's output
_REAL = {
    "embedding": "a look-up: no product to spike through",
    "unknown": "unknown module type",
    "norm": "real: its output is the current that neurons receive, the same in each step",
    "gated_mlp": "its neuron sits inside",
    "state_space": "the core of a state-space mixer",
}


def prepare(model: PreTrainedModel, config: NeuTransformer) -> ConversionReport:
    """Put spiking self-attention and the neurons of feed-forward blocks in. Nothing is calibrated yet.

    Raises:
        ConversionError: There is no spiking type of the model's class, or its attention is no plain causal one.
    """
    become(model)
    text = model.config.get_text_config()
    if getattr(text, "add_cross_attention", False):
        raise ConversionError(f"{type(model).__name__} attends to an encoder; spiking self-attention does not")
    builder = _Builder(model, config)
    if skipped := builder.skipped_attention():
        raise ConversionError(
            f"skip names {skipped}: all layers of a model attend by spikes or none does, as its cache holds one form"
        )
    for name, module, kind in walked(model, config.skip):
        builder.visit(name, module, kind)
    if any(row.kind == "attention" for row in builder.report.replaced):
        model.set_attn_implementation(NAME)
    return builder.report


class _Builder(Builder):
    """What NeuTransformer puts where."""

    def __init__(self, model: PreTrainedModel, config: NeuTransformer) -> None:
        super().__init__(model, config, "neutransformer")
        pairs = [] if config.ffn == "none" else list(feed_forward_pairs(model))
        pairs = [pair for pair in pairs if not self._skipped(pair.act) and not self._skipped(pair.linear)]
        self.acts = {pair.act: pair for pair in pairs}
        self.downs = {pair.linear: pair for pair in pairs}
        self.outputs = {
            f"{name}.{OUTPUT[type(module).__name__]}"
            for name, module in model.named_modules()
            if type(module).__name__ in OUTPUT and not self._skipped(name)
        }

    def _skipped(self, name: str) -> bool:
        return any(fnmatch(name, pattern) for pattern in self.config.skip)

    def skipped_attention(self) -> str | None:
        """An attention layer that is to stay dense, or None."""
        names = (name for name, module in self.model.named_modules() if type(module).__name__ in OUTPUT)
        return next((name for name in names if self._skipped(name)), None)

    def stays_real(self, name: str, module: nn.Module, kind: str) -> str | None:
        """Why a module stays as it is, or None."""
        if kind in _REAL:
            return _REAL[kind] + (f" {type(module).__qualname__}" if kind == "unknown" else "")
        if self._skipped(name):
            return "named in skip"
        if kind == "activation" and (name not in self.acts or self.config.ffn == "signed_if"):
            return "real: the neuron sends what it puts out" if name in self.acts else "no feed-forward block's"
        if kind == "linear" and name not in self.outputs and name not in self.downs:
            return "real input, the same in each step"
        return None

    def _attention(self, name: str, module: Any) -> tuple[nn.Module, str]:
        config = self.config
        groups, size = heads_of(module)
        heads = getattr(module, "num_heads", None) or module.config.num_attention_heads
        spiking = SpikingSelfAttention(
            heads,
            groups,
            config.steps,
            normalise=config.normalise,
            windows=config.windows,
            site=name,
            tau=config.tau,
            reset=config.reset,
            signed=config.spikes == "signed",
            surrogate=config.surrogate,
        )
        install(module, spiking)
        return module, f"LIF of {config.steps} steps on queries, keys, values and output, {heads} heads of {size}"

    def _linear(self, name: str, module: nn.Linear | Conv1D) -> tuple[nn.Module, str]:
        if name in self.outputs:  # the mean over T steps comes in: its integers are exact, and nothing is calibrated
            spikes = self.config.spikes if self.config.spikes == "signed" else "unsigned"
            neuron = SignedInteger(self.config.steps, spikes=spikes, learns=False, site=name)
            neuron.set_threshold(1 / self.config.steps)
            attention: Any = self.model.get_submodule(name.rpartition(".")[0])
            attention.spiking.sends_to(neuron)
            return SpikingLinear.from_dense(module, neuron), "spikes of attention's output"
        pair, relu = self.downs[name], self.config.ffn == "relu_if"
        neuron = SignedInteger(
            self.config.ffn_steps, spikes="unsigned" if relu and not pair.gated else "signed", site=name
        )
        return SpikingLinear.from_dense(module, neuron), f"{neuron.spikes} IF of {self.config.ffn_steps} steps"

    def _activation(self, name: str, module: nn.Module) -> tuple[nn.Module, str]:
        if self.acts[name].gated:
            return nn.ReLU(), f"ReLU, its product with the gate sent by {self.acts[name].linear}"
        return nn.Identity(), f"its IF sits in {self.acts[name].linear}"
