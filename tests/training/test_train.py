import copy
import json
import math

import pytest
import torch

import families
from spikeform.errors import ConversionError, ForeignFolderError
from spikeform.evaluation import perplexity
from spikeform.training import TrainingError, TrainOptions, train
from spikeform.training.trainer import rate

QUICK = {"window": 16, "batch_size": 4, "steps": 12, "learning_rate": 2e-3, "save_every": 100}


def quick(**more):
    return TrainOptions(**(QUICK | more))


@pytest.mark.parametrize("family", ["gpt2", "llama", "opt"])
def test_learns(family, ids):
    model = families.build(family)
    train(model, ids, options=quick(steps=40), valid=ids[:800])
    curve = model.spikeform_history[-1]["curve"]
    measured = [point["held_out_loss"] for point in curve if "held_out_loss" in point]
    assert len(measured) == 11
    assert measured[-1] < measured[0] - 0.25
    assert not model.training


def test_held_out_perplexity_is_that_of_evaluation(ids):
    model = families.build("gpt2")
    train(model, ids, options=quick(), valid=ids[:810])
    metrics = model.spikeform_history[-1]["metrics"]
    assert metrics["perplexity"] == pytest.approx(perplexity(model, ids[:810], window=16).perplexity, rel=1e-5)
    assert metrics["perplexity"] == pytest.approx(math.exp(metrics["held_out_loss"]), rel=1e-4)


def test_accumulated_batches_are_one_batch(ids):
    models = [families.build("llama") for _ in range(2)]
    train(models[0], ids, options=quick(batch_size=8, steps=4))
    train(models[1], ids, options=quick(batch_size=2, accumulate=4, steps=4))
    a, b = (m.state_dict() for m in models)
    assert max(families.difference(a[name], b[name]) for name in a) < 1e-4


def test_checkpointing_changes_nothing_but_memory(ids):
    models = [families.build("gpt2") for _ in range(2)]
    train(models[0], ids, options=quick())
    train(models[1], ids, options=quick(gradient_checkpointing=True))
    a, b = (m.state_dict() for m in models)
    assert all(torch.allclose(a[name], b[name], atol=1e-6) for name in a)
    assert not any(getattr(m, "gradient_checkpointing", False) for m in models[1].modules())


def test_bfloat16_weights_are_trained_in_fp32(ids):
    model = families.build("llama").to(torch.bfloat16)
    train(model, ids, options=quick(steps=2, bf16=True))
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_leaves_no_trace_in_the_model(ids):
    model = families.build("llama")
    model.lm_head.weight.requires_grad_(False)
    before = model.config.to_dict()
    train(model, ids, options=quick(steps=2))
    assert model.config.to_dict() == before
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == ["lm_head.weight"]
    assert all(p.grad is None for p in model.parameters())


def test_distillation_pulls_towards_the_teacher(ids):
    teacher = families.build("gpt2", seed=1)
    distances = []
    for weight in (0.0, 20.0):
        model = families.build("gpt2")
        train(model, ids, options=quick(steps=30, distil=weight), teacher=teacher if weight else None)
        with torch.no_grad():
            p, q = (m(ids[None, :64]).logits.log_softmax(-1) for m in (teacher, model))
        distances.append(float((p.exp() * (p - q)).sum(-1).mean()))
    assert distances[1] < 0.9 * distances[0]


def test_writes_a_plain_folder(ids, tokenizer, tmp_path):
    from transformers import AutoModelForCausalLM

    model = families.build("gpt2")
    train(model, ids, tokenizer, quick(steps=2), out=tmp_path / "out", command=["spikeform", "train"])
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        assert torch.equal(again(ids[None, :16]).logits, model(ids[None, :16]).logits)
    found = json.loads((tmp_path / "out" / "training.json").read_text())
    assert found["command"] == ["spikeform", "train"]
    (entry,) = found["history"]
    assert entry["stage"] == "train"
    assert entry["options"]["steps"] == entry["steps"] == 2
    assert entry["data"]["train"]["tokens"] == len(ids)
    assert {"torch", "transformers", "accelerate"} <= entry["versions"].keys()
    with pytest.raises(ForeignFolderError, match="it is not empty"):
        train(model, ids, tokenizer, quick(), out=tmp_path / "out")


def test_keeps_the_work_folder_if_asked(ids, tokenizer, tmp_path):
    train(families.build("gpt2"), ids, tokenizer, quick(steps=2), out=tmp_path / "out", keep_work=True)
    assert (tmp_path / "out.work" / "checkpoint-2" / "complete.json").is_file()


def test_masked(ids, tokenizer):
    masking = copy.deepcopy(tokenizer)
    masking.add_special_tokens({"cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"})
    model = families.build("bert_mlm")
    model.resize_token_embeddings(len(masking))
    train(model, ids, masking, quick(task="masked", steps=30), valid=ids[:800])
    measured = [p["perplexity"] for p in model.spikeform_history[-1]["curve"] if "perplexity" in p]
    assert measured[-1] < 0.8 * measured[0]


def test_classify(tokenizer, tmp_path):
    rows = [(word * n, label) for n in (1, 3, 5) for label, word in enumerate(("aa", "bb", "cc"))] * 5
    file = tmp_path / "train.tsv"
    file.write_text("sentence\tlabel\n" + "".join(f"{text}\t{label}\n" for text, label in rows))
    model = families.build("bert")
    options = quick(task="classify", steps=60, learning_rate=1e-3, window=12)
    model = train(model, file, tokenizer, options, valid=[file])
    assert model.spikeform_history[-1]["metrics"]["accuracy"] > 0.9
    assert model.spikeform_history[-1]["data"]["train"]["sentences"] == 45


def test_warm_up_and_schedules():
    assert [rate(s, 10, 0.2, "linear") for s in (0, 1, 2, 6, 9)] == pytest.approx([1 / 3, 2 / 3, 1, 0.5, 0.125])
    assert rate(6, 10, 0.2, "cosine") == pytest.approx(0.5)
    assert rate(9, 10, 0.0, "constant") == 1
    assert all(0 < rate(s, n, w, "linear") <= 1 for n in (1, 2, 7) for w in (0, 0.5, 0.99) for s in range(n))


@pytest.mark.parametrize(
    ("options", "more", "message"),
    [
        ({"window": 128}, {}, "longer than the model's context of 64"),
        ({"distil": 1.0}, {}, "distil needs a teacher"),
        ({"task": "masked"}, {}, "needs a tokenizer"),
        ({}, {"data": torch.arange(500)}, "outside the model's vocabulary of 120"),
        ({}, {"data": torch.arange(9)}, "fewer than one window"),
        ({}, {"data": []}, "data must be"),
        ({"learning_rate": 1e30}, {}, "the loss is (nan|inf) at step"),
    ],
)
def test_refused(ids, options, more, message):
    call = {"data": ids, "options": quick(**options)} | more
    tokenizer = object() if call["data"] == [] else None
    with pytest.raises(ValueError, match=message):
        train(families.build("gpt2"), tokenizer=tokenizer, **call)


def test_refuses_without_accelerate(ids, monkeypatch):
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(TrainingError, match=r"pip install 'spikeform\[train\]'"):
        train(families.build("gpt2"), ids)


def test_refuses_what_is_no_model(ids):
    with pytest.raises(ConversionError, match="got Linear"):
        train(torch.nn.Linear(2, 2), ids)


def test_refuses_a_method_without_gradients(ids):
    import spikeform

    model = spikeform.convert(families.build("gpt2"), spikeform.LAS(steps=4), calibration=ids[:64])
    with pytest.raises(TrainingError, match="a model converted with las cannot be trained"):
        train(model, ids, options=quick())
