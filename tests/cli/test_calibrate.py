"""``spikeform calibrate``."""

import json
import os
import shutil
import signal

import pytest
import torch
from safetensors.torch import load_file

import families
import spikeform

QUICK = ["coarse_steps=4", "fine_steps=4", "evaluate_every=2", "batch_size=4", "window=16"]
QUICK = [part for setting in QUICK for part in ("--set", setting)]


@pytest.fixture(scope="session")
def _fas(run, dense, tmp_path_factory):
    folder = tmp_path_factory.mktemp("fas") / "model"
    result = run("convert", dense, folder, "--method", "fas", "--steps", "4", "--calibration-tokens", "256")
    assert result.code == 0, result.err
    return folder


@pytest.fixture
def fas(_fas, tmp_path):
    """Folder of a model converted with FAS."""
    return shutil.copytree(_fas, tmp_path / "fas")


def fitted(key):
    return key.endswith((".scale", ".initial"))


def test_calibrates_and_records(run, fas, text, tmp_path):
    out = tmp_path / "out"
    result = run("calibrate", fas, out, "--text", text, "--valid", text, *QUICK, "--steps", "3", "--json")
    assert result.code == 0, result.err
    before, after = (load_file(folder / "model.safetensors") for folder in (fas, out))
    assert all(torch.equal(before[key], after[key]) for key in before if not fitted(key))
    assert all(after[key].shape == (96,) for key in after if fitted(key))
    manifest = json.loads((out / "spikeform.json").read_text())
    assert manifest["command"][:2] == ["spikeform", "calibrate"]
    history = manifest["report"]["history"]
    assert history == result.json["records"]
    assert [entry["stage"] for entry in history] == ["calibrate_coarse", "calibrate_fine"]
    assert history[0]["data"]["train"]["text"]["files"] == ["text.txt"]
    assert history[1]["metrics"]["validation_after"]["perplexity"] > 1
    model = spikeform.load(out)
    assert model.config.quantization_config.steps == 3
    assert (out / "tokenizer.json").is_file()
    assert not (tmp_path / "out.work").exists()


def test_plain_output_says_what_happened(run, fas, text, tmp_path):
    recipe = tmp_path / "fas.yaml"
    recipe.write_text("method: fas\nsteps: 4\ncalibrate:\n  coarse_steps: 2\n  window: 16\n  batch_size: 4\n")
    args = ["calibrate", fas, tmp_path / "out", "--text", text, "--config", recipe, "--granularity", "layer"]
    result = run(*args)
    assert result.code == 0, result.err
    assert "coarse (by layer): 2 steps in" in result.out
    assert "held out: kl" in result.out
    assert "coarse 2 of 2, loss" in result.err
    plan = run(*args, "--dry-run", "--json")
    assert plan.json["calibrate"]["coarse_steps"] == 2
    assert plan.json["calibrate"]["granularity"] == "layer"


def test_stopped_and_resumed(run, fas, text, tmp_path, monkeypatch):
    args = ["--text", text, *QUICK]
    assert run("calibrate", fas, tmp_path / "whole", *args).code == 0
    from spikeform.cli import calibrate

    line = calibrate._line
    at = ("fine", 2)

    def stopping(point):
        if (point["stage"], point["step"]) == at:
            os.kill(os.getpid(), signal.SIGTERM)
        return line(point)

    monkeypatch.setattr(calibrate, "_line", stopping)
    out, work = tmp_path / "out", tmp_path / "out.work"
    stopped = run("calibrate", fas, out, *args)
    assert stopped.code == 128 + signal.SIGTERM
    assert f"stopped after step 2 of the fine stage; the same command with --resume {work} goes on" in stopped.err
    assert not out.exists()
    monkeypatch.undo()
    again = run("calibrate", fas, out, *args)
    assert again.code == 2
    assert "holds a stopped calibration" in again.err
    assert run("calibrate", fas, out, *args, "--resume", work).code == 0
    whole, resumed = (load_file(folder / "model.safetensors") for folder in (tmp_path / "whole", out))
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)


def test_a_classifier_is_calibrated_on_labelled_sentences(run, tokenizer, tmp_path):
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
    model = BertForSequenceClassification(BertConfig(vocab_size=257, num_labels=2, pad_token_id=0, **sizes)).eval()
    spikeform.convert(model, spikeform.FAS(steps=4), calibration=families.tokens(4, 16))
    spikeform.save(model, tmp_path / "fas", tokenizer)
    sentences = "".join(f"{'so ' * (i % 5)}good\t{i % 2}\n" for i in range(40))
    (tmp_path / "train.tsv").write_text(f"sentence\tlabel\n{sentences}")
    args = ["--text", tmp_path / "train.tsv", "--valid", tmp_path / "train.tsv", *QUICK[:-2], "--set", "window=32"]
    result = run("calibrate", tmp_path / "fas", tmp_path / "out", *args)
    assert result.code == 0, result.err
    assert "validation: accuracy" in result.out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--steps", "0"], "steps must be a whole number from 1 to 64"),
        (["--granularity", "neuron"], "granularity must be one of"),
        (["--set", "stepps=3"], "unknown calibration option stepps; known:"),
        (["--set", "kl"], "--set takes key=value"),
        (["--text", "nowhere.txt"], "there is no text file nowhere.txt"),
        (["--valid", "nowhere.txt"], "there is no text file nowhere.txt"),
        (["--config", "nowhere.yaml"], "no recipe nowhere.yaml"),
        (["--set", "window=512"], "fewer than one window"),
    ],
)
def test_bad_options_are_one_clear_line(run, fas, tmp_path, options, message):
    (tmp_path / "short.txt").write_text("too short")
    result = run("calibrate", fas, tmp_path / "out", "--text", tmp_path / "short.txt", *options)
    assert result.code == 2
    assert result.err.strip().splitlines()[-1].startswith("error: ")
    assert message in result.err
    assert not list(tmp_path.glob("out*"))


def test_other_models_are_refused(run, fas, dense, spiking, text, tmp_path):
    for model, message in ((dense, "it is dense"), (spiking, "is of las"), (tmp_path / "no", "no such folder")):
        result = run("calibrate", model, tmp_path / "out", "--text", text)
        assert result.code == 2
        assert message in result.err
    config = json.loads((fas / "config.json").read_text())
    config["quantization_config"]["steps"] = 0
    (fas / "config.json").write_text(json.dumps(config))
    result = run("calibrate", fas, tmp_path / "out", "--text", text)
    assert result.code == 2
    assert "give --steps" in result.err
    result = run("calibrate", fas, fas, "--text", text, "--steps", "4")
    assert result.code == 2
    assert "the model was loaded from there" in result.err
