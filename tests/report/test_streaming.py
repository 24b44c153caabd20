"""Rasters and tables of streaming models: the steps of a token's streams, gathered."""

import pytest
import torch

import spikeform
from families import build, tokens
from spikeform.errors import SpikeformError
from spikeform.neurons import StreamingNeuron
from spikeform.report import inspect, raster
from spikeform.report.raster import capture, literal
from spikeform.spikes.trace import Firing, observe

STEPS, LENGTH = 4, 6
IDS = tokens(rows=2, length=LENGTH)
# OPT's feed-forward block sees [rows x tokens, channels]; a pooler sees one token.
SITES = {
    "llama": "model.layers.1.mlp.down_proj",
    "gpt2": "transformer.h.0.mlp.c_proj",
    "opt": "model.decoder.layers.1.fc2",
    "bert": "bert.pooler.activation",
}


def spiking(family: str, **options):
    options = {"steps": STEPS, "threshold": 2.0, "gated": "product"} | options
    return spikeform.convert(build(family), spikeform.FAS(**options))


def one_by_one(model, site: str) -> torch.Tensor:
    """Codes of the site for the first row, ``[T, L, C]``, gathered step by step."""
    found = []
    with (
        torch.no_grad(),
        observe(lambda e: found.append(e.train.codes) if isinstance(e, Firing) and e.site == site else 0),
    ):
        model(IDS[:1])
    codes = found[0].reshape(STEPS, -1, found[0].shape[-1])
    return codes


@pytest.mark.parametrize("family", SITES)
def test_a_raster_shows_the_steps_of_each_token(tmp_path, family) -> None:
    model, site = spiking(family), SITES[family]
    codes = one_by_one(model, site)
    assert torch.equal(literal(capture(model, IDS[:1], site)[1], STEPS), codes)
    drawn = raster(model, IDS, site=site, path=tmp_path / "r.png", elements=50)
    assert (drawn.window, drawn.tokens, drawn.elements) == (STEPS, codes.shape[1], 50)
    assert drawn.channels == codes.shape[-1]
    assert drawn.spikes == int(codes[..., :50].abs().sum()) > 0
    assert drawn.negative == int((codes[..., :50] < 0).sum())
    if family != "bert":
        first = raster(model, IDS, site=site, path=tmp_path / "r.png", elements=50, tokens=2)
        assert (first.tokens, first.spikes) == (2, int(codes[:, :2, :50].abs().sum()))  # a causal model


def test_where_spikes_only_gate_a_neuron_is_drawn(tmp_path) -> None:
    drawn = raster(spiking("llama", gated="activation"), IDS, path=tmp_path / "r.png")
    assert drawn.site == "model.layers.0.mlp.act_fn"
    assert drawn.window == STEPS


def test_what_cannot_be_drawn_is_an_error(tmp_path) -> None:
    with pytest.raises(SpikeformError, match="at steps=0 the model is the QCFS network"):
        raster(spiking("llama", steps=0), IDS, path=tmp_path / "r.png")
    with pytest.raises(SpikeformError, match="64 steps a token leave room for 25 tokens"):
        raster(spiking("llama", steps=64), tokens(length=40), path=tmp_path / "r.png", tokens=40)
    assert not list(tmp_path.iterdir())


def test_inspect_gives_ranges() -> None:
    model = spiking("llama", granularity="channel", levels=4)
    neurons = [module for module in model.modules() if isinstance(module, StreamingNeuron)]
    with torch.no_grad():
        neurons[0].scale.copy_(torch.linspace(0.5, 1.5, 112))
        neurons[0].initial[3] = 0.25
    row, other = (row for row in inspect(model) if row["neuron"])
    assert row["site"] == "model.layers.0.mlp.down_proj"
    assert (row["steps"], row["window"], row["levels"], row["signed"]) == (STEPS, STEPS, 4, True)
    assert (row["thresholds"], row["scale"], row["initial"]) == ([2.0], [0.5, 1.5], [0.25, 0.5])
    assert row["per_channel"]
    assert (other["scale"], other["initial"]) == ([1.0, 1.0], [0.5, 0.5])
    spikeform.set_steps(model, 0)
    assert {row["steps"] for row in inspect(model) if row["neuron"]} == {0}
