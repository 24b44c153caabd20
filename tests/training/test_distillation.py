"""SpikingMamba learns from the model that it came from, by the loop that trains every method."""

import copy
import os
import signal
import sys

import pytest
import torch
from safetensors import safe_open

import families
import spikeform
from spikeform.errors import ConfigError
from spikeform.neurons import SignedInteger
from spikeform.training import Interrupted, TrainingError, TrainOptions, train
from spikeform.training.neurons import thresholds, trainable
from spikeform.training.trainer import make_optimizer

QUICK = {"window": 16, "batch_size": 4, "steps": 6, "learning_rate": 1e-3, "save_every": 3}
TAUGHT = QUICK | {"ce": 0, "distil": 1, "hidden": 1, "freeze": ("*embed*",)}


def converted(family="mamba2", **options):
    return spikeform.convert(families.build(family), spikeform.SpikingMamba(**options), families.tokens(4, 32))


def taught(model, ids, family="mamba2", **more):
    calls = {k: more.pop(k) for k in ("out", "resume", "progress", "valid") if k in more}
    return train(model, ids, options=TrainOptions(**TAUGHT | more), teacher=families.build(family), **calls)


def changed(model, before):
    return {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}


def state(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.fixture(scope="module")
def teacher(ids):
    """A dense model that has learned something."""
    model = families.build("mamba2")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter /= 4 if parameter.ndim > 1 else 1
    return train(model, ids[:3000], options=TrainOptions(window=32, batch_size=8, steps=25, learning_rate=5e-3))


@pytest.mark.parametrize("options", [{"compensation": "grad"}, {"compensation": "add", "thresholds_first": 0.1}])
def test_the_model_comes_closer_to_its_teacher(teacher, options, ids):
    model = spikeform.convert(copy.deepcopy(teacher), spikeform.SpikingMamba(steps=1, per_channel=True), ids[None, :64])
    before, held = state(model), ids[3000:4000].view(-1, 50)

    def apart():
        with torch.no_grad():
            p, q = (m(held).logits.log_softmax(-1) for m in (teacher, model))
        return float((p.exp() * (p - q)).sum(-1).mean())

    first = apart()
    train(model, ids[:3000], options=TrainOptions(**TAUGHT | {"steps": 25, "window": 32} | options), teacher=teacher)
    assert apart() < 0.75 * first
    moved = changed(model, before)
    assert set(before) - moved == {n for n in before if "embed" in n}
    assert {f"{n}.threshold" for n, m in model.named_modules() if isinstance(m, SignedInteger)} <= moved
    assert model.spikeform_report.history[-1]["neurons"] == len(thresholds(model)) == 4
    assert not model.training


def test_model_teacher_and_losses_are_one_graph(ids, monkeypatch):
    """Compiled, a step is what it is when it is not; by the backend that only traces, which needs no compiler."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    how = torch.compile
    monkeypatch.setattr(torch, "compile", lambda step: how(step, backend=backend, fullgraph=True))
    torch.compiler.reset()
    curves = []
    for compiled in (False, True):
        model = converted(rotate=True)
        taught(model, ids, compile=compiled, compensation="mix", valid=ids[:64])
        curves.append([{k: v for k, v in p.items() if k != "seconds"} for p in history(model)])
    assert curves[0] == curves[1]
    assert len(graphs) == 3  # a weight that moves is a number at first, then a variable, and none once it is 0


def history(model):
    return model.spikeform_report.history[-1]["curve"]


def test_a_frozen_parameter_gets_no_gradient():
    model = converted()
    with trainable(model, TrainOptions(freeze=("*embed*", "*.layers.1.*norm*"))):
        model(families.tokens()).logits.sum().backward()
        without = {name for name, p in model.named_parameters() if p.grad is None}
    assert model.lm_head.weight is model.backbone.embeddings.weight
    assert without == {"backbone.embeddings.weight", *(f"backbone.layers.1.{n}.weight" for n in ("norm", "mixer.norm"))}
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    with pytest.raises(TrainingError, match=r"freeze: 'emb' names no parameter of Mamba2ForCausalLM"):
        train(model, families.tokens(), options=TrainOptions(**QUICK, freeze=("emb",)))


@pytest.mark.parametrize("family", ["mamba2", "mamba"])
def test_no_fused_kernel_skips_the_output_neuron(family, ids, monkeypatch):
    """In training a mixer would hand the weight of its output projection to one, where it is installed."""
    model, calls = converted(family), []
    module = sys.modules[f"transformers.models.{family}.modeling_{family}"]
    kernels = [name for name in dir(module) if name.endswith(("split_conv1d_scan_combined", "mamba_inner_fn"))]
    assert kernels
    for name in kernels:
        monkeypatch.setattr(module, name, lambda *_, **__: pytest.fail("a fused kernel ran in place of the neuron"))
    for name, neuron in model.named_modules():
        if isinstance(neuron, SignedInteger):
            neuron.register_forward_hook(lambda neuron, *_, name=name: neuron.training and calls.append(name))
    taught(model, ids, family, steps=3)
    assert len(calls) == 3 * 4
    assert {calls.count(name) for name in calls} == {3}
    assert sum(name.endswith("out_proj.neuron") for name in calls) == 3 * 2


def test_thresholds_first(ids):
    model = converted(per_channel=True)
    with trainable(model, TrainOptions()):
        before = state(model)
    taught(model, ids, thresholds_first=1.0, weight_decay=0.5)
    # Weights at rest carry the thresholds: taken out again, they are what they were, up to rounding.
    with trainable(model, TrainOptions()):
        moved = {n for n, p in model.named_parameters() if not torch.allclose(p, before[n], rtol=1e-6)}
    assert all(name.endswith("threshold") or "norm" in name for name in moved)
    assert {name.rpartition(".")[2] for name in moved} == {"threshold", "weight"}
    optimizer, schedule = make_optimizer(model, TrainOptions(thresholds_first=0.5, warm_up=0, schedule="constant"), 4)
    seen = []
    for _ in range(4):
        seen.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        schedule.step()
    assert seen == [[0, 0, 9e-5, 1e-3]] * 2 + [[9e-5, 9e-5, 9e-5, 1e-3]] * 2


def test_what_is_decayed(ids):
    model = converted("mamba")
    optimizer, _ = make_optimizer(model, TrainOptions(weight_decay=0.1), 4)
    names = {id(p): name.rpartition(".")[2] for name, p in model.named_parameters()}
    kinds = {group["weight_decay"]: set() for group in optimizer.param_groups}
    for group in optimizer.param_groups:
        kinds[group["weight_decay"]] |= {names[id(p)] for p in group["params"]}
    assert "weight" in kinds[0.1]
    assert not kinds[0.1] & {"A_log", "D", "dt_bias", "threshold", "bias"}
    assert {"A_log", "D", "threshold"} <= kinds[0.0]


def test_thresholds_may_stay(ids):
    model = converted()
    before = [t.detach().clone() for t in thresholds(model)]
    taught(model, ids, threshold_learning_rate=0)
    assert all(torch.equal(t, b) for t, b in zip(thresholds(model), before, strict=True))


def test_clipping(ids):
    a, b, c = (taught(converted(), ids, clip=clip, steps=2).state_dict() for clip in (0, 1e6, 1e-6))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert any(not torch.equal(a[name], c[name]) for name in a)


def test_thresholds_of_channels_are_in_the_weights_again(ids):
    model, seen = converted(per_channel=True), []
    layer = model.backbone.layers[0].mixer.in_proj
    layer.event_rows = layer.weight.T.contiguous()

    def look(point):
        seen.append((layer.neuron.folded, layer.event_rows))
        if len(seen) == 2:
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        taught(model, ids, progress=look)
    assert seen[0] == (False, None)
    assert layer.neuron.folded
    with torch.no_grad():
        wanted, tokens = model(ids[None, :16]).logits, ids[None, :16]
        layer.unfold()
        assert torch.allclose(model(tokens).logits, wanted, atol=1e-3)


def test_stopped_and_resumed(ids, tmp_path):
    options = {"compensation": "add", "compensation_rank": 2, "steps": 8}
    whole = taught(converted(per_channel=True), ids, **options)
    stop = lambda point: point["step"] == 3 and os.kill(os.getpid(), signal.SIGTERM)  # noqa: E731
    out = tmp_path / "out"
    with pytest.raises(Interrupted, match="stopped at step 4"):
        taught(converted(per_channel=True), ids, **options, out=out, progress=stop)
    with safe_open(tmp_path / "out.work" / "checkpoint-4" / "model.safetensors", "pt") as saved:
        inside = [key for key in saved.keys() if "compensation" in key]  # noqa: SIM118
    assert len(inside) == 4 * 2
    resumed = taught(converted(per_channel=True), ids, **options, out=out, resume=True)
    a, b, c = (model.state_dict() for model in (whole, resumed, spikeform.load(out)))
    assert a.keys() == b.keys() == c.keys()
    assert all(torch.equal(a[name], b[name]) and torch.equal(a[name], c[name]) for name in a)
    assert not [key for key in a if "compensation" in key]


def test_saved_loaded_and_trained_further(ids, tmp_path):
    model = taught(converted(per_channel=True), ids, out=tmp_path / "out", valid=ids[:160])
    again = spikeform.load(tmp_path / "out")
    with torch.no_grad():
        assert torch.equal(again(ids[None, :16]).logits, model(ids[None, :16]).logits)
    assert again.spikeform_report.history == model.spikeform_report.history
    assert len(taught(again, ids).spikeform_report.history) == 2


def test_checkpointing_gives_the_same_weights(ids):
    a, b = (taught(converted(), ids, gradient_checkpointing=g, compensation="add").state_dict() for g in (False, True))
    assert all(torch.allclose(a[name], b[name], atol=1e-6) for name in a)


def test_bfloat16_products_leave_parameters_in_fp32(ids):
    model = taught(converted(per_channel=True).to(torch.bfloat16), ids, bf16=True, compensation="mix")
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_refused(ids):
    model = converted()
    for term in ("distil", "hidden"):
        with pytest.raises(TrainingError, match=f"{term} needs a teacher: give the dense model, or {term} 0"):
            train(model, ids, options=TrainOptions(**QUICK, **{term: 1}))
    with pytest.raises(TrainingError, match="streams are for a model converted with FAS"):
        taught(model, ids, streams=4)
    with pytest.raises(TrainingError, match="int8 weights cannot be trained: convert the dense model with"):
        taught(converted(weight_bits=8), ids)
    with pytest.raises(TrainingError, match="compensation is for signed-integer neurons"):
        train(families.build("gpt2"), ids, options=TrainOptions(**QUICK, compensation="grad"))
    with pytest.raises(TrainingError, match="freeze names every parameter"):
        taught(model, ids, freeze=["*"])
    with pytest.raises(ConfigError, match="nothing is minimised"):
        TrainOptions(ce=0)
