"""SpikeLLM's options: each bad one is one clear error that names it, and a config survives every way of writing it."""

import json
from dataclasses import fields, replace

import pytest

import spikeform
from spikeform.cli.recipe import read_config
from spikeform.conversion.registry import config_from_dict
from spikeform.errors import ConfigError, NewerFormatError
from spikeform.methods.spikellm.config import SpikeLLM

TERNARY = {"pipeline": "gptq", "weight_form": "ternary"}
BAD = [
    ("pipeline", "awq"),
    ("pipeline", None),
    *[("bits", value) for value in (1, 0, 9, 15, 4.0, True, "4", None, float("nan"))],
    *[("weight_bits", value) for value in (0, 9, 32, 4.0, True, "4")],
    *[("steps", value) for value in (0, 3, 16, 2.0, True, "2")],
    *[("salient", value) for value in (-0.1, 1.1, float("nan"), float("inf"), "0.1", True, None)],
    ("saliency", "hessian"),
    ("allocation", "equal"),
    *[("budget", value) for value in (0.9, float("inf"), float("nan"), "1.1", True)],
    ("masks", "layer"),
    ("signed", 1),
    ("signed", "yes"),
    ("form", "ternary"),
    ("span", "own"),
    ("key_axis", "sequence"),
    ("attention", 1),
    *[("probability_bits", value) for value in (3, 17, 8.0, True)],
    *[("lm_head", value) for value in ("int4", True, 8, None)],
    ("weight_form", "binary"),
    *[("weight_steps", value) for value in ((), (2, 1), (1, 1), (3,), (1.0,), (True,), (0,), "1", 1, (16,))],
    *[("weight_salient", value) for value in ((0.1,), "0.1", 0.1)],
    ("rotate", 1),
    ("rotate_heads", 1),
    ("lwc", 1),
    ("let", "yes"),
    *[("epochs", value) for value in (-1, 1.5, True)],
    *[("batch_size", value) for value in (0, -1, 1.0)],
    *[(name, value) for name in ("lwc_lr", "let_lr", "damp") for value in (0.0, -1.0, float("nan"), float("inf"), "1")],
    *[("alpha", value) for value in (-0.1, 1.5, float("nan"), True)],
    *[("block_size", value) for value in (0, 1.0)],
    *[("sweeps", value) for value in (-1, 1.0, True)],
    ("act_order", 0),
    *[("seed", value) for value in (-1, 1.0, True)],
    *[("skip", value) for value in ("*.mlp", (1,), None)],
    *[("version", value) for value in (0, 1.0, True, "1")],
]


@pytest.mark.parametrize(("name", "value"), BAD, ids=lambda x: repr(x))
def test_a_bad_value_names_its_option(name, value):
    with pytest.raises(ConfigError) as caught:
        SpikeLLM(**{name: value})
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_every_option_is_tried_above():
    assert {name for name, _ in BAD} == {f.name for f in fields(SpikeLLM)}


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"bits": 16, "weight_bits": 16}, "bits and weight_bits"),
        ({"weight_steps": (1, 2)}, "weight_salient"),
        ({"weight_steps": (1, 2), "weight_salient": (0.1, 0.1)}, "weight_salient"),
        ({"weight_steps": (1, 2), "weight_salient": (0.0,)}, "weight_salient"),
        ({"weight_steps": (1, 2), "weight_salient": (float("nan"),)}, "weight_salient"),
        ({"weight_steps": (1, 2), "weight_salient": ("0.1",)}, "weight_salient"),
        ({"weight_steps": (1, 2, 4), "weight_salient": (0.6, 0.5)}, "weight_salient"),
        ({"weight_form": "ternary"}, "weight_form ternary"),
        ({"weight_form": "partial_binary"}, "weight_form partial_binary"),
        ({"weight_form": "partial_binary", "pipeline": "rtn"}, "partial_binary"),
        ({"weight_form": "partial_binary", "pipeline": "gptq"}, "weight_steps"),
        ({"weight_bits": 16, "pipeline": "gptq"}, "weight_bits 16"),
        ({"weight_bits": 16, "pipeline": "rtn"}, "weight_bits 16"),
        ({"weight_bits": 16, "weight_steps": (1, 2), "weight_salient": (0.1,)}, "weight_bits 16"),
        ({"lwc": True, "pipeline": "rtn"}, "lwc"),
        ({"lwc": True, "weight_bits": 16}, "lwc"),
        ({"allocation": "budget", "bits": 16}, "allocation budget"),
        ({"allocation": "energy", "saliency": "none"}, "allocation energy"),
    ],
    ids=str,
)
def test_contradictions_are_named(options, named):
    with pytest.raises(ConfigError, match=named):
        SpikeLLM(**options)


GOOD = [
    {},
    {"pipeline": "rtn", "lwc": False, "let": True},
    {"bits": 16, "weight_bits": 2, "attention": False},
    {"weight_bits": 16, "epochs": 0},
    {**TERNARY, "weight_steps": [1, 2, 4], "weight_salient": [0.2, 0.1], "act_order": True},
    {"pipeline": "gptq", "weight_form": "partial_binary", "weight_steps": (1, 8), "weight_salient": (0.05,)},
    {"allocation": "sensitivity", "budget": 1, "saliency": "diagonal", "masks": "shared", "steps": 8},
    {"signed": False, "form": "official", "span": "separate", "key_axis": "channel", "skip": ["a.*", "b"]},
    {"steps": 1, "salient": 0, "saliency": "none"},
    {"lm_head": "int8"},
]


@pytest.mark.parametrize("options", GOOD, ids=str)
def test_round_trips(options):
    config = SpikeLLM(**options)
    data = json.loads(json.dumps(config.to_dict()))
    assert data["quant_method"] == "spikeform_spikellm"
    assert SpikeLLM.from_dict(data) == config
    assert config_from_dict(data) == config
    assert type(SpikeLLM.from_dict(data).weight_steps) is tuple
    named = {k: v for k, v in data.items() if k != "quant_method"} | {"method": "spikellm"}
    assert config_from_dict(named) == config
    assert replace(config, seed=3) == SpikeLLM(**{**options, "seed": 3})


def test_a_recipe(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "method: spikellm\npipeline: gptq\nweight_form: ternary\nweight_steps: [1, 2]\nweight_salient: [0.2]\n"
    )
    assert read_config(recipe=path) == SpikeLLM(**TERNARY, weight_steps=(1, 2), weight_salient=(0.2,))
    assert read_config(recipe=path).lm_head == SpikeLLM().lm_head == "real"  # a recipe from before there was a choice
    path.write_text("method: spikellm\nlm_head: int8\n")
    assert read_config(recipe=path) == SpikeLLM(lm_head="int8")
    path.write_text("method: spikellm\nsteps: 3\n")
    with pytest.raises(ConfigError, match="steps must be one of 1, 2, 4, 8, got 3"):
        read_config(recipe=path)


def test_a_whole_config_takes_another_pipeline():
    """What is left to the pipeline stays so in what ``to_dict`` writes."""
    data = SpikeLLM().to_dict() | {"pipeline": "gptq"}
    assert SpikeLLM.from_dict(data) == replace(SpikeLLM(), pipeline="gptq") == SpikeLLM(pipeline="gptq")
    with pytest.raises(ConfigError, match="lwc"):
        SpikeLLM.from_dict(data | {"lwc": True})


def test_keys_that_are_not_known():
    with pytest.raises(ConfigError, match="unknown SpikeLLM option addbit"):
        SpikeLLM.from_dict({"addbit": 1})
    with pytest.raises(ConfigError, match="quant_method"):
        SpikeLLM.from_dict({"quant_method": "spikeform_las"})
    with pytest.raises(NewerFormatError, match="upgrade spikeform"):
        SpikeLLM.from_dict({"version": 2, "new_option": 1})


def test_it_is_frozen_and_known():
    config = SpikeLLM()
    with pytest.raises(ConfigError, match="frozen"):
        config.steps = 4
    assert spikeform.SpikeLLM is SpikeLLM
    assert all(f.metadata["help"] for f in fields(SpikeLLM))


def test_the_papers_settings_are_the_defaults():
    config = SpikeLLM()
    assert (config.bits, config.weight_bits, config.steps, config.salient) == (4, 4, 2, 0.1)
    assert (config.saliency, config.allocation, config.masks, config.span) == ("obs", "fraction", "own", "shared")
    assert (config.clips, config.transforms, config.spikes, config.codes) == (True, True, True, True)
    gptq = SpikeLLM(pipeline="gptq")
    assert (gptq.clips, gptq.transforms) == (False, False)
