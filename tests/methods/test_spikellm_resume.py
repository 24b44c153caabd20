"""A conversion that was killed after some blocks and resumed is the one that was not, bit for bit."""

import importlib
import json

import pytest
import torch

import families
import spikeform
from spikeform.errors import CalibrationError

IDS = families.tokens(rows=3, length=12, seed=5)
OPTIONS = {
    "omniquant": {"epochs": 1},
    "gptq": {
        "pipeline": "gptq",
        "weight_form": "ternary",
        "weight_steps": (1, 2),
        "weight_salient": (0.2,),
        "act_order": True,
    },
    "gptq with let": {"pipeline": "gptq", "let": True},
    "rotate": {"rotate": True, "epochs": 1, "key_axis": "channel"},
    "real weights": {"weight_bits": 16, "epochs": 1},
    "real inputs": {"bits": 16, "epochs": 1},
    "partly binary": {
        "pipeline": "gptq",
        "weight_form": "partial_binary",
        "weight_steps": (1, 8),
        "weight_salient": (0.1,),
    },
    "sensitivity": {"allocation": "sensitivity", "budget": 1.3, "steps": 4, "epochs": 0},
    "energy": {"allocation": "energy", "budget": 1.3, "epochs": 0},
    "tiers": {"weight_steps": (1, 2), "weight_salient": (0.2,), "weight_bits": 8, "epochs": 1},
    "skip": {"skip": ("*.q_proj", "*.c_attn"), "epochs": 1},
}


class Killed(Exception):
    """As if the process had ended here."""


def convert(family="llama", model=0, ids=IDS, **options):
    arguments = {k: options.pop(k) for k in ("workdir", "progress") if k in options}
    return spikeform.convert(families.build(family, model), spikeform.SpikeLLM(**options), ids, **arguments)


def kill_after(blocks):
    def progress(done, _all):
        if done == blocks:
            raise Killed

    return progress


def same(a, b):
    first, second = a.state_dict(), b.state_dict()
    assert first.keys() == second.keys()
    assert [n for n in first if first[n].dtype != second[n].dtype or not torch.equal(first[n], second[n])] == []
    assert a.spikeform_report.to_dict() == b.spikeform_report.to_dict()
    assert {n: type(m) for n, m in a.named_modules()} == {n: type(m) for n, m in b.named_modules()}
    with torch.no_grad():
        assert torch.equal(a(IDS).logits, b(IDS).logits)


@pytest.mark.parametrize(
    ("family", "options"),
    [("llama", o) for k, o in OPTIONS.items()]
    + [(f, OPTIONS[k]) for f in ("gpt2", "opt") for k in ("omniquant", "rotate", "skip")],
    ids=lambda x: x if isinstance(x, str) else ",".join(x),
)
def test_killed_and_resumed(family, options, tmp_path):
    if "skip" in options:
        options = options | {"skip": ("*.c_attn",) if family == "gpt2" else ("*.q_proj",)}
    whole = convert(family, **options)
    with pytest.raises(Killed):
        convert(family, **options, workdir=tmp_path, progress=kill_after(1))
    assert (tmp_path / "block-0000.safetensors").exists()
    assert not (tmp_path / "block-0001.safetensors").exists()
    same(convert(family, **options, workdir=tmp_path), whole)
    same(convert(family, **options, workdir=tmp_path), whole)  # of nothing but finished blocks


def test_finished_blocks_are_not_worked_out_again(tmp_path, monkeypatch):
    convert(workdir=tmp_path, epochs=0)
    calibrate = importlib.import_module("spikeform.methods.spikellm.calibrate")  # the package has a function so named
    monkeypatch.setattr(calibrate, "_convert", lambda *a: pytest.fail("a finished block was converted again"))
    seen = []
    convert(workdir=tmp_path, epochs=0, progress=lambda done, blocks: seen.append((done, blocks)))
    assert seen == [(1, 2), (2, 2)]


@pytest.mark.parametrize(
    "change",
    [
        {"model": 1},
        {"ids": families.tokens(rows=3, length=12, seed=6)},
        {"ids": families.tokens(rows=3, length=11, seed=5)},
        {"seed": 1},
        {"salient": 0.2},
        {"pipeline": "rtn"},
        {"skip": ("*.q_proj",)},
    ],
    ids=lambda change: next(iter(change)),
)
def test_another_run_is_refused(change, tmp_path):
    with pytest.raises(Killed):
        convert(epochs=0, workdir=tmp_path, progress=kill_after(1))
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    with pytest.raises(CalibrationError, match="another run"):
        convert(**{"epochs": 0, **change}, workdir=tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_a_damaged_block_is_named(tmp_path):
    with pytest.raises(Killed):
        convert(epochs=0, workdir=tmp_path, progress=kill_after(1))
    file = tmp_path / "block-0000.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(CalibrationError, match=r"block-0000\.safetensors is damaged"):
        convert(epochs=0, workdir=tmp_path)
    file.unlink()
    same(convert(epochs=0, workdir=tmp_path), convert(epochs=0))


def test_what_a_kill_in_the_middle_of_writing_leaves(tmp_path):
    (tmp_path / "block-0000.partial").write_bytes(b"half")
    same(convert(epochs=0, workdir=tmp_path), convert(epochs=0))
    assert json.loads((tmp_path / "calibration.json").read_text())["format"] == 2


def test_folders_of_something_else(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(CalibrationError, match="not empty"):
        convert(epochs=0, workdir=tmp_path)
    with pytest.raises(CalibrationError, match="is a file"):
        convert(epochs=0, workdir=tmp_path / "thesis.txt")
    las = tmp_path / "las"
    spikeform.convert(families.build("llama"), spikeform.LAS(steps=6), IDS, workdir=las)
    with pytest.raises(CalibrationError, match="another run"):
        convert(epochs=0, workdir=las)


def test_the_same_twice_without_a_folder():
    """Nothing is left to chance."""
    torch.manual_seed(1)
    first = convert(epochs=1, batch_size=2)
    torch.manual_seed(2)
    same(convert(epochs=1, batch_size=2), first)
