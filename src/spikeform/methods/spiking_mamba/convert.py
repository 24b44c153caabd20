"""SpikingMamba: which neuron sits where."""

from __future__ import annotations

from fnmatch import fnmatch
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from spikeform.conversion.builder import Builder, walked
from spikeform.conversion.kinds import mixers
from spikeform.conversion.report import ConversionReport
from spikeform.errors import ConversionError
from spikeform.layers import SpikingLinear
from spikeform.layers.state_space import ConvolvedProjection, call_projections
from spikeform.methods.spiking_mamba.config import SpikingMamba
from spikeform.neurons import SignedInteger
from spikeform.neurons.hadamard import factors, turned

PROJECTIONS = ("in_proj", "out_proj")


def prepare(model: PreTrainedModel, config: SpikingMamba) -> ConversionReport:
    """Put neurons before the projections of every mixer. Thresholds are not set yet.

    Raises:
        ConversionError: The model has no state-space mixer of a known type.
    """
    found = mixers(model)
    if not found:
        raise ConversionError(
            f"{type(model).__name__} has no Mamba or Mamba-2 mixer: spikeform.SpikingMamba converts these"
        )
    builder = _Builder(model, config, {f"{name}.{part}": mixer for name, mixer in found for part in PROJECTIONS})
    for name, module, kind in walked(model, config.skip):
        builder.visit(name, module, kind)
    for _, mixer in found:
        call_projections(mixer)
    # A wish for how fresh weights are drawn; transformers carries it out on loaded ones too, at each load.
    if getattr(model.config, "rescale_prenorm_residual", False):
        model.config.rescale_prenorm_residual = False
    return builder.report


class _Builder(Builder):
    """What SpikingMamba puts where."""

    def __init__(self, model: PreTrainedModel, config: SpikingMamba, projections: dict[str, Any]) -> None:
        super().__init__(model, config, "spiking_mamba")
        self.projections = projections
        self.head = model.get_output_embeddings()
        self.tied = bool(getattr(model.config, "tie_word_embeddings", False))

    def stays_real(self, name: str, module: nn.Module, kind: str) -> str | None:
        """Why a module stays as it is, or None."""
        if any(fnmatch(name, pattern) for pattern in self.config.skip):
            return "named in skip"
        if kind == "embedding":
            return "a look-up: no product to spike through"
        if module is self.head:
            return None if self.config.lm_head else "the output head stays real (lm_head is false)"
        if name not in self.projections:
            return "the state-space core stays real: convolution, scan, gate and norms"
        return None

    def _neuron(self, site: str, channels: int | None, rotates: bool = False) -> SignedInteger:
        config, kind = self.config, {"spikes": self.config.spikes, "alpha": self.config.alpha}
        return SignedInteger(config.steps, channels, rotates=rotates, site=site, **kind)

    def _linear(self, name: str, module: nn.Linear) -> tuple[nn.Module, str]:
        tied = module is self.head and self.tied  # nothing may be folded into the embedding
        rotates = self.config.rotate and name.endswith(".out_proj")
        neuron = self._neuron(name, module.in_features if self.config.per_channel and not tied else None, rotates)
        convolved = self.config.conv and name.endswith(".in_proj")
        layer = (ConvolvedProjection if convolved else SpikingLinear).from_dense(module, neuron)
        if rotates and not layer.weight.is_meta:  # a checkpoint's are turned already
            dense = layer.weight.detach()
            weight = turned(dense, factors(layer.in_features, dense.device)).to(dense.dtype)
            layer.weight = nn.Parameter(weight, layer.weight.requires_grad)
        if isinstance(layer, ConvolvedProjection):
            mixer: Any = self.projections[name]
            width, taps = mixer.conv1d.weight.shape[0], mixer.conv1d.weight.shape[-1]
            start = mixer.intermediate_size if width != mixer.intermediate_size else 0  # Mamba-2 has its gate first
            layer.send(self._neuron(f"{name}.conv", None), start, start + width, taps)
        coded = self.config.weight_bits == 8 and not tied
        kind = (
            f"{self.config.spikes} integers{' (convolution too)' if convolved else ''}{', rotated' if rotates else ''}"
        )
        return layer, kind + (", 8-bit weights" if coded else "")
