"""Rows, rasters and sentences of models of signed-integer neurons."""

import pytest
import torch
from transformers import Mamba2Config, Mamba2ForCausalLM

import spikeform
from spikeform.cli.output import Output
from spikeform.cli.views import show_energy
from spikeform.report import raster

IDS = torch.randint(1, 60, (2, 12), generator=torch.Generator().manual_seed(4))


def spiking(**options):
    torch.manual_seed(1)
    sizes = {"vocab_size": 60, "hidden_size": 32, "state_size": 8, "num_hidden_layers": 2, "chunk_size": 8}
    heads = {"num_heads": 4, "head_dim": 16, "n_groups": 1, "tie_word_embeddings": True}
    ids = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    return spikeform.convert(
        Mamba2ForCausalLM(Mamba2Config(**sizes, **heads, **ids)).eval(), spikeform.SpikingMamba(**options), IDS
    )


@pytest.mark.parametrize(
    ("options", "spikes", "steps"),
    [({}, "signed", 4), ({"steps": 8}, "unsigned", 8), ({"steps": 1}, "binary", 1)],
)
def test_rows_of_one_threshold(options, spikes, steps) -> None:
    model = spiking(spikes=spikes, **options)
    rows = [row for row in spikeform.inspect(model) if row["neuron"]]
    assert len(rows) == 4
    for row in rows:
        neuron = model.get_submodule(row["site"]).neuron
        assert (row["neuron"], row["spikes"], row["steps"], row["window"]) == ("SignedInteger", spikes, steps, steps)
        assert row["thresholds"] == neuron.threshold.tolist()
        assert (row["per_channel"], row["folded"]) == (False, False)


def test_rows_of_thresholds_of_channels_and_of_the_convolution() -> None:
    model = spiking(per_channel=True, conv=True)
    rows = {row["site"]: row for row in spikeform.inspect(model) if row["neuron"]}
    assert len(rows) == 6
    one = rows["backbone.layers.0.mixer.in_proj"]
    threshold = model.backbone.layers[0].mixer.in_proj.neuron.threshold.detach()
    assert one["thresholds"] == [float(threshold.min()), float(threshold.max())]
    assert (one["per_channel"], one["folded"], one["layer"]) == (True, True, "ConvolvedProjection")
    sent = rows["backbone.layers.0.mixer.in_proj.conv"]
    assert len(sent["thresholds"]) == 1
    assert not sent["per_channel"]


def test_int8_weights_are_told() -> None:
    row = next(row for row in spikeform.inspect(spiking(weight_bits=8)) if row["neuron"])
    assert (row["layer"], row["weight_bits"], row["weight_form"]) == ("CodedLinear", 8, "affine")


def test_a_raster_fires_at_once(tmp_path) -> None:
    model = spiking()
    site = "backbone.layers.0.mixer.in_proj"
    drawn = raster(model, IDS[:1], site=site, path=tmp_path / "r.png", elements=8, tokens=5)
    layer = model.get_submodule(site)
    seen = []
    layer.register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
    with torch.no_grad():
        model(IDS[:1], use_cache=False)
    train = layer.neuron(seen[0])
    shown = train.codes[0, :5, :8]
    assert drawn.spikes == int(shown.abs().sum()) > 0
    assert drawn.negative == int(shown.clamp(max=0).abs().sum()) > 0
    assert drawn.window == 4
    steps = train.unroll()[:, 0, :5, :8].abs()
    assert bool((steps[1:] <= steps[:-1]).all())  # thermometer: who fires in a step fired in all before


def test_the_three_accountings_are_printed(capsys) -> None:
    report = spikeform.energy(spiking(), IDS, cost_models=["45nm-fp32"])
    with Output(False) as output:
        show_energy(output, report)
    shown = capsys.readouterr().out
    for name, found in report.accountings.items():
        line = next(line for line in shown.splitlines() if line.startswith(f"{name} "))
        assert f"{found['estimates']['45nm-fp32']['times_less']:.2f} x less" in line
        assert f"{found['other_macs']:,}" in line
    assert "4.6 and 0.9 pJ" in shown
    assert "ESTIMATED" in shown
