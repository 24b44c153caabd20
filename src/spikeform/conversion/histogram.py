"""Statistics of a neuron's input: one histogram of log2 |x| per channel, from which every threshold follows.

Histograms add, so calibration needs one pass, any batch size, and no stored activations.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from spikeform.spikes import power_of_two

PER_OCTAVE = 4
LOWEST, HIGHEST = -28, 28  # octaves; smaller inputs share the first bin, larger ones the last
BINS = (HIGHEST - LOWEST) * PER_OCTAVE
SAMPLE = 1 << 22  # inputs of one call that are counted


@lru_cache(maxsize=4)  # sites of one shape take the same ones, and drawing them takes longer than counting
def _drawn(inputs: int, count: int, device: torch.device) -> Tensor:
    """Places of so many inputs, the same ones each time, int64 ``[count]``."""
    return torch.randint(inputs, (count,), generator=torch.Generator().manual_seed(0)).to(device)


class Histogram:
    """Counts ``[C, BINS]`` of input magnitudes per channel, and their exact maxima.

    Args:
        counts: fp64 ``[C, BINS]``.
        peak: fp32 ``[C]``, largest magnitude of each channel.
        shape: Shape that the channel axis unfolds to (``(D,)``, or ``(G, 1, E)`` for keys and values).
    """

    def __init__(self, counts: Tensor, peak: Tensor, shape: tuple[int, ...]) -> None:
        self.counts, self.peak, self.shape = counts, peak, shape

    @classmethod
    def of(cls, x_CN: Tensor, shape: tuple[int, ...]) -> Histogram:
        """Histogram of ``x`` given as ``[C, N]``. Zeros are not counted: every threshold codes them exactly."""
        x_CN = x_CN.detach().abs()
        channels, inputs = x_CN.shape
        peak = (x_CN.amax(1) if inputs else x_CN.new_zeros(channels)).float().cpu()
        # Shares need no more than a large sample; the peak is of all. Drawn at random (from a fixed seed): a
        # stride may share a factor with the width, and then never see some channels.
        if x_CN.numel() > SAMPLE:
            x_CN = x_CN[:, _drawn(inputs, max(SAMPLE // channels, 1), x_CN.device)]
        x_CN = x_CN.float()
        index = ((x_CN.log2() - LOWEST) * PER_OCTAVE).floor().clamp_(0, BINS - 1).long()
        index += torch.arange(channels, device=x_CN.device)[:, None] * BINS
        counts = torch.bincount(index[x_CN > 0], minlength=channels * BINS).view(channels, BINS)
        return cls(counts.double().cpu(), peak, shape)

    def add(self, other: Histogram) -> None:
        """Accumulate another batch."""
        self.counts += other.counts
        self.peak = torch.maximum(self.peak, other.peak)

    @staticmethod
    def magnitudes() -> Tensor:
        """Geometric centre of each bin, fp64 ``[BINS]``."""
        return 2.0 ** ((torch.arange(BINS, dtype=torch.float64) + 0.5) / PER_OCTAVE + LOWEST)

    @staticmethod
    def edges() -> Tensor:
        """Upper edge of each bin, fp64 ``[BINS]``."""
        return 2.0 ** ((torch.arange(BINS, dtype=torch.float64) + 1) / PER_OCTAVE + LOWEST)

    def mean_square(self) -> Tensor:
        """Mean square of each channel's non-zero inputs, fp64 ``[C]``."""
        return self.counts @ self.magnitudes().square() / self.counts.sum(1).clamp(min=1)

    def shifted(self, shift_C: Tensor) -> Histogram:
        """The histogram of ``x * 2^-shift``: whole octaves are whole bins, so it is exact."""
        moved = torch.zeros_like(self.counts)
        for shift in shift_C.unique().tolist():
            rows = shift_C == shift
            source = torch.arange(BINS)
            target = (source - shift * PER_OCTAVE).clamp(0, BINS - 1)
            moved[rows] = moved[rows].index_add(1, target, self.counts[rows])
        return Histogram(moved, self.peak * power_of_two(-shift_C), self.shape)

    def least_error(self, levels: int, fires: float = 0.5, per_octave: int = PER_OCTAVE, octaves: int = 10) -> Tensor:
        """For each channel the threshold with the least squared error of ``levels`` even levels up to it.

        Args:
            levels: L: the codes are ``0 .. L`` in units of ``threshold / L``.
            fires: Inputs below this share of a unit are coded 0: 1/2 where codes are rounded.
            per_octave: Thresholds that are tried in an octave.
            octaves: How far below the channel's peak they go.

        Returns:
            fp64 ``[C]``, positive.
        """
        m_N, peak_C = self.magnitudes(), self.peak.double().clamp(min=2.0**LOWEST)
        best_C, least_C = peak_C, torch.full_like(peak_C, float("inf"))
        for cut in range(octaves * per_octave):
            theta_C = peak_C * 2.0 ** (-cut / per_octave)
            unit_C1 = (theta_C / levels)[:, None]
            error_CN = torch.where(m_N < unit_C1 * fires, m_N.square(), unit_C1.square() / 12)
            error_CN = torch.where(m_N > theta_C[:, None], (m_N - theta_C[:, None]).square(), error_CN)
            error_C = (error_CN * self.counts).sum(1)
            better = error_C < least_C
            best_C, least_C = torch.where(better, theta_C, best_C), torch.where(better, error_C, least_C)
        return best_C

    def merged(self) -> Histogram:
        """All channels as one."""
        return Histogram(self.counts.sum(0, keepdim=True), self.peak.max()[None], (1,))
