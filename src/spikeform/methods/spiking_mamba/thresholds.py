"""Thresholds to begin with, from histograms of a site's input. The paper's rule was not found: this one is ours."""

from __future__ import annotations

import torch

from spikeform.conversion.histogram import Histogram
from spikeform.errors import CalibrationError
from spikeform.methods.spiking_mamba.config import SpikingMamba
from spikeform.neurons import SignedInteger

_FLOOR = 2.0**-6  # a channel's threshold is at least this share of the layer's
_PER_OCTAVE = 16  # thresholds that are tried in an octave


def given(neuron: SignedInteger, config: SpikingMamba) -> bool:
    """Set a neuron's threshold from the config, if it names one."""
    if config.threshold is None:
        return False
    neuron.set_threshold(config.threshold)
    return True


def fit(neuron: SignedInteger, histogram: Histogram, config: SpikingMamba) -> float:
    """Set ``V_th = argmin_c sum (x - c n(x / c))^2`` over the inputs, of each channel or of all.

    Returns:
        The share of the inputs beyond the largest integer.

    Raises:
        CalibrationError: The inputs are not finite.
    """
    if not bool(histogram.peak.isfinite().all()):
        raise CalibrationError(f"{neuron.site}: the dense model's activations are not finite on the calibration data")
    fires = 1.0 if neuron.spikes == "binary" else 0.5
    search = {"levels": neuron.steps, "fires": fires, "per_octave": _PER_OCTAVE}
    top = layer = histogram.merged().least_error(**search)
    if neuron.statistics_per_channel:
        top = torch.maximum(histogram.least_error(**search), layer * _FLOOR)
    neuron.set_threshold(top / neuron.steps)
    counts = histogram.counts if neuron.statistics_per_channel else histogram.counts.sum(0, keepdim=True)
    above = Histogram.magnitudes() > top[:, None] * (1 + 0.5 / neuron.steps)
    total = counts.sum()
    return float(counts[above.expand_as(counts)].sum() / total) if total else 0.0
