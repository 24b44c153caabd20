"""The embedded BERT and its SST-2 classifier: plain folders, within limits, as good as their card."""

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForMaskedLM, AutoModelForSequenceClassification, AutoTokenizer

from spikeform import pretrained
from spikeform.evaluation import labelled_batches, load_labelled

ROOT = Path(__file__).resolve().parents[2]
LOADER = {"bert": AutoModelForMaskedLM, "bert-sst2": AutoModelForSequenceClassification}
# A sentence with one word masked, and words of which one should be among the likeliest ten.
CLOZE = [
    ("the old man sat down at the [MASK] and ate his bread .", {"table", "fire", "door", "window"}),
    ("she did not know what to [MASK] .", {"do", "say", "think", "make"}),
    ("once upon a [MASK] there was a little girl .", {"time"}),
]


@pytest.fixture(scope="module", params=LOADER)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def folder(name):
    return pretrained.path(name)


@pytest.fixture(scope="module")
def model(name, folder):
    return LOADER[name].from_pretrained(folder).eval()


@pytest.fixture(scope="module")
def tokenizer(folder):
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def report(name):
    return json.loads((ROOT / "benchmarks" / "results" / f"reference-{name}.json").read_text(encoding="utf-8"))


@pytest.fixture
def benchmarks(monkeypatch):
    """The benchmark scripts, importable."""
    monkeypatch.setattr(sys, "path", [str(ROOT / "benchmarks"), *sys.path])


def test_limits(folder, model, tokenizer, report):
    parameters = sum(p.numel() for p in model.parameters())
    assert parameters == report["parameters"] <= 4_000_000
    assert sum(file.stat().st_size for file in folder.iterdir()) <= 10 * 2**20
    assert model.config.architectures == [type(model).__name__]
    assert len(tokenizer) == model.config.vocab_size
    assert tokenizer.model_max_length == model.config.max_position_embeddings == 128
    assert model.config.hidden_size // model.config.num_attention_heads >= 32


def test_stored_in_bfloat16_without_loss(folder, model):
    loaded = model.state_dict()
    with safe_open(folder / "model.safetensors", "pt") as stored:
        for key in stored.keys():  # noqa: SIM118 (safe_open is no dict)
            assert stored.get_tensor(key).dtype == torch.bfloat16
            assert loaded[key].dtype == torch.float32
            assert torch.equal(stored.get_tensor(key).float(), loaded[key])


def test_tokenizer(tokenizer):
    tokens = tokenizer.convert_ids_to_tokens(tokenizer("It's [MASK], and I don't care.").input_ids)
    assert tokens[0] == "[CLS]"
    assert tokens[-1] == "[SEP]"
    assert "[MASK]" in tokens
    assert "[UNK]" not in tokens
    tokenised = "it 's [MASK] , and i do n't care ."
    assert tokenizer.convert_ids_to_tokens(tokenizer(tokenised).input_ids) == tokens
    padded = tokenizer(["a", "a b"], padding=True)
    assert padded["attention_mask"] == [[1, 1, 1, 0], [1, 1, 1, 1]]
    assert padded["input_ids"][0][-1] == tokenizer.pad_token_id == 0


def test_both_share_one_tokenizer():
    a, b = ((pretrained.path(name) / "tokenizer.json").read_text(encoding="utf-8") for name in LOADER)
    assert a == b


@torch.no_grad()
def test_fills_gaps():
    tokenizer = AutoTokenizer.from_pretrained(pretrained.path("bert"))
    model = AutoModelForMaskedLM.from_pretrained(pretrained.path("bert")).eval()
    found = 0
    for sentence, words in CLOZE:
        encoded = tokenizer(sentence, return_tensors="pt")
        logits = model(**encoded).logits[encoded.input_ids == tokenizer.mask_token_id]
        found += bool(words & set(tokenizer.convert_ids_to_tokens(logits.topk(10).indices[0])))
    assert found >= 2


@torch.no_grad()
def test_held_out_figure(data_root, benchmarks):
    """Re-measures every 25th row of the held-out books, by the recorded protocol."""
    import bert_masked
    import reference_data

    tokenizer = AutoTokenizer.from_pretrained(pretrained.path("bert"))
    model = AutoModelForMaskedLM.from_pretrained(pretrained.path("bert")).eval()
    recorded = json.loads((ROOT / "benchmarks" / "results" / "reference-bert.json").read_text(encoding="utf-8"))
    ids, _ = reference_data.encode_held_out(data_root, tokenizer, "books")
    assert len(ids) // bert_masked.WINDOW == recorded["held_out"]["books"]["windows"]
    measured = bert_masked.held_out(model, ids, tokenizer, "cpu", every=25, batch=32)
    part = recorded["held_out"]["books_every_25th_window"]
    assert measured["nats_per_token"] == pytest.approx(part["nats_per_token"], abs=5e-4)
    assert measured["predicted_tokens"] == part["predicted_tokens"]


@torch.no_grad()
def test_accuracy_on_sst2(data_root):
    recorded = json.loads((ROOT / "benchmarks" / "results" / "reference-bert-sst2.json").read_text(encoding="utf-8"))
    tokenizer = AutoTokenizer.from_pretrained(pretrained.path("bert-sst2"))
    model = AutoModelForSequenceClassification.from_pretrained(pretrained.path("bert-sst2")).eval()
    assert model.config.id2label == {0: "negative", 1: "positive"}
    texts, labels = load_labelled(data_root / "glue" / "SST-2" / "test.tsv")
    right = 0
    for batch in labelled_batches(tokenizer, texts, labels, 64):
        given = batch.pop("labels")
        right += int((model(**batch).logits.argmax(-1) == given).sum())
    assert len(texts) == recorded["test"]["sentences"] == 872
    # A tie may fall otherwise on another machine: two sentences are 0.23 points.
    assert right / len(texts) == pytest.approx(recorded["test"]["accuracy"], abs=2.5 / 872)
    assert recorded["test"]["accuracy"] >= 0.75
