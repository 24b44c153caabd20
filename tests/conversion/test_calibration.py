"""Calibration: what data it takes, block by block, and that an interrupted one resumes."""

import copy
import json
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM

import families
import spikeform
from spikeform.conversion.calibrate import calibrate
from spikeform.conversion.data import MAX_WINDOW, sample, windows
from spikeform.conversion.kinds import blocks
from spikeform.errors import CalibrationError

CALIBRATION = families.tokens(rows=6, length=16, seed=5)


@pytest.fixture
def model():
    return families.build("llama")


class Tokenizer:
    """One token a character."""

    def __call__(self, text):
        return {"input_ids": [3 + ord(c) % 100 for c in text]}


def thresholds(model):
    return {n: b.clone() for n, b in model.named_buffers() if n.endswith(("threshold", "channel_shift"))}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


# Data ------------------------------------------------------------------------------------------------------


def test_texts_longer_than_the_context_are_split(model):
    text = "it was a dark and stormy night, " * 10
    batches, described = windows(model, [text, "short"], Tokenizer())
    lengths = sorted(len(row) for batch in batches for row in batch)
    assert sum(lengths) == len(text) + 5
    assert max(lengths) == families.CONTEXT
    assert described == {"source": "texts", "sequences": 6, "tokens": 325}
    assert all(batch.shape[1] == len(batch[0]) for batch in batches)
    assert windows(model, text, Tokenizer())[1]["tokens"] == len(text)
    ids = torch.arange(3, 103).repeat(3)
    assert windows(model, ids, None)[1] == {"source": "token ids", "sequences": 5, "tokens": 300}
    model.config.max_position_embeddings = 10**6
    assert max(b.shape[1] for b in windows(model, torch.zeros(1, 2000, dtype=torch.long), None)[0]) == MAX_WINDOW


def test_a_wide_model_takes_fewer_windows_at_once(model, monkeypatch):
    ids = torch.arange(3, 103).repeat(9)[: 20 * families.CONTEXT // 2].view(10, -1)
    assert [len(b) for b in windows(model, ids, None)[0]] == [8, 2]
    monkeypatch.setattr("spikeform.conversion.data.ELEMENTS", 3 * ids.shape[1] * model.config.hidden_size)
    batches = windows(model, ids, None)[0]
    assert [len(b) for b in batches] == [3, 3, 3, 1]
    assert torch.equal(torch.cat(batches), ids)


@pytest.mark.parametrize(
    ("calibration", "tokenizer", "message"),
    [
        ([], Tokenizer(), "no text"),
        ("", Tokenizer(), "no text"),
        (["", "  \n"], Tokenizer(), "no text"),
        (["text"], None, "needs a tokenizer"),
        ([1, 2, 3], Tokenizer(), "must be texts"),
        ([["text"]], Tokenizer(), "must be texts"),
        (["text", None], Tokenizer(), "must be texts"),
        (torch.empty(0, 5, dtype=torch.long), None, "no tokens"),
        (torch.empty(5, 0, dtype=torch.long), None, "no tokens"),
        (torch.tensor(5), None, r"\[N, L\]"),
        (torch.zeros(2, 2, 2, dtype=torch.long), None, r"\[N, L\]"),
        (torch.tensor([[1.0, 2.0]]), None, "integers from 0 to 119"),
        (torch.tensor([[1, 120]]), None, "integers from 0 to 119"),
        (torch.tensor([[-1, 5]]), None, "integers from 0 to 119"),
    ],
)
def test_data_that_cannot_be_used(calibration, tokenizer, message, model):
    before = {n: p.clone() for n, p in model.named_parameters()}
    with pytest.raises(CalibrationError, match=message):
        spikeform.convert(model, spikeform.LAS(), calibration, tokenizer)
    assert same(before, dict(model.named_parameters()))  # refused before anything was replaced
    spikeform.convert(model, spikeform.LAS(), CALIBRATION)


@pytest.mark.parametrize("family", ["gpt2", "llama", "bert"])
def test_without_data_the_model_supplies_it(family):
    model = families.build(family)
    spikeform.convert(model, spikeform.LAS(steps=8))
    described = model.spikeform_report.calibration
    assert described["source"] == ("random tokens" if family == "bert" else "sampled from the dense model")
    assert described["tokens"] == 16 * families.CONTEXT
    again = spikeform.convert(families.build(family), spikeform.LAS(steps=8))
    assert same(thresholds(model), thresholds(again))


@pytest.mark.parametrize("bos", [None, 1, 119, 120, 50256])
def test_a_start_token_beyond_the_vocabulary_is_not_used(bos, model):
    """A configuration may keep the default of its family (GPT-2's is 50256) over a smaller vocabulary."""
    model.config.bos_token_id = bos
    model.train()
    ids = sample(model, 4, 6, 0)
    assert ids.shape == (4, 6)
    assert int(ids.max()) < families.VOCABULARY
    assert bos in (None, 120, 50256) or bool((ids[:2, 0] == bos).all())
    assert model.training


# Blocks ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", families.FAMILIES)
def test_the_blocks_of_a_family(family):
    found = blocks(families.build(family))
    assert len(found) == 2
    assert all(name.endswith(f".{i}") for i, (name, _) in enumerate(found))


@pytest.mark.parametrize("family", families.FAMILIES)
def test_batches_do_not_matter(family, monkeypatch):
    """Windows in one batch or in several give the same histograms, and so the same thresholds."""
    together, apart = families.build(family), families.build(family)
    config = spikeform.LAS(steps=8)
    spikeform.convert(together, config, CALIBRATION)
    first, _ = windows(apart, CALIBRATION[:3], None)
    second, _ = windows(apart, CALIBRATION[3:], None)
    monkeypatch.setattr(sys.modules["spikeform.conversion.transform"], "windows", lambda *a: (first + second, {}))
    spikeform.convert(apart, config, CALIBRATION)
    assert same(thresholds(together), thresholds(apart))


def test_a_block_is_calibrated_on_what_spiking_blocks_send(model):
    """At T = 2 the first block's errors are large; the second block's thresholds must have seen them."""
    config = spikeform.LAS(steps=2)
    model = spikeform.convert(model, config, CALIBRATION)
    alone = spikeform.convert(families.build("llama"), spikeform.LAS(steps=2, skip=("*.layers.0.*",)), CALIBRATION)
    one, two = thresholds(model), thresholds(alone)
    differ = [n for n in two if ".layers.1." in n and not torch.equal(one[n], two[n])]
    assert differ


def test_a_site_that_sees_nothing_is_an_error(model):
    from spikeform.methods.las import prepare

    config = spikeform.LAS()
    prepare(model, config)
    with pytest.raises(CalibrationError, match="saw no calibration input"):
        calibrate(model, [], lambda n, h: 0.0)


# Resuming --------------------------------------------------------------------------------------------------


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("options", [{}, {"per_channel": True}, {"margin": 0.3}], ids=str)
def test_an_interrupted_calibration_resumes(options, tmp_path):
    config = spikeform.LAS(steps=4, **options)
    whole = spikeform.convert(families.build("llama"), config, CALIBRATION)

    def stop(done, blocks):
        assert blocks == 2
        raise Interrupted

    with pytest.raises(Interrupted):
        spikeform.convert(families.build("llama"), config, CALIBRATION, workdir=tmp_path / "w", progress=stop)
    assert (tmp_path / "w" / "block-0000.safetensors").exists()
    assert not (tmp_path / "w" / "block-0001.safetensors").exists()
    seen = []
    resumed = spikeform.convert(
        families.build("llama"),
        config,
        CALIBRATION,
        workdir=tmp_path / "w",
        progress=lambda *a: seen.append(a),
    )
    assert seen == [(1, 2), (2, 2)]
    assert same(thresholds(resumed), thresholds(whole))
    assert resumed.spikeform_report == whole.spikeform_report
    assert whole.spikeform_report.saturation or "margin" not in options
    with torch.no_grad():
        assert torch.equal(resumed(families.tokens()).logits, whole(families.tokens()).logits)


def test_a_finished_block_is_not_calibrated_again(tmp_path, monkeypatch):
    config = spikeform.LAS(steps=4)
    spikeform.convert(families.build("llama"), config, CALIBRATION, workdir=tmp_path)
    import spikeform.conversion.calibrate as module

    saved = []
    monkeypatch.setattr(module.Store, "save", lambda *a: saved.append(a))
    spikeform.convert(families.build("llama"), config, CALIBRATION, workdir=tmp_path)
    assert not saved


@pytest.mark.parametrize("change", ["data", "config", "weights", "family"])
def test_a_work_folder_of_another_run_is_refused(change, tmp_path):
    spikeform.convert(families.build("llama"), spikeform.LAS(steps=4), CALIBRATION, workdir=tmp_path)
    model = families.build("mistral" if change == "family" else "llama", seed=int(change == "weights"))
    config = spikeform.LAS(steps=5 if change == "config" else 4)
    data = CALIBRATION + 1 if change == "data" else CALIBRATION
    with pytest.raises(CalibrationError, match="another run"):
        spikeform.convert(model, config, data, workdir=tmp_path)


def test_a_folder_with_other_files_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(CalibrationError, match="not empty"):
        spikeform.convert(families.build("llama"), spikeform.LAS(), CALIBRATION, workdir=tmp_path)
    with pytest.raises(CalibrationError, match="is a file"):
        spikeform.convert(families.build("llama"), spikeform.LAS(), CALIBRATION, workdir=tmp_path / "thesis.tex")
    assert (tmp_path / "thesis.tex").read_text() == "mine"


def test_damage_in_a_work_folder(tmp_path):
    config = spikeform.LAS(steps=4)
    spikeform.convert(families.build("llama"), config, CALIBRATION, workdir=tmp_path)
    block = tmp_path / "block-0001.safetensors"
    block.write_bytes(block.read_bytes()[:100])
    with pytest.raises(CalibrationError, match=r"block-0001.*damaged"):
        spikeform.convert(families.build("llama"), config, CALIBRATION, workdir=tmp_path)
    block.unlink()
    spikeform.convert(families.build("llama"), config, CALIBRATION, workdir=tmp_path)
    (tmp_path / "calibration.json").write_text("{")
    with pytest.raises(CalibrationError, match="another run"):
        spikeform.convert(families.build("llama"), config, CALIBRATION, workdir=tmp_path)


def test_a_kill_before_the_first_block_leaves_a_folder_to_use(tmp_path):
    (tmp_path / "calibration.partial").write_text("{")
    spikeform.convert(families.build("llama"), spikeform.LAS(steps=4), CALIBRATION, workdir=tmp_path)
    assert json.loads((tmp_path / "calibration.json").read_text())["format"] == 2


def test_nothing_is_left_of_calibration(model, tmp_path):
    spikeform.convert(model, spikeform.LAS(per_channel=True), CALIBRATION)
    from spikeform.neurons import MT

    for neuron in model.modules():
        if isinstance(neuron, MT):
            assert neuron.channel_weight is None
            assert not neuron.balance_channels
    model.save_pretrained(tmp_path)
    assert AutoModelForCausalLM.from_pretrained(tmp_path).spikeform_report.rows == model.spikeform_report.rows
    assert copy.deepcopy(model).spikeform_report == model.spikeform_report
