import json

import pytest

import preferences
import spikeform

QUICK = ["--prefer", "steps=3", "--prefer", "learning_rate=1e-3", "--prefer", "window=16", "--prefer", "max_length=40"]
PAIRS = ["--pair", "count=30", "--pair", "prompt_tokens=6", "--pair", "response_tokens=10"]


def refused(result, message):
    assert result.code == 2, result.err
    assert result.out == ""
    (line,) = [line for line in result.err.splitlines() if line.startswith("error: ")]
    assert message in line


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders of a spiking model and of the dense one."""
    root = tmp_path_factory.mktemp("models")
    preferences.dense().save_pretrained(root / "dense")
    preferences.tokenizer().save_pretrained(root / "dense")
    spikeform.save(preferences.spiking(), root / "spiking", preferences.tokenizer())
    return root / "spiking", root / "dense"


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "text.json"
    file.write_text(json.dumps(preferences.texts()))
    return file


def test_builds_pairs_and_tunes(run, models, words, tmp_path):
    model, dense = models
    args = ["prefer", model, tmp_path / "out", "--pairs", tmp_path / "pairs", "--build", words, "--teacher", dense]
    result = run(*args, *PAIRS, *QUICK, "--valid", words, "--json")
    assert result.code == 0, result.err
    record = result.json["record"]
    assert record["options"]["method"] == "dpo"
    assert record["data"]["train"]["card"]["options"]["count"] == 30
    assert {"perplexity", "density", "preference"} <= record["metrics"]["after"].keys()
    assert "step 3, loss" in result.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "pairs"]
    assert [entry["stage"] for entry in spikeform.load(tmp_path / "out").spikeform_report.history] == ["prefer"]
    manifest = json.loads((tmp_path / "out" / "spikeform.json").read_text())
    assert manifest["command"][:3] == ["spikeform", "prefer", str(model)]

    # The pairs are there now: again, by the other method, with the dense model as reference.
    args = ["prefer", model, tmp_path / "kto", "--pairs", tmp_path / "pairs", "--method", "kto", "--reference", dense]
    result = run(*args, *QUICK)
    assert result.code == 0, result.err
    assert "preferred, per token: " in result.out
    refused(run(*args[:5], "--build", words, "--teacher", dense), "which is there already")


def test_dense_control_of_its_own_text(run, models, words, tmp_path):
    args = ["prefer", models[1], tmp_path / "out", "--pairs", tmp_path / "pairs", "--build", words, *PAIRS]
    plan = run(*args, "--dry-run", "--json").json
    assert (plan["build"]["count"], plan["prefer"]["method"]) == (30, "dpo")
    assert "count: 30" in run(*args, "--dry-run").out
    assert not list(tmp_path.iterdir())
    result = run(*args, "--pair", "chosen=text", *QUICK)
    assert result.code == 0, result.err
    assert (tmp_path / "out" / "training.json").is_file()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--prefer", "betta=3"], "unknown preference option betta"),
        (["--prefer", "beta"], "--prefer takes key=value"),
        (["--method", "ppo"], "method must be one of dpo, kto"),
        (["--pair", "count=3"], "--pair has options of --build"),
        (["--build", "nowhere.txt"], "there is no text file nowhere.txt"),
        (["--valid", "nowhere.txt"], "there is no text file nowhere.txt"),
        (["--build", __file__], "give --teacher MODEL, or --pair chosen=text"),
        ([], "there are no preference pairs at ./none.jsonl"),
    ],
)
def test_bad_options_are_one_clear_line(run, models, tmp_path, options, message):
    refused(run("prefer", models[0], tmp_path / "out", "--pairs", "./none.jsonl", *options), message)
    assert not (tmp_path / "out").exists()


def test_a_model_that_does_not_learn(run, spiking, words, tmp_path):
    args = ["prefer", spiking, tmp_path / "out", "--pairs", tmp_path / "pairs", "--build", words]
    refused(run(*args, "--pair", "chosen=text"), "a model converted with las cannot be trained")
    assert not (tmp_path / "pairs").exists()
