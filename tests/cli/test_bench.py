import pytest
from transformers import BertConfig, BertForSequenceClassification

import spikeform
from spikeform.errors import SpikeformError
from spikeform.report import bench
from spikeform.report.bench_measures import spread

SHORT = ("--prompt", 8, "--new", 4, "--repeat", 2, "--device", "cpu", "--threads", 1)


def test_a_converted_model_beside_its_parent(run, spiking, dense):
    result = run("bench", spiking, "--reference", dense, *SHORT, "--executor", "automatic", "--executor", "temporal")
    assert result.code == 0, result.err
    lines = result.out.splitlines()
    assert [line.split()[:2] for line in lines[1:4]] == [
        ["dense", "automatic"],
        ["spiking", "automatic"],
        ["spiking", "temporal"],
    ]
    assert "vs dense" in lines[0]
    assert "8 tokens read, 4 written" in result.out


def test_the_document_holds_every_figure(run, spiking, dense):
    found = run("bench", spiking, "--reference", dense, *SHORT, "--json").json
    base, row = found["rows"]
    assert base["prefill_speedup"] is None
    assert row["prefill_speedup"] == pytest.approx(row["prefill_tokens_per_s"] / base["prefill_tokens_per_s"])
    assert row["decode_speedup"] == pytest.approx(base["decode_ms"] / row["decode_ms"])
    assert row["decode_tokens_per_s"] == pytest.approx(1000 / row["decode_ms"])
    assert row["weight_bytes"] > 0
    assert not row["compiled"]
    assert found["protocol"]["threads"] == 1
    assert found["protocol"]["rounds"] == 2


def test_without_a_parent_there_is_no_ratio(run, spiking):
    result = run("bench", spiking, *SHORT)
    assert result.code == 0, result.err
    assert "vs dense" not in result.out


def test_a_dense_model_is_converted_for_the_occasion(run, dense):
    found = run("bench", dense, "--steps", 8, "--set", "softmax=false", *SHORT, "--dtype", "bfloat16", "--json").json
    assert found["config"]["steps"] == 8
    assert found["config"]["softmax"] is False
    assert [row["model"] for row in found["rows"]] == ["dense", "spiking"]
    assert found["protocol"]["dtype"] == "bfloat16"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--new", 1), "--new must be at least 2"),
        (("--prompt", 0), "--prompt must be at least 1"),
        (("--executor", "fast"), "--executor must be one of"),
        (("--dtype", "int8"), "--dtype must be one of"),
        (("--steps", 8), "is converted already"),
        (("--prompt", 600), "exceed the model's context"),
    ],
)
def test_refusals(run, spiking, options, message):
    result = run("bench", spiking, *options)
    assert result.code == 2
    assert message in result.err


def test_a_dense_model_takes_no_reference(run, dense):
    result = run("bench", dense, "--reference", dense)
    assert result.code == 2
    assert "its own reference" in result.err


def test_a_classifier_reads_and_does_not_write():
    sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model, dense = (BertForSequenceClassification(BertConfig(**sizes, intermediate_size=64)).eval() for _ in range(2))
    spikeform.convert(model, spikeform.LAS(steps=8))
    rows = bench(model, dense, prompt=8, repeat=2).rows
    assert [row.decode_ms for row in rows] == [None, None]
    assert rows[1].prefill_speedup is not None
    assert rows[1].decode_speedup is None


def test_batches_and_progress(tiny_llama):
    seen = []
    found = bench(tiny_llama(), prompt=4, new=3, batch=3, repeat=1, progress=lambda *x: seen.append(x))
    assert seen == [(1, 2), (2, 2)]
    assert found.rows[0].decode_tokens_per_s == pytest.approx(3000 / found.rows[0].decode_ms)


def test_unknown_executor_and_long_prompt(tiny_llama):
    with pytest.raises(ValueError, match="no executor named"):
        bench(tiny_llama(), executors=("fast",), prompt=4, new=3)
    with pytest.raises(SpikeformError, match="context"):
        bench(tiny_llama(), prompt=100_000)


def test_spread():
    assert spread([1.0]) == 0.0
    assert spread([1.0, 2.0, 3.0, 4.0, 5.0]) == 2.0
