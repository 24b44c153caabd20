"""What the scripts of the embedded Mamba-2 and of SpikingMamba's measurements promise."""

import importlib
import io
import json
import lzma
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, Mamba2Config, Mamba2ForCausalLM
from transformers.models.mamba2 import modeling_mamba2

import spikeform
from spikeform.training import TrainOptions

SENTENCES = [("the cat sleeps", "the cat sleep"), ("dogs bark", "dogs barks"), ("a b c", "a b c d e f g")]


@pytest.fixture
def script(monkeypatch):
    """Imports a script by name. What it puts into transformers is taken out again."""
    monkeypatch.setattr(sys, "path", [str(Path(__file__).resolve().parents[2] / "benchmarks"), *sys.path])
    monkeypatch.setattr(modeling_mamba2, "mamba2_chunk_scan", modeling_mamba2.mamba2_chunk_scan)
    return importlib.import_module


@pytest.fixture
def archive(tmp_path):
    """Three pairs in two paradigms."""
    path = tmp_path / "blimp.tar.xz"
    with tarfile.open(path, "w:xz") as made:
        for name, pairs in (("one", SENTENCES[:2]), ("two", SENTENCES[2:])):
            lines = [json.dumps({"sentence_good": good, "sentence_bad": bad}) for good, bad in pairs]
            data = "\n".join(lines).encode()
            member = tarfile.TarInfo(f"blimp/{name}.jsonl")
            member.size = len(data)
            made.addfile(member, io.BytesIO(data))
    return path


@pytest.fixture(scope="module")
def tiny():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_heads": 4, "head_dim": 16, "state_size": 8, "n_groups": 1, "chunk_size": 16}
    tokens = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    config = Mamba2Config(vocab_size=257, num_hidden_layers=2, tie_word_embeddings=True, **sizes, **tokens)
    return Mamba2ForCausalLM(config).eval()


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("length", [1, 32, 45])
@pytest.mark.parametrize("begun", [False, True])
def test_the_scan_is_that_of_transformers(script, groups, length, begun):
    scan = script("spiking_mamba_scan").chunk_scan
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(shape, generator=generator).requires_grad_()

    given = [draw(2, length, 4, 6), draw(2, length, 4), -draw(4).detach().exp()]
    given += [draw(2, length, groups, 5), draw(2, length, groups, 5)]
    more = {"D": draw(4), "dt_bias": draw(4), "dt_softplus": True, "return_final_states": True}
    more |= {"initial_states": draw(2, 4, 6, 5) if begun else None, "dt_limit": (0.0, 2.0)}
    found = []
    for function in (modeling_mamba2.mamba2_chunk_scan, scan):
        y, state = function(*given, 16, **more)
        wanted = [t for t in (*given, *more.values()) if isinstance(t, torch.Tensor) and t.requires_grad]
        found.append((y, state, *torch.autograd.grad(y.square().sum() + state.sum(), wanted)))
    for theirs, ours in zip(*found, strict=True):
        assert theirs.shape == ours.shape
        assert (theirs - ours).norm() <= 1e-5 * theirs.norm()


def test_installing_the_scan_keeps_the_model(script, tiny):
    ids = torch.arange(1, 41)[None]
    with torch.no_grad():
        before = tiny(ids).logits
        script("spiking_mamba_scan").install()
        assert modeling_mamba2.mamba2_chunk_scan is script("spiking_mamba_scan").chunk_scan
        assert (tiny(ids).logits - before).norm() <= 1e-5 * before.norm()


def test_the_reference_model_is_within_its_limit_and_well_begun(script, tmp_path):
    torch.manual_seed(0)
    model = script("reference_models").build("mamba2", 0, 0, 1)
    assert 3_000_000 < sum(p.numel() for p in model.parameters()) <= 4_000_000
    assert model.lm_head.weight is model.backbone.embeddings.weight
    with torch.no_grad():
        logits = model(torch.randint(2, 3072, (1, 64))).logits
    assert 0.1 < logits.std() < 1  # near a loss of log 3072 at the first step
    mixer = model.backbone.layers[0].mixer
    dt = torch.nn.functional.softplus(mixer.dt_bias)
    assert ((dt > 0.9e-3) & (dt < 0.11)).all()
    assert torch.allclose(mixer.A_log.exp(), torch.arange(1.0, 9.0))
    assert mixer.out_proj.weight.abs().max() <= 512**-0.5 * 7**-0.5 + 1e-6
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(value, again[name]) for name, value in model.state_dict().items())


def test_blimp_is_scored_sentence_by_sentence(script, archive, tiny, tokenizer):
    blimp = script("spiking_mamba_blimp")
    pairs = blimp.Pairs(archive, tokenizer)
    assert pairs.sizes == {"one": 2, "two": 1}
    assert blimp.Pairs(archive, tokenizer, limit=1).sizes == {"one": 1, "two": 1}
    right = blimp.answers(tiny, pairs, batch_size=4)

    def score(sentence):
        ids = torch.tensor([[0, *tokenizer(" " + sentence, add_special_tokens=False)["input_ids"]]])
        with torch.no_grad():
            logs = tiny(ids).logits[0, :-1].double().log_softmax(-1)
        return logs.gather(1, ids[0, 1:, None]).sum()

    assert right.tolist() == [bool(score(good) >= score(bad)) for good, bad in SENTENCES]
    assert right[2]  # the same words and more
    won = torch.tensor([True, False, True])
    assert blimp.accuracy(won, pairs)["acc"] == pytest.approx(0.75)
    lost = blimp.difference(won, torch.tensor([True, True, True]), pairs)
    assert lost["points"] == pytest.approx(-25)
    assert lost["stderr"] == pytest.approx(25)  # of the first paradigm's mean: 50 points, halved
    empty = archive.with_name("empty.tar.xz")
    tarfile.open(empty, "w:xz").close()
    with pytest.raises(ValueError, match="holds no pairs"):
        blimp.Pairs(empty, tokenizer)


def test_every_point_can_be_run_and_is_in_a_table(script):
    run, tables = script("spiking_mamba_run"), script("spiking_mamba_tables")
    points = run.points()
    for point in points.values():
        if point.config is not None:
            spikeform.SpikingMamba(**point.config)
        if point.training is not None:
            TrainOptions(**{**run.DISTILLED, **point.training, "steps": 10})
    trained = {name for name, point in points.items() if point.training is not None}
    assert trained == set(tables.TITLES)
    assert {name for _, *pair in tables.QUESTIONS for name in pair} <= trained
    assert {point.config["steps"] for point in points.values() if point.group == "range"} == {1, 2, 4, 8}


def test_text_of_the_models_own_is_drawn_once(script, tiny, tmp_path, monkeypatch):
    runs = script("method_runs")
    monkeypatch.setattr(runs, "WINDOW", 24)
    text = torch.arange(1, 101)
    drawn = runs.sampled_stream(tiny, text, 24 * 5 + 3, tmp_path, rows=2)
    assert drawn.shape == (24 * 5,)
    for window in drawn.view(5, 24):
        assert torch.equal(window[:16], torch.arange(16) + window[0])  # of the text
    assert drawn.view(5, 24)[:, 16:].unique().numel() > 10
    monkeypatch.setattr(tiny, "generate", None)
    assert torch.equal(runs.sampled_stream(tiny, text, 24 * 5 + 3, tmp_path), drawn)


def test_a_run_fills_its_file_and_the_tables(script, archive, tiny, tokenizer, tmp_path, monkeypatch):
    run, tables = script("spiking_mamba_run"), script("spiking_mamba_tables")
    tiny.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "books").mkdir()
    (tmp_path / "books" / "valid.txt.xz").write_bytes(lzma.compress(b"It was a bright cold day. " * 60))
    np.save(tmp_path / "train-257.npy", np.random.default_rng(0).integers(1, 257, 4096).astype(np.uint16))
    out = tmp_path / "spiking-mamba.json"
    given = ["--model", str(tmp_path / "model"), "--data", str(tmp_path), "--cache", str(tmp_path), "--out", str(out)]
    given += ["--steps", "2", "--long-steps", "2", "--batch-size", "2", "--calibration", "2", "--tokens", "1024"]
    given += ["--save", str(tmp_path / "saved"), "--device", "cpu"]
    run.main(run.parse([*given, "--only", "dense", "converted-signed-4", "d4"]))
    run.main(run.parse([*given, "--only", "converted-signed-4", "d4-long"]))
    data = json.loads(out.read_text())
    assert [row["point"] for row in data["rows"]] == ["dense", "converted-signed-4", "d4", "d4-long"]  # none twice
    row = data["rows"][2]
    assert row["text"]["perplexity_ratio"] == pytest.approx(row["text"]["perplexity"] / row["text"]["dense_perplexity"])
    assert len(row["rates"]) == 1 + 2 * 2
    assert 0 < row["rates"]["all"]["density"] <= row["rates"]["all"]["spikes"] <= 4
    assert len(row["energy"]["accountings"]) == 3
    assert row["curve"][-1]["step"] == 2
    assert not any(out.with_suffix(".work").iterdir())  # what a stopped run would go on from
    saved = spikeform.load(tmp_path / "saved" / "d4")
    assert spikeform.perplexity(saved, torch.arange(1, 65), window=64).perplexity > 1
    with pytest.raises(SystemExit, match="another protocol"):
        run.main(run.parse([*given, "--blimp", "1"]))
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    text, short = tables.results(*tables.load(), None), tables.readme(tables.load()[1])
    assert f"| D = 4 | 2 × 2 | 0 | {row['text']['perplexity']:.2f} |" in text
    assert f"| D = 4, longer | {data['rows'][3]['text']['perplexity']:.2f} |" in short
    for table in (part.splitlines() for part in text.split("\n\n") if part.startswith("| ")):
        assert len({line.count("|") for line in table}) == 1  # as many cells in each line
