"""The configuration of NeuTransformer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from spikeform.conversion.config import MethodConfig, choice, is_real, option, patterns, switches
from spikeform.conversion.options import whole
from spikeform.errors import ConfigError
from spikeform.neurons.lif import RESETS
from spikeform.neurons.surrogate import SURROGATES


@dataclass(eq=True, repr=True)
class NeuTransformer(MethodConfig):
    """Spiking self-attention in a trained transformer, and its feed-forward blocks converted (arXiv 2510.00133).

    Conversion puts the neurons in and finds gains and thresholds to begin with; :func:`spikeform.train` then
    fine-tunes the attention. The paper's equations were not found: form and defaults are ours, after Spikformer.

    Args:
        steps: T of attention's neurons, 1 to 16.
        spikes: Of queries, keys, values and the output: ``binary`` or ``signed``.
        normalise: Divide what a query gathers by the number of keys that it sees.
        windows: How many tokens heads see, the query's own the last of them, in equal parts of the key/value heads;
            0, which must be the last: all. ``(2, 8, 32, 0)`` lets a quarter of them see two. Empty: all see all.
        tau: Membrane time constant in steps, at least 1; 0: nothing leaks (integrate-and-fire).
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

    steps: int = option(4, "time steps T of attention, 1 to 16")
    spikes: str = option("binary", "binary or signed spikes in attention")
    normalise: bool = option(True, "divide by the number of keys that a query sees")
    windows: tuple[int, ...] = option((), "tokens that heads see, in equal parts, 0 (all) last; empty: all see all")
    tau: float = option(2.0, "membrane time constant in steps, at least 1; 0: no leak")
    reset: str = option("hard", "hard or soft")
    surrogate: str = option("sigmoid", "sigmoid, arctan or triangle")
    rate: float = option(0.15, "firing rate that gains begin with")
    ffn: str = option("signed_if", "signed_if, relu_if or none")
    ffn_steps: int = option(16, "time steps of feed-forward neurons, 1 to 64")
    balance: str = option("mse", "thresholds by mse or percentile")
    percentile: float = option(0.999, "share of activations below the largest code")
    skip: tuple[str, ...] = option((), "module name patterns that stay dense")
    version: int = option(1, "format of this config")

    def check(self) -> None:
        """Every option in its range; lists become tuples."""
        whole("steps", self.steps, 1, 16)
        whole("ffn_steps", self.ffn_steps, 1, 64)
        choice("spikes", self.spikes, ("binary", "signed"))
        choice("reset", self.reset, RESETS)
        choice("surrogate", self.surrogate, SURROGATES)
        choice("ffn", self.ffn, ("signed_if", "relu_if", "none"))
        choice("balance", self.balance, ("mse", "percentile"))
        switches(self, "normalise")
        if not isinstance(self.windows, list | tuple) or 0 in self.windows[:-1]:
            raise ConfigError(
                f"windows must be a list of whole numbers, of which only the last may be 0 (all), got {self.windows!r}"
            )
        for window in self.windows:
            whole("windows", window, 0, 4096)
        self.windows = tuple(self.windows)
        if not is_real(self.tau) or not (self.tau == 0 or 1 <= self.tau < float("inf")):
            raise ConfigError(f"tau must be 0 (no leak) or a finite number of at least 1, got {self.tau!r}")
        for name in ("rate", "percentile"):
            if not is_real(getattr(self, name)) or not 0 < getattr(self, name) < 1:
                raise ConfigError(f"{name} must be above 0 and below 1, got {getattr(self, name)!r}")
        self.skip = patterns("skip", self.skip)
