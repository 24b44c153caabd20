"""int8 weights: the nearest codes of each row; sums of integers, the same bits in every executor and after a reload."""

import copy
import gc
import weakref

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

import families
import spikeform
from spikeform.conversion import weights
from spikeform.conversion.weights import row_codes
from spikeform.energy import energy
from spikeform.errors import ConfigError, ConversionError, DamagedCheckpointError
from spikeform.layers import CodedLinear, SpikingLinear
from spikeform.report.inspect import inspect
from spikeform.spikes.trace import Firing, Product, observe
from spikeform.synapses import EXECUTORS, linear

LAS = spikeform.LAS
CALIBRATION = families.tokens(rows=4, length=24, seed=5)
OPTIONS = {
    "free": {},
    "powers": {"units": "power_of_two", "coding": "signed_digit", "steps": 11},
    "channels": {"per_channel": True, "lm_head": True, "steps": 9},
    "single": {"outlier": False, "coding": "multi_threshold", "steps": 6, "rounding": "floor"},
}


def converted(family, **options):
    model = families.build(family)
    return spikeform.convert(model, LAS(**{"steps": 16, "weight_bits": 8, **options}), CALIBRATION)


def coded(model):
    return {name: m for name, m in model.named_modules() if isinstance(m, CodedLinear)}


@torch.no_grad()
def logits(model, ids=None):
    return model(input_ids=families.tokens() if ids is None else ids).logits


def test_codes_of_a_row():
    """Half a step of each row's own scale at most; the largest weight is met exactly; symmetric."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(40, 70, generator=generator) * torch.randn(40, 1, generator=generator).exp()
    weight[3] = 0
    weight[4, 0] = -100
    found = row_codes(weight)
    assert found.codes.dtype == torch.int8
    assert found.tier is None
    assert int(found.codes.min()) == -127
    assert (found.codes.abs().amax(1)[weight.abs().amax(1) > 0] == 127).all()
    assert torch.equal(row_codes(-weight).codes, -found.codes)
    error = (found.dequantise() - weight).abs().amax(1)
    assert bool((error <= found.scale[0] * 0.50001).all())
    assert not found.codes[3].any()
    assert float(found.scale[0, 3]) == 1
    assert torch.equal(row_codes(found.dequantise()).codes, found.codes)
    assert row_codes(weight.bfloat16()).scale.dtype == torch.float32
    with pytest.raises(ValueError, match="not finite"):
        row_codes(torch.full((2, 3), float("inf")))


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("family", families.FAMILIES)
def test_every_product_is_the_same_in_every_executor(family, options):
    """Bit for bit, given the same train: temporal, collapsed, event. And it is the product with the rounded weight."""
    model, events = converted(family, **options), []
    with observe(events.append):
        logits(model)
    layers = {layer.neuron.site: layer for layer in coded(model).values()}
    assert all(layer.site == site for site, layer in layers.items())
    products = [e for e in events if isinstance(e, Product) and e.kind == "linear"]
    assert layers
    assert layers.keys() <= {e.site for e in products}
    for event in products:
        if event.site in layers:
            layer, train = layers[event.site], event.operands[0]
            weight, bias = layer.integer_weight(), layer.bias
            found = {}
            for name in EXECUTORS:
                with spikeform.executor(name), torch.no_grad():
                    found[name] = linear(train, weight, bias)
            assert all(torch.equal(found["collapsed"], other) for other in found.values()), event.site
            real = train.decode().double() @ weight.dequantise().double().T
            real = real if bias is None else real + bias.double()
            assert families.difference(real, found["collapsed"]) < 2e-6


@pytest.mark.parametrize("family", families.FAMILIES)
def test_whole_models_in_fp64(family):
    model, found = converted(family).double(), {}
    for name in EXECUTORS:
        with spikeform.executor(name):
            found[name] = logits(model)
    families.close(found["collapsed"], found["temporal"])
    families.close(found["collapsed"], found["event"])


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3", "bert"])  # head: of its own, tied, tied, none
def test_which_layers_are_coded(family):
    model, dense = converted(family, lm_head=True), families.build(family)
    tied = bool(getattr(dense.config, "tie_word_embeddings", False)) and family != "bert"
    layers = coded(model)
    real = [n for n, m in model.named_modules() if isinstance(m, SpikingLinear) and n not in layers]
    assert real == (["lm_head"] if tied else [])
    for name, layer in layers.items():
        original = dense.get_submodule(name)
        weight = original.weight.T if family == "gpt2" and name != "lm_head" else original.weight
        assert torch.equal(layer.integer_weight().codes, row_codes(weight).codes)
        assert (layer.bias is None) == (original.bias is None)
        assert layer.bias is None or torch.equal(layer.bias, original.bias)
    rows = {row.name: row for row in model.spikeform_report.replaced if row.kind == "linear"}
    assert {name for name, row in rows.items() if row.replaced_by == "CodedLinear"} == set(layers)
    assert all(row.reason.endswith(", 8-bit weights") == (name in layers) for name, row in rows.items())


def test_channel_shifts_are_folded_first():
    """So integer sums need no shift: the codes are those of the folded weights."""
    model = converted("llama", per_channel=True, steps=9)
    plain = spikeform.convert(families.build("llama"), LAS(steps=9, per_channel=True), CALIBRATION)
    shifted = 0
    for name, layer in coded(model).items():
        other = plain.get_submodule(name)
        assert layer.neuron.folded
        assert torch.equal(layer.neuron.channel_shift, other.neuron.channel_shift)
        assert torch.equal(layer.integer_weight().codes, row_codes(other.weight).codes)
        shifted += int(layer.neuron.channel_shift.any())
    assert shifted
    assert families.difference(logits(plain), logits(model)) < 0.1


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("family", families.FAMILIES)
def test_save_and_load(family, options, tmp_path):
    model = converted(family, **options)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert torch.equal(logits(loaded), logits(model))
    first, second = model.state_dict(), loaded.state_dict()
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert loaded.spikeform_report.rows == model.spikeform_report.rows
    assert loaded.config.quantization_config == model.config.quantization_config


@pytest.mark.parametrize("bits", [16, 4, "8", None])
def test_only_eight_bits_can_be_asked_for_later(bits):
    model = converted("llama", weight_bits=16)
    with pytest.raises(ConfigError, match="must be 8, got"):
        spikeform.set_weight_bits(model, bits)
    assert not coded(model)


def test_real_weights_are_let_go_one_by_one(monkeypatch):
    """A model that is coded never holds both forms of more than one layer."""
    model, alive = families.build("llama"), []
    real = {id(m): weakref.ref(m.weight) for m in model.modules() if isinstance(m, torch.nn.Linear)}

    def counting(weight):
        gc.collect()
        alive.append(sum(ref() is not None for ref in real.values()))
        return row_codes(weight)

    monkeypatch.setattr(weights, "row_codes", counting)
    spikeform.convert(model, LAS(steps=8, weight_bits=8), CALIBRATION)
    assert len(alive) == len(coded(model)) > 7
    assert alive == list(range(len(real), len(real) - len(alive), -1))


def test_bfloat16_and_damage(tmp_path):
    families.build("llama").save_pretrained(tmp_path / "dense")  # a cast would round its rotary frequencies too
    model = LlamaForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.bfloat16)
    spikeform.convert(model, LAS(steps=16, weight_bits=8, units="power_of_two"), CALIBRATION)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert torch.equal(logits(loaded), logits(model))
    assert all(layer.scale.dtype == torch.float32 for layer in coded(loaded).values())
    path, name = tmp_path / "model.safetensors", "model.layers.0.mlp.up_proj"
    tensors = load_file(path)
    assert tensors[f"{name}.weight"].dtype == torch.uint8
    assert tensors[f"{name}.weight"].shape == (1, 112, 64)
    for key, value in ((f"{name}.scale", float("nan")), (f"{name}.neuron.threshold", 3.0)):
        save_file({**tensors, key: tensors[key] * value}, path, metadata={"format": "pt"})
        with pytest.raises(DamagedCheckpointError, match=key):
            type(model).from_pretrained(tmp_path)


def test_reports_and_energy():
    model, ids = converted("llama", steps=8), families.tokens()
    rows = {row["site"]: row for row in inspect(model)}
    for name, layer in coded(model).items():
        row = rows[name]
        assert (row["layer"], row["neuron"], row["weight_bits"], row["steps"]) == ("CodedLinear", "OAT", 8, 8)
        assert layer.weight.numel() < row["bytes"] < 0.65 * row["bf16_bytes"]
    plain = spikeform.convert(families.build("llama"), LAS(steps=8), CALIBRATION)
    report, other = energy(model, ids), energy(plain, ids)
    assert report.spikes_per_token == pytest.approx(other.spikes_per_token, rel=0.02)
    assert report.accumulations_per_mac == pytest.approx(other.accumulations_per_mac, rel=0.02)
    fired = []
    with torch.no_grad(), observe(lambda e: fired.append(e) if isinstance(e, Firing) else None):
        model(input_ids=ids)
    for event in fired:
        assert int(event.train.count().sum()) == int(event.train.coding.sent(event.train.unroll()))


def test_cached_decoding_is_the_full_forward():
    model, ids = converted("llama", units="power_of_two").double(), families.tokens(length=12)
    past, parts = None, []
    with torch.no_grad():
        for chunk in ids.split([5, 1, 1, 5], 1):
            out = model(input_ids=chunk, past_key_values=past, use_cache=True)
            past = out.past_key_values
            parts.append(out.logits)
    families.close(torch.cat(parts, 1), logits(model, ids))


def test_what_is_refused_and_what_stays():
    for bits in (4, 0, "8", True, 8.0, None):
        with pytest.raises(ConfigError, match="weight_bits"):
            LAS(weight_bits=bits)
    model = families.build("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] = float("nan")
    thresholds = {role: (1.0, 8.0) for role in spikeform.methods.las.config.ROLES}
    with pytest.raises(ConversionError, match=r"layers\.1\.mlp\.up_proj.*not finite"):
        spikeform.convert(model, LAS(steps=8, weight_bits=8, thresholds=thresholds), CALIBRATION)
    real = spikeform.convert(families.build("llama"), LAS(steps=8), CALIBRATION)
    assert not coded(real)
    assert torch.equal(logits(real), logits(copy.deepcopy(real)))
