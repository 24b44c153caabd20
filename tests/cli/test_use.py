"""The verbs that use a converted model."""

import json
import subprocess
import sys

import pytest
import torch

import spikeform


def error_of(result):
    assert result.code == 2
    assert result.out == ""
    assert "Traceback" not in result.err
    return result.err.splitlines()[-1]


def test_generate_goes_on_from_the_prompt(run, spiking, tokenizer):
    result = run("generate", spiking, "--prompt", "abc", "--max-new-tokens", "9", "--json")
    assert result.json["prompt_tokens"] == 3
    assert result.json["new_tokens"] <= 9
    ids = torch.tensor([result.json["ids"]])
    with torch.no_grad():
        logits = spikeform.load(spiking)(ids).logits
    assert logits[0, 2:-1].argmax(-1).tolist() == result.json["ids"][3:]  # greedy, and the cache is exact
    assert "abc" in run("generate", spiking, "--prompt", "abc", "--max-new-tokens", "4").out


def test_generate_samples_by_seed(run, spiking):
    args = ["generate", spiking, "--prompt", "abc", "--max-new-tokens", "12", "--temperature", "2", "--json"]
    one, again, other = (run(*args, "--seed", seed).json["ids"] for seed in (1, 1, 2))
    assert one == again != other


def test_generate_by_literal_spikes(run, spiking):
    args = ["generate", spiking, "--prompt", "abc", "--max-new-tokens", "5", "--json"]
    literal, default = (run(*args, *more).json for more in (["--executor", "temporal"], []))
    assert literal["ids"] == default["ids"]
    assert literal["executor"] == "temporal"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--executor", "magic"], "no executor named 'magic'"),
        (["--greedy", "--temperature", "1"], "--greedy takes no --temperature"),
        (["--temperature", "0"], "--temperature must be a number above 0"),
        (["--top-k", "0"], "--top-k must be at least 1"),
        (["--max-new-tokens", "0"], "--max-new-tokens must be at least 1"),
        (["--max-new-tokens", "600"], "exceed the model's context of 512: lower --max-new-tokens to 511"),
        (["--prompt", ""], "the prompt is empty"),
    ],
)
def test_generate_refuses(run, spiking, options, message):
    assert message in error_of(run("generate", spiking, "--prompt", "a", *options))


@pytest.mark.parametrize("verb", ["generate", "evaluate", "energy", "inspect", "verify"])
def test_a_dense_model_is_refused(run, dense, verb):
    options = {"generate": ["--prompt", "a"], "evaluate": ["--reference", dense]}.get(verb, [])
    assert "is not a converted checkpoint" in error_of(run(verb, dense, *options))
    assert "no model at nowhere" in error_of(run(verb, "nowhere", *options))


def test_evaluate_on_text_and_on_samples(run, spiking, dense, text):
    args = ["evaluate", spiking, "--reference", dense, "--window", "64", "--json"]
    on_text = run(*args, "--text", text).json
    assert on_text["fidelity"]["windows"] == 14
    assert on_text["fidelity"]["top1_agreement"] > 0.9
    sampled = run(*args, "--max-tokens", "128").json
    assert sampled["data"]["sampled_from"] == "dense"
    assert sampled["fidelity"]["windows"] == 2
    assert sampled["missed"] == []


def test_evaluate_says_what_it_measured_on(run, spiking, dense, text):
    out = run("evaluate", spiking, "--reference", dense, "--window", "64", "--max-tokens", "128").out
    assert "128 tokens sampled from the dense model (no --text given), seed 1" in out
    assert "ratio (1 is lossless)" in out
    assert "windows of 64 tokens" in out
    alone = run("evaluate", spiking, "--text", text, "--window", "64")
    assert "fidelity to the dense model was not measured" in alone.out


def test_evaluate_fails_below_a_limit(run, spiking, dense):
    args = ["evaluate", spiking, "--reference", dense, "--window", "64", "--max-tokens", "128"]
    assert run(*args, "--max-ratio", "1.5", "--min-agreement", "0.5").code == 0
    missed = run(*args, "--max-ratio", "0.5", "--min-agreement", "1.1", "--json")
    assert missed.code == 1
    assert len(missed.json["missed"]) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "nothing to measure"),
        (["--text", "nowhere.txt"], "no text file nowhere.txt"),
        (["--text", "TEXT", "--max-ratio", "1.01"], "give --reference"),
        (["--reference", "DENSE", "--window", "1024"], "longer than the model's context of 512"),
        (["--reference", "OUT"], "is a converted model already"),
        (["--tasks", "chess"], "unknown task 'chess'"),
        (["--tasks", "piqa", "--limit", "0"], "--limit must be at least 1"),
        (["--text", "TEXT", "--max-tokens", "8", "--window", "64"], "fewer than one window"),
    ],
)
def test_evaluate_refuses(run, spiking, dense, text, options, message):
    names = {"OUT": spiking, "DENSE": dense, "TEXT": text}
    assert message in error_of(run("evaluate", spiking, *(names.get(o, o) for o in options)))


def test_zero_shot(run, spiking, dense, data_root, monkeypatch):
    pytest.importorskip("lm_eval")
    monkeypatch.setenv("SPIKEFORM_DATA", str(data_root))
    result = run("evaluate", spiking, "--tasks", "piqa", "--limit", "2", "--json")
    assert result.code == 0, result.err
    assert result.json["zeroshot"]["spiking"]["tasks"]["piqa"]["n"] == 2


def test_energy_is_estimated_and_beside_both_rivals(run, spiking, dense, text):
    result = run("energy", spiking, "--reference", dense, "--text", text, "--tokens", "64", "--json")
    assert result.json["label"] == "ESTIMATED"
    assert result.json["tokens"] == 64
    assert result.json["protocol"]["dense_checked"]
    plain = run("energy", spiking, "--tokens", "32").out
    assert "sampled from the spiking model itself" in plain
    assert "ESTIMATED" in plain
    assert "not counted:" in plain
    assert "ACE" not in plain  # of bursts and integer weights
    assert result.json["ace"]["per_mac"]["spiking"] == 12 * 16  # a bit a step, real weights
    for rival in ("dense", "quantised"):
        assert f"the {rival} one: " in plain


def test_the_energy_verdict_follows_the_numbers():
    from types import SimpleNamespace

    from spikeform.cli.views import verdict

    def of(*ratios):
        rows = [{"vs dense": ratio, "vs quantised": 2 * ratio} for ratio in ratios]
        return verdict(SimpleNamespace(summary=lambda: rows))

    assert "beats the dense one: 0.40 to 0.60 times" in of(0.4, 0.6)
    assert "beats, in 1 of 2 estimates, the quantised one: 0.80 to 1.20 times" in of(0.4, 0.6)
    assert "loses to the dense one: 1.00 to 1.50 times" in of(1.0, 1.5)


def test_inspect_shows_neurons_and_origin(run, spiking, dense):
    document = run("inspect", spiking, "--json").json
    assert {row["function"] for row in document["neurons"]} > {"identity", "exp", "silu"}
    assert {row["site"] for row in document["dense"]} == {"model.embed_tokens", "lm_head"}
    assert document["source"]["name"] == str(dense)
    assert document["command"][1] == "convert"
    plain = run("inspect", spiking).out
    assert "model.layers.1.mlp.down_proj" in plain
    assert "stay real" in plain


def test_verify_finds_damage(run, spiking):
    good = run("verify", spiking, "--json")
    assert good.code == 0
    assert good.json["ok"]
    assert good.json["hashes"]
    file = spiking / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    bad = run("verify", spiking, "--json")
    assert bad.code == 1
    assert not bad.json["ok"]
    assert "model.safetensors" in bad.json["problems"][0]
    plain = run("verify", spiking)
    assert plain.code == 1
    assert "DAMAGED" in plain.out
    file.write_bytes(data[:-100])
    assert any("truncated" in problem for problem in run("verify", spiking, "--json").json["problems"])
    assert "damaged" in run("generate", spiking, "--prompt", "a").err


def test_a_newer_checkpoint(run, spiking):
    manifest = spiking / "spikeform.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"format_version": 99}))
    for verb in ("verify", "inspect"):
        assert "newer spikeform" in error_of(run(verb, spiking))


def test_a_checkpoint_of_plain_save_pretrained(run, spiking, tmp_path):
    spikeform.load(spiking).save_pretrained(tmp_path / "plain")
    result = run("verify", tmp_path / "plain")
    assert result.code == 0
    assert "no spikeform.json here" in result.out
    assert run("inspect", tmp_path / "plain", "--json").json["command"] is None


def test_a_real_command_line(spiking):
    """Through the installed entry point: exit codes and streams of a process."""
    code = "from spikeform.cli import main; main()"
    call = [sys.executable, "-c", code]
    bad = subprocess.run([*call, "verify", "nowhere"], capture_output=True, text=True)
    assert bad.returncode == 2
    assert bad.stdout == ""
    assert bad.stderr.splitlines()[-1] == "error: no model at nowhere: there is no such folder"
    args = ["generate", str(spiking), "--prompt", "a", "--max-new-tokens", "3", "--json"]
    good = subprocess.run([*call, *args], capture_output=True, text=True)
    assert good.returncode == 0
    assert json.loads(good.stdout)["prompt"] == "a"


def test_debug_shows_where(run):
    with pytest.raises(spikeform.errors.ForeignFolderError):
        run("--debug", "verify", "nowhere")


def test_a_defect_has_its_own_exit_code(run, spiking, monkeypatch):
    def broken(*_args, **_options):
        raise KeyError("oops")

    monkeypatch.setattr(spikeform, "verify", broken)
    result = run("verify", spiking)
    assert result.code == 3
    assert "KeyError" in result.err
    assert "defect" in result.err
