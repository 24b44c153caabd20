import json

import pytest

import spikeform


@pytest.fixture
def small(monkeypatch):
    """The demo, measuring less."""
    from spikeform.cli import demo

    for name, value in {"WINDOW": 32, "MEASURED": 64, "COUNTED": 32, "WRITTEN": 6}.items():
        monkeypatch.setattr(demo, name, value)


def test_demo_shows_and_saves_everything(run, small, dense, text, tmp_path):
    args = ["demo", "--model", dense, "--steps", "10", "--out", tmp_path / "demo", "--text", text]
    result = run(*args)
    assert result.code == 0, result.err
    for word in ("tokens are the same", "ratio (1 is lossless)", "per token", "ESTIMATED", "quantised"):
        assert word in result.out
    report = json.loads((tmp_path / "demo" / "report.json").read_text())
    assert report["config"]["steps"] == 10
    assert report["fidelity"]["windows"] == 2
    assert report["raster"]["site"] == "model.layers.1.mlp.down_proj"
    assert (tmp_path / "demo" / "raster.png").read_bytes()[:4] == b"\x89PNG"
    assert spikeform.verify(tmp_path / "demo" / "checkpoint").manifest
    for path in report["files"].values():
        assert path in result.out
    assert run(*args[:-2], "--json").json["data"]["sampled_from"] == "dense"  # a second one replaces the first


def test_demo_keeps_foreign_files(run, tmp_path):
    (tmp_path / "report.json").write_text("mine")
    result = run("demo", "--out", tmp_path)
    assert result.code == 2
    assert "its report.json is not the demo's" in result.err
    assert (tmp_path / "report.json").read_text() == "mine"
    assert "steps must be" in run("demo", "--steps", "17").err
    assert "no reference model is named" in run("demo", "--model", "pretrained:bard").err


@pytest.mark.slow
def test_demo_of_the_default_model(run, small, tmp_path):
    """The embedded model itself, measured on little: real weights, lossless to four digits at 16 steps."""
    document = run("demo", "--out", tmp_path / "demo", "--json").json
    assert document["model"] == "llama"
    assert document["fidelity"]["perplexity_ratio"] == pytest.approx(1, abs=1e-3)
    assert document["text"]["same"] == document["text"]["tokens"] == 6
    assert document["seconds"] < 90
