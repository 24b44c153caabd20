"""Stage 2 of FAS: what learns, what stays, and that each stage helps."""

import contextlib
import copy
import dataclasses
import json

import pytest
import torch

import families
import spikeform
from spikeform.errors import CalibrationError, ConfigError, ConversionError, NewerFormatError, SpikeformError
from spikeform.layers.streaming import paused, running
from spikeform.methods.fas.calibrate import CalibrateOptions, Interrupted, calibrate
from spikeform.methods.fas.calibration.data import Examples, read
from spikeform.methods.fas.calibration.losses import following, teach
from spikeform.methods.fas.calibration.options import STARTS
from spikeform.methods.fas.calibration.recompute import recomputing
from spikeform.methods.fas.calibration.stages import Stages, parameters_of
from spikeform.neurons import StreamingNeuron

QUICK = CalibrateOptions(coarse_steps=12, fine_steps=12, evaluate_every=4, batch_size=4, seed=3)
CACHELESS = {"use_cache": False}


def converted(family="gpt2", steps=4, **options):
    model = families.build(family)
    ids = families.tokens(24, 12)
    return spikeform.convert(model, spikeform.FAS(steps=steps, levels=8, **options), calibration=ids), ids


def neurons_of(model):
    return [m for m in model.modules() if isinstance(m, StreamingNeuron)]


def weights_of(model):
    fitted = {id(p) for p in parameters_of(neurons_of(model))}
    return {name: p.detach().clone() for name, p in model.named_parameters() if id(p) not in fitted}


def measured(model, stage, when):
    return next(h for h in model.spikeform_report.history if h["stage"] == f"calibrate_{stage}")["metrics"][when]


@pytest.mark.parametrize("family", ["gpt2", "opt", "llama", "bert_mlm"])
def test_each_stage_helps_and_weights_stay(family):
    model, ids = converted(family)
    weights, flags = weights_of(model), {n: p.requires_grad for n, p in model.named_parameters()}
    with paused(model), torch.no_grad():
        taught = model(ids[:2]).logits
    points = []
    assert calibrate(model, ids, options=QUICK, validation=ids[:3], progress=points.append) is model
    assert measured(model, "coarse", "after")["kl"] <= measured(model, "coarse", "before")["kl"]
    assert measured(model, "fine", "before") == measured(model, "coarse", "after")
    assert measured(model, "fine", "after")["kl"] < measured(model, "coarse", "before")["kl"]
    after = weights_of(model)
    assert all(torch.equal(after[name], weights[name]) for name in weights)
    assert {n: p.requires_grad for n, p in model.named_parameters()} == flags
    with paused(model), torch.no_grad():
        assert torch.equal(model(ids[:2]).logits, taught)
    assert all(p.shape == (n.channels,) for n in neurons_of(model) for p in (n.scale, n.initial))
    assert any(float((n.scale - 1).abs().max()) > 0.01 for n in neurons_of(model))
    config = model.config.quantization_config
    assert (config.granularity, config.steps) == ("channel", 4)
    assert {p["stage"] for p in points} == {"coarse", "fine"}
    entry = model.spikeform_report.history[-1]
    assert entry["metrics"]["validation_after"]["kl"] >= 0
    assert entry["data"]["train"]["tokens"] == ids.numel()
    json.dumps(model.spikeform_report.history)


def test_the_loss_falls():
    model, ids = converted(steps=8)
    options = dataclasses.replace(QUICK, start="released", coarse_steps=60, fine_steps=0, granularity="layer")
    calibrate(model, ids, options=options)
    assert measured(model, "coarse", "after")["loss"] < 0.9 * measured(model, "coarse", "before")["loss"]
    assert all(n.scale.shape == n.initial.shape == (1,) for n in neurons_of(model))


def test_nothing_better_leaves_the_model_as_it_was(monkeypatch):
    monkeypatch.setitem(STARTS, "released", (50.0, 0.0))  # thresholds that nothing reaches
    model, ids = converted()
    before = [p.detach().clone() for p in parameters_of(neurons_of(model))]
    options = dataclasses.replace(QUICK, start="released", coarse_steps=1, fine_steps=1)
    calibrate(model, ids, options=options)
    assert measured(model, "fine", "kept") is False
    assert all(torch.equal(a, b) for a, b in zip(before, parameters_of(neurons_of(model)), strict=True))
    assert model.config.quantization_config.granularity == "layer"


def test_channels_know_no_length_and_positions_do(tmp_path):
    model, ids = converted()
    calibrate(model, ids, options=QUICK)
    with torch.no_grad():
        long = families.tokens(1, 40)  # the data's sequences have 12 tokens
        assert families.difference(model(long).logits[:, :20], model(long[:, :20]).logits) < 1e-5
    model, ids = converted()
    calibrate(model, ids, options=dataclasses.replace(QUICK, granularity="position", positions=16))
    for neuron in neurons_of(model):
        assert neuron.scale.shape == neuron.initial.shape == (16, neuron.channels)
        assert torch.equal(neuron.scale[12:], neuron.scale[12:13].expand(4, -1))  # never seen, so as they began
    config = model.config.quantization_config
    assert (config.granularity, config.positions) == ("position", 16)
    with pytest.raises(SpikeformError, match="calibrated for 16 positions"):
        model(families.tokens(1, 17))
    spikeform.save(model, tmp_path / "saved")
    again = spikeform.load(tmp_path / "saved")
    with torch.no_grad():
        whole = model(ids[:2]).logits
        assert torch.equal(again(ids[:2]).logits, whole)
        for each in (model, again):  # a cache does not make the positions begin anew
            past = each(ids[:2, :8], use_cache=True).past_key_values
            assert families.difference(whole[:, 8:], each(ids[:2, 8:], past_key_values=past).logits) < 1e-5


def test_saved_is_loaded_to_the_same_bits(tmp_path):
    model, ids = converted()
    calibrate(model, ids, options=dataclasses.replace(QUICK, steps=3))
    spikeform.save(model, tmp_path / "saved")
    again = spikeform.load(tmp_path / "saved")
    assert again.config.quantization_config == model.config.quantization_config
    assert again.config.quantization_config.steps == 3
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)


@pytest.mark.parametrize(("stage", "stops"), [("coarse", 1), ("coarse", 7), ("coarse", 12), ("fine", 15), ("fine", 24)])
def test_stopped_and_resumed_is_as_undisturbed(stage, stops, tmp_path):
    whole, ids = converted()
    stopped = copy.deepcopy(whole)
    calibrate(whole, ids, options=QUICK)
    asked = iter(range(1, 100))
    before = [p.detach().clone() for p in parameters_of(neurons_of(stopped))]
    with pytest.raises(Interrupted, match=f"of the {stage} stage; the state is in"):
        calibrate(stopped, ids, options=QUICK, workdir=tmp_path / "work", stop=lambda: next(asked) == stops)
    assert all(torch.equal(a, b) for a, b in zip(before, parameters_of(neurons_of(stopped)), strict=True))
    assert stopped.spikeform_report.history == []
    calibrate(stopped, ids, options=QUICK, workdir=tmp_path / "work")
    assert all(torch.equal(a, b) for a, b in zip(stopped.parameters(), whole.parameters(), strict=True))
    metrics = [[h["metrics"] for h in model.spikeform_report.history] for model in (stopped, whole)]
    assert metrics[0] == metrics[1]


def test_killed_and_resumed_is_as_undisturbed(tmp_path):
    whole, ids = converted()
    killed = copy.deepcopy(whole)
    calibrate(whole, ids, options=QUICK)
    options = dataclasses.replace(QUICK, save_every=5)

    def kill(point):
        if (point["stage"], point["step"]) == ("fine", 8):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        calibrate(killed, ids, options=options, workdir=tmp_path, progress=kill)
    points = []
    calibrate(killed, ids, options=options, workdir=tmp_path, progress=points.append)
    assert [(p["stage"], p["step"]) for p in points] == [("fine", 8), ("fine", 10), ("fine", 12)]  # from step 5 on
    assert all(torch.equal(a, b) for a, b in zip(killed.parameters(), whole.parameters(), strict=True))


def test_the_work_folder_is_one_run_s(tmp_path):
    model, ids = converted()
    given = copy.deepcopy(model)
    work = tmp_path / "work"
    calibrate(model, ids, options=QUICK, workdir=work)
    again = copy.deepcopy(given)
    calibrate(again, ids, options=dataclasses.replace(QUICK, save_every=7), workdir=work)  # done already
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))
    for changed in ({"options": dataclasses.replace(QUICK, seed=4)}, {"data": ids.flip(0)}, {"model": model}):
        with pytest.raises(CalibrationError, match="another run"):
            calibrate(**({"model": given, "data": ids, "options": QUICK} | changed), workdir=work)
    (work / "state.safetensors").write_bytes(b"12345678")
    with pytest.raises(CalibrationError, match="is damaged"):
        calibrate(given, ids, options=QUICK, workdir=work)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").touch()
    with pytest.raises(CalibrationError, match="holds no calibration"):
        calibrate(given, ids, options=QUICK, workdir=tmp_path / "notes")


@contextlib.contextmanager
def comparing(model, batch, options=QUICK):
    neurons = neurons_of(model)
    extra = CACHELESS if model.can_generate() else {}
    with following(model, neurons, batch, teach(model, neurons, batch, extra), options, extra) as (_, errors):
        yield errors


def errors_of(model, batch, options=QUICK):
    with comparing(model, batch, options) as errors:
        return errors


def test_the_loss_is_the_paper_s():
    model, ids = converted(steps=4)
    seen = {}
    neurons = neurons_of(model)
    handles = [
        n.register_forward_hook(lambda n, _, train: seen.setdefault(n, []).append(train.decode())) for n in neurons
    ]
    with torch.no_grad():
        spiking = model(ids[:3]).logits
        with paused(model):
            qcfs = model(ids[:3]).logits
        for handle in handles:
            handle.remove()
        tau = 2.0
        p, q = (torch.softmax(z.double() / tau, -1) for z in (qcfs, spiking))
        kl = tau**2 * (p * (p / q).log()).sum(-1).mean()
        squares = [(y.view(3, 4, 12, -1).mean(1) - wanted).square().mean() for y, wanted in seen.values()]
        powers = [wanted.square().mean() for _, wanted in seen.values()]
        options = dataclasses.replace(QUICK, temperature=tau, alignment=0.5, kl=3.0)
        found = errors_of(model, {"input_ids": ids[:3]}, options)
        plain = errors_of(model, {"input_ids": ids[:3]}, dataclasses.replace(options, normalise=False))
    wanted = sum(square / power for square, power in zip(squares, powers, strict=True))
    assert float(found.alignment) == pytest.approx(float(wanted), 1e-4)
    assert float(plain.alignment) == pytest.approx(float(sum(squares)), 1e-4)
    assert float(found.kl) == pytest.approx(float(kl), 1e-4)
    assert float(found.total(options)) == pytest.approx(0.5 * float(wanted) + 3 * float(kl), 1e-4)


def test_rates_fall_linearly_to_zero(monkeypatch):
    model, ids = converted()
    rates, step = [], Stages._step

    def noted(self, optimizer, *args):
        rates.append(optimizer.param_groups[0]["lr"])
        return step(self, optimizer, *args)

    monkeypatch.setattr(Stages, "_step", noted)
    calibrate(model, ids, options=dataclasses.replace(QUICK, coarse_steps=4, fine_steps=2))
    assert rates == pytest.approx([1e-2, 7.5e-3, 5e-3, 2.5e-3, 5e-3, 2.5e-3])


@pytest.mark.parametrize("family", ["gpt2", "opt", "bert", "bert_mlm"])
def test_padding_says_nothing(family):
    model, ids = converted(family)
    with torch.no_grad():
        alone = [errors_of(model, {"input_ids": row[None]}) for row in (ids[0], ids[1, :5])]
        padded = torch.stack([ids[0], torch.cat([ids[1, :5], ids.new_zeros(7)])])
        mask = torch.ones_like(padded)
        mask[1, 5:] = 0
        batch = {"input_ids": padded, "attention_mask": mask}
        both, other = (errors_of(model, batch, dataclasses.replace(QUICK, normalise=n)) for n in (True, False))
        plain = [
            errors_of(model, {"input_ids": row[None]}, dataclasses.replace(QUICK, normalise=False))
            for row in (ids[0], ids[1, :5])
        ]
    if family != "bert":  # whose pooler has no positions, but one output a sequence
        assert float(other.alignment) == pytest.approx(
            float(12 * plain[0].alignment + 5 * plain[1].alignment) / 17, 1e-4
        )
        assert float(both.kl) == pytest.approx(float(12 * alone[0].kl + 5 * alone[1].kl) / 17, 1e-3)
    else:
        assert float(both.kl) == pytest.approx(float(alone[0].kl + alone[1].kl) / 2, 1e-3)


def test_a_network_that_is_its_own_qcfs_network_has_no_error():
    model, ids = converted(steps=8)  # T = L, and one block: its input is constant in time
    model.transformer.h = model.transformer.h[:1]
    with torch.no_grad():
        found = errors_of(model, {"input_ids": ids[:2]})
    assert float(found.alignment) == 0
    assert 0 < float(found.kl) < 0.05  # the last norm sees each step by itself


@pytest.mark.parametrize("family", ["gpt2", "opt", "llama", "bert"])
def test_recomputing_gives_the_same_gradients(family):
    model, ids = converted(family)
    model.requires_grad_(False)
    found = []
    for wanted in (False, True):
        for parameter in parameters_of(neurons_of(model)):
            parameter.requires_grad_(True).grad = None
        with recomputing(model, wanted), comparing(model, {"input_ids": ids[:2]}) as errors:
            errors.total(QUICK).backward()
        found.append([p.grad.clone() for p in parameters_of(neurons_of(model))])
    assert all(float(a.abs().sum()) > 0 for a in found[0])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert not any("forward" in vars(m) for m in model.modules())


def test_bfloat16_steps_help_too():
    model, ids = converted(steps=3)
    calibrate(model, ids, options=dataclasses.replace(QUICK, bf16=True, gradient_checkpointing=True))
    assert measured(model, "fine", "after")["kl"] < measured(model, "coarse", "before")["kl"]
    assert all(p.dtype == torch.float32 for p in model.parameters())


def test_a_classifier_is_calibrated_on_padded_batches():
    model, _ = converted("bert")
    ids = families.tokens(24, 10)
    lengths = torch.randint(3, 11, (24,), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(10) < lengths[:, None]).long()
    labels = torch.arange(24) % 3
    batches = [
        {"input_ids": i, "attention_mask": m, "labels": y}
        for i, m, y in zip(ids.split(8), mask.split(8), labels.split(8), strict=True)
    ]
    calibrate(model, batches, options=QUICK, validation=batches[:1])
    assert measured(model, "fine", "after")["kl"] <= measured(model, "coarse", "before")["kl"]
    assert 0 <= measured(model, "fine", "validation_after")["accuracy"] <= 1
    examples = read(model, batches, None, 512)
    assert [len(row["input_ids"]) for row in examples.rows] == lengths.tolist()
    assert examples.source["tokens"] == int(lengths.sum())


def test_operators_that_pass_no_gradient_do_not_hinder():
    model, ids = converted("llama", operators=8)
    calibrate(model, ids[:8], options=dataclasses.replace(QUICK, coarse_steps=4, fine_steps=4))
    assert measured(model, "fine", "after")["kl"] <= measured(model, "coarse", "before")["kl"]


def test_signed_neurons_learn_too():
    model, ids = converted("llama", sites="all")
    calibrate(model, ids[:12], options=dataclasses.replace(QUICK, coarse_learning_rate=3e-3))
    assert all(n.signed or n.site for n in neurons_of(model))
    assert measured(model, "fine", "after")["kl"] <= measured(model, "coarse", "before")["kl"]


def test_a_calibrated_model_may_be_refined_for_other_steps():
    model, ids = converted()
    calibrate(model, ids, options=QUICK)
    more = dataclasses.replace(QUICK, start="model", coarse_steps=0, fine_steps=4)
    calibrate(model, ids, options=more)
    with pytest.raises(ConfigError, match="start=model cannot begin with one parameter per layer"):
        calibrate(model, ids, options=dataclasses.replace(QUICK, start="model"))
    calibrate(model, ids, options=dataclasses.replace(QUICK, steps=2))
    assert [h["time_steps"] for h in model.spikeform_report.history] == [4, 4, 4, 2, 2]
    with running(model, 2):
        assert model.config.quantization_config.steps == 2


def test_batches_visit_everything_once_an_epoch():
    rows = [{"input_ids": torch.tensor([i, i])} for i in range(7)]
    examples, cpu = Examples(rows), torch.device("cpu")
    seen = [int(i) for step in range(7) for i in examples.shuffled(step, 3, 0, cpu)["input_ids"][:, 0]]
    assert [sorted(seen[i : i + 7]) for i in (0, 7, 14)] == [list(range(7))] * 3
    assert seen[:7] != seen[7:14]
    train, held = examples.split()
    assert (len(train.rows), len(held.rows)) == (6, 1)


def test_what_cannot_be_calibrated_is_refused(tokenizer):
    model, ids = converted()
    dense = families.build("gpt2")
    with pytest.raises(ConversionError, match="a model converted with"):
        calibrate(dense, ids)
    with pytest.raises(CalibrationError, match="at least two sequences"):
        calibrate(model, ids[:1])
    with pytest.raises(CalibrationError, match="needs a tokenizer"):
        calibrate(model, ["some text"])
    with pytest.raises(CalibrationError, match="mapping with token ids input_ids"):
        calibrate(model, [ids])
    with pytest.raises(CalibrationError, match="from 0 to 119"):
        calibrate(model, [{"input_ids": ids + 100}])
    with pytest.raises(CalibrationError, match="has 12 tokens: from 1 to 8"):
        calibrate(model, [{"input_ids": ids}], options=dataclasses.replace(QUICK, window=8))
    with pytest.raises(ConfigError, match="positions is 8, but the data hold sequences of 12"):
        calibrate(model, ids, options=dataclasses.replace(QUICK, granularity="position", positions=8))
    spikeform.set_steps(model, 0)
    with pytest.raises(ConfigError, match="steps=0"):
        calibrate(model, ids)
    assert model.spikeform_report.history == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"granularity": "neuron"}, "granularity must be one of"),
        ({"start": "zero"}, "start must be one of"),
        ({"steps": 0}, "steps must be a whole number from 1 to 64"),
        ({"steps": True}, "steps must be"),
        ({"positions": 4}, "positions has a meaning with granularity position only"),
        ({"kl": -1.0}, "kl must be a number of at least 0"),
        ({"temperature": 0}, "temperature must be a number above 0"),
        ({"coarse_learning_rate": "fast"}, "coarse_learning_rate must be a number above 0"),
        ({"kl": 0, "alignment": 0}, "nothing to calibrate by"),
        ({"coarse_steps": 0, "granularity": "layer"}, "there is no stage"),
        ({"bf16": 1}, "bf16 must be true or false"),
        ({"window": 4096}, "window must be a whole number from 2 to 512"),
        ({"learning_rate": 1.0}, "unknown calibration option learning_rate; known:"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ConfigError, match=message):
        CalibrateOptions.from_dict(options)


def test_options_round_trip():
    options = CalibrateOptions(steps=8, granularity="position", positions=512, kl=2.0)
    assert CalibrateOptions.from_dict(json.loads(json.dumps(options.to_dict()))) == options
    assert CalibrateOptions.from_dict({"fine_learning_rate": "1e-3"}).fine_learning_rate == 1e-3
    with pytest.raises(NewerFormatError, match="newer than 1"):
        CalibrateOptions.from_dict({"version": 2, "unheard": 1})
