"""Tables and rasters of LIF neurons: rows of what they are, and spikes in the steps in which they were sent."""

from functools import cache

import pytest
import torch

import families
import spikeform
from spikeform.report import inspect, raster
from spikeform.spikes.trace import Firing, observe

IDS = families.tokens(rows=2, length=7)
ATTENTION = {"gpt2": ("transformer.h.0.attn", "c_proj"), "llama": ("model.layers.0.self_attn", "o_proj")}


@cache
def spiking(family: str, spikes: str = "binary"):
    config = spikeform.NeuTransformer(steps=3, spikes=spikes, tau=1.5, reset="soft")
    return spikeform.convert(families.build(family), config, families.tokens(rows=4, length=20, seed=5))


def sent(model, site: str) -> torch.Tensor:
    """Codes of the first row, ``[T, L, channels]``, gathered head by head."""
    found = []
    with (
        torch.no_grad(),
        observe(lambda e: found.append(e.train.codes) if isinstance(e, Firing) and e.site == site else None),
    ):
        model(IDS[:1])
    return torch.cat([found[0][:, 0, head] for head in range(found[0].shape[2])], -1)


@pytest.mark.parametrize("spikes", ["binary", "signed"])
@pytest.mark.parametrize("family", ATTENTION)
@pytest.mark.parametrize("name", ["query", "value", "output"])
def test_a_raster_shows_every_spike_in_its_step(tmp_path, family, spikes, name) -> None:
    model, (attention, _) = spiking(family, spikes), ATTENTION[family]
    site = f"{attention}.{name}"
    codes = sent(model, site)
    drawn = raster(model, IDS, site=site, path=tmp_path / "r.png", elements=20, tokens=7)
    assert (drawn.window, drawn.tokens, drawn.elements, drawn.channels) == (3, 7, 20, codes.shape[-1])
    assert drawn.spikes == int(codes[..., :20].abs().sum()) > 0
    assert drawn.negative == int((codes[..., :20] < 0).sum())
    assert (drawn.negative > 0) == (spikes == "signed")
    first = raster(model, IDS, site=site, path=tmp_path / "r.png", elements=20, tokens=2)
    assert first.spikes == int(codes[:, :2, :20].abs().sum())  # a causal model


@pytest.mark.parametrize("family", ATTENTION)
def test_the_projection_behind_attention_shows_what_was_counted(tmp_path, family) -> None:
    model, (attention, projection) = spiking(family, "signed"), ATTENTION[family]
    codes = sent(model, f"{attention}.output")
    drawn = raster(model, IDS, path=tmp_path / "r.png", elements=64, tokens=7)  # the first linear layer with spikes
    assert drawn.site == f"{attention}.{projection}"
    assert drawn.window == 3
    assert (drawn.spikes, drawn.negative) == (int(codes.abs().sum()), int((codes < 0).sum()))
    queries = raster(model, IDS, site=attention, path=tmp_path / "r.png", elements=64, tokens=7)
    assert queries.spikes == int(sent(model, f"{attention}.query").abs().sum())


def test_inspect_tells_of_leaky_neurons() -> None:
    model, (attention, projection) = spiking("llama", "signed"), ATTENTION["llama"]
    rows = {row["site"]: row for row in inspect(model)}
    row = rows[f"{attention}.key"]
    assert (row["neuron"], row["layer"], row["steps"], row["window"]) == ("LIF", "SpikingSelfAttention", 3, 3)
    assert (row["tau"], row["reset"], row["signed"], row["thresholds"]) == (1.5, "soft", True, [1.0])
    gain = model.get_submodule(attention).spiking.key.gain
    assert row["gain"] == [float(gain.detach().min()), float(gain.detach().max())]
    assert row["gain"][0] < row["gain"][1]
    assert rows[f"{attention}.output"]["thresholds"] == [0.5]
    assert rows[f"{attention}.{projection}"]["neuron"] == "SignedInteger"
    assert not rows[f"{attention}.query"]["per_channel"]
