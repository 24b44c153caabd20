"""Law 7: replacing nothing is an error; the report says what spikes, what does not, and why."""

import copy

import pytest
import torch
from torch import nn
from transformers import BertForSequenceClassification, Gemma2Config, Gemma2ForCausalLM
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRMSNorm
from transformers.quantizers import AutoHfQuantizer

import families
import spikeform
from families import close, difference
from spikeform.conversion import ConversionReport
from spikeform.conversion.kinds import kind_of
from spikeform.errors import CalibrationError, ConfigError, ConversionError
from spikeform.layers import SpikingLinear, SpikingNorm

CALIBRATION = families.tokens(rows=4, length=16, seed=5)
GIVEN = dict.fromkeys(("linear", "query", "key", "value", "norm", "up", "act", "lm_head"), (4.0, 64.0))
GIVEN["probability"] = (0.1, 1.01)


def convert(model, **options):
    return spikeform.convert(model, spikeform.LAS(**options), CALIBRATION)


# What each family has: linear layers (with the classifier), norms, attentions, activations, gated blocks.
EXPECTED = {
    "gpt2": (8, 5, 2, 2, 0),
    "opt": (12, 5, 2, 2, 0),
    "opt_post_norm": (14, 4, 2, 2, 0),
    "llama": (14, 5, 2, 2, 2),
    "mistral": (14, 5, 2, 2, 2),
    "mistral_window": (14, 5, 2, 2, 2),
    "qwen2": (14, 5, 2, 2, 2),
    "qwen3": (14, 9, 2, 2, 2),
    "gpt_neox": (8, 5, 2, 2, 0),
    "phi": (12, 3, 2, 2, 0),
    "phi_qk_norm": (12, 7, 2, 2, 0),
    "gemma": (14, 5, 2, 2, 2),
    "bert": (14, 5, 2, 3, 0),
    "bert_mlm": (13, 6, 2, 3, 0),
}


@pytest.mark.parametrize("family", families.FAMILIES)
def test_everything_of_a_known_family_spikes(family, spiking):
    model = spiking(family)
    report = model.spikeform_report
    kinds = [row.kind for row in report.replaced]
    found = tuple(kinds.count(k) for k in ("linear", "norm", "attention", "activation", "gated_mlp"))
    assert found == EXPECTED[family]
    stays = {row.kind for row in report.dense}
    assert stays <= {"embedding", "linear"}, report.dense
    assert all(row.reason for row in report.rows)
    heads = [row for row in report.dense if row.kind == "linear"]
    assert all("lm_head" in row.reason for row in heads)
    assert len(heads) == (family != "bert")
    # What the report says is what is there: no dense linear layer or norm that it does not name.
    named = {row.name for row in report.dense}
    for name, module in model.named_modules():
        if kind_of(module) in ("linear", "norm", "activation", "gated_mlp"):
            assert name in named
    for row in report.replaced:
        child = model.get_submodule(row.name)
        assert type(child.spiking if row.kind == "attention" else child).__name__ == row.replaced_by
    assert report.calibration["tokens"] == 16 * 24
    assert ConversionReport.from_dict(report.to_dict()) == report


@pytest.mark.parametrize("family", ["gpt2", "llama", "bert"])
def test_nothing_replaced_is_an_error(family, dense):
    with pytest.raises(ConversionError, match=r"nothing in .* could be converted"):
        convert(copy.deepcopy(dense(family)), skip=("*",))


def test_what_is_converted_already_is_refused(spiking, tmp_path):
    model = spiking("llama")
    with pytest.raises(ConversionError, match="converted already"):
        convert(model)
    model.save_pretrained(tmp_path)
    with pytest.raises(ConversionError, match="converted already"):
        convert(type(model).from_pretrained(tmp_path))


def test_what_is_quantized_otherwise_is_refused(dense):
    model = copy.deepcopy(dense("llama"))
    model.config.quantization_config = AutoHfQuantizer.merge_quantization_configs(
        {"quant_method": "fp8", "activation_scheme": "dynamic"}, None
    )
    with pytest.raises(ConversionError, match="quantized already"):
        convert(model)


@pytest.mark.parametrize("thing", [nn.Linear(3, 3), "gpt2", None])
def test_what_is_no_model_is_refused(thing):
    with pytest.raises(ConversionError, match="takes a transformers model"):
        convert(thing)


@pytest.mark.parametrize("config", [None, {"steps": 16}, spikeform.LAS])
def test_what_is_no_config_is_refused(config, dense):
    with pytest.raises(ConfigError, match=r"use one of: spikeform\.LAS"):
        spikeform.convert(dense("llama"), config)


class MyLinear(nn.Linear):
    """Computes something else than a linear layer does."""

    def forward(self, x):
        return super().forward(x) * 2


class MyBlock(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner, self.scale = inner, nn.Parameter(torch.tensor(0.5))

    def forward(self, x):
        return self.inner(x) * self.scale


class MyNorm(LlamaRMSNorm):
    pass


class MyAttention(LlamaAttention):
    pass


def test_unknown_modules_stay_as_they_are_and_are_reported(dense, logits):
    model = copy.deepcopy(dense("llama"))
    layer = model.model.layers[0]
    layer.mlp.up_proj.__class__ = MyLinear
    layer.mlp.down_proj = MyBlock(layer.mlp.down_proj)
    layer.input_layernorm.__class__ = MyNorm
    layer.self_attn.__class__ = MyAttention
    layer.mlp.act_fn = nn.Mish()
    wanted = logits(model)
    convert(model)
    rows = {row.name: row for row in model.spikeform_report.rows}
    for name, kind in {
        "model.layers.0.mlp.up_proj": "MyLinear",
        "model.layers.0.mlp.down_proj": "MyBlock",
        "model.layers.0.input_layernorm": "MyNorm",
        "model.layers.0.self_attn": "MyAttention",
        "model.layers.0.mlp.act_fn": "Mish",
    }.items():
        assert rows[name].replaced_by is None
        assert rows[name].kind == "unknown"
        assert kind in rows[name].reason
        assert type(model.get_submodule(name)).__name__ == kind
        assert name in model.spikeform_report.summary()
    assert rows["model.layers.0.mlp.down_proj.inner"].replaced_by == "SpikingLinear"
    assert rows["model.layers.1.self_attn"].replaced_by == "SpikingAttention"
    assert difference(wanted, logits(model)) < 1e-3


def test_a_module_used_twice_spikes_in_both_places(dense, logits):
    """Two names for one module: each place gets a neuron of its own."""
    model = copy.deepcopy(dense("gpt2"))
    first, second = model.transformer.h
    second.mlp.act, second.mlp.c_fc = first.mlp.act, first.mlp.c_fc
    wanted = logits(model)
    convert(model)
    for block in (first, second):
        assert type(block.mlp.act).__name__ == "SpikingActivation"
        assert isinstance(block.mlp.c_fc, SpikingLinear)
    assert difference(wanted, logits(model)) < 1e-3


def test_a_family_that_is_not_known_keeps_its_attention(logits):
    """Gemma 2 caps its scores: its attention stays dense, and computes what it did."""
    sizes = {
        "vocab_size": 120,
        "hidden_size": 64,
        "intermediate_size": 112,
        "num_hidden_layers": 2,
        "head_dim": 16,
    }
    torch.manual_seed(0)
    model = Gemma2ForCausalLM(
        Gemma2Config(**sizes, num_attention_heads=4, num_key_value_heads=2, attn_logit_softcapping=0.1)
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= 4
    wanted = logits(model)
    convert(model)
    rows = {row.name: row for row in model.spikeform_report.rows}
    assert "Gemma2Attention" in rows["model.layers.0.self_attn"].reason
    assert rows["model.layers.0.self_attn.q_proj"].replaced_by == "SpikingLinear"
    assert difference(wanted, logits(model)) < 1e-3


SWITCHES = {
    "norms": ("SpikingNorm", "norms is false"),
    "activations": ("SpikingActivation", "activations is false"),
}


@pytest.mark.parametrize("switch", SWITCHES)
@pytest.mark.parametrize("family", ["gpt2", "llama", "bert"])
def test_switches(family, switch, dense, logits):
    name, reason = SWITCHES[switch]
    model = convert(copy.deepcopy(dense(family)), **{switch: False})
    assert not any(type(m).__name__ == name for m in model.modules())
    assert any(row.reason == reason for row in model.spikeform_report.dense)
    assert difference(logits(dense(family)), logits(model)) < 1e-3


def test_softmax_may_stay_real(dense, logits):
    model = convert(copy.deepcopy(dense("llama")), softmax=False)
    attention = model.model.layers[0].self_attn.spiking
    assert attention.exp is None
    assert attention.reciprocal is None
    assert difference(logits(dense("llama")), logits(model)) < 1e-3


def test_the_head_may_spike(dense):
    model = convert(copy.deepcopy(dense("gpt2")), lm_head=True, per_channel=True)
    assert isinstance(model.lm_head, SpikingLinear)
    assert model.lm_head.weight is model.transformer.wte.weight
    assert model.lm_head.neuron.channel_shift is None  # nothing may be folded into a weight that the embedding shares


def test_skip_by_pattern(dense, logits):
    model = convert(copy.deepcopy(dense("llama")), skip=("*.layers.0.*", "*_layernorm"))
    for name, module in model.named_modules():
        if isinstance(module, SpikingLinear):
            assert ".layers.0." not in name
        assert not (isinstance(module, SpikingNorm) and name.endswith("_layernorm"))
    assert sum(row.reason == "named in skip" for row in model.spikeform_report.dense) == 14
    assert difference(logits(dense("llama")), logits(model)) < 1e-3


def test_attention_left_dense_is_the_familys_own(dense, logits):
    for family, pattern in (
        ("gpt2", "*.attn"),
        ("llama", "*.self_attn"),
        ("bert", "*.attention.self"),
        ("opt", "*.self_attn"),
    ):
        model = convert(copy.deepcopy(dense(family)), skip=(pattern, "*.1.*", "*.h.1.*")[: 2 + (family == "gpt2")])
        ids, mask = families.tokens(), torch.ones(2, 16, dtype=torch.long)
        mask[0, :4] = 0
        wanted = logits(dense(family), ids, attention_mask=mask)
        found = logits(model, ids, attention_mask=mask)
        if family != "bert":
            wanted, found = wanted[:, 4:], found[:, 4:]
        assert difference(wanted, found) < 1e-3, family


@pytest.mark.parametrize("pattern", ["*.layers.7.*", "model.layers.0", "lmhead"])
def test_a_pattern_that_names_nothing_is_an_error(pattern, dense):
    with pytest.raises(ConfigError, match="names no module"):
        convert(copy.deepcopy(dense("llama")), skip=(pattern,))
    with pytest.raises(ConfigError, match="neither a role"):
        convert(copy.deepcopy(dense("llama")), thresholds={pattern + ".x": (1.0, 2.0)})


def test_given_thresholds_need_no_data(dense, logits, monkeypatch):
    import spikeform.conversion.data as data

    monkeypatch.setattr(data, "sample", lambda *a: pytest.fail("sampled for nothing"))
    for family in ("gpt2", "llama", "bert"):
        model = spikeform.convert(copy.deepcopy(dense(family)), spikeform.LAS(thresholds=GIVEN))
        assert model.spikeform_report.calibration == {"source": "thresholds given in the config"}
        thresholds = {n: b.tolist() for n, b in model.named_buffers() if n.endswith("threshold")}
        assert all(t == [4.0, 64.0] for n, t in thresholds.items() if "probability" not in n)
        assert difference(logits(dense(family)), logits(model)) < 5e-2


def test_a_site_goes_before_a_pattern_goes_before_a_role(dense):
    site = "model.layers.0.self_attn.q_proj"
    table = {**GIVEN, "*_proj": (2.0, 16.0), site: (1.0, 8.0)}
    model = spikeform.convert(copy.deepcopy(dense("llama")), spikeform.LAS(thresholds=table))
    assert model.get_submodule(site).neuron.threshold.tolist() == [1.0, 8.0]
    assert model.model.layers[0].self_attn.k_proj.neuron.threshold.tolist() == [2.0, 16.0]
    assert model.model.layers[0].self_attn.spiking.key.threshold.tolist() == [4.0, 64.0]


def test_some_given_some_calibrated(dense):
    model = convert(copy.deepcopy(dense("llama")), thresholds={"query": (3.0, 48.0)})
    assert model.model.layers[1].self_attn.spiking.query.threshold.tolist() == [3.0, 48.0]
    assert model.model.layers[1].self_attn.spiking.key.calibrated


def test_saturation_is_counted_and_reported(dense, spiking):
    assert spiking("llama").spikeform_report.saturation == {}
    low = convert(copy.deepcopy(dense("llama")), margin=0.25)
    shares = low.spikeform_report.saturation
    assert shares
    assert all(0 < share < 0.5 for share in shares.values())
    assert not any("probability" in site for site in shares)


def test_training_mode_and_sharing_are_kept(dense):
    model = copy.deepcopy(dense("qwen3")).train()
    convert(model)
    assert model.training
    assert model.model.layers[0].self_attn.q_proj.training
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_models_without_a_head(dense, logits):
    """A bare backbone runs with a cache unless told not to: calibration must not see it twice."""
    backbone = copy.deepcopy(dense("llama")).model
    ids = families.tokens()
    with torch.no_grad():
        wanted = backbone(ids).last_hidden_state
        convert(backbone)
        assert difference(wanted, backbone(ids).last_hidden_state) < 1e-3
    whole = copy.deepcopy(dense("llama"))
    convert(whole)
    thresholds = dict(whole.model.named_buffers())
    for name, buffer in backbone.named_buffers():
        if name.endswith("threshold"):
            assert torch.equal(buffer, thresholds[name]), name


def test_activations_that_are_not_finite_are_refused(dense):
    model = copy.deepcopy(dense("llama"))
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = float("inf")
    with pytest.raises(CalibrationError, match="activations are not finite"):
        convert(model)


def test_a_classifier_is_a_linear_layer_like_others(spiking):
    model = spiking("bert")
    assert isinstance(model, BertForSequenceClassification)
    assert isinstance(model.classifier, SpikingLinear)


def test_close_is_strict():
    with pytest.raises(AssertionError):
        close(torch.ones(3), torch.tensor([1.0, 1.0, 1.00001]))
