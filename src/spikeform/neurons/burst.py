"""Neurons whose channels take different numbers of steps."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from spikeform.errors import SpikeformError
from spikeform.native import fixed
from spikeform.neurons.neuron import ThresholdNeuron, entry
from spikeform.spikes import Burst


class Tables(NamedTuple):
    """Of each channel: its sub-neuron (uint8), its largest code and what its unit is in common units (fp32).

    And ``multiples`` ``[R]``: that of each sub-neuron.
    """

    branch: Tensor
    top: Tensor
    multiple: Tensor
    multiples: Tensor


class BurstNeuron(ThresholdNeuron):
    """Bursts of T steps, T a power of two of each channel's own; one sub-neuron for each possible T.

    Args:
        coding: Burst whose tiers are 1, 2, .. steps.
        channels: Shape of what has a T each.
        site: The qualified name under which its firing is reported.

    Attributes:
        times: uint8 ``[*channels]``: T of each channel, 0 until set.
    """

    times: Tensor

    def __init__(self, coding: Burst, channels: tuple[int, ...], site: str = "") -> None:
        super().__init__(site)
        self.coding, self.channels, self.tiers = coding, tuple(channels), coding.tiers
        self.register_buffer("times", torch.zeros(self.channels, dtype=torch.uint8))
        self._known: tuple[Tensor, int | None, Tables] | None = None

    @property
    def name(self) -> str:
        """What errors call it."""
        return self.site or type(self).__name__

    def set_times(self, times: Tensor) -> None:
        """Set the steps T of each channel.

        Raises:
            SpikeformError: Wrong shape, or a T that is no power of two up to ``steps``.
        """
        if tuple(times.shape) != self.channels or not self._possible(times):
            raise SpikeformError(
                f"{self.name}: needs steps of {list(self.tiers)} for channels {list(self.channels)}, got "
                f"{times.unique().tolist()} for {list(times.shape)}"
            )
        self.times = times.to(self.times.device, torch.uint8)

    def _possible(self, times: Tensor) -> bool:
        return bool(torch.isin(times.long(), torch.tensor(self.tiers, device=times.device)).all())

    @property
    def calibrated(self) -> bool:
        """Whether every channel has its steps."""
        return self._possible(self.times)

    def tables(self) -> Tables:
        """What ``times`` means for each channel.

        Kept until ``times`` changes, so that neither they nor the check is paid for at every call.

        Raises:
            SpikeformError: Not calibrated.
        """
        times = entry(self, self._buffers, "times")
        if torch.compiler.is_compiling():
            return self._of_times() if self._known is None or self._known[0] is not times else self._known[2]
        version = None if times.is_inference() else times._version
        # The tensor itself is kept: another one may later lie where a dead one lay.
        if self._known is None or self._known[0] is not times or self._known[1] != version:
            if not self.calibrated:
                raise SpikeformError(f"{self.name} is not calibrated: convert with calibration data, or set_times()")
            self._known = (times, version, self._look_up())
        return self._known[2]

    def _look_up(self) -> Tables:
        # Not inference tensors, even when met in inference mode first: a backward pass may want them later.
        with torch.inference_mode(False), torch.no_grad():
            return Tables(*(fixed(table) for table in self._of_times()))

    def _of_times(self) -> Tables:
        branch = torch.zeros_like(self.times)
        top, multiple = (torch.zeros(self.channels, dtype=torch.float32, device=self.times.device) for _ in range(2))
        for r, t in enumerate(self.tiers):
            branch = torch.where(self.times == t, r, branch)
            top = torch.where(self.times == t, float(self.coding.capacity(t)), top)
            multiple = torch.where(self.times == t, float(self.coding.steps // t), multiple)
        factors = [float(self.coding.steps // t) for t in self.tiers]
        return Tables(branch, top, multiple, torch.tensor(factors, dtype=torch.float32, device=self.times.device))
