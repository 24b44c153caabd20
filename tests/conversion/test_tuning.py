"""tune() measures zeros and time of each linear layer, and what it chooses means the same."""

import copy

import pytest
import torch
from transformers import Mamba2Config, Mamba2ForCausalLM

import families
import spikeform
from families import difference
from spikeform.conversion import tuning as tuned
from spikeform.errors import ConversionError
from spikeform.layers import CodedLinear, SpikingLinear
from spikeform.synapses import dispatch

IDS = families.tokens(rows=4, length=24, seed=5)
pytestmark = pytest.mark.skipif(not dispatch.kernels("cpu")[0], reason=dispatch.kernels("cpu")[1])


def converted(family, config, dtype):
    model = families.build(family)
    with torch.no_grad():  # most of what a ReLU sends is then zero
        for name, parameter in model.named_parameters():
            if name.endswith("fc1.bias"):
                parameter -= 3.0
    return spikeform.convert(model, config, IDS).to(dtype)


@pytest.fixture
def event_is_faster(monkeypatch):
    monkeypatch.setattr(tuned, "_race", lambda layers, rows: dict.fromkeys(layers, (2.0, 1.0)))


CASES = {
    "real": (spikeform.LAS(steps=8), torch.bfloat16, SpikingLinear),
    "real fp32": (spikeform.LAS(steps=8), torch.float32, SpikingLinear),
    "integer": (spikeform.SpikeLLM(weight_bits=4, epochs=0), torch.float32, CodedLinear),
}
SIGNED = {
    "bf16": ({}, torch.bfloat16),
    "fp32": ({}, torch.float32),
    "folded": ({"per_channel": True}, torch.float32),
    "convolution": ({"conv": True}, torch.float32),
    "int8": ({"weight_bits": 8}, torch.float32),
    "int8, bf16": ({"weight_bits": 8}, torch.bfloat16),
}


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_zeros_are_measured_and_the_event_executor_means_the_same(case, event_is_faster):
    config, dtype, kind = CASES[case]
    model = converted("opt", config, dtype)
    plain = copy.deepcopy(model)
    found = {row.site: row for row in spikeform.tune(model, IDS)}
    layers = {name: m for name, m in model.named_modules() if isinstance(m, SpikingLinear) and m.neuron is not None}
    assert set(found) == set(layers)
    for name, layer in layers.items():
        assert type(layer) is kind
        assert (layer.event_rows is not None) == (found[name].executor == "event")
        x = torch.randn(3, layer.in_features, dtype=dtype)
        x[:, ::2] = 0
        other = plain.get_submodule(name)
        integers = other.neuron(x).codes
        if found[name].executor == "event":
            assert name.endswith("fc2")
            assert found[name].zeros >= tuned.LEAST_ZEROS
            rows = layer.event_rows
            assert torch.equal(rows.t(), layer.weight)
            assert difference(other(x), layer(x)) < (4e-3 if dtype == torch.bfloat16 else 1e-6)
            layer.event_rows = torch.zeros_like(rows)  # so it is these rows that are visited, by up to four inputs
            bias = 0.0 if layer.bias is None else layer.bias
            assert torch.equal(layer(x), torch.zeros_like(other(x)) + bias)
            many = x.repeat(2, 1)
            assert torch.equal(layer(many), other(many))
        assert float((integers == 0).float().mean()) >= 0.5
    assert any(row.executor == "event" for row in found.values())
    assert any(row.executor == "collapsed" for row in found.values())


def mamba(options, dtype):
    sizes = {"vocab_size": 120, "hidden_size": 64, "state_size": 8, "num_hidden_layers": 2}
    ids = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    torch.manual_seed(0)
    heads = {"num_heads": 8, "head_dim": 16, "n_groups": 1, "chunk_size": 8, "tie_word_embeddings": True}
    model = Mamba2ForCausalLM(Mamba2Config(**sizes, **ids, **heads)).eval()
    return spikeform.convert(model, spikeform.SpikingMamba(threshold=1.5, **options), IDS).to(dtype)


@pytest.mark.parametrize("case", SIGNED)
@torch.no_grad()
def test_signed_integers_go_to_the_event_executor(case, event_is_faster):
    options, dtype = SIGNED[case]
    model = mamba(options, dtype)
    plain = copy.deepcopy(model)
    found = {row.site: row for row in spikeform.tune(model, IDS)}
    layers = {name: m for name, m in model.named_modules() if isinstance(m, SpikingLinear)}
    assert set(found) == set(layers)
    seen = {name: [] for name in layers}
    for name in layers:
        plain.get_submodule(name).register_forward_pre_hook(lambda _m, args, name=name: seen[name].append(args[0]))
    plain(IDS[:1], use_cache=False)
    for name, layer in layers.items():
        (x,), neuron = seen[name], layer.neuron
        assert found[name].zeros == pytest.approx(
            float((neuron.integers(x) == 0).float().mean()), abs=0.02 if dtype == torch.bfloat16 else 2e-3
        )
        assert found[name].executor == "event"
        assert torch.equal(layer.event_rows.t(), layer.weight)
        few = x[0, :3]
        wanted = plain.get_submodule(name)(few)
        if dtype == torch.float32 and isinstance(layer, CodedLinear):
            assert torch.equal(layer(few), wanted)
        assert difference(layer(few), wanted) < (8e-3 if dtype == torch.bfloat16 else 1e-6)
    assert len(layers) == 4
    # Whole models decode alike, token by token.
    if dtype == torch.float32 and case != "convolution":
        options = {"max_new_tokens": 5, "do_sample": False}
        assert torch.equal(model.generate(IDS[:1, :4], **options), plain.generate(IDS[:1, :4], **options))


def test_what_is_not_faster_is_not_chosen(monkeypatch):
    model = converted("opt", spikeform.LAS(steps=8), torch.bfloat16)
    monkeypatch.setattr(tuned, "_race", lambda layers, rows: dict.fromkeys(layers, (1.0, 0.98)))
    assert all(row.executor == "collapsed" for row in spikeform.tune(model, IDS))
    assert all(m.event_rows is None for m in model.modules() if isinstance(m, SpikingLinear))


def test_it_really_measures():
    model = converted("opt", spikeform.LAS(steps=8), torch.bfloat16)
    rows = spikeform.tune(model, IDS)
    timed = [row for row in rows if row.zeros >= tuned.LEAST_ZEROS]
    assert timed
    assert all(0 < row.collapsed < 1 and 0 < row.event < 1 for row in timed)
    assert all(row.to_dict()["site"] == row.site for row in rows)


def test_a_dense_model_is_refused():
    with pytest.raises(ConversionError, match="convert it first"):
        spikeform.tune(families.build("opt"), IDS)
