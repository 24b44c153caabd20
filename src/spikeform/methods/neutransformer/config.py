"""The configuration of NeuTransformer."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from spikeform.conversion.config import MethodConfig, choice, is_real
from spikeform.conversion.options import whole
from spikeform.errors import ConfigError
from spikeform.neurons.lif import RESETS
from spikeform.neurons.surrogate import SURROGATES


def _option(default: Any, help: str) -> Any:  # the help text feeds command lines and recipe checkers
    return field(default=default, metadata={"help": help})


@dataclass(eq=True, repr=True)
class NeuTransformer(MethodConfig):
    """Spiking self-attention in a trained transformer, and its feed-forward blocks converted (arXiv 2510.00133).

    Conversion puts the neurons in and finds gains and thresholds to begin with; :func:`spikeform.train` then
    fine-tunes the attention. The paper's equations were not found: form and defaults are ours, after Spikformer.

    Args:
        steps: T of attention's neurons, 1 to 16.
        spikes: Of queries, keys, values and the output: ``binary`` or ``signed``.
        normalise: Divide what a query gathers by the number of keys that it sees.
        tau: Membrane time constant in steps, at least 1.
        reset: ``hard`` or ``soft``.
        surrogate: ``sigmoid``, ``arctan`` or ``triangle``.
        rate: Share of steps in which neurons fire to begin with, from which gains follow.
        ffn: ``signed_if``: the activation as it is, negative lobe included, sent as signed spikes;
            ``relu_if``: a ReLU in its place; ``none``: feed-forward blocks stay dense.
        ffn_steps: T of the feed-forward blocks' neurons, 1 to 64.
        balance: Their thresholds: ``mse`` (least squared error) or ``percentile``.
        percentile: Share of activations below the largest code, for ``percentile``.
        skip: Module name patterns that stay dense.
        version: Format of this config.

    Raises:
        ConfigError: A value is out of range; the message names it.
    """

    quant_method: ClassVar[str] = "spikeform_neutransformer"  # type: ignore[misc]

    steps: int = _option(4, "time steps T of attention, 1 to 16")
    spikes: str = _option("binary", "binary or signed spikes in attention")
    normalise: bool = _option(True, "divide by the number of keys that a query sees")
    tau: float = _option(2.0, "membrane time constant in steps, at least 1")
    reset: str = _option("hard", "hard or soft")
    surrogate: str = _option("sigmoid", "sigmoid, arctan or triangle")
    rate: float = _option(0.15, "firing rate that gains begin with")
    ffn: str = _option("signed_if", "signed_if, relu_if or none")
    ffn_steps: int = _option(16, "time steps of feed-forward neurons, 1 to 64")
    balance: str = _option("mse", "thresholds by mse or percentile")
    percentile: float = _option(0.999, "share of activations below the largest code")
    skip: tuple[str, ...] = _option((), "module name patterns that stay dense")
    version: int = _option(1, "format of this config")

    def check(self) -> None:
        """Every option in its range; lists become tuples."""
        whole("steps", self.steps, 1, 16)
        whole("ffn_steps", self.ffn_steps, 1, 64)
        choice("spikes", self.spikes, ("binary", "signed"))
        choice("reset", self.reset, RESETS)
        choice("surrogate", self.surrogate, SURROGATES)
        choice("ffn", self.ffn, ("signed_if", "relu_if", "none"))
        choice("balance", self.balance, ("mse", "percentile"))
        if not isinstance(self.normalise, bool):
            raise ConfigError(f"normalise must be true or false, got {self.normalise!r}")
        if not is_real(self.tau) or not 1 <= self.tau < float("inf"):
            raise ConfigError(f"tau must be a finite number of at least 1, got {self.tau!r}")
        for name in ("rate", "percentile"):
            if not is_real(getattr(self, name)) or not 0 < getattr(self, name) < 1:
                raise ConfigError(f"{name} must be above 0 and below 1, got {getattr(self, name)!r}")
        if not isinstance(self.skip, list | tuple) or not all(isinstance(pattern, str) for pattern in self.skip):
            raise ConfigError(f"skip must be a list of module name patterns, got {self.skip!r}")
        self.skip = tuple(self.skip)
