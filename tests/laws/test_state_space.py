"""The laws on Mamba and Mamba-2, converted with SpikingMamba.

The scans of transformers run in fp32 whatever the model's dtype, so real sums agree to its rounding, not fp64's.
"""

import copy
import itertools
from functools import cache

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import families
import spikeform
from families import difference
from spikeform.errors import DamagedCheckpointError
from spikeform.layers import CodedLinear, SpikingLinear
from spikeform.neurons import SignedInteger
from spikeform.spikes.trace import Product, observe
from spikeform.synapses import dispatch

IDS = families.tokens(rows=3, length=18)
OPTIONS = {
    "default": {},
    "channels": {"per_channel": True, "steps": 3},
    "int8": {"weight_bits": 8},
    "int8_channels": {"weight_bits": 8, "per_channel": True, "steps": 8},
    "everything": {"conv": True, "lm_head": True, "steps": 2},
    "unsigned": {"spikes": "unsigned"},
    "binary": {"spikes": "binary", "steps": 1},
    "literal": {"threshold": 1.0},
}
CASES = [(family, name) for family in families.STATE_SPACE for name in OPTIONS]
ROUNDING = 1e-5  # fp32's, through a few layers


def near(a, b, rounding=ROUNDING):
    """Equal but for fp32's order of sums; a layer may be silent, so nothing is divided by its output."""
    return float((a - b).norm()) <= rounding * float(a.norm())


@cache
def dense_of(family):
    return families.build(family)


@cache
def spiking_of(family, name="default"):
    model = copy.deepcopy(dense_of(family))
    return spikeform.convert(model, spikeform.SpikingMamba(**OPTIONS[name]), families.tokens(rows=8, length=24, seed=5))


@torch.no_grad()
def logits_of(model, ids=IDS, **more):
    return model(input_ids=ids, **more).logits


@torch.no_grad()
def products_of(model, executor):
    """Every product of a pass by one executor, with its output."""
    told, outputs = [], []
    hooks = [
        m.register_forward_hook(lambda _m, _a, out: outputs.append(out))
        for m in model.modules()
        if isinstance(m, SpikingLinear)
    ]
    with spikeform.executor(executor), observe(lambda e: told.append(e) if isinstance(e, Product) else None):
        model(input_ids=IDS)
    for hook in hooks:
        hook.remove()
    return told, outputs


@pytest.mark.parametrize(("family", "name"), CASES)
def test_executors_agree_and_count_is_sent(family, name):
    model = spiking_of(family, name)
    temporal, wanted = products_of(model, "temporal")
    assert temporal
    sent = [p for p in temporal if p.sent is not None]
    assert len(sent) >= 4
    for product in sent:
        assert int(product.sent[0]) == int(product.operands[0].count().sum())
    for executor in ("collapsed", "event"):
        told, outputs = products_of(model, executor)
        assert [p.site for p in told] == [p.site for p in temporal]
        for one, other, wants, out in zip(temporal, told, wanted, outputs, strict=False):
            if one.operands[0].codes.equal(other.operands[0].codes):  # nothing upstream has moved a code
                assert near(wants, out)
    if name.startswith("int8"):
        assert all(torch.equal(a, b) for a, b in zip(wanted, products_of(model, "event")[1], strict=True))


@pytest.mark.parametrize(("family", "name"), CASES)
def test_fused_is_what_it_stands_for(family, name):
    if not dispatch.kernels("cpu")[0]:
        pytest.skip(dispatch.kernels("cpu")[1])
    model, seen = spiking_of(family, name), []
    hooks = [
        m.register_forward_hook(lambda m, args, out: seen.append((m, args[0], out)))
        for m in model.modules()
        if isinstance(m, SpikingLinear) and m.neuron is not None
    ]
    logits_of(model)
    for hook in hooks:
        hook.remove()
    for module, x, fused in seen:
        for rows in (None, 1):  # a whole prefill, and a decoded token
            x_ = x if rows is None else x[:1, :1]
            with torch.no_grad(), spikeform.executor("collapsed"):
                apart = module(x_)
            with torch.no_grad():
                whole = module(x_)
            assert near(apart, whole)
        assert fused.shape[:-1] == x.shape[:-1]


def test_event_rows_are_visited_in_decoding():
    """With and without: the same sums (int8: bit for bit)."""
    if not dispatch.kernels("cpu")[0]:
        pytest.skip(dispatch.kernels("cpu")[1])
    for name in ("default", "int8"):
        model = copy.deepcopy(spiking_of("mamba2", name)).to(torch.bfloat16 if name == "default" else torch.float32)
        layer = model.backbone.layers[0].mixer.out_proj
        x = torch.randn(1, 1, layer.in_features, dtype=torch.bfloat16 if name == "default" else torch.float32)
        with torch.no_grad():
            whole = layer(x)
            layer.event_rows = layer.weight.detach().t().contiguous()
            visited = layer(x)
        assert torch.equal(whole, visited) if name == "int8" else near(whole.float(), visited.float(), 1e-2)


@pytest.mark.parametrize(("family", "name"), [(f, n) for f in families.STATE_SPACE for n in ("default", "everything")])
def test_decoding_is_the_full_forward(family, name):
    model = spiking_of(family, name)
    parts, past = [], None
    with torch.no_grad():
        for token in IDS.split(1, 1):
            out = model(input_ids=token, cache_params=past, use_cache=True)
            past = out.cache_params
            parts.append(out.logits)
    assert near(logits_of(model), torch.cat(parts, 1))
    written = model.generate(IDS[:2, :6], max_new_tokens=8, do_sample=False)
    again = logits_of(model, written).argmax(-1)
    ended = (written[:, 6:-1] == model.config.eos_token_id).any()
    assert ended or torch.equal(written[:, 6:], again[:, 5:-1])


@pytest.mark.parametrize(("family", "name"), CASES)
def test_nothing_depends_on_later_tokens_padding_or_other_rows(family, name):
    model = spiking_of(family, name)
    changed = IDS.clone()
    changed[:, 11:] = (changed[:, 11:] - 3 + 50) % (families.VOCABULARY - 3) + 3
    before, after = logits_of(model), logits_of(model, changed)
    assert near(before[:, :11], after[:, :11])
    assert difference(before[:, 11:], after[:, 11:]) > 1e-3
    filler = families.tokens(rows=3, length=5, seed=9)
    mask = torch.cat([torch.zeros_like(filler), torch.ones_like(IDS)], 1)
    padded = logits_of(model, torch.cat([filler, IDS], 1), attention_mask=mask)[:, 5:]
    assert near(before, padded)
    changed = torch.cat([IDS[:1], families.tokens(rows=2, length=18, seed=7)])
    assert torch.equal(before[0], logits_of(model, changed)[0])
    assert torch.equal(before, logits_of(model))  # and nothing is kept from call to call


@pytest.mark.parametrize(("family", "name"), CASES)
def test_save_and_load_are_the_same_bits(family, name, tmp_path):
    model = spiking_of(family, name)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits_of(loaded), logits_of(model))
    first, second = model.state_dict(), loaded.state_dict()
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert loaded.spikeform_report.rows == model.spikeform_report.rows


@pytest.mark.parametrize("family", families.STATE_SPACE)
def test_a_load_does_not_rescale_the_output_projections(family, tmp_path):
    """transformers divides them by the root of the layers once more at each load, where the config asks for it."""
    model = families.build(family)
    model.config.rescale_prenorm_residual = True
    spikeform.convert(model, spikeform.SpikingMamba(), families.tokens(rows=8, length=24, seed=5))
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits_of(loaded), logits_of(model))


def test_bfloat16_keeps_thresholds(tmp_path):
    model = spiking_of("mamba2", "everything")
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert loaded.backbone.layers[0].mixer.in_proj.weight.dtype == torch.bfloat16
    found = 0
    for name, neuron in model.named_modules():
        if isinstance(neuron, SignedInteger):
            assert torch.equal(loaded.get_submodule(name).threshold, neuron.threshold)
            found += 1
    assert found == 7


def test_damage_is_named(tmp_path):
    model = spiking_of("mamba2")
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    name = next(key for key in tensors if key.endswith("out_proj.neuron.threshold"))
    for broken in ({k: v for k, v in tensors.items() if k != name}, {**tensors, name: tensors[name] * float("nan")}):
        save_file(broken, file, metadata={"format": "pt"})
        with pytest.raises(DamagedCheckpointError, match=r"out_proj\.neuron\.threshold"):
            AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("family", families.STATE_SPACE)
def test_more_steps_come_nearer(family):
    dense, error = copy.deepcopy(dense_of(family)), []
    with torch.no_grad():
        for parameter in dense.parameters():  # as a fresh model has them: the law is about neurons, not about chaos
            parameter /= 4 if parameter.ndim > 1 else 1
    for steps in (1, 2, 4, 8, 16):
        model = copy.deepcopy(dense)
        spikeform.convert(model, spikeform.SpikingMamba(steps=steps), families.tokens(rows=8, length=24, seed=5))
        error.append(difference(logits_of(dense), logits_of(model)))
    assert all(after < before for before, after in itertools.pairwise(error))
    assert error[-1] < 0.3 * error[0]


def test_integer_weights_where_they_are_asked_for():
    model = spiking_of("mamba2", "int8")
    kinds = {name: type(m) for name, m in model.named_modules() if isinstance(m, SpikingLinear)}
    assert len(kinds) == 4
    assert set(kinds.values()) == {CodedLinear}
