"""SpikeLLM on the command line: from a recipe to a checkpoint that the other verbs understand."""

import json
import shutil

import pytest


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """The quickest pipeline."""
    file = tmp_path_factory.mktemp("recipes") / "spikellm.yaml"
    file.write_text("method: spikellm\nversion: 1\npipeline: rtn\nsalient: 0.125\n")
    return file


@pytest.fixture(scope="module")
def made(run, dense, recipe, tmp_path_factory):
    """What ``convert`` printed, and the folder that it wrote."""
    folder = tmp_path_factory.mktemp("spikellm") / "out"
    args = ["convert", dense, folder, "--method", "spikellm", "--recipe", recipe, "--calibration-tokens", "128"]
    result = run(*args)
    assert result.code == 0, result.err
    return result, folder


def test_convert_says_what_the_weights_take(run, made, dense, recipe, tmp_path):
    result, folder = made
    assert "calibrating blocks: 2 of 2" in result.err
    args = ["--config", recipe, "--set", "weight_bits=2", "--calibration-tokens", "128", "--json"]
    fewer = run("convert", dense, tmp_path / "out", *args).json
    size = fewer["weights"]
    assert fewer["config"]["quant_method"] == "spikeform_spikellm"
    assert size["layers"] == 14
    four = run("inspect", folder, "--json").json["weights"]
    assert 2 / 16 < size["ratio"] < four["ratio"] < 0.4
    line = f"14 converted linear layers take {four['bytes']:,} bytes, {four['ratio']:.3f} of the"
    assert line in " ".join(result.out.split())
    facts = fewer["report"]["calibration"]
    assert (facts["source"], facts["tokens"]) == ("sampled from the dense model", 128)
    assert [block["steps"] for block in facts["blocks"]] == pytest.approx([1.125, 1.125], rel=0.02)
    assert "mean steps of an input channel 1.1" in result.out
    assert "{'steps'" not in result.out


def test_stored_bytes_are_the_files(made, run):
    folder = made[1]
    tensors = json.loads((folder / "spikeform.json").read_text())["tensors"]
    width = {"U8": 1, "I8": 1, "I16": 2, "F32": 4}
    held = 0
    for name, tensor in tensors.items():
        owner, _, key = name.rpartition(".")
        if owner.endswith("_proj") and key in ("weight", "scale", "zero", "tier", "bias"):
            size = width[tensor["dtype"]]
            for n in tensor["shape"]:
                size *= n
            held += size
    assert held == run("inspect", folder, "--json").json["weights"]["bytes"]


def test_inspect_shows_steps_and_weights(run, made):
    document = run("inspect", made[1], "--json").json
    linear = [row for row in document["neurons"] if row["layer"] == "CodedLinear"]
    assert len(linear) == 14
    assert all(0.1 <= row["salient"] <= 0.15 and row["weight_bits"] == 4 for row in linear)
    assert linear[0]["channels"] == {"1": 0.875, "2": 0.125}
    plain = run("inspect", made[1]).out
    assert "GIF neuron populations" in plain
    assert "T=1 87.5%, T=2 12.5%" in plain
    assert "integer weights of 14 linear layers" in plain
    assert "blocks on the calibration data" in plain
    assert plain.count("model.layers.0.mlp.down_proj") == 2  # its neuron, and its weights


def test_energy_shows_the_effort(run, made, dense):
    args = ["energy", made[1], "--reference", dense, "--tokens", "32"]
    found = run(*args, "--json").json
    assert found["protocol"]["dense_checked"]
    assert found["ace"]["additive_fraction"] == 1
    assert found["ace"]["per_mac"]["spiking"] == pytest.approx(16 * 1.125, rel=0.02)
    plain = " ".join(run(*args).out.split())
    assert "ACE of linear layers" in plain
    assert "uniform W4A4" in plain
    assert "Additions alone stand for 100.0% of the multiply-accumulates" in plain


def test_verify_and_generate(run, made, tmp_path):
    folder = shutil.copytree(made[1], tmp_path / "out")
    assert run("verify", folder).code == 0
    args = ["generate", folder, "--prompt", "abc", "--max-new-tokens", "4", "--json"]
    literal, default = (run(*args, *more).json["ids"] for more in (["--executor", "temporal"], []))
    assert literal == default
    file = folder / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert run("verify", folder).code == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--steps", "3"], "steps must be one of 1, 2, 4, 8"),
        (["--set", "bits=9"], "bits must be"),
        (["--set", "salient=2"], "salient must be a number from 0 to 1"),
        (["--method", "las"], "is a recipe for spikellm, not for las"),
    ],
)
def test_bad_options(run, dense, recipe, tmp_path, options, message):
    result = run("convert", dense, tmp_path / "out", "--recipe", recipe, *options)
    assert result.code == 2
    assert message in result.err.splitlines()[-1]
    assert result.out == ""
    assert not (tmp_path / "out").exists()
