"""Thresholds from histograms of a site's input. The paper gives constants and no rule: these rules are ours."""

from __future__ import annotations

from fnmatch import fnmatch

import torch
from torch import Tensor

from spikeform.conversion.histogram import Histogram
from spikeform.errors import CalibrationError
from spikeform.methods.las.config import LAS
from spikeform.neurons import MT
from spikeform.spikes import power_of_two

MAX_SHIFT = 24
PSEUDO_COUNTS = 32
_OUTLIER_CUTS = 28  # quarter octaves below the margin that least_error may cut the largest threshold


def given(neuron: MT, config: LAS) -> bool:
    """Set a neuron's threshold from the config: an exact site, then a pattern, then its role."""
    table = config.thresholds or {}
    for name, values in sorted(table.items(), key=lambda item: item[0] != neuron.site):
        if name == neuron.role or fnmatch(neuron.site, name):
            neuron.set_threshold(values)
            return True
    return False


def fit(neuron: MT, histogram: Histogram, config: LAS) -> float:
    """Set a neuron's threshold (and channel shifts) from its input's histogram.

    Returns:
        The share of the histogram's inputs above the largest threshold.

    Raises:
        CalibrationError: The inputs are not finite.
    """
    if not bool(histogram.peak.isfinite().all()):
        raise CalibrationError(f"{neuron.site}: the dense model's activations are not finite on the calibration data")
    if neuron.channel_shift is not None:
        shift = channel_shifts(histogram)
        neuron.channel_shift = shift.view(neuron.channel_shift.shape).to(neuron.channel_shift)
        histogram = histogram.shifted(shift)
    weight = _channel_weight(neuron, histogram)
    peak = float(histogram.peak.max())
    if peak == 0.0:  # nothing ever arrives: any threshold codes zero exactly
        neuron.set_threshold(torch.arange(1.0, neuron.populations + 1))
        return 0.0
    if neuron.role == "probability":
        # The largest probability is 1, and the top code stands for it exactly.
        tops = torch.tensor([neuron.coding.resolution / neuron.coding.limit], dtype=torch.float64)
    elif config.threshold == "least_error":
        cuts = 2.0 ** (-torch.arange(_OUTLIER_CUTS, dtype=torch.float64) / 4)
        tops = peak * config.margin * cuts
    else:
        tops = torch.tensor([peak * config.margin], dtype=torch.float64)
    weighted = (histogram.counts * weight[:, None]).sum(0)
    if neuron.populations == 1:
        thresholds = [float(tops[_errors(weighted, tops, neuron, config).sum(1).argmin()])]
    elif config.threshold == "quantile":
        normal = _quantile(histogram.counts.sum(0), config.quantile)
        thresholds = [min(normal, float(tops[0]) / 2), float(tops[0])]
    else:
        thresholds = _least_error(weighted, tops, neuron, config)
    neuron.set_threshold(thresholds)
    above = Histogram.magnitudes() > neuron.threshold[-1].double().cpu()
    counts = histogram.counts.sum(0)
    return float(counts[above].sum() / counts.sum())


def channel_shifts(histogram: Histogram) -> Tensor:
    """Exponents ``[C]``, int8, that bring every channel's root mean square near the median channel's.

    The root mean square, not the peak: it is the steadier of the two, and the shared threshold then leaves most
    channels room above what calibration saw. A channel that calibration hardly saw (a ReLU that seldom opens)
    is drawn towards the median by pseudo-counts, since its next input may be any size.
    """
    seen, square = histogram.counts.sum(1), histogram.mean_square()
    live = seen > 0
    reference = square[live].median() if bool(live.any()) else square.new_ones(())
    square = (seen * square + PSEUDO_COUNTS * reference) / (seen + PSEUDO_COUNTS)
    shift = ((square / reference).log2() / 2).round().clamp(-MAX_SHIFT, MAX_SHIFT)
    return shift.to(torch.int8)


def _channel_weight(neuron: MT, histogram: Histogram) -> Tensor:
    """How much a squared error in each channel matters, fp64 ``[C]``: what the next weights make of it where
    they are known, or the inverse of the channel's own mean square. Either way no rescaling of channels that
    leaves the dense function alone changes the choice.
    """
    channels = histogram.counts.shape[0]
    if channels == 1:
        return torch.ones(1, dtype=torch.float64)
    if neuron.channel_weight is not None:
        weight = neuron.channel_weight.double().cpu()
        if neuron.channel_shift is not None:
            weight = weight * power_of_two(2 * neuron.channel_shift.cpu().int().view(-1), torch.float64)
        return weight
    if neuron.balance_channels:
        return 1.0 / histogram.mean_square().clamp(min=1e-30)
    return torch.ones(channels, dtype=torch.float64)


def _errors(weighted: Tensor, thresholds: Tensor, neuron: MT, config: LAS) -> Tensor:
    """Squared coding error of each bin's inputs for each threshold: fp64 ``[len(thresholds), BINS]``."""
    m = Histogram.magnitudes()
    unit = thresholds[:, None] / neuron.coding.resolution
    nearest = config.rounding == "nearest"
    error = unit.square() / (12 if nearest else 3)
    error = torch.where(m < (unit / 2 if nearest else unit), m.square(), error)
    error = torch.where(m > thresholds[:, None], (m - thresholds[:, None]).square(), error)
    return error * weighted


def _least_error(weighted: Tensor, tops: Tensor, neuron: MT, config: LAS) -> list[float]:
    """The pair (normal, top) with the least error: bins below ``normal`` cost its error, the others ``top``'s."""
    edges = Histogram.edges()
    below = _errors(weighted, edges, neuron, config).cumsum(1).diagonal()  # [normal]: its bins up to its own edge
    top_errors = _errors(weighted, tops, neuron, config)
    above = top_errors.sum(1, keepdim=True) - top_errors.cumsum(1)  # [top, normal]
    total = below + above
    total[edges >= tops[:, None] * 0.999] = float("inf")
    top, normal = divmod(int(total.argmin()), total.shape[1])
    return [float(edges[normal]), float(tops[top])]


def _quantile(counts: Tensor, share: float) -> float:
    reached = counts.cumsum(0) >= share * counts.sum()
    return float(Histogram.edges()[int(reached.nonzero()[0])])
