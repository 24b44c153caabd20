"""What the scripts of GPT-2's sizes and of NeuTransformer's measurements promise."""

import importlib
import json
import lzma
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

import spikeform
from spikeform.training import TrainOptions
from spikeform.training.neurons import trainable

LAYERS, HEADS, WIDTH = 2, 2, 32


@pytest.fixture
def script(monkeypatch):
    """Imports a script by name."""
    monkeypatch.setattr(sys, "path", [str(Path(__file__).resolve().parents[2] / "benchmarks"), *sys.path])
    return importlib.import_module


@pytest.fixture
def given(tokenizer, tmp_path):
    """Arguments that name a tiny model, its texts and a file to fill."""
    torch.manual_seed(0)
    sizes = {"n_embd": WIDTH, "n_layer": LAYERS, "n_head": HEADS, "n_positions": 512, "initializer_range": 0.2}
    tokens = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    model = GPT2LMHeadModel(GPT2Config(vocab_size=257, **sizes, **tokens))
    model.save_pretrained(tmp_path / "gpt2")
    tokenizer.save_pretrained(tmp_path / "gpt2")
    (tmp_path / "books").mkdir()
    (tmp_path / "books" / "valid.txt.xz").write_bytes(lzma.compress(b"It was a bright cold day. " * 60))
    np.save(tmp_path / "train-257.npy", np.random.default_rng(0).integers(1, 257, 4096).astype(np.uint16))
    found = ["--trained", str(tmp_path), "--data", str(tmp_path), "--cache", str(tmp_path), "--device", "cpu"]
    found += ["--out", str(tmp_path / "neutransformer-quality.json"), "--save", str(tmp_path / "saved")]
    return [
        *found,
        *["--steps", "2", "--long-steps", "2", "--batch-size", "2", "--calibration", "1", "--tokens", "1024"],
    ]


@pytest.mark.parametrize(("name", "millions"), [("gpt2-1m", 1), ("gpt2", 3), ("gpt2-8m", 8)])
def test_the_sizes_are_one_family(script, name, millions):
    reference = script("reference_models")
    assert name in reference.NAMES
    model = reference.build(name, 0, 0, 1)
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(millions * 1e6, rel=0.06)
    config = model.config
    assert config.n_embd % 64 == 0
    assert config.n_embd // config.n_head == 32
    assert (reference.VOCABULARY[name], reference.CONTEXT[name]) == (config.vocab_size, config.n_positions)
    assert model.lm_head.weight is model.transformer.wte.weight


def test_every_point_can_be_run_and_is_in_a_table(script):
    run, tables = script("neutransformer_run"), script("neutransformer_tables")
    points = run.points()
    for point in points.values():
        if point.config is not None:
            spikeform.NeuTransformer(**point.config)
        if point.training is not None:
            TrainOptions(**{**run.TUNED, **point.training, "steps": 10})
    trained = {name for name, point in points.items() if point.training is not None}
    assert trained == {*tables.MODELS, *tables.ABLATIONS, *tables.REACH}
    assert {name for _, *pair in tables.QUESTIONS for name in pair} <= set(tables.ABLATIONS)
    assert set(tables.FEED_FORWARD) <= set(points) - trained
    assert {points[name].config.get("steps", 4) for name in ("t1", "t2", "base", "t8")} == {1, 2, 4, 8}
    assert {points[name].config.get("ffn_steps", 16) for name in ("ffn8", "base", "ffn32")} == {8, 16, 32}
    assert all(points[name].length == 0 for name in tables.ABLATIONS)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_what_is_frozen_is_there(script, name):
    run = script("neutransformer_run")
    folder = spikeform.pretrained.path(name)
    model = spikeform.convert(
        script("method_runs").AutoModelForCausalLM.from_pretrained(folder),
        spikeform.NeuTransformer(),
        torch.arange(2, 34)[None],
    )

    def frozen(patterns):
        with trainable(model, TrainOptions(steps=1, freeze=patterns)):
            names = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
        return {name for name in names if not name.endswith(".neuron.threshold")}

    embeddings = {"gpt2": ("wte", "wpe"), "llama": ("embed_tokens",)}[name]
    assert {part.split(".")[-2] for part in frozen(run.FROZEN[name])} == set(embeddings)
    if name == "gpt2":
        learn = {part for part, _ in model.named_parameters()} - frozen(run.ATTENTION)
        assert all("attn" in part or "ln_1" in part or part.endswith("threshold") for part in learn)


def test_a_run_fills_its_file_and_the_tables(script, given, tmp_path, monkeypatch):
    run, tables = script("neutransformer_run"), script("neutransformer_tables")
    run.main(run.parse([*given, "--only", "gpt2-dense", "gpt2-converted", "base"]))
    run.main(run.parse([*given, "--only", "gpt2-converted", "gpt2"]))
    data = json.loads((tmp_path / "neutransformer-quality.json").read_text())
    rows = {row["point"]: row for row in data["rows"]}
    assert [row["point"] for row in data["rows"]] == ["gpt2-dense", "gpt2-converted", "base", "gpt2"]  # none twice
    same = rows["gpt2-dense"]["closeness"]
    assert all(same[name] == pytest.approx(1, abs=1e-5) for name in ("hidden", "centred", "logits"))
    assert same["unrelated"] < 0.999
    assert rows["gpt2-converted"]["feed_forward"]["perplexity_ratio"] == pytest.approx(1, abs=0.05)
    row = rows["base"]
    assert row["closeness"]["hidden"] == pytest.approx(row["text"]["cosine"]["final"], abs=1e-6)
    assert 0 <= row["closeness"]["accuracy"] <= 1
    layers = row["energy"]["attention"]["layers"]
    assert len(layers) == LAYERS
    assert all(0 <= rate <= 1 for layer in layers.values() for rate in layer["rates"].values())
    assert "feed_forward" not in row
    assert row["curve"][-1]["step"] == 2
    assert spikeform.load(tmp_path / "saved" / "gpt2").config.model_type == "neutransformer_gpt2"
    with pytest.raises(SystemExit, match="another protocol"):
        run.main(run.parse([*given, "--tokens", "512"]))
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    text = tables.results(*tables.load())
    said = "| shorter: T = 4, feed-forward T = 16 | 2 × 2 |"
    assert f"{said} 0 | {row['text']['perplexity']:.2f} |" in text
    assert f"| gpt2, {said[2:]} {row['text']['perplexity']:.2f} |" in tables.readme(tables.load()[1])
    assert "64.71 to 85.28% less" in text
    for table in (part.splitlines() for part in text.split("\n\n") if part.startswith("| ")):
        assert len({line.count("|") for line in table}) == 1  # as many cells in each line


def test_a_point_that_fails_leaves_the_others(script, given, tmp_path, capsys):
    run = script("neutransformer_run")
    with pytest.raises(SystemExit, match=r"failed, see above: gpt2-1m-dense$"):
        run.main(run.parse([*given, "--only", "gpt2-dense", "gpt2-1m-dense", "gpt2-converted"]))
    rows = json.loads((tmp_path / "neutransformer-quality.json").read_text())["rows"]
    assert [row["point"] for row in rows] == ["gpt2-dense", "gpt2-converted"]
    assert "no gpt2-1m in" in capsys.readouterr().err
    run.main(run.parse([*given, "--only", "base", "--minutes", "0"]))
    assert "time is up: base" in capsys.readouterr().out


def test_a_model_that_is_not_there_is_named(script, tmp_path):
    run = script("neutransformer_run")
    with pytest.raises(FileNotFoundError, match=r"no gpt2-8m in .*train_reference\.py --model gpt2-8m"):
        run.folder_of("gpt2-8m", tmp_path)
    assert run.folder_of("gpt2", None) == spikeform.pretrained.path("gpt2")
