import gzip
import lzma

import pytest
import torch

from spikeform.evaluation import labelled_batches, load_labelled

GOOD = 'sentence\tlabel\nit \'s "good" \t1\n\nbad\t0\n'
PACK = {"xz": lzma.compress, "gz": gzip.compress}


@pytest.mark.parametrize("name", ["a.tsv", "a.TSV", "v1.2.tsv.xz", "a.tsv.gz"])
def test_load(tmp_path, name):
    (tmp_path / name).write_bytes(PACK.get(name.rsplit(".", 1)[1], bytes)(GOOD.encode()))
    assert load_labelled(tmp_path / name) == (['it \'s "good"', "bad"], [1, 0])


def test_columns_by_name_and_windows_line_ends(tmp_path):
    path = tmp_path / "a.tsv"
    path.write_bytes("\ufeffid\tclass\ttext\r\n7\t12\té\u2028x\r\n".encode())
    assert load_labelled(path, text="text", label="class") == (["é\u2028x"], [12])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"", "read from .tsv"),
        ("tsv.xz", b"", "read from .tsv"),
        ("a.tsv", b"", "no column sentence and no label"),
        ("a.tsv", b"sentence\tgold\na\t1\n", r"no column label: its header is \['sentence', 'gold'\]"),
        ("a.tsv", b"sentence\tlabel\n", "holds no labelled sentences"),
        ("a.tsv", b"sentence\tlabel\na\t1\nb\n", "line 3: 1 columns, but the header names 2"),
        ("a.tsv", b"sentence\tlabel\na\tb\t1\n", "line 2: 3 columns"),
        ("a.tsv", b"sentence\tlabel\n \t1\n", "line 2: there is no sentence"),
        ("a.tsv", b"sentence\tlabel\na\t-1\n", "label '-1' is no class"),
        ("a.tsv", "sentence\tlabel\na\t²\n".encode(), "is no class"),
        ("a.tsv", b"\xff\xfe", "not UTF-8"),
        ("a.tsv.xz", b"damaged", "damaged or truncated"),
        ("a.tsv.xz", lzma.compress(GOOD.encode())[:-20], "damaged or truncated"),
        ("a.tsv.gz", gzip.compress(GOOD.encode(), mtime=0)[:-9], "damaged or truncated"),  # fixed: it is in the id
    ],
)
def test_load_refuses(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_labelled(tmp_path / name)


def test_load_refuses_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="labelled sentences"):
        load_labelled(tmp_path / "a.tsv")


def test_sst2(data_root):
    texts, labels = load_labelled(data_root / "glue" / "SST-2" / "train.tsv.xz")
    assert (len(texts), len(labels), set(labels)) == (60_614, 60_614, {0, 1})


def test_batches(tokenizer):
    texts, labels = ["one", "seventeen", "a", "to", "five"], [1, 0, 0, 1, 1]
    batches = list(labelled_batches(tokenizer, texts, labels, 2))
    assert [list(batch["input_ids"].shape) for batch in batches] == [[2, 9], [2, 2], [1, 4]]
    assert torch.cat([batch["labels"] for batch in batches]).tolist() == labels
    assert batches[0]["attention_mask"].sum(1).tolist() == [3, 9]
    assert [tokenizer.decode(ids) for ids in batches[1]["input_ids"]] == ["a<|end|>", "to"]
    assert next(labelled_batches(tokenizer, texts, max_length=4))["input_ids"].shape == (5, 4)
    assert all("labels" not in batch for batch in labelled_batches(tokenizer, texts))
    assert next(labelled_batches(tokenizer, texts, labels, device="meta"))["labels"].is_meta


def test_batches_refuse(tokenizer):
    for texts, labels, size, message in (
        ([], [], 2, "no sentences"),
        ("one sentence", None, 2, "no sentences"),
        (["a"], [0, 1], 2, "1 sentences, but 2 labels"),
        (["a"], [0], 0, "batch_size"),
    ):
        with pytest.raises(ValueError, match=message):
            next(labelled_batches(tokenizer, texts, labels, size))
