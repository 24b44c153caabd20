import json

import pytest
import torch
from safetensors.torch import load, load_file, save_file

import spikeform


def test_converts_calibrates_and_records(run, dense, text, tmp_path):
    out = tmp_path / "out"
    args = ["convert", dense, out, "--method", "las", "--steps", "10", "--set", "coding=signed_digit"]
    result = run(*args, "--calibration", text, "--calibration-tokens", "300", "--json")
    assert result.code == 0, result.err
    assert result.json["config"]["steps"] == 10
    assert result.json["config"]["coding"] == "signed_digit"
    calibration = result.json["report"]["calibration"]
    assert calibration == {"source": "texts", "files": ["text.txt"], "tokens": 300, "of": 900}
    manifest = json.loads((out / "spikeform.json").read_text())
    assert manifest["command"][:4] == ["spikeform", "convert", str(dense), str(out)]
    assert manifest["report"]["calibration"] == calibration
    assert spikeform.load(out).config.quantization_config.steps == 10
    assert (out / "tokenizer.json").is_file()


def test_plain_output_says_what_happened(run, dense, tmp_path):
    result = run("convert", dense, tmp_path / "out", "--steps", "4", "--calibration-tokens", "64")
    assert "modules spike" in result.out
    assert "sampled from the dense model" in result.out
    assert "calibrating blocks: 2 of 2" in result.err


def test_is_the_same_as_the_python_call(run, dense, tmp_path):
    from transformers import AutoModelForCausalLM

    run("convert", dense, tmp_path / "out", "--steps", "8")
    ours = spikeform.convert(AutoModelForCausalLM.from_pretrained(dense), spikeform.LAS(steps=8))
    ids = torch.arange(40).view(1, -1)
    with torch.no_grad():
        assert torch.equal(spikeform.load(tmp_path / "out")(ids).logits, ours(ids).logits)


def test_dry_run_prints_the_config_and_writes_nothing(run, dense, tmp_path):
    recipe = tmp_path / "las.yaml"
    recipe.write_text("method: las\nsteps: 7\nrounding: floor\nskip: ['*.layers.0.*']\n")
    args = ["convert", dense, tmp_path / "out", "--config", recipe, "--set", "rounding=strict", "--dry-run"]
    result = run(*args, "--json")
    assert result.json["config"]["steps"] == 7
    assert result.json["config"]["rounding"] == "strict"
    assert result.json["config"]["skip"] == ["*.layers.0.*"]
    assert "steps: 7" in run(*args).out
    assert not (tmp_path / "out").exists()


def test_resume_keeps_blocks(run, dense, tmp_path):
    args = ["--steps", "6", "--calibration-tokens", "64", "--resume", tmp_path / "blocks"]
    assert run("convert", dense, tmp_path / "a", *args).code == 0
    assert len(list((tmp_path / "blocks").glob("block-*.safetensors"))) == 2
    assert run("convert", dense, tmp_path / "b", *args).code == 0
    a, b = (load_file(tmp_path / name / "model.safetensors") for name in "ab")
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
    other = run("convert", dense, tmp_path / "c", *args, "--seed", "1")
    assert other.code == 2
    assert "another run" in other.err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--steps", "0"], "steps must be"),
        (["--steps", "17"], "steps must be"),
        (["--steps", "1.5"], "steps must be"),
        (["--steps", "true"], "steps must be"),
        (["--set", "stepps=3"], "unknown LAS option stepps; known:"),
        (["--set", "coding=morse"], "coding must be one of"),
        (["--set", "coding"], "--set takes key=value"),
        (["--set", "coding=[1"], "is not a YAML value"),
        (["--method", "magic"], "unknown method 'magic'; known: las"),
        (["--set", "version=2"], "newer than 1"),
        (["--set", "skip=['*']"], "nothing in LlamaForCausalLM could be converted"),
        (["--calibration", "nowhere.txt"], "no calibration file nowhere.txt"),
        (["--calibration-tokens", "0"], "--calibration-tokens must be at least 1"),
        (["--config", "nowhere.yaml"], "no recipe nowhere.yaml"),
    ],
)
def test_bad_options_are_one_clear_line(run, dense, tmp_path, options, message):
    result = run("convert", dense, tmp_path / "out", *options)
    refused(result, message)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[1, 2]", "must be a mapping"),
        ("steps: [", "is not YAML"),
        ("method: las\nsteps: 16\nthreshhold: quantile", "unknown LAS option threshhold"),
        ("method: fas", "is a recipe for fas, not for las"),
    ],
)
def test_bad_recipes(run, dense, tmp_path, content, message):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(content)
    refused(run("convert", dense, tmp_path / "out", "--config", recipe, "--method", "las"), message)


def test_calibration_without_text(run, dense, tmp_path):
    empty = tmp_path / "empty.txt"
    empty.write_text(" \n\n")
    refused(run("convert", dense, tmp_path / "out", "--calibration", empty), "holds no text")


def test_calibration_longer_than_the_context_is_split(run, dense, text, tmp_path):
    result = run("convert", dense, tmp_path / "out", "--steps", "4", "--calibration", text, "--json")
    assert result.json["report"]["calibration"]["tokens"] == 900  # the context is 512


@pytest.mark.parametrize("name", ["nowhere/at/all", "./nowhere", "nobody/nothing"])
def test_no_model(run, tmp_path, name):
    refused(run("convert", name, tmp_path / "out"), "no model")


def test_a_folder_that_is_no_model(run, tmp_path):
    (tmp_path / "notes").mkdir()
    refused(run("convert", tmp_path / "notes", tmp_path / "out"), "the folder has no config.json")


def test_a_converted_model(run, spiking, tmp_path):
    refused(run("convert", spiking, tmp_path / "out"), "is a converted model already")


def test_damaged_dense_models(run, tiny_llama, tmp_path):
    folder = tmp_path / "dense"
    tiny_llama().save_pretrained(folder)
    file = folder / "model.safetensors"
    whole = file.read_bytes()

    file.write_bytes(whole[: len(whole) // 2])
    refused(run("convert", folder, tmp_path / "out"), f"cannot load {folder}")
    file.unlink()
    refused(run("convert", folder, tmp_path / "out"), f"cannot load {folder}")

    tensors = load(whole)
    less = {k: v for k, v in tensors.items() if k != "model.norm.weight"}
    save_file(less, file, metadata={"format": "pt"})
    refused(run("convert", folder, tmp_path / "out"), "lacks the tensor model.norm.weight")
    save_file(tensors | {"model.norm.weight": torch.full((64,), float("nan"))}, file, metadata={"format": "pt"})
    refused(run("convert", folder, tmp_path / "out"), "model.norm.weight is not finite")
    save_file(tensors | {"model.norm.weight": torch.ones(63)}, file, metadata={"format": "pt"})
    refused(run("convert", folder, tmp_path / "out"), f"cannot load {folder}")


def test_foreign_output_folder(run, dense, tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    refused(run("convert", dense, tmp_path), "is not ours to replace")
    refused(run("convert", dense, tmp_path / "thesis.tex"), "it is a file")
    refused(run("convert", dense, dense), "was loaded from there")
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_text_without_a_tokenizer(run, tiny_llama, text, tmp_path):
    tiny_llama().save_pretrained(tmp_path / "dense")
    args = ["convert", tmp_path / "dense", tmp_path / "out", "--steps", "4"]
    refused(run(*args, "--calibration", text), "needs a tokenizer")
    assert run(*args, "--calibration-tokens", "64").code == 0  # sampled ids need none


def test_a_classifier_is_converted(run, tmp_path):
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=100, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96
    )
    BertForSequenceClassification(config).save_pretrained(tmp_path / "dense")
    result = run("convert", tmp_path / "dense", tmp_path / "out", "--calibration-tokens", "128", "--json")
    assert result.code == 0, result.err
    assert result.json["report"]["calibration"]["source"] == "random tokens"
    assert type(spikeform.load(tmp_path / "out")).__name__ == "BertForSequenceClassification"
    refused(run("generate", tmp_path / "out", "--prompt", "a"), "no tokenizer")


def refused(result, message):
    assert result.code == 2
    assert message in result.err
    last = [line for line in result.err.splitlines() if not line.endswith("...")][-1]
    assert last.startswith("error: ")  # one line, and no traceback
    assert "Traceback" not in result.err
    assert result.out == ""
