import pytest
import torch
from torch import Tensor, nn

from spikeform.errors import SpikeformError
from spikeform.neurons import MT, OAT
from spikeform.report import inspect, raster
from spikeform.report.raster import capture, literal
from spikeform.spikes import MultiThreshold, Radix2, SignedDigit
from spikeform.synapses import linear, matmul

IDS = torch.randint(0, 50, (2, 9), generator=torch.Generator().manual_seed(2))


class Toy(nn.Module):
    def __init__(self, coding=None) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.embed = nn.Embedding(50, 12)
        self.embed.weight = nn.Parameter(torch.randn(50, 12, generator=generator))
        self.neuron = OAT(coding or Radix2(6), (2.0, 8.0), site="up")
        self.query = MT(coding or Radix2(6), (20.0,), site="attention.query")
        self.weight = torch.randn(8, 12, generator=generator)

    def forward(self, ids: Tensor) -> Tensor:
        y = linear(self.neuron(self.embed(ids)), self.weight, site="up")
        heads = self.query(y.unflatten(-1, (2, 4)).transpose(1, 2))
        return matmul(heads, heads, transpose_b=True, site="attention.scores")


def painted(path) -> tuple[int, int]:
    """Pixels in the two spike colours."""
    from matplotlib.image import imread

    image = (torch.from_numpy(imread(path))[..., :3] * 255).round().int()
    colours = torch.tensor([[0x1F, 0x5F, 0xA8], [0xC8, 0x45, 0x2C]])
    return tuple(int((image == colour).all(-1).sum()) for colour in colours)


@pytest.mark.parametrize("coding", [Radix2(6), SignedDigit(6), MultiThreshold(6, 4)], ids=repr)
def test_drawn_spikes_are_the_counted_ones(tmp_path, coding) -> None:
    model = Toy(coding)
    drawn = raster(model, IDS, path=tmp_path / "r.png", elements=5, tokens=4)
    with torch.no_grad():
        train = model.neuron(model.embed(IDS))
    assert drawn.spikes == int(train.count()[0, :4, :5].sum()) == drawn.positive + drawn.negative
    assert drawn.negative > 0
    assert (drawn.site, drawn.tokens, drawn.elements, drawn.channels) == ("up", 4, 5, 12)
    assert drawn.window == coding.window
    assert all(pixels > 100 for pixels in painted(drawn.path))


def test_other_sites_and_heads_side_by_side(tmp_path) -> None:
    model = Toy()
    drawn = raster(model, IDS, site="attention.query", path=tmp_path / "q.png", labels=list("a$b c d e f\n"))
    _, train = capture(model, IDS[:1], "attention.query")
    assert (drawn.tokens, drawn.channels) == (9, 8)
    assert drawn.spikes == int(train.count().sum())
    spikes = literal(train)
    assert torch.equal(spikes[:, 3, 4:], train.unroll()[:, 0, 1, 3])


def test_bad_input(tmp_path) -> None:
    model = Toy()
    with pytest.raises(SpikeformError, match=r"no site 'nope'; spikes pass 3 sites: up, "):
        raster(model, IDS, site="nope", path=tmp_path / "r.png")
    with pytest.raises(SpikeformError, match="convert it first"):
        raster(nn.Embedding(50, 2), IDS, path=tmp_path / "r.png")
    with pytest.raises(SpikeformError, match="no folder"):
        raster(model, IDS, path=tmp_path / "missing" / "r.png")
    with pytest.raises(SpikeformError, match="ids must be"):
        raster(model, IDS[0], path=tmp_path / "r.png")
    with pytest.raises(SpikeformError, match="elements must be from 1 to 512"):
        raster(model, IDS, path=tmp_path / "r.png", elements=0)
    assert not list(tmp_path.iterdir())


def test_inspect_rows() -> None:
    rows = inspect(Toy(Radix2(7)))
    assert [row["site"] for row in rows] == ["up", "attention.query"]
    assert rows[0] == {
        "site": "up", "layer": "Toy", "neuron": "OAT", "steps": 7, "coding": "Radix2", "window": 7,
        "thresholds": [2.0, 8.0], "per_channel": False, "function": "identity",
    }  # fmt: skip
    with pytest.raises(SpikeformError, match="convert it first"):
        inspect(nn.Linear(2, 2))
