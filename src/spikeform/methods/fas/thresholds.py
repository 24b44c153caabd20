"""QCFS thresholds from histograms of a site's input. The paper gives constants; this rule is ours."""

from __future__ import annotations

import torch

from spikeform.conversion.histogram import Histogram
from spikeform.errors import CalibrationError
from spikeform.methods.fas import operators
from spikeform.methods.fas.config import FAS
from spikeform.neurons import MT, StreamingNeuron

_FLOOR = 2.0**-6  # a channel's threshold is at least this share of the layer's


def given(neuron: StreamingNeuron | MT, config: FAS) -> bool:
    """Set a neuron's threshold from the config, if it names one."""
    if isinstance(neuron, MT) or config.threshold is None:
        return False
    neuron.set_threshold(config.threshold)
    return True


def fit(neuron: StreamingNeuron | MT, histogram: Histogram, config: FAS) -> float:
    """Set a neuron's threshold to the one of least squared QCFS error on its inputs.

    Returns:
        The share of the (positive) inputs above it.

    Raises:
        CalibrationError: The inputs are not finite.
    """
    if isinstance(neuron, MT):
        return operators.fit(neuron, histogram, config)
    if not bool(histogram.peak.isfinite().all()):
        raise CalibrationError(f"{neuron.site}: the dense model's activations are not finite on the calibration data")
    layer = histogram.merged().least_error(config.levels)
    theta = layer
    if neuron.statistics_per_channel:
        theta = torch.maximum(histogram.least_error(config.levels), layer * _FLOOR)
    neuron.set_threshold(theta)
    above = Histogram.magnitudes() > neuron.threshold.detach().double().cpu()[:, None]
    total = histogram.counts.sum()
    counts = histogram.counts if neuron.statistics_per_channel else histogram.counts.sum(0, keepdim=True)
    return float(counts[above.expand_as(counts)].sum() / total) if total else 0.0
