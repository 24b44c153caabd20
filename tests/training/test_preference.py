"""DPO and KTO of a spiking Mamba, and what they are judged by."""

import copy
import json
import math
import os
import signal

import pytest
import torch

import preferences
import spikeform
from spikeform.errors import ConfigError, ConversionError
from spikeform.evaluation import perplexity
from spikeform.neurons import SignedInteger
from spikeform.spikes.trace import observe
from spikeform.training import Interrupted, TrainingError
from spikeform.training.preference import (
    PairOptions,
    PreferOptions,
    load_pairs,
    mcnemar,
    prefer,
    preference_pairs,
    rank,
    trainers,
    wilson,
)
from spikeform.training.preference.measures import Firings, response_log_probs, token_ids
from spikeform.training.signals import StopSignals

QUICK = {"steps": 8, "batch_size": 8, "learning_rate": 2e-3, "threshold_learning_rate": 1e-3, "max_length": 40}
QUICK |= {"window": 16, "beta": 0.5, "save_every": 100}


def quick(**more):
    return PreferOptions(**(QUICK | more))


@pytest.fixture(scope="module")
def tokenizer():
    return preferences.tokenizer()


@pytest.fixture(scope="module")
def pairs(tokenizer):
    """Responses of the text's own: the random model has no idea which are the better ones."""
    options = PairOptions(count=40, prompt_tokens=6, response_tokens=10, chosen="text", replace_share=0.2)
    return preference_pairs(preferences.dense(), tokenizer, preferences.texts(), options)


@pytest.fixture(scope="module")
def ids():
    return torch.randint(preferences.WORDS, (200,), generator=torch.Generator().manual_seed(2))


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module", params=["dpo", "kto"])
def tuned(request, pairs, tokenizer, ids, tmp_path_factory):
    """One run of each method: before, after, the points of its curve, and the folder written."""
    model = preferences.spiking(per_channel=True)
    before, points = copy.deepcopy(model), []
    out = tmp_path_factory.mktemp("tuned") / "out"
    options = quick(method=request.param, steps=16)
    prefer(model, pairs, tokenizer, options, valid=ids, out=out, progress=points.append, command=["spikeform"])
    return request.param, before, model, points, out


def test_the_first_loss_is_that_of_no_preference(tuned):
    method, _, _, points, _ = tuned
    assert points[0]["step"] == 1
    assert points[0]["loss"] == pytest.approx(math.log(2) if method == "dpo" else 0.5, abs=1e-6)
    assert points[0]["margin"] == 0  # policy and reference begin with the same bits


def test_learns_its_pairs(tuned, pairs, tokenizer):
    _, before, model, points, _ = tuned
    first, last = (int(rank(m, pairs.train, tokenizer, end_token=False).wins().sum()) for m in (before, model))
    assert last > first + 0.2 * len(pairs.train)
    assert points[-1]["loss"] < 0.75 * points[0]["loss"]
    assert points[-1]["margin"] > 1


def test_leaves_nothing_in_the_model(tuned):
    _, before, model, _, _ = tuned
    assert vars(model).keys() == vars(before).keys()
    written = ("architectures", "dtype")  # by saving
    a, b = ({k: v for k, v in m.config.to_dict().items() if k not in written} for m in (model, before))
    assert a == b
    assert model.generation_config.to_dict() == before.generation_config.to_dict()
    assert state(model).keys() == state(before).keys()
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    neurons = [module for module in model.modules() if isinstance(module, SignedInteger)]
    assert neurons
    assert all(neuron.folded and neuron.compensation is None for neuron in neurons)
    assert not any(module.training for module in model.modules())


def test_ends_on_the_way(pairs, tokenizer):
    """At a share of the way that the same run goes in full; and what is saved and told is that model."""
    start, whole, part = (preferences.spiking(per_channel=True) for _ in range(3))
    prefer(whole, pairs, tokenizer, quick())
    prefer(part, pairs, tokenizer, quick(interpolate=0.25))
    moved = 0
    for name, x in state(part).items():
        a, b = start.state_dict()[name], whole.state_dict()[name]
        torch.testing.assert_close(x, a.lerp(b, 0.25) if x.is_floating_point() else b, rtol=0, atol=1e-7)
        moved += not torch.equal(a, b)
    assert moved > 3
    told = part.spikeform_report.history[-1]["metrics"]["after"]["preference"]
    assert told == rank(part, pairs.held_out, tokenizer, end_token=False).to_dict()


def test_embeddings_stay_and_thresholds_learn(tuned):
    _, before, model, _, _ = tuned
    a, b = state(before), state(model)
    same = {name for name in a if torch.equal(a[name], b[name])}
    assert {"backbone.embeddings.weight", "lm_head.weight"} <= same
    assert not [name for name in same if "threshold" in name or "proj" in name]


def test_is_written_and_remembered(tuned, ids, pairs, tokenizer):
    method, before, model, _, out = tuned
    again = spikeform.load(out)
    with torch.no_grad():
        assert torch.equal(again(ids[None, :20]).logits, model(ids[None, :20]).logits)
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    (entry,) = again.spikeform_report.history
    assert json.loads(json.dumps(entry)) == model.spikeform_report.history[-1]
    assert (entry["stage"], entry["options"]["method"], entry["steps"]) == ("prefer", method, 16)
    assert entry["data"]["train"]["pairs"] == len(pairs.train)
    assert entry["reference"] == "the model before this stage, frozen"
    measured = entry["metrics"]
    for name, network in (("before", before), ("after", model)):
        found = rank(network, pairs.held_out, tokenizer, end_token=False)
        assert measured[name]["preference"] == json.loads(json.dumps(found.to_dict()))
        assert measured[name]["perplexity"] == pytest.approx(perplexity(network, ids, window=16).perplexity, rel=1e-5)
        assert 0 < measured[name]["density"] < measured[name]["spikes_per_neuron"]
    assert measured["mcnemar"].keys() == {"summed", "per_token"}


def test_the_given_reference_is_used_and_left_alone(pairs, tokenizer, monkeypatch):
    model, reference = preferences.spiking(), preferences.dense()
    reference.lm_head.weight.requires_grad_(False)
    before, marks = state(reference), dict(vars(reference))
    seen, make = [], trainers.make
    monkeypatch.setattr(trainers, "make", lambda *args: seen.append(make(*args)) or seen[-1])
    points = []
    prefer(model, pairs, tokenizer, quick(steps=2), reference=reference, progress=points.append)
    assert seen[0].accelerator.unwrap_model(seen[0].ref_model) is reference
    assert abs(points[0]["loss"] - math.log(2)) > 0.01  # the dense model, and not the spiking one
    assert equal(state(reference), before)
    assert dict(vars(reference)) == marks
    assert [n for n, p in reference.named_parameters() if not p.requires_grad] == ["backbone.embeddings.weight"]
    assert "Mamba2ForCausalLM (dense), given" in model.spikeform_report.history[-1]["reference"]


@pytest.mark.parametrize("end", [False, True])
def test_trl_sees_the_tokens_and_spikes_that_are_measured(pairs, tokenizer, tmp_path, end):
    import dataclasses

    pairs = dataclasses.replace(pairs, end_token=end)
    model, given, options = preferences.spiking(), preferences.spiking(), quick()
    with StopSignals() as stop, trainers.as_it_was(model), trainers.as_it_was(given):
        trainer = trainers.make(model, given, pairs, tokenizer, options, 2, tmp_path, stop, 0.0, print)
        batch = trainer.data_collator([trainer.train_dataset[i] for i in range(6)])
        counted = Firings()
        with observe(counted):
            found = torch.stack(trainer.compute_ref_log_probs(trainer.ref_model, batch), -1)
    rows = pairs.train[:6]
    wanted = rank(preferences.spiking(), rows, tokenizer, end_token=end)
    assert torch.allclose(found.double(), wanted.summed_N2, atol=2e-3)
    assert batch["completion_mask"].sum() == wanted.tokens_N2.sum()
    assert counted.spikes > 0
    assert ("forward" in vars(model)) is False


def test_policy_spikes_in_every_layer_while_it_learns(pairs, tokenizer, monkeypatch):
    sites, encode = set(), SignedInteger.encode

    def watched(self, x):
        if self.training:
            sites.add(self.site)
        return encode(self, x)

    monkeypatch.setattr(SignedInteger, "encode", watched)
    model = preferences.spiking()
    prefer(model, pairs, tokenizer, quick(steps=1))
    assert len(sites) == 2 * model.config.num_hidden_layers


@pytest.mark.parametrize("family", ["mamba", "mamba2"])
@pytest.mark.parametrize("make", [preferences.dense, preferences.spiking])
def test_padding_changes_no_log_probability(family, make):
    model = make(family)
    rng = torch.Generator().manual_seed(0)
    sequences = [(3, torch.randint(preferences.WORDS, (n,), generator=rng).tolist()) for n in (9, 20, 14)]
    with torch.no_grad():
        alone = torch.cat([response_log_probs(model, [sequence]) for sequence in sequences])
        for left in (False, True):
            assert torch.allclose(response_log_probs(model, sequences, left), alone, atol=1e-4)


def test_a_stopped_run_goes_on_with_the_same_bits(pairs, tokenizer, tmp_path):
    options = quick(steps=6, method="kto")
    undisturbed = prefer(preferences.spiking(per_channel=True), pairs, tokenizer, options)

    def stop(point):
        if point["step"] == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    where = {"out": tmp_path / "out"}
    with pytest.raises(Interrupted) as stopped:
        prefer(preferences.spiking(per_channel=True), pairs, tokenizer, options, **where, progress=stop)
    assert 3 <= stopped.value.step < 6
    assert not where["out"].exists()
    with pytest.raises(TrainingError, match="holds a stopped run"):
        prefer(preferences.spiking(per_channel=True), pairs, tokenizer, options, **where)
    again = prefer(preferences.spiking(per_channel=True), pairs, tokenizer, options, **where, resume=True)
    assert equal(state(again), state(undisturbed))
    assert not (tmp_path / "out.work").exists()


def test_bfloat16_and_checkpointing(pairs, tokenizer):
    points = []
    model = preferences.spiking()
    options = quick(steps=2, bf16=True, gradient_checkpointing=True, accumulate=2, batch_size=2)
    prefer(model, pairs, tokenizer, options, progress=points.append)
    assert points[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert points[0]["margin"] == 0
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert not any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


def test_dense_control_and_plain_lists(pairs, tokenizer):
    model = preferences.dense()
    prefer(model, pairs.train, tokenizer, quick(steps=1), held_out=pairs.held_out)
    (entry,) = model.spikeform_history
    assert entry["metrics"]["before"]["preference"]["pairs"] == len(pairs.held_out)
    assert "density" not in entry["metrics"]["before"]


def test_whole_responses_end(tokenizer):
    pair = {"prompt": "w1 w2", "chosen": " w3", "rejected": " w4 <end>"}
    assert token_ids(pair, tokenizer, True) == ([1, 2], [3, 60], [4, 60])
    assert token_ids(pair, tokenizer, False) == ([1, 2], [3], [4, 60])


def test_cross_entropy_of_the_chosen_is_added(pairs, tokenizer):
    points, rows = [], pairs.train[:8]
    model = preferences.spiking()
    found = rank(model, rows, tokenizer)
    options = quick(steps=1, sft=0.5)
    prefer(model, rows, tokenizer, options, progress=points.append)
    nats = float(-found.summed_N2[:, 0].sum() / found.tokens_N2[:, 0].sum())
    assert points[0]["loss"] == pytest.approx(math.log(2) + 0.5 * nats, rel=1e-4)


def test_kto_batches_are_whole(pairs):
    rows = trainers.unpaired(pairs.train, quick(method="kto", batch_size=7))
    assert len(rows) == len(pairs.train) * 2 // 7 * 7
    assert {row["label"] for row in rows[:14]} == {True, False}
    with pytest.raises(TrainingError, match="do not fill one batch of 100"):
        trainers.unpaired(pairs.train[:3], quick(method="kto", batch_size=100))


def test_intervals_and_tests_are_the_textbooks():
    assert wilson(8, 10) == pytest.approx([0.49016, 0.94331], abs=1e-5)
    before, after = torch.tensor([True] * 2 + [False] * 8), torch.tensor([False] + [True] * 9)
    assert mcnemar(before, after) == {"lost": 1, "won": 8, "p": 0.0391}
    assert mcnemar(after, after) == {"lost": 0, "won": 0, "p": 1.0}


def test_spikes_are_counted(ids):
    model, counted, sent = preferences.spiking(), Firings(), []
    with observe(lambda event: (counted(event), sent.append(event))), torch.no_grad():
        model(ids[None, :16])
    codes = torch.cat([event.train.codes.flatten() for event in sent if hasattr(event, "saturated")])
    assert counted.neurons == codes.numel()
    assert counted.spikes == int(codes.abs().sum())
    assert counted.active == int((codes != 0).sum())


def test_refuses_without_trl(pairs, tokenizer, monkeypatch):
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(TrainingError, match=r"pip install 'spikeform\[prefer\]'"):
        prefer(preferences.spiking(), pairs, tokenizer)


def test_refuses_models_it_cannot_tune(pairs, tokenizer):
    model = preferences.spiking()
    for network, reference, error, message in [
        (torch.nn.Linear(2, 2), None, ConversionError, "got Linear"),
        (preferences.spiking(weight_bits=8), None, TrainingError, "int8 weights cannot be trained"),
        (preferences.spiking(lm_head=True), None, TrainingError, "model's output head spikes"),
        (model, model, TrainingError, "reference is the model itself"),
        (model, preferences.spiking(lm_head=True), TrainingError, "reference's output head spikes"),
    ]:
        with pytest.raises(error, match=message):
            prefer(network, pairs, tokenizer, reference=reference)


@pytest.mark.parametrize(
    ("given", "options", "message"),
    [
        ([], {}, "no preference pairs to learn from"),
        ([{"prompt": "w1"}], {}, "a pair has the texts prompt, chosen and rejected"),
        (None, {"max_length": 4}, "no response within max_length=4"),
        (None, {"learning_rate": 1e30, "steps": 4}, "the loss is (nan|inf) at step"),
    ],
)
def test_refuses_pairs_and_rates(pairs, tokenizer, given, options, message):
    with pytest.raises(TrainingError, match=message):
        prefer(preferences.spiking(), pairs if given is None else given, tokenizer, quick(**options))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "ppo"}, "method must be one of dpo, kto"),
        ({"method": "kto", "batch_size": 1}, "batch_size must be a whole number of at least 2"),
        ({"method": "kto", "sft": 0.1}, "sft is for dpo"),
        ({"steps": 1, "epochs": 1.0}, "steps or epochs, not both"),
        ({"beta": 0}, "beta must be a number above 0"),
        ({"warm_up": 1.0}, "warm_up is a share"),
        ({"interpolate": 0.0}, "interpolate must be a number above 0"),
        ({"interpolate": 1.5}, "interpolate is a share of the way"),
        ({"bf16": 1}, "bf16 must be true or false"),
    ],
)
def test_refused_options(options, message):
    with pytest.raises(ConfigError, match=message):
        PreferOptions(**options)
    assert PreferOptions.from_dict(PreferOptions(beta=0.2).to_dict()) == PreferOptions(beta=0.2)


def test_hub_pairs_by_name(pairs, monkeypatch):
    import datasets

    made = {
        name: datasets.Dataset.from_list([{k: row[k] for k in ("prompt", "chosen", "rejected")} for row in part])
        for name, part in (("train_prefs", pairs.train), ("test_prefs", pairs.held_out))
    }
    monkeypatch.setattr(datasets, "load_dataset", lambda name: datasets.DatasetDict(made))
    found = load_pairs("someone/pairs")
    assert [row["chosen"] for row in found.held_out] == [row["chosen"] for row in pairs.held_out]
    assert len(found.train) == len(pairs.train)
    assert found.end_token
