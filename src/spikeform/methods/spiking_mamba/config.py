"""The configuration of SpikingMamba."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from spikeform.conversion.config import MethodConfig, choice, is_real, option, patterns, switches
from spikeform.conversion.options import whole
from spikeform.errors import ConfigError
from spikeform.neurons.signed_integer import SPIKES


@dataclass(eq=True, repr=True)
class SpikingMamba(MethodConfig):
    """Signed-integer neurons before the projections of Mamba and Mamba-2 (arXiv 2510.04595).

    Conversion puts the neurons in; :func:`spikeform.train` then distils the model from the one that it came from. The
    paper's D and threshold rule were not found: the defaults are ours (its literal threshold is 1).

    Args:
        steps: D, the range of the integers and the number of ternary steps, 1 to 16.
        spikes: ``signed``; or, to compare with, ``unsigned`` (integers 0 .. D) or ``binary`` (one spike or none; D 1).
        threshold: V_th of every neuron, e.g. 1; None finds each from calibration data, by the least squared error.
        per_channel: A threshold for each input channel, folded into the following weights, instead of one in all.
        rotate: Turn the channels before each output projection by a Hadamard matrix, and its weights with them, so that
            dense model and conversion are the same function: what a gate leaves has heavy tails, which few integers
            tell badly. Ours, not the paper's.
        alpha: Height of the surrogate gradient.
        conv: Also encode what goes into the causal convolution.
        lm_head: Also encode the output head's input.
        weight_bits: 16: weights stay real. 8: int8 weights, one scale an output row, made after training. A head
            tied to the embedding stays real.
        skip: Module name patterns (``*.layers.0.*``) that stay dense.
        version: Format of this config.

    Raises:
        ConfigError: A value is out of range; the message names it.
    """

    quant_method: ClassVar[str] = "spikeform_spiking_mamba"  # type: ignore[misc]

    steps: int = option(4, "range D of the integers, and ternary steps, 1 to 16")
    spikes: str = option("signed", "signed, unsigned or binary")
    threshold: float | None = option(None, "threshold of every neuron; none finds each from data")
    per_channel: bool = option(False, "a threshold per input channel, folded into the weights")
    rotate: bool = option(False, "turn the channels before out_proj by a Hadamard matrix, its weights with them")
    alpha: float = option(1.0, "height of the surrogate gradient")
    conv: bool = option(False, "also encode what goes into the causal convolution")
    lm_head: bool = option(False, "also encode the output head's input")
    weight_bits: int = option(16, "16: real weights; 8: int8 weights, one scale an output row")
    skip: tuple[str, ...] = option((), "module name patterns that stay dense")
    version: int = option(1, "format of this config")

    def check(self) -> None:
        """Every option in its range; lists become tuples."""
        whole("steps", self.steps, 1, 16)
        choice("spikes", self.spikes, SPIKES)
        choice("weight_bits", self.weight_bits, (8, 16))
        switches(self, "per_channel", "rotate", "conv", "lm_head")
        for name in ("threshold", "alpha"):
            value = getattr(self, name)
            if not (name == "threshold" and value is None) and not (is_real(value) and 0 < value < float("inf")):
                raise ConfigError(f"{name} must be a finite number above 0, got {value!r}")
        if self.spikes == "binary" and self.steps != 1:
            raise ConfigError(f"binary spikes have one step: set steps=1, got {self.steps}")
        if self.conv and self.weight_bits == 8:
            raise ConfigError("conv=True needs weight_bits=16: the layer before the convolution has real weights")
        self.skip = patterns("skip", self.skip)
