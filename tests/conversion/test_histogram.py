"""Histograms of magnitudes: exact peaks, counts that add, octaves that shift."""

import pytest
import torch

from spikeform.conversion.histogram import BINS, HIGHEST, LOWEST, SAMPLE, Histogram


def test_counts_and_edges():
    x = torch.tensor([[1.0, -1.0, 1.1, 1.18, 0.0, 2.0, -4.0]])
    histogram = Histogram.of(x, (1,))
    assert histogram.counts.shape == (1, BINS)
    assert int(histogram.counts.sum()) == 6  # zeros are coded exactly by any threshold
    assert float(histogram.peak) == 4.0
    edges = Histogram.edges()
    for value, count in ((1.0, 4), (2.0, 1), (4.0, 1)):
        index = int((edges <= value * (1 + 1e-9)).sum())
        assert int(histogram.counts[0, index]) == count
    ratio = Histogram.edges() / Histogram.magnitudes()
    assert torch.allclose(ratio, torch.full_like(ratio, 2.0 ** (1 / 8)))


def test_batches_add():
    x = torch.randn(3, 400, generator=torch.Generator().manual_seed(0))
    whole, parts = Histogram.of(x, (3,)), Histogram.of(x[:, :150], (3,))
    parts.add(Histogram.of(x[:, 150:], (3,)))
    assert torch.equal(whole.counts, parts.counts)
    assert torch.equal(whole.peak, parts.peak)
    assert whole.mean_square().tolist() == pytest.approx(x.square().mean(1).tolist(), rel=0.05)


def test_beyond_the_bins_and_empty():
    histogram = Histogram.of(torch.tensor([[1e-30, 1e30, 2.0**LOWEST, 2.0**HIGHEST]]), (1,))
    assert int(histogram.counts[0, 0]) == 2
    assert int(histogram.counts[0, -1]) == 2
    empty = Histogram.of(torch.empty(2, 0), (2,))
    assert empty.counts.sum() == 0
    assert empty.peak.tolist() == [0.0, 0.0]


def test_large_inputs_are_sampled_but_their_peak_is_exact():
    x = torch.randn(4, SAMPLE, generator=torch.Generator().manual_seed(0))
    x[2, 12345] = 1e6
    histogram = Histogram.of(x, (4,))
    assert float(histogram.peak[2]) == 1e6
    assert int(histogram.counts.sum()) <= SAMPLE
    again = Histogram.of(x, (4,))
    assert torch.equal(histogram.counts, again.counts)
    shares = histogram.counts.sum(1) / histogram.counts.sum()
    assert torch.allclose(shares, torch.full((4,), 0.25, dtype=torch.float64), atol=1e-3)
