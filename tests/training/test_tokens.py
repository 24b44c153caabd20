import lzma

import pytest
import torch

from spikeform.evaluation import load_text, tokenize
from spikeform.training import TrainingError, tokens


@pytest.fixture
def files(tmp_path):
    """Two files, one packed and long enough for several pieces."""
    paragraph = "So it was said, and so it was done.\n\n"
    long, short = tmp_path / "long.txt.xz", tmp_path / "short.jsonl"
    long.write_bytes(lzma.compress((paragraph * 5000).encode()))
    short.write_text('{"text": "One."}\n{"text": "Two."}\n')
    return [long, short]


def test_same_ids_as_the_whole_text_at_once(files, tokenizer, tmp_path):
    found = tokens.from_files(files, tokenizer, tmp_path / "work")
    whole = tokenize(tokenizer, [document for file in files for document in load_text(file)])
    assert torch.equal(torch.from_numpy(found.ids.astype("int64")), whole)
    assert found.source["files"] == ["long.txt.xz", "short.jsonl"]
    assert found.source["tokens"] == len(whole)
    texts = tokens.from_texts([document for file in files for document in load_text(file)], tokenizer)
    assert (texts.ids == found.ids).all()


def test_tokenised_once(files, tokenizer, tmp_path, monkeypatch):
    first = tokens.from_files(files, tokenizer, tmp_path / "work")
    monkeypatch.setattr(tokens, "_encode", lambda batch, tokenizer: pytest.fail("tokenised again"))
    again = tokens.from_files(files, tokenizer, tmp_path / "work")
    assert (first.ids == again.ids).all()
    assert [path.name for path in (tmp_path / "work").iterdir()] == [
        path.name for path in (tmp_path / "work").glob("*.bin")
    ]


def test_other_content_is_tokenised_anew(files, tokenizer, tmp_path):
    before = tokens.from_files(files, tokenizer, tmp_path / "work")
    files[1].write_text('{"text": "Three."}\n')
    after = tokens.from_files(files, tokenizer, tmp_path / "work")
    assert len(after.ids) != len(before.ids)
    assert after.source["sha256"] != before.source["sha256"]


def test_bad_data(tokenizer, tmp_path):
    with pytest.raises(TrainingError, match="no text"):
        tokens.from_texts([" \n"], tokenizer)
    with pytest.raises(TrainingError, match="tensor of integers"):
        tokens.from_ids(torch.ones(3))
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(ValueError, match="holds no text"):
        tokens.from_files([tmp_path / "empty.txt"], tokenizer, tmp_path / "work")
