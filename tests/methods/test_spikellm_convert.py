"""Converting with SpikeLLM: what a user may bring, what every option does, and what is refused with one clear error."""

import copy
from functools import cache

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

import families
import spikeform
from families import difference
from spikeform.errors import CalibrationError, ConfigError, ConversionError
from spikeform.layers import CodedLinear, SpikingAttention, SpikingLinear
from spikeform.neurons import GIF
from spikeform.pretrained.twin import outlier_twin
from spikeform.synapses import EXECUTORS

CALIBRATION = families.tokens(rows=4, length=16, seed=5)
IDS = families.tokens()


def convert(model="llama", ids=CALIBRATION, **options):
    model = families.build(model) if isinstance(model, str) else model
    return spikeform.convert(model, spikeform.SpikeLLM(**{"epochs": 0, **options}), ids)


@cache
def converted(family="llama", twin=False, **options):
    model = outlier_twin(families.build(family), scales=(16.0, 256.0)) if twin else families.build(family)
    return convert(model, **options)


@torch.no_grad()
def logits(model, ids=IDS, **more):
    return model(input_ids=ids, **more).logits


def times(model):
    return {n: m.times for n, m in model.named_modules() if isinstance(m, GIF)}


def linear_times(model):
    return {n: m.neuron.times for n, m in model.named_modules() if isinstance(m, SpikingLinear)}


# What a user may bring -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"epochs": 1},
        {"rotate": True},
        {"pipeline": "gptq", "let": True},
        {"weight_bits": 16, "epochs": 1},
        {"key_axis": "channel", "signed": False},
        {"pipeline": "gptq", "weight_form": "partial_binary", "weight_steps": (1, 8), "weight_salient": (0.1,)},
    ],
    ids=lambda o: ",".join(o),
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype, options, tmp_path):
    """About as good as fp32, and executors agree bit for bit all the same."""
    families.build("llama").save_pretrained(tmp_path)
    model = convert(AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype), **options)
    assert all(p.dtype == dtype for p in model.parameters())
    wanted, out = logits(families.build("llama")), logits(model)
    assert out.dtype == dtype
    assert difference(wanted, out) < 1.15 * difference(wanted, logits(converted(**options))) + 0.02
    if isinstance(model.model.layers[0].mlp.up_proj, CodedLinear):
        for name in EXECUTORS:
            with spikeform.executor(name):
                assert torch.equal(logits(model), out)


def test_calibration_of_its_own():
    model = convert(ids=None)
    assert model.spikeform_report.calibration["source"] == "sampled from the dense model"
    assert torch.equal(logits(model), logits(convert(ids=None)))
    assert convert("bert_mlm", ids=None).spikeform_report.calibration["source"] == "random tokens"


def test_texts_of_any_length(tiny_llama, tokenizer):
    texts = ["One.", "", "A longer text than that, so that there are batches of several lengths.", "x"]
    model = spikeform.convert(tiny_llama(), spikeform.SpikeLLM(epochs=1), texts, tokenizer)
    assert model.spikeform_report.calibration["sequences"] == 4
    assert {t for n in times(model).values() for t in n.unique().tolist()} == {1, 2}


@pytest.mark.parametrize(
    "options", [{"epochs": 1}, {"pipeline": "gptq"}, {"rotate": True}, {"key_axis": "channel"}], ids=str
)
def test_one_token_of_calibration(options):
    assert logits(convert(ids=torch.tensor([[5]]), **options)).isfinite().all()


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([], "holds no text"),
        ([" "], "holds no text"),
        (torch.zeros(0, 5, dtype=torch.long), "holds no tokens"),
        (torch.full((1, 4), 500), "0 to 119"),
        (torch.zeros(2, 3), "integers"),
        ("text", "needs a tokenizer"),
        ([1, 2], "must be texts"),
    ],
    ids=str,
)
def test_calibration_that_cannot_be_used(ids, message):
    model = families.build("llama")
    with pytest.raises(CalibrationError, match=message):
        convert(model, ids)
    assert not hasattr(model, "spikeform_report")
    assert torch.equal(logits(model), logits(families.build("llama")))  # it is untouched


def test_models_that_cannot_be_converted():
    model = copy.deepcopy(converted())
    for config in (spikeform.SpikeLLM(), spikeform.LAS(steps=4)):
        with pytest.raises(ConversionError, match="converted already"):
            spikeform.convert(model, config, CALIBRATION)
    assert torch.equal(logits(model), logits(converted()))
    quantized = families.build("llama")
    quantized.config.quantization_config = {"quant_method": "bitsandbytes"}
    with pytest.raises(ConversionError, match="quantized already"):
        convert(quantized)
    with pytest.raises(ConversionError, match="transformers model, got Linear"):
        convert(nn.Linear(3, 3))


def test_a_model_without_values():
    with torch.device("meta"):
        empty = type(families.build("llama"))(families.build("llama").config)
    with pytest.raises(ConversionError, match="meta"):
        convert(empty)


def test_weights_that_are_not_finite():
    model = families.build("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    for options in ({}, {"epochs": 1}, {"pipeline": "gptq"}, {"rotate": True}):
        with pytest.raises((CalibrationError, ConversionError), match="finite"):
            convert(copy.deepcopy(model), **options)


@pytest.mark.parametrize("options", [{}, {"pipeline": "gptq"}, {"allocation": "energy"}], ids=str)
def test_a_layer_that_no_text_reaches(options):
    model = families.build("llama")
    model.model.layers[0].mlp.unused = nn.Linear(64, 8)
    with pytest.raises(CalibrationError, match=r"layers\.0\.mlp\.unused saw no calibration input; leave it dense"):
        convert(model, **options)
    model = families.build("llama")
    model.model.layers[0].mlp.unused = nn.Linear(64, 8)
    assert logits(convert(model, skip=("*.unused",), **options)).isfinite().all()


def test_half_a_conversion_is_not_converted_again():
    model = families.build("llama")

    def fail(done, blocks):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        spikeform.convert(model, spikeform.SpikeLLM(epochs=0), CALIBRATION, progress=fail)
    with pytest.raises(ConversionError, match="failed half way"):
        convert(model)


def test_rotation_of_post_norm_models_is_refused():
    for family in ("bert", "opt_post_norm"):
        model = families.build(family)
        with pytest.raises(ConversionError, match="rotate"):
            convert(model, rotate=True)
        assert torch.equal(logits(model), logits(families.build(family)))


@pytest.mark.parametrize("training", [True, False])
def test_modes_and_gradients_are_left_as_they_were(training):
    model = families.build("llama").train(training)
    model.lm_head.weight.requires_grad_(False)
    with torch.no_grad():
        convert(model, epochs=1)
    assert all(m.training == training for m in model.modules())
    assert not model.lm_head.weight.requires_grad
    assert model.model.norm.weight.requires_grad
    assert all(p.grad is None and p.is_leaf for p in model.parameters())
    assert torch.equal(logits(model.eval()), logits(converted(epochs=1)))  # no dropout, no grad mode has a say


@pytest.mark.parametrize(("skip", "error"), [(("*.nothing",), "names no module"), (("mlp",), "names no module")])
def test_skip_patterns_that_name_nothing(skip, error):
    with pytest.raises(ConfigError, match=error):
        convert(skip=skip)


# What the options do ---------------------------------------------------------------------------------------------


def test_saliency_decides_the_masks():
    masks = {s: times(converted(saliency=s)) for s in ("obs", "diagonal", "magnitude", "random")}
    for first in masks:
        for second in masks:
            same = [torch.equal(masks[first][n], masks[second][n]) for n in masks[first] if not n.endswith("query")]
            assert all(same) if first == second else sum(same) < len(same) / 2, (first, second)
    assert all(bool((t == 1).all()) for t in times(converted(saliency="none")).values())
    assert times(converted(saliency="random", seed=0)).keys() == masks["random"].keys()
    other = times(converted(saliency="random", seed=1))
    assert not any(torch.equal(other[n], t) for n, t in masks["random"].items() if not n.endswith("query"))


def test_magnitude_takes_the_largest_inputs():
    plain, seen = families.build("gpt2"), {}
    layer = plain.transformer.h[0].mlp.c_proj
    layer.register_forward_pre_hook(lambda m, args: seen.update(x=args[0].abs().flatten(0, -2).amax(0)))
    logits(plain, CALIBRATION)
    found = converted("gpt2", saliency="magnitude").transformer.h[0].mlp.c_proj.neuron.times
    most = seen["x"].argsort(descending=True)[: int((found == 2).sum())]
    assert int((found == 2).sum()) == len(found) - int(0.9 * len(found))
    assert bool((found[most] == 2).all())


def test_shared_masks_are_those_of_one_input():
    for masks in ("shared", "own"):
        found = linear_times(converted(masks=masks))
        for block in (0, 1):
            for names in (
                ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
                ("mlp.gate_proj", "mlp.up_proj"),
            ):
                first, *rest = (found[f"model.layers.{block}.{name}"] for name in names)
                assert all(torch.equal(first, other) for other in rest) == (masks == "shared")


@pytest.mark.parametrize("allocation", ["budget", "sensitivity", "energy"])
def test_budgets_are_kept_and_used(allocation):
    for budget in (1.0, 1.25):
        model = converted(allocation=allocation, budget=budget, steps=4)
        found = linear_times(model)
        macs = {n: model.get_submodule(n).out_features for n in found}
        spent = sum(float(t.double().sum()) * macs[n] for n, t in found.items())
        share = spent / sum(t.numel() * macs[n] for n, t in found.items())
        if allocation == "energy" and budget > 1:  # the budget is of spikes, which salient channels send more of
            assert 1.0 < share < 1.5
        else:
            assert 0.97 * budget <= share <= budget + 1e-9, share
        # What the neurons do is what they say.
        for name, t in found.items():
            tables = model.get_submodule(name).neuron.tables()
            assert torch.equal(tables.top, 15.0 * t), name
    mean = {
        float(t.double().mean()) for t in linear_times(converted(allocation=allocation, budget=1.25, steps=4)).values()
    }
    assert len(mean) > 5  # every layer has a share of its own


def test_the_closed_form_transformation_needs_no_epochs():
    for pipeline in ("gptq", "rtn"):
        first, second = (converted(pipeline=pipeline, let=True, epochs=e) for e in (0, 7))
        assert torch.equal(logits(first), logits(second))
        assert not torch.equal(logits(first), logits(converted(pipeline=pipeline)))


@pytest.mark.parametrize("family", ["gpt2", "opt", "llama", "qwen3", "gpt_neox", "phi"])
def test_outlier_channels_are_undone_by_the_transformation_and_by_rotation(family):
    """A twin, its channels up to 256 times larger, is converted to the same model, its masks too."""
    wanted = logits(families.build(family))
    for options in (
        {},
        {"rotate": True},
        {"masks": "shared", "saliency": "diagonal"},
        {"pipeline": "gptq", "let": True},
    ):
        plain, twin = converted(family, **options), converted(family, True, **options)
        assert all(torch.equal(t, times(twin)[n]) for n, t in times(plain).items()), options
        assert difference(logits(plain), logits(twin)) < 1e-4, options
    bare = {"let": False}
    assert difference(wanted, logits(converted(family, True, **bare))) > 2 * difference(
        wanted, logits(converted(family, **bare))
    )


def test_heads_are_rotated_or_not(tmp_path):
    model = convert("llama", pipeline="rtn", rotate=True, rotate_heads=False)
    attentions = [m for m in model.modules() if isinstance(m, SpikingAttention)]
    assert attentions
    assert all(attention.signs is None for attention in attentions)
    whole = convert("llama", pipeline="rtn", rotate=True)
    assert all(m.signs is not None for m in whole.modules() if isinstance(m, SpikingAttention))
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(type(model).from_pretrained(tmp_path)), logits(model))
    assert difference(logits(families.build("llama")), logits(model)) < 0.6


def test_learning_lowers_each_blocks_error():
    """Of the first block: what reaches the second differs."""
    for options in ({}, {"let": False}, {"lwc": False}, {"weight_bits": 16}, {"bits": 16}):
        before, after = (
            converted("opt", **options, epochs=e).spikeform_report.calibration["blocks"][0] for e in (0, 3)
        )
        assert after["error"] < before["error"], options


def test_gptq_beats_rounding():
    for options in ({"weight_bits": 3}, {"weight_form": "ternary", "weight_steps": (1, 2), "weight_salient": (0.2,)}):
        errors = [
            sum(
                b["error"]
                for b in converted("opt", pipeline=p, bits=8, **options).spikeform_report.calibration["blocks"]
            )
            for p in ("gptq", "rtn")
        ]
        assert errors[0] < 0.8 * errors[1], options


def test_tiers_of_weights():
    """Salient input channels have finer weights, as many of them as was asked."""
    options = {"pipeline": "gptq", "weight_form": "ternary", "weight_steps": (1, 2, 4), "weight_salient": (0.25, 0.125)}
    for layer in converted("gpt2", **options).modules():
        if isinstance(layer, CodedLinear):
            counts = layer.tier.long().bincount(minlength=3).tolist()
            k = layer.in_features
            assert counts == [k - round(0.25 * k) - round(0.125 * k), round(0.25 * k), round(0.125 * k)]
            for tier, most in enumerate((1, 2, 4)):
                assert int(layer.weight[:, layer.tier == tier].abs().max()) == most


def test_partly_binary_weights_are_mostly_two_values_a_row():
    options = {"pipeline": "gptq", "weight_form": "partial_binary", "weight_steps": (1, 8), "weight_salient": (0.1,)}
    model = converted("gpt2", **options, block_size=64)
    weight = model.transformer.h[0].attn.c_attn.weight.detach()
    assert not isinstance(model.transformer.h[0].attn.c_attn, CodedLinear)
    shares = [torch.unique(row, return_counts=True)[1].sort(descending=True)[0][:2].sum() / len(row) for row in weight]
    assert 0.85 < float(torch.stack(shares).mean()) < 0.97


def test_what_stays_real():
    model = converted(attention=False)
    assert not any(isinstance(m, SpikingAttention) for m in model.modules())
    model = converted(bits=16)
    assert not times(model)
    assert all(m.neuron is None for m in model.modules() if isinstance(m, CodedLinear))
    model = converted(weight_bits=16, let=False)
    plain = dict(families.build("llama").named_parameters())
    assert all(torch.equal(p, plain[n]) for n, p in model.named_parameters())


def test_progress_is_told():
    seen = []
    config = spikeform.SpikeLLM(epochs=0)
    spikeform.convert(families.build("gpt2"), config, CALIBRATION, progress=lambda *a: seen.append(a))
    assert seen == [(1, 2), (2, 2)]
