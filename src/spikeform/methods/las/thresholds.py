"""Thresholds from histograms of a site's input. The paper gives constants and no rule: these rules are ours."""

from __future__ import annotations

from fnmatch import fnmatch
from math import ceil, log2

import torch
from torch import Tensor

from spikeform.conversion.histogram import BINS, LOWEST, PER_OCTAVE, Histogram
from spikeform.errors import CalibrationError
from spikeform.methods.las.config import LAS, check_powers_of_two
from spikeform.neurons import MT
from spikeform.spikes import power_of_two

MAX_SHIFT = 24
PSEUDO_COUNTS = 32
_OUTLIER_CUTS = 28  # quarter octaves below the margin that least_error may cut the largest threshold


def given(neuron: MT, config: LAS) -> bool:
    """Set a neuron's threshold from the config: an exact site, then a pattern, then its role.

    Raises:
        ConfigError: It must be a power of two and is not.
    """
    table = config.thresholds or {}
    patterns = [name for name in table if name != neuron.role and fnmatch(neuron.site, name)]
    for name in (neuron.site, *patterns, neuron.role):
        if name in table:
            if neuron.power_of_two:
                check_powers_of_two(name, table[name])
            neuron.set_threshold(table[name])
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
        tops = torch.tensor([_top_of_one(neuron)], dtype=torch.float64)
    elif neuron.power_of_two:
        # From the next one above what is left as room, down as many octaves; above the lowest edges of the histogram.
        octaves = _OUTLIER_CUTS // PER_OCTAVE if config.threshold == "least_error" else 1
        highest = max(ceil(log2(peak * config.margin)), LOWEST + octaves + 1)
        tops = power_of_two(highest - torch.arange(octaves), torch.float64)
    elif config.threshold == "least_error":
        cuts = 2.0 ** (-torch.arange(_OUTLIER_CUTS, dtype=torch.float64) / 4)
        tops = peak * config.margin * cuts
    else:
        tops = torch.tensor([peak * config.margin], dtype=torch.float64)
    counts = histogram.counts
    if config.threshold == "least_error" and neuron.role != "probability":
        counts = counts + _unseen(histogram, config.margin)
    weighted = (counts * weight[:, None]).sum(0)
    if neuron.populations == 1:
        thresholds = [float(tops[_errors(weighted, tops, neuron, config).sum(1).argmin()])]
    elif config.threshold == "quantile":
        normal = _quantile(histogram.counts.sum(0), config.quantile)
        normal = 2.0 ** ceil(log2(normal)) if neuron.power_of_two else normal
        thresholds = [min(normal, float(tops[0]) / 2), float(tops[0])]
    else:
        thresholds = _least_error(weighted, tops, neuron, config)
    neuron.set_threshold(tuple(thresholds))
    if peak <= float(neuron.threshold[-1]):
        return 0.0
    above = Histogram.magnitudes() > neuron.threshold[-1].double().cpu()
    counts = histogram.counts.sum(0)
    return float(counts[above].sum() / counts.sum())


def _top_of_one(neuron: MT) -> float:
    """The threshold whose top code stands for 1, the largest probability, exactly."""
    limit = torch.tensor([neuron.limit])
    top = neuron.coding.resolution / int(neuron.coding.nearest_code(limit))
    # Where inputs are cut, the fp32 quotient must not fall below the top code by a rounding.
    return top if neuron.rounding == "nearest" else top * (1 - 2.0**-22)


def _unseen(histogram: Histogram, margin: float) -> Tensor:
    """What calibration did not meet, as counts ``[C, BINS]``.

    For each channel, ``margin^-4`` of an input at ``margin`` times its largest one. By the rule of succession
    the next input exceeds the N seen ones with probability 1 / (N + 1), and where tails fall as the fourth
    power, goes beyond ``margin`` times the largest in ``margin^-4`` of these cases. Without it the least error
    on the sample leaves no room above the sample, even where steps are plenty.
    """
    position = ((histogram.peak.double() * margin).log2() - LOWEST) * PER_OCTAVE
    bins = position.floor().clamp(0, BINS - 1).long()
    unseen = torch.zeros_like(histogram.counts).scatter_(1, bins[:, None], min(margin**-4, 1.0))
    return unseen.masked_fill(histogram.peak[:, None] == 0, 0.0)


def channel_shifts(histogram: Histogram) -> Tensor:
    """Exponents ``[C]``, int8, that bring every channel's root mean square near the median channel's.

    The root mean square, not the peak: it is the steadier of the two, and the shared threshold then leaves most
    channels room above what calibration saw. A channel that calibration hardly saw (a ReLU that seldom opens)
    is drawn towards the median by pseudo-counts, since its next input may be any size.
    """
    seen, square = histogram.counts.sum(1), histogram.mean_square()
    live = seen > 0
    reference = square[live].median() if bool(live.any()) else square.new_ones(())
    # In the logarithm: in the mean square itself a small channel, however often seen, would be drawn up too.
    octaves = (square / reference).clamp(min=1e-30).log2() / 2 * seen / (seen + PSEUDO_COUNTS)
    return octaves.round().clamp(-MAX_SHIFT, MAX_SHIFT).to(torch.int8)


def _channel_weight(neuron: MT, histogram: Histogram) -> Tensor:
    """How much a squared error in each channel matters, fp64 ``[C]``.

    What the next weights make of it where they are known, or the inverse of the channel's own mean square.
    Either way no rescaling of channels that leaves the dense function alone changes the choice.
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
    if neuron.power_of_two:
        total[:, torch.arange(1, len(edges) + 1) % PER_OCTAVE != 0] = float("inf")
    top, normal = divmod(int(total.argmin()), total.shape[1])
    return [float(edges[normal]), float(tops[top])]


def _quantile(counts: Tensor, share: float) -> float:
    reached = counts.cumsum(0) >= share * counts.sum()
    return float(Histogram.edges()[int(reached.nonzero()[0])])
