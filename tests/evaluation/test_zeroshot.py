import importlib.util
import json
import math
import sys

import pytest
import torch

from spikeform.evaluation import available_tasks, zeroshot
from spikeform.evaluation.zeroshot import score, unpack

needs_harness = pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm_eval is not installed")


def test_known_tasks():
    assert {"blimp", "piqa", "arc_easy", "arc_challenge", "hellaswag", "winogrande", "copa"} <= set(available_tasks())


@needs_harness
def test_a_choice_longer_than_the_context(model, tokenizer, tmp_path):
    (tmp_path / "zeroshot").mkdir()
    question = {"query": "Question: why?\n", "choices": ["no", "because " * 20], "gold": 1}
    (tmp_path / "zeroshot" / "piqa.jsonl").write_text(json.dumps(question))
    with pytest.raises(ValueError, match="context of 64 tokens: leave that task out"):
        zeroshot(model, tokenizer, ["piqa"], tmp_path)


@needs_harness
def test_every_task_runs_offline_on_a_random_model(wide_model, tokenizer, data):
    torch.manual_seed(7)
    expected_next = torch.rand(1)
    torch.manual_seed(7)
    result = zeroshot(wide_model, tokenizer, available_tasks(), data, limit=5)
    assert torch.equal(torch.rand(1), expected_next)  # the caller's random state is left alone
    assert "lm-evaluation-harness 0." in result["protocol"]
    assert "first 5" in result["protocol"]
    assert set(result["tasks"]) == set(available_tasks())
    for name, task in result["tasks"].items():
        assert 0 <= task["acc"] <= 1
        assert task["n"] == (170 if name == "blimp" else 5)
        assert task["chance"] in (0.25, 0.5)
        assert task["acc_stderr"] >= 0
    blimp = result["tasks"]["blimp"]
    assert len(blimp["parts"]) == 34
    assert blimp["acc"] == pytest.approx(sum(blimp["parts"].values()) / 34)
    json.dumps(result)


def log_likelihood(model, tokenizer, context, continuation):
    """Sum of log p of the continuation's tokens, by hand; an empty context is the end-of-text token."""
    before = tokenizer(context, add_special_tokens=False)["input_ids"] or [0]
    ids = torch.tensor([before + tokenizer(continuation, add_special_tokens=False)["input_ids"]])
    ids, skip = ids[:, -65:], max(0, ids.shape[1] - 65)
    with torch.no_grad():
        log_p = model(ids[:, :-1]).logits[0].double().log_softmax(-1)
    scored = log_p.gather(1, ids[0, 1:, None])[:, 0]
    return scored[max(0, len(before) - skip - 1) :].sum().item()


@needs_harness
def test_accuracies_are_those_counted_by_hand(model, tokenizer, tmp_path):
    """What is asked is what the task files say: BLiMP's bare sentences, PIQA's question and answers."""
    import io
    import tarfile

    pairs = [(f"The cat {i} sees.", f"The cat {i} see.") for i in range(12)]
    lines = "\n".join(json.dumps({"sentence_good": good, "sentence_bad": bad}) for good, bad in pairs).encode()
    with tarfile.open(tmp_path / "blimp.tar.xz", "w:xz") as archive:
        for name in ("one", "two"):
            member = tarfile.TarInfo(f"blimp/{name}.jsonl")
            member.size = len(lines)
            archive.addfile(member, io.BytesIO(lines))
    (tmp_path / "zeroshot").mkdir()
    questions = [
        {"query": f"Question: open {i}?\n", "choices": ["use a key", f"eat it {i}"], "gold": i % 2} for i in range(12)
    ]
    (tmp_path / "zeroshot" / "piqa.jsonl").write_text("\n".join(map(json.dumps, questions)))

    tasks = zeroshot(model, tokenizer, ["blimp", "piqa"], tmp_path, batch_size=5)["tasks"]

    right = [
        log_likelihood(model, tokenizer, "", good) > log_likelihood(model, tokenizer, "", bad) for good, bad in pairs
    ]
    assert tasks["blimp"]["parts"] == {"one": sum(right) / 12, "two": sum(right) / 12}
    assert tasks["blimp"]["n"] == 24
    right = []
    for q in questions:
        context = q["query"].strip() + "\nAnswer:"
        found = [log_likelihood(model, tokenizer, context, " " + choice) for choice in q["choices"]]
        right.append(found.index(max(found)) == q["gold"])
    assert tasks["piqa"]["acc"] == pytest.approx(sum(right) / 12)
    assert tasks["piqa"]["acc_stderr"] == pytest.approx(
        math.sqrt(sum(right) / 12 * (1 - sum(right) / 12) / 11), rel=1e-6
    )
    assert "acc_norm" in tasks["piqa"]


def test_a_group_weighs_its_parts_alike():
    parts = {"blimp_a": "a", "blimp_b": "b"}
    raw = {
        "results": {
            "blimp_a": {"acc,none": 0.5, "acc_stderr,none": 0.03},
            "blimp_b": {"acc,none": 0.9, "acc_stderr,none": 0.04},
        },
        "n-samples": {"blimp_a": {"effective": 10}, "blimp_b": {"effective": 30}},
    }
    found = score("blimp", parts, raw)
    assert found == {
        "acc": pytest.approx(0.7),
        "acc_stderr": pytest.approx(0.025),
        "chance": 0.5,
        "n": 40,
        "parts": {"a": 0.5, "b": 0.9},
    }
    raw["results"]["blimp_a"]["acc_stderr,none"] = "N/A"
    assert score("blimp", parts, raw)["acc_stderr"] is None


def test_six_line_files(tmp_path):
    import lzma

    lines = ["A man. he", "2", "a", "b", "c", "d", "A dog", "0", "e", "f", "g", "h"]
    (tmp_path / "x.txt.xz").write_bytes(lzma.compress("\n".join(lines).encode()))
    path = unpack(tmp_path / "x.txt.xz", tmp_path / "out")[""]
    first, second = map(json.loads, path.read_text().splitlines())
    assert first == {"query": "A man. he", "gold": 2, "choices": ["a", "b", "c", "d"]}
    assert second["gold"] == 0


def test_errors(model, tokenizer, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"unknown task 'mmlu': choose from arc_challenge, .*piqa"):
        zeroshot(model, tokenizer, ["piqa", "mmlu"], tmp_path)
    with pytest.raises(ValueError, match="no task given: choose from"):
        zeroshot(model, tokenizer, [], tmp_path)
    for limit in (0, -1, 0.5, True):
        with pytest.raises(ValueError, match="limit is"):
            zeroshot(model, tokenizer, ["piqa"], tmp_path, limit=limit)
    with pytest.raises(FileNotFoundError, match=r"task piqa needs .*piqa\.jsonl.*SPIKEFORM_DATA"):
        zeroshot(model, tokenizer, ["piqa"], tmp_path)
    monkeypatch.delenv("SPIKEFORM_DATA", raising=False)
    with pytest.raises(FileNotFoundError, match="SPIKEFORM_DATA"):
        zeroshot(model, tokenizer, ["piqa"])
    # By name in sys.modules: the attribute of the package is the function.
    monkeypatch.setattr(sys.modules["spikeform.evaluation.zeroshot"], "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install spikeform\[eval\]"):
        zeroshot(model, tokenizer, ["piqa"], tmp_path)
