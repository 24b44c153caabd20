"""QCFS thresholds from histograms of a site's input. The paper gives constants; this rule is ours."""

from __future__ import annotations

import torch
from torch import Tensor

from spikeform.conversion.histogram import Histogram
from spikeform.errors import CalibrationError
from spikeform.methods.fas import operators
from spikeform.methods.fas.config import FAS
from spikeform.neurons import MT, StreamingNeuron

_CUTS = 40  # quarter octaves below the largest input that a threshold may lie
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
    layer = _least_error(histogram.counts.sum(0, keepdim=True), histogram.peak.max()[None], config.levels)
    theta = layer
    if neuron.statistics_per_channel:
        theta = _least_error(histogram.counts, histogram.peak, config.levels)
        theta = torch.maximum(theta, layer * _FLOOR)
    neuron.set_threshold(theta)
    above = Histogram.magnitudes() > neuron.threshold.detach().double().cpu()[:, None]
    total = histogram.counts.sum()
    counts = histogram.counts if neuron.statistics_per_channel else histogram.counts.sum(0, keepdim=True)
    return float(counts[above.expand_as(counts)].sum() / total) if total else 0.0


def _least_error(counts_CN: Tensor, peak_C: Tensor, levels: int) -> Tensor:
    """For each channel the threshold, among quarter octaves below its peak, with the least error: fp64 ``[C]``."""
    m_N = Histogram.magnitudes()
    peak_C = peak_C.double().clamp(min=2.0**-24)
    best_C, least_C = peak_C, torch.full_like(peak_C, float("inf"))
    for cut in range(_CUTS):
        theta_C = peak_C * 2.0 ** (-cut / 4)
        unit_C1 = (theta_C / levels)[:, None]
        error_CN = torch.where(m_N < unit_C1 / 2, m_N.square(), unit_C1.square() / 12)
        error_CN = torch.where(m_N > theta_C[:, None], (m_N - theta_C[:, None]).square(), error_CN)
        error_C = (error_CN * counts_CN).sum(1)
        better = error_C < least_C
        best_C, least_C = torch.where(better, theta_C, best_C), torch.where(better, error_C, least_C)
    return best_C
