import json

import pytest

import spikeform

QUICK = ["--train", "window=32", "--train", "batch_size=2", "--train", "steps=4", "--train", "learning_rate=1e-4"]


def refused(result, message):
    assert result.code == 2, result.err
    assert result.out == ""
    (line,) = [line for line in result.err.splitlines() if line.startswith("error: ")]
    assert message in line


def test_dense_to_quantised(run, dense, text, tmp_path):
    out = tmp_path / "out"
    result = run("train", dense, out, "--text", text, "--valid", text, *QUICK, "--set", "levels=4", "--json")
    assert result.code == 0, result.err
    assert result.json["config"]["levels"] == 4
    assert result.json["config"]["steps"] == 0
    record = result.json["record"]
    assert record["neurons"] == 2
    assert record["data"]["train"]["files"] == record["data"]["held_out"]["files"] == ["text.txt"]
    assert record["metrics"]["perplexity"] > 1
    assert "step 4, loss" in result.err
    assert not (tmp_path / "out.work").exists()
    model = spikeform.load(out)
    assert [entry["stage"] for entry in model.spikeform_report.history] == ["train"]
    manifest = json.loads((out / "spikeform.json").read_text())
    assert manifest["command"][:3] == ["spikeform", "train", str(dense)]
    assert manifest["report"]["history"] == model.spikeform_report.history
    assert (out / "tokenizer.json").is_file()


def test_goes_on_from_a_checkpoint(run, dense, text, tmp_path):
    assert run("train", dense, tmp_path / "a", "--text", text, *QUICK).code == 0
    result = run("train", tmp_path / "a", tmp_path / "b", "--text", text, *QUICK)
    assert result.code == 0, result.err
    assert "4 steps in" in result.out
    history = spikeform.load(tmp_path / "b").spikeform_report.history
    assert [entry["stage"] for entry in history] == ["train", "train"]


def test_dense_control(run, dense, text, tmp_path):
    from transformers import AutoModelForCausalLM

    out = tmp_path / "out"
    result = run("train", dense, out, "--method", "dense", "--text", text, "--valid", text, *QUICK)
    assert result.code == 0, result.err
    assert "perplexity: " in result.out
    assert AutoModelForCausalLM.from_pretrained(out).config.architectures == ["LlamaForCausalLM"]
    assert (out / "training.json").is_file()


def test_recipe(run, dense, text, tmp_path):
    recipe = tmp_path / "fas.yaml"
    recipe.write_text("method: fas\nsteps: 8\nlevels: 4\ntrain:\n  steps: 3\n  window: 16\ncalibrate: {}\n")
    args = ["train", dense, tmp_path / "out", "--text", text, "--recipe", recipe, "--train", "window=24"]
    plan = run(*args, "--dry-run", "--json").json
    assert (plan["config"]["levels"], plan["config"]["steps"]) == (4, 0)
    assert (plan["train"]["steps"], plan["train"]["window"], plan["train"]["task"]) == (3, 24, "causal")
    control = run(*args, "--method", "dense", "--dry-run", "--json").json
    assert control["config"] is None
    assert control["train"] == plan["train"]
    assert "window: 24" in run(*args, "--dry-run").out
    assert not (tmp_path / "out").exists()


@pytest.fixture
def mamba(tokenizer, tmp_path):
    """Folder of a tiny Mamba-2 with its tokenizer."""
    import families

    model = families.build("mamba2")
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(tmp_path / "mamba")
    tokenizer.save_pretrained(tmp_path / "mamba")
    return tmp_path / "mamba"


def test_distils_what_it_converts_then_goes_on(run, mamba, text, tmp_path):
    taught = [*QUICK, "--train", "distil=1", "--train", "hidden=1", "--train", "ce=0", "--train", 'freeze=["*embed*"]']
    args = ["--text", text, *taught]
    result = run("train", mamba, tmp_path / "a", "--method", "spiking_mamba", "--set", "steps=2", *args, "--json")
    assert result.code == 0, result.err
    assert (result.json["method"], result.json["config"]["steps"]) == ("spiking_mamba", 2)
    assert result.json["record"]["neurons"] == 4
    assert result.json["record"]["options"]["freeze"] == ["*embed*"]
    refused(run("train", tmp_path / "a", tmp_path / "b", *args), "distil needs the dense model: give --teacher MODEL")
    refused(run("train", tmp_path / "a", tmp_path / "b", *args, "--method", "fas"), "spiking_mamba, not with fas")
    result = run("train", tmp_path / "a", tmp_path / "b", "--teacher", mamba, *args)
    assert result.code == 0, result.err
    assert len(spikeform.load(tmp_path / "b").spikeform_report.history) == 2


def test_classifier_on_a_language_model(run, dense, tmp_path):
    file = tmp_path / "train.tsv"
    file.write_text("sentence\tlabel\n" + "good\t1\nbad\t0\n" * 20)
    args = ["--task", "classify", "--text", file, "--valid", file, *QUICK]
    result = run("train", dense, tmp_path / "out", *args)
    assert result.code == 0, result.err
    assert "accuracy: " in result.out
    model = spikeform.load(tmp_path / "out")
    assert (type(model).__name__, model.config.num_labels) == ("LlamaForSequenceClassification", 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--train", "stepps=3"], "unknown training option stepps"),
        (["--train", "steps"], "--train takes key=value"),
        (["--train", "steps=0"], "steps must be a whole number"),
        (["--train", "steps=2", "--train", "epochs=1"], "steps or epochs, not both"),
        (["--task", "sing"], "task must be one of"),
        (["--task", "masked"], "which has no head for the task masked"),
        (["--method", "las"], "a model converted with las cannot be trained"),
        (["--method", "sing"], "unknown method 'sing'; known: las, fas,"),
        (["--method", "spiking_mamba", "--set", "weight_bits=8"], "int8 weights cannot be trained: convert the dense"),
        (["--train", "freeze=embed"], "freeze must be a list of parameter name patterns"),
        (["--method", "dense", "--set", "levels=4"], "with --method dense use --train"),
        (["--set", "stepps=4"], "unknown FAS option stepps"),
        (["--text", "nowhere.txt"], "there is no text file nowhere.txt"),
        (["--valid", "nowhere.txt"], "there is no text file nowhere.txt"),
        (["--train", "window=1000"], "longer than the model's context of 512"),
        (["--config", "nowhere.yaml"], "no recipe nowhere.yaml"),
    ],
)
def test_bad_options_are_one_clear_line(run, dense, text, tmp_path, options, message):
    refused(run("train", dense, tmp_path / "out", "--text", text, *QUICK[:2], *options), message)
    assert not (tmp_path / "out").exists()


def test_a_model_of_another_method(run, spiking, text, tmp_path):
    args = ["train", spiking, tmp_path / "out", "--text", text]
    refused(run(*args, "--method", "dense"), "a converted model is trained with its own method, las, not with dense")
    refused(run(*args, *QUICK), "a model converted with las cannot be trained")


def test_foreign_folders(run, dense, text, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").touch()
    args = ["train", dense, tmp_path / "out", "--text", text]
    refused(run(*args), "it is not empty and holds no spikeform.json")
    refused(run(*args, "--method", "dense"), "it is not empty")
    refused(run("train", dense, tmp_path / "new", "--text", text, "--work", tmp_path / "out"), "not of a training run")


def test_stopped_and_resumed(run, dense, text, tmp_path, monkeypatch):
    import os
    import signal

    from spikeform.cli import train

    line = train._line
    monkeypatch.setattr(
        train, "_line", lambda point: (point["step"] == 2 and os.kill(os.getpid(), signal.SIGTERM)) or line(point)
    )
    args = ["train", dense, tmp_path / "out", "--text", text, *QUICK]
    stopped = run(*args)
    assert stopped.code == 128 + signal.SIGTERM
    assert "stopped at step 3" in stopped.err
    assert "--resume" in stopped.err
    assert not (tmp_path / "out").exists()
    monkeypatch.undo()
    refused(run(*args), "holds a stopped run (at step 3): resume it")
    refused(run(*args, "--resume", "--train", "seed=1"), "another run, of other options")
    assert run(*args, "--resume").code == 0
    assert spikeform.load(tmp_path / "out").spikeform_report.history[0]["steps"] == 4
