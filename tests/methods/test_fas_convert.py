"""What FAS puts where, what it says of it, and what it refuses."""

import copy

import pytest
import torch
from torch import nn
from transformers import (
    AlbertConfig,
    AlbertModel,
    BertConfig,
    BertLMHeadModel,
    GPT2Config,
    GPT2LMHeadModel,
    GPTJConfig,
    GPTJForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

import families
import spikeform
from families import close
from spikeform.errors import CalibrationError, ConfigError, ConversionError
from spikeform.layers import SpikingActivation, SpikingLinear
from spikeform.layers.streaming import paused
from spikeform.neurons import MT, StreamingNeuron

CALIBRATION = families.tokens(rows=4, length=12, seed=5)
SMALL = {"vocab_size": 120, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


def convert(family, **options):
    model = families.build(family) if isinstance(family, str) else family
    return spikeform.convert(model, spikeform.FAS(**{"steps": 2, **options}), CALIBRATION)


def neurons(model):
    return {m.site: m for m in model.modules() if isinstance(m, StreamingNeuron)}


@pytest.mark.parametrize("family", families.FAMILIES)
@pytest.mark.parametrize("sites", ["feed_forward", "all"])
def test_everything_is_in_the_report(family, sites):
    dense = families.build(family)
    computing = {n for n, m in dense.named_modules() if isinstance(m, nn.Linear | nn.LayerNorm | nn.Embedding)}
    model = convert(copy.deepcopy(dense), sites=sites)
    rows = {row.name: row for row in model.spikeform_report.rows}
    assert computing <= rows.keys()
    for name, row in rows.items():
        assert row.reason
        assert row.replaced_by is None or type(model.get_submodule(name)).__name__ == row.replaced_by
    for site, neuron in neurons(model).items():
        assert rows[site].replaced_by in ("SpikingLinear", "SpikingActivation")
        assert neuron.calibrated
    assert model.spikeform_report.method == "fas"
    assert model.spikeform_report.calibration["tokens"] == CALIBRATION.numel()


def test_gpt2():
    model = convert("gpt2")
    assert sorted(neurons(model)) == ["transformer.h.0.mlp.c_proj", "transformer.h.1.mlp.c_proj"]
    assert all(not n.signed and n.positional for n in neurons(model).values())
    assert isinstance(model.transformer.h[0].mlp.act, nn.Identity)
    everywhere = neurons(convert("gpt2", sites="all"))
    assert len(everywhere) == 8
    assert all(n.signed != site.endswith("mlp.c_proj") for site, n in everywhere.items())


def test_gated_feed_forward_blocks():
    model = convert("llama")
    assert sorted(neurons(model)) == ["model.layers.0.mlp.act_fn", "model.layers.1.mlp.act_fn"]
    assert isinstance(model.model.layers[0].mlp.act_fn, SpikingActivation)
    assert model.model.layers[0].mlp.down_proj.neuron is None
    model = convert("llama", gated="product")
    assert sorted(neurons(model)) == ["model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"]
    assert all(n.signed for n in neurons(model).values())
    assert (
        isinstance(model.model.layers[0].mlp.act_fn, nn.SiLU)
        or "SiLU" in type(model.model.layers[0].mlp.act_fn).__name__
    )
    assert len(neurons(convert("llama", gated="product", sites="all"))) == 14
    assert len(neurons(convert("llama", sites="all"))) == 16


def test_bert_goes_on_after_its_blocks():
    found = neurons(convert("bert"))
    assert found["bert.pooler.activation"].positional is False
    assert found["bert.encoder.layer.0.output.dense"].positional is True
    assert "cls.predictions.transform.transform_act_fn" in neurons(convert("bert_mlm"))


def test_shapes_of_parameters():
    for options, threshold, calibrated in (
        ({}, (1,), (1,)),
        ({"granularity": "channel"}, (1,), (112,)),
        ({"per_channel": True}, (112,), (1,)),
        ({"per_channel": True, "granularity": "position", "positions": 9}, (112,), (9, 112)),
    ):
        for neuron in neurons(convert("llama", **options)).values():
            assert neuron.threshold.shape == threshold
            assert neuron.scale.shape == neuron.initial.shape == calibrated
            assert neuron.threshold.requires_grad
            assert not neuron.scale.requires_grad
            assert not neuron.initial.requires_grad
    bert = neurons(convert("bert", granularity="position", positions=9))
    assert bert["bert.pooler.activation"].scale.shape == (64,)


def test_thresholds_from_the_config():
    model = spikeform.convert(families.build("gpt2"), spikeform.FAS(steps=2, threshold=3.0))
    assert all(n.threshold.item() == 3.0 for n in neurons(model).values())
    assert model.spikeform_report.calibration == {"source": "thresholds given in the config"}


@pytest.mark.parametrize("options", [{}, {"per_channel": True}, {"levels": 1}, {"sites": "all", "levels": 4}], ids=str)
def test_thresholds_from_data_are_near_the_best(options):
    """Half or twice a threshold makes the QCFS network of its layer no better."""
    for family in ("gpt2", "llama"):
        dense, model = families.build(family), convert(family, **{**options, "steps": 0})
        wanted = dense(input_ids=CALIBRATION).logits
        assert families.difference(wanted, model(input_ids=CALIBRATION).logits) < 1.2
        seen = {}
        handles = [
            n.register_forward_hook(lambda m, a, out, seen=seen: seen.update({m: a[0]}))
            for n in neurons(model).values()
        ]
        with torch.no_grad():
            model(input_ids=CALIBRATION)
            for handle in handles:
                handle.remove()
            for neuron, x in seen.items():
                dense_x = x if neuron.signed else x.clamp(min=0)
                found = neuron.threshold.clone()
                errors = []
                for factor in (1.0, 0.5, 2.0):
                    neuron.threshold.copy_(found * factor)
                    errors.append(float((neuron(x).decode() - dense_x).square().mean()))
                neuron.threshold.copy_(found)
                assert errors[0] <= 1.05 * min(errors), (neuron.site, errors)


@pytest.mark.parametrize("family", ["gpt2", "llama", "bert"])
def test_operators_are_few_spike_neurons_beside_it(family):
    model = convert(family, operators=8)
    kinds = {type(m).__name__ for m in model.modules()}
    assert {"SpikingNorm", "SpikingAttention"} <= kinds
    assert all(m.calibrated for m in model.modules() if isinstance(m, MT))
    assert neurons(model).keys() == neurons(convert(family)).keys()
    rows = {row.name: row.replaced_by for row in model.spikeform_report.rows if row.kind in ("norm", "attention")}
    assert all(rows.values())
    ids = families.tokens(rows=3, length=8)
    with torch.no_grad():
        real, spiking = convert(family)(input_ids=ids).logits, model(input_ids=ids).logits
    assert families.difference(real, spiking) < 0.5


def test_what_is_named_in_skip_stays_dense():
    model = convert("gpt2", skip=("transformer.h.0.mlp.act",))
    assert sorted(neurons(model)) == ["transformer.h.1.mlp.c_proj"]
    model = convert("llama", skip=("*.layers.0.*",))
    assert sorted(neurons(model)) == ["model.layers.1.mlp.act_fn"]
    rows = {row.name: row for row in model.spikeform_report.rows}
    assert rows["model.layers.0.mlp.act_fn"].reason == "named in skip"
    ids = families.tokens(rows=3, length=8)
    model.double()
    with torch.no_grad(), paused(model):
        assert model(input_ids=ids).logits.isfinite().all()
    close(model(input_ids=ids).logits[:1], model(input_ids=ids[:1]).logits)
    with pytest.raises(ConfigError, match=r"'\*.attention' names no module"):
        convert("llama", skip=("*.attention",))


def test_nothing_replaced_is_an_error():
    with pytest.raises(ConversionError, match="nothing in GPT2LMHeadModel could be converted"):
        convert("gpt2", skip=("*",))


def test_twice_is_an_error():
    with pytest.raises(ConversionError, match="converted already"):
        convert(convert("gpt2"))
    for config in (spikeform.FAS(), spikeform.LAS()):
        with pytest.raises(ConversionError, match="converted already"):
            spikeform.convert(convert("gpt2"), config, CALIBRATION)


def test_a_conversion_that_failed_half_way_is_not_begun_again():
    """Its modules are in, and its hooks would be put on twice."""
    for config in (spikeform.FAS(steps=2), spikeform.LAS(steps=8)):
        model = families.build("gpt2")
        with torch.no_grad():
            model.transformer.h[1].mlp.c_fc.weight[0, 0] = float("inf")
        with pytest.raises(CalibrationError, match="not finite"):
            spikeform.convert(model, config, CALIBRATION)
        with pytest.raises(ConversionError, match="failed half way; load the dense model anew"):
            spikeform.convert(model, spikeform.FAS(steps=2, sites="all"), CALIBRATION)


def test_files_are_marked_where_no_layer_receives_spikes():
    """Else a program without spikeform would load them as the dense model."""
    model = convert("llama", skip=("*.down_proj",))
    marked = [n for n, m in model.named_modules() if isinstance(m, SpikingLinear)]
    assert marked == ["model.layers.0.mlp.gate_proj", "model.layers.1.mlp.gate_proj"]
    rows = {row.name: row for row in model.spikeform_report.rows}
    assert rows[marked[0]].reason == "real values; marks the files as spiking"
    with pytest.raises(ConversionError, match="leave one of them out of skip"):
        convert("llama", skip=("*_proj",))


# Models that know no time --------------------------------------------------------------------------------------


def test_a_family_without_a_table_streams_where_it_can(tmp_path):
    """Nothing of its first block is computed once, since its attention is of an unknown type."""
    torch.manual_seed(0)
    config = GPTJConfig(vocab_size=120, n_embd=32, n_layer=2, n_head=2, rotary_dim=8, n_positions=32)
    dense, ids = GPTJForCausalLM(config).eval(), families.tokens(rows=4, length=8)
    model = convert(copy.deepcopy(dense).double(), steps=4)
    assert sorted(neurons(model)) == ["transformer.h.0.mlp.act", "transformer.h.1.mlp.act"]
    with torch.no_grad():
        whole = model(input_ids=ids).logits
        assert families.difference(whole[:1], model(input_ids=ids[:1]).logits) < 1e-6  # its softmax is in fp32
        first = model(input_ids=ids[:, :5], use_cache=True)
        rest = model(input_ids=ids[:, 5:], past_key_values=first.past_key_values).logits
    assert families.difference(whole, torch.cat([first.logits, rest], 1)) < 1e-6
    assert first.past_key_values.layers[0].keys.shape[0] == 4
    model = convert(dense)
    spikeform.save(model, tmp_path / "out")
    with torch.no_grad():
        assert torch.equal(spikeform.load(tmp_path / "out")(input_ids=ids).logits, model(input_ids=ids).logits)


def t5():
    sizes = {"vocab_size": 120, "d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2}
    return T5ForConditionalGeneration(T5Config(**sizes))


def albert():
    return AlbertModel(AlbertConfig(**SMALL, embedding_size=16, intermediate_size=64))


def attends(kind, config, **more):
    return lambda: kind(config(**SMALL, add_cross_attention=True, **more))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (t5, "attends to an encoder"),
        (attends(GPT2LMHeadModel, GPT2Config), "attends to an encoder"),
        (attends(BertLMHeadModel, BertConfig, is_decoder=True), "attends to an encoder"),
        (albert, "runs 2 blocks and has 1"),
    ],
    ids=["t5", "gpt2", "bert", "albert"],
)
def test_refused(build, message):
    with pytest.raises(ConversionError, match=message):
        spikeform.convert(build(), spikeform.FAS(threshold=1.0))


def test_experts_stay_dense():
    """They get the tokens that were routed to them, in rows that say nothing of steps."""
    model = MixtralForCausalLM(MixtralConfig(**SMALL, intermediate_size=64, num_key_value_heads=2, num_local_experts=4))
    with pytest.raises(ConversionError, match="nothing in MixtralForCausalLM could be converted"):
        spikeform.convert(model, spikeform.FAS(threshold=1.0))
