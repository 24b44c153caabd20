"""The configuration of FAS."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from spikeform.conversion.config import MethodConfig, choice, is_real, option, patterns, switches
from spikeform.conversion.options import whole
from spikeform.errors import ConfigError

MAX_STEPS, MAX_LEVELS = 64, 16


@dataclass(eq=True, repr=True)
class FAS(MethodConfig):
    """Fine-tuning with QCFS activations, then calibration from coarse to fine (arXiv 2502.04405).

    A model of this method streams: T passes, one a time step. With ``steps=0`` it is the network of QCFS
    activations, which stage 1 fine-tunes. The paper leaves open what a gated feed-forward block gets, and every
    option from ``per_channel`` on is ours.

    Args:
        steps: Time steps T, 0 to 64; :func:`spikeform.set_steps` changes it later.
        levels: L of QCFS, 1 to 16.
        sites: ``feed_forward`` (neurons replace activation functions, as the paper has it) or ``all`` (signed
            neurons also in front of every linear layer of the blocks).
        gated: In gated feed-forward blocks (SwiGLU), ``activation``: the neuron replaces the activation of the gate,
            or ``product``: a signed neuron encodes the gated product, so that the down projection receives spikes.
        per_channel: A QCFS threshold per channel instead of per layer.
        granularity: Of what calibration finds (threshold scale and initial potential): ``layer``, ``channel``, or
            ``position`` (per position and channel, the released code's form).
        positions: Positions that ``position`` knows; a longer input is an error.
        operators: Steps of few-spike operators (LAS's neurons) for softmax, norms and the products of attention, 1
            to 16; None leaves these real.
        threshold: QCFS threshold of every neuron; None finds each from calibration data.
        surrogate: Half width of the surrogate gradient's triangle, in thresholds.
        skip: Module name patterns that stay dense.
        version: Format of this config.

    Raises:
        ConfigError: A value is out of range; the message names it.
    """

    quant_method: ClassVar[str] = "spikeform_fas"  # type: ignore[misc]

    steps: int = option(8, "time steps T, 0 to 64; 0 is the QCFS network")
    levels: int = option(8, "levels L of QCFS, 1 to 16")
    sites: str = option("feed_forward", "feed_forward or all")
    gated: str = option("activation", "activation or product")
    per_channel: bool = option(False, "a QCFS threshold per channel")
    granularity: str = option("layer", "layer, channel or position")
    positions: int | None = option(None, "positions that granularity position knows")
    operators: int | None = option(None, "steps of few-spike operators, 1 to 16; none leaves them real")
    threshold: float | None = option(None, "QCFS threshold of every neuron; none finds each from data")
    surrogate: float = option(1.0, "half width of the surrogate triangle, in thresholds")
    skip: tuple[str, ...] = option((), "module name patterns that stay dense")
    version: int = option(1, "format of this config")

    def check(self) -> None:
        """Every option in its range; lists become tuples."""
        whole("steps", self.steps, 0, MAX_STEPS)
        whole("levels", self.levels, 1, MAX_LEVELS)
        choice("sites", self.sites, ("feed_forward", "all"))
        choice("gated", self.gated, ("activation", "product"))
        choice("granularity", self.granularity, ("layer", "channel", "position"))
        switches(self, "per_channel")
        if self.operators is not None:
            whole("operators", self.operators, 1, 16)
        if (self.granularity == "position") != (self.positions is not None):
            raise ConfigError("positions is needed with granularity position, and has no meaning without it")
        if self.positions is not None:
            whole("positions", self.positions, 1, 2**20)
        if self.threshold is not None and not (is_real(self.threshold) and 0 < self.threshold < float("inf")):
            raise ConfigError(f"threshold must be a finite number above 0, got {self.threshold!r}")
        if not is_real(self.surrogate) or not 0.5 <= self.surrogate < float("inf"):
            raise ConfigError(
                f"surrogate must be a finite number of at least 0.5 (below it gradients grow from step to step), got "
                f"{self.surrogate!r}"
            )
        self.skip = patterns("skip", self.skip)
