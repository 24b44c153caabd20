"""Training of the quantised network: thresholds learn by rules of their own, and nothing of FAS is disturbed."""

import os
import signal

import pytest
import torch
from safetensors import safe_open

import families
import spikeform
from spikeform.layers.streaming import neurons_of
from spikeform.training import Interrupted, TrainingError, TrainOptions, train
from spikeform.training.examples import Stream, Windows
from spikeform.training.heads import with_classifier
from spikeform.training.neurons import thresholds
from spikeform.training.tokens import from_ids
from spikeform.training.trainer import LEAST_THRESHOLD

QUICK = {"window": 16, "batch_size": 4, "steps": 20, "learning_rate": 2e-3, "save_every": 5}


def converted(family, **options):
    ids = families.tokens(4, 32)
    return spikeform.convert(families.build(family), spikeform.FAS(**({"steps": 0} | options)), ids)


@pytest.mark.parametrize("family", ["gpt2", "llama", "opt", "gpt_neox"])
@pytest.mark.parametrize("options", [{}, {"gated": "product", "sites": "all"}], ids=["", "all"])
def test_weights_and_thresholds_learn(family, options, ids):
    model = converted(family, **options)
    before = [t.detach().clone() for t in thresholds(model)]
    train(model, ids, options=TrainOptions(**QUICK, threshold_learning_rate=1e-2), valid=ids[:800])
    entry = model.spikeform_report.history[-1]
    assert entry["neurons"] == len(before) > 0
    measured = [point["held_out_loss"] for point in entry["curve"] if "held_out_loss" in point]
    assert measured[-1] < measured[0] - 0.1
    assert all(not torch.equal(t, b) for t, b in zip(thresholds(model), before, strict=True))


def test_thresholds_have_a_rate_of_their_own_and_no_decay(ids):
    model = converted("gpt2")
    before = [t.detach().clone() for t in thresholds(model)]
    weight = model.transformer.h[0].mlp.c_fc.weight.detach().clone()
    train(model, ids, options=TrainOptions(**QUICK | {"steps": 3}, threshold_learning_rate=0.0, weight_decay=0.5))
    assert all(torch.equal(t, b) for t, b in zip(thresholds(model), before, strict=True))
    assert not torch.equal(model.transformer.h[0].mlp.c_fc.weight, weight)


def test_thresholds_stay_positive(ids):
    model = converted("gpt2", sites="all")
    train(model, ids, options=TrainOptions(**QUICK | {"steps": 1}, threshold_learning_rate=50.0))
    found = torch.cat([t.detach() for t in thresholds(model)])
    assert found.min() == LEAST_THRESHOLD  # one at least would have become negative
    assert found.max() > 1
    assert all(neuron.calibrated for neuron in neurons_of(model))


def test_what_calibration_finds_is_left_alone(ids):
    model = converted("gpt2")
    options = TrainOptions(**QUICK | {"steps": 3}, threshold_learning_rate=0.1, streams=2, stream_share=0.5)
    train(model, ids, options=options)
    assert {neuron.scale.item() for neuron in neurons_of(model)} == {1.0}
    assert {neuron.initial.item() for neuron in neurons_of(model)} == {0.5}


def test_a_spiking_model_is_trained_as_its_qcfs_network(ids):
    models = [converted("gpt2"), converted("gpt2", steps=4)]
    for model in models:
        train(model, ids, options=TrainOptions(**QUICK))
    a, b = (model.state_dict() for model in models)
    assert all(torch.equal(a[name], b[name]) for name in a)
    neuron = neurons_of(models[1])[0]
    assert neuron.clock.steps == models[1].config.quantization_config.steps == 4
    assert neuron.scale.tolist() == [1.0]
    assert neuron.initial.tolist() == [0.5]
    assert not any(parameter.requires_grad for parameter in (neuron.scale, neuron.initial))


def test_streams_train_a_share_of_each_batch_as_the_spiking_network(ids):
    from spikeform.layers.streaming import running

    curves = []
    options = TrainOptions(**QUICK | {"steps": 1, "learning_rate": 1e-9}, streams=4, stream_share=0.25)
    model = converted("llama")  # no dropout
    train(model, ids, options=options, progress=curves.append)
    batch = Stream(Windows(from_ids(ids), 16), 4, 0).__getitems__([0, 1, 2, 3])["input_ids"]
    with torch.no_grad():
        still = model(batch[:3], labels=batch[:3]).loss
        with running(model, 4):
            moving = model(batch[3:], labels=batch[3:]).loss
    assert curves[-1]["loss"] == pytest.approx(float(0.75 * still + 0.25 * moving), rel=1e-4)
    assert abs(still - moving) > 0.01
    with pytest.raises(TrainingError, match="streams are for a model converted with FAS"):
        train(families.build("llama"), ids, options=options)


def test_saved_and_loaded(ids, tmp_path):
    model = converted("llama")
    train(model, ids, options=TrainOptions(**QUICK), out=tmp_path / "out")
    again = spikeform.load(tmp_path / "out")
    with torch.no_grad():
        assert torch.equal(again(ids[None, :16]).logits, model(ids[None, :16]).logits)
    assert again.spikeform_report.history == model.spikeform_report.history
    train(again, ids, options=TrainOptions(**QUICK), out=tmp_path / "next")
    assert len(spikeform.load(tmp_path / "next").spikeform_report.history) == 2


@pytest.mark.parametrize("family", ["gpt2", "qwen3"])  # tied heads
def test_stopped_and_resumed(family, ids, tmp_path):
    whole, out = converted(family), tmp_path / "out"
    train(whole, ids, options=TrainOptions(**QUICK))
    stop = lambda point: point["step"] == 7 and os.kill(os.getpid(), signal.SIGTERM)  # noqa: E731
    with pytest.raises(Interrupted, match="stopped at step 8"):
        train(converted(family), ids, options=TrainOptions(**QUICK), out=out, progress=stop)
    with safe_open(tmp_path / "out.work" / "checkpoint-8" / "model.safetensors", "pt") as state:
        assert not {"lm_head.weight", "model.embed_tokens.weight", "transformer.wte.weight"} <= set(state.keys())
    resumed = train(converted(family), ids, options=TrainOptions(**QUICK), out=out, resume=True)
    a, b = whole.state_dict(), resumed.state_dict()
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert resumed.lm_head.weight is resumed.get_input_embeddings().weight


def test_checkpointing_gives_the_same_gradients(ids):
    models = [converted("gpt2") for _ in range(2)]
    train(models[0], ids, options=TrainOptions(**QUICK | {"steps": 3}))
    train(models[1], ids, options=TrainOptions(**QUICK | {"steps": 3}, gradient_checkpointing=True))
    a, b = (model.state_dict() for model in models)
    assert all(torch.allclose(a[name], b[name], atol=1e-6) for name in a)


def test_bfloat16_products_leave_parameters_in_fp32(ids):
    model = converted("llama", gated="product")
    train(model, ids, options=TrainOptions(**QUICK | {"steps": 3}, bf16=True), valid=ids[:400])
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_a_classifier_takes_over_the_body_of_a_language_model(tokenizer):
    model = families.build("bert_mlm")
    model.resize_token_embeddings(len(tokenizer))
    spikeform.convert(model, spikeform.FAS(steps=0), families.tokens(4, 32))
    for number, threshold in enumerate(thresholds(model)):
        threshold.data.fill_(0.5 + number)
    made = with_classifier(model, 3, tokenizer, ["a good film", "a bad one"])
    theirs = dict(model.base_model.named_parameters())
    for name, parameter in made.base_model.named_parameters():
        if not name.startswith("pooler"):
            assert torch.equal(parameter, theirs[name]), name
    assert made.config.num_labels == 3
    assert made.config.quantization_config == model.config.quantization_config
    assert all(neuron.calibrated for neuron in neurons_of(made))
    (pooler,) = [n for n in neurons_of(made) if "pooler" in n.site]
    assert pooler.threshold.item() not in (1.0, 0.5)


def test_a_dense_classifier_on_a_language_model(tokenizer):
    model = families.build("gpt2")
    made = with_classifier(model, 2, tokenizer, seed=1)
    again = with_classifier(model, 2, tokenizer, seed=1)
    assert torch.equal(made.score.weight, again.score.weight)
    assert torch.equal(made.transformer.wte.weight, model.transformer.wte.weight)
