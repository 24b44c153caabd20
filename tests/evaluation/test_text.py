import gzip
import json
import lzma

import pytest
import torch

from spikeform.evaluation import data_root, load_text, perplexity, sample_ids, tokenize

STORY = "One day…\n\nIt rained."


@pytest.mark.parametrize(
    ("name", "content", "documents"),
    [
        ("a.txt", STORY, [STORY]),
        ("a.txt.xz", STORY, [STORY]),
        ("a.xz", STORY, [STORY]),
        ("a.tokens.xz", STORY, [STORY]),
        ("v1.2.xz", STORY, [STORY]),
        ("a.txt.gz", STORY, [STORY]),
        ("a.json", json.dumps([STORY, "two"]), [STORY, "two"]),
        ("a.json.gz", json.dumps([STORY, " ", "two"]), [STORY, "two"]),
        ("a.jsonl", '{"text": "one\u2028more"}\n\n{"text": "two", "id": 3}\n', ["one\u2028more", "two"]),
        ("a.JSONL.XZ", '{"text": "one"}', ["one"]),
    ],
)
def test_load_text(tmp_path, name, content, documents):
    pack = {"xz": lzma.compress, "gz": gzip.compress}.get(name.lower().rsplit(".", 1)[1], bytes)
    (tmp_path / name).write_bytes(pack(content.encode()))
    assert load_text(tmp_path / name) == documents


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.pdf", b"x", "unknown kind of text '.pdf'"),
        ("a.txt", b" \n", "holds no text"),
        ("a.txt", b"\xff\xfe", "not UTF-8"),
        ("a.json", b"[]", "holds no text"),
        ("a.json", b"{", "not JSON"),
        ("a.json", b'{"text": "x"}', "not a list of strings"),
        ("a.json", b"[1]", "not a list of strings"),
        ("a.jsonl", b'{"text": "x"}\n{"txt": "x"}', "line 2"),
        ("a.jsonl", b'{"text": 1}', "line 1"),
        ("a.jsonl", b"[1]", "line 1"),
        ("a.jsonl", b"oops", "line 1"),
        ("a.txt.xz", lzma.compress(b"text")[:-9], "damaged or truncated"),
        ("a.txt.gz", gzip.compress(b"text", mtime=0)[:-9], "damaged or truncated"),  # fixed: it is in the id
        ("a.txt.xz", b"text", "damaged or truncated"),
        ("a.txt.gz", b"text", "damaged or truncated"),
    ],
)
def test_a_bad_file_is_one_clear_error(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        load_text(tmp_path / name)
    assert name in str(error.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.txt"):
        load_text(tmp_path / "nowhere.txt")


def test_tokenize_joins_documents_with_a_blank_line(tokenizer):
    ids = tokenize(tokenizer, ["ab", "c"])
    assert ids.dtype == torch.int64
    assert tokenizer.decode(ids) == "ab\n\nc"
    assert len(ids) == 5  # no special token added
    assert torch.equal(tokenize(tokenizer, "ab\n\nc"), ids)
    for nothing in ([], ["", " "]):
        with pytest.raises(ValueError, match="no text to tokenize"):
            tokenize(tokenizer, nothing)


def test_data_root(tmp_path, monkeypatch):
    monkeypatch.delenv("SPIKEFORM_DATA", raising=False)
    with pytest.raises(FileNotFoundError, match="SPIKEFORM_DATA"):
        data_root()
    monkeypatch.setenv("SPIKEFORM_DATA", str(tmp_path))
    assert data_root() == tmp_path
    with pytest.raises(FileNotFoundError, match="does not exist"):
        data_root(tmp_path / "x")


def test_sample_ids(model):
    ids = sample_ids(model, 130, seed=3, window=32)
    assert ids.shape == (5, 32)
    assert (ids[:, 0] == 0).all()
    assert torch.equal(ids, sample_ids(model, 130, seed=3, window=32))
    assert not torch.equal(ids, sample_ids(model, 130, seed=4, window=32))
    assert len({tuple(row) for row in ids.tolist()}) == 5
    assert sample_ids(model, 1).shape == (1, 64)  # the model's context, as it is below 512
    assert not ids.is_inference()
    model(input_ids=ids).logits.sum().backward()
    model.zero_grad()


def test_samples_follow_the_model(model):
    """The frequencies after the first token are the model's probabilities, and its text is likely to it."""
    first = sample_ids(model, 8000, window=2, batch_size=4000)[:, 1]
    with torch.no_grad():
        p = model(torch.tensor([[0]])).logits[0, -1].softmax(-1)
    found = torch.bincount(first, minlength=257) / len(first)
    assert (found - p).abs().max() < 5 * (p.max() * (1 - p.max()) / len(first)).sqrt()
    own = perplexity(model, sample_ids(model, 1280, window=64), window=64)
    foreign = perplexity(model, torch.randint(0, 257, (1280,), generator=torch.Generator().manual_seed(0)), window=64)
    assert own.nats < foreign.nats - 1


def test_sample_errors(model, monkeypatch):
    with pytest.raises(ValueError, match="at least 1 token"):
        sample_ids(model, 0)
    with pytest.raises(ValueError, match="context of 64"):
        sample_ids(model, 10, window=65)
    monkeypatch.setattr(model.config, "bos_token_id", None)
    with pytest.raises(ValueError, match="bos_token_id"):
        sample_ids(model, 10)
