"""Rasters and rows of GIF neurons and integer weights."""

import pytest
import torch
from torch import Tensor, nn

from spikeform.errors import SpikeformError
from spikeform.layers import CodedLinear
from spikeform.neurons import GIF
from spikeform.report import inspect, raster
from spikeform.report.weights import coded_size
from spikeform.synapses.integer import IntegerWeight

IDS = torch.randint(0, 50, (1, 6), generator=torch.Generator().manual_seed(2))
K, N = 12, 8


class Toy(nn.Module):
    def __init__(self, spikes: bool = True, signed: bool = True) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.embed = nn.Embedding(50, K)
        self.embed.weight = nn.Parameter(torch.randn(50, K, generator=generator))
        neuron = GIF(4, (K,), steps=4, signed=signed, site="up") if spikes else None
        if neuron is not None:
            neuron.set_times(torch.tensor([4, 2, 2] + [1] * (K - 3)))
        codes = torch.randint(-7, 9, (N, K), generator=generator, dtype=torch.int8)
        zero = torch.full((2, N), 7, dtype=torch.int16)
        tier = (torch.arange(K) < 3).to(torch.uint8)
        whole = IntegerWeight(codes, torch.ones(2, N), zero, tier, 4, (1, 2))
        layer = nn.Linear(K, N)
        layer.neuron = neuron
        self.up = CodedLinear.from_spiking(layer, whole, site="up")

    def forward(self, ids: Tensor) -> Tensor:
        return self.up(self.embed(ids))


@pytest.mark.parametrize("signed", [True, False])
def test_a_step_shows_all_its_spikes(tmp_path, signed) -> None:
    from matplotlib.image import imread

    model = Toy(signed=signed)
    drawn = raster(model, IDS, path=tmp_path / "r.png", elements=5, tokens=4)
    with torch.no_grad():
        train = model.up.neuron(model.embed(IDS))
    assert drawn.spikes == int(train.count()[0, :4, :5].sum()) == drawn.positive + drawn.negative
    assert drawn.spikes > 4 * 5 * drawn.window / 2  # several spikes in one step
    assert (drawn.window, drawn.channels) == (4, K)
    assert (drawn.negative > 0) is signed
    # The plot's marks are as dark as the step is full: more shades of blue than one.
    image = (torch.from_numpy(imread(drawn.path))[..., :3] * 255).round().int()
    blue = image[(image[..., 2] > image[..., 0] + 20) & (image[..., 1] > image[..., 0])]
    assert len(blue.unique(dim=0)) > 5


def test_spikes_of_weights_are_no_activity(tmp_path) -> None:
    for site in (None, "up"):
        with pytest.raises(SpikeformError, match="those of the weights"):
            raster(Toy(spikes=False), IDS, site=site, path=tmp_path / "r.png")


def test_rows_say_steps_and_weights() -> None:
    (row,) = inspect(Toy())
    assert (row["site"], row["layer"], row["neuron"], row["steps"], row["levels"]) == (
        "up",
        "CodedLinear",
        "GIF",
        4,
        15,
    )
    assert row["channels"] == pytest.approx({1: 9 / 12, 2: 2 / 12, 4: 1 / 12})
    assert row["salient"] == pytest.approx(3 / 12)
    assert (row["weight_bits"], row["weight_form"]) == (4, "affine")
    assert row["weight_steps"] == pytest.approx({1: 9 / 12, 2: 3 / 12})
    # 9 columns of 4 bits and 3 of 5 in whole bytes a row; scale, zero, tier, bias
    stored = N * (5 + 2) + 2 * N * 4 + 2 * N * 1 + K + N * 4
    assert (row["bytes"], row["bf16_bytes"]) == (stored, 2 * (N * K + N))
    (alone,) = inspect(Toy(spikes=False))
    assert (alone["neuron"], alone["steps"], alone["bytes"]) == ("weights", 2, stored)
    assert coded_size(Toy()) == {
        "layers": 1, "bytes": stored, "bf16_bytes": 2 * (N * K + N), "ratio": stored / (2 * (N * K + N)),
    }  # fmt: skip
    assert coded_size(nn.Linear(2, 2)) is None
