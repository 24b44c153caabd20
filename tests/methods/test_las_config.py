"""The configuration of LAS: every bad value is one clear error that names it."""

import copy
import json
import pickle

import pytest
from transformers.utils.quantization_config import QuantizationConfigMixin

import spikeform
from spikeform.conversion import config_from_dict
from spikeform.errors import ConfigError, NewerFormatError, SpikeformError

LAS = spikeform.LAS

BAD = [
    ("steps", 0),
    ("steps", 17),
    ("steps", -1),
    ("steps", 1.5),
    ("steps", 8.0),
    ("steps", True),
    ("steps", "8"),
    ("steps", None),
    ("coding", "ternary"),
    ("coding", None),
    ("coding", ["radix2"]),
    ("levels", 1),
    ("levels", 3),
    ("levels", 2.0),
    ("levels", True),
    ("rounding", "ceil"),
    ("threshold", "max"),
    ("nonlinear", "table"),
    ("quantile", 0.0),
    ("quantile", 1.1),
    ("quantile", float("nan")),
    ("quantile", True),
    ("margin", 0),
    ("margin", -1.0),
    ("margin", float("inf")),
    ("margin", float("nan")),
    ("margin", "2"),
    ("outlier", 1),
    ("per_channel", "yes"),
    ("softmax", None),
    ("norms", 0),
    ("activations", 2),
    ("lm_head", "true"),
    ("skip", "lm_head"),
    ("skip", None),
    ("skip", 5),
    ("skip", ("a", 1)),
    ("units", "powers"),
    ("units", None),
    ("weight_bits", 4),
    ("weight_bits", 8.0),
    ("weight_bits", "8"),
    ("thresholds", []),
    ("thresholds", {"linear": (1.0,)}),
    ("thresholds", {"linear": 1.0}),
    ("thresholds", {"linear": (2.0, 1.0)}),
    ("thresholds", {"linear": (1.0, 1.0)}),
    ("thresholds", {"linear": (0.0, 1.0)}),
    ("thresholds", {"linear": (1.0, float("nan"))}),
    ("thresholds", {"linear": (1.0, float("inf"))}),
    ("thresholds", {"linear": ("1", "2")}),
    ("thresholds", {1: (1.0, 2.0)}),
    ("version", 0),
    ("version", 1.0),
    ("version", True),
    ("version", "1"),
]


@pytest.mark.parametrize(("name", "value"), BAD, ids=str)
def test_a_bad_value_is_named(name, value):
    for make in (lambda: LAS(**{name: value}), lambda: LAS.from_dict({name: value})):
        with pytest.raises(ConfigError, match=name):
            make()
    assert issubclass(ConfigError, SpikeformError)
    assert issubclass(ConfigError, ValueError)


GOOD = [
    LAS(),
    LAS(steps=1, coding="multi_threshold", levels=4, rounding="strict", outlier=False, threshold="quantile"),
    LAS(skip=("a*", "b"), thresholds={"query": (1.0, 2.5), "*.key": (0.5, 1)}, per_channel=True, lm_head=True),
    LAS(units="power_of_two", weight_bits=8, coding="signed_digit", thresholds={"query": (0.5, 4), "norm": (0.3, 1)}),
]


@pytest.mark.parametrize("config", GOOD, ids=range(len(GOOD)))
def test_round_trips(config):
    data = config.to_dict()
    assert data["quant_method"] == "spikeform_las"
    assert LAS.from_dict(json.loads(json.dumps(data))) == config
    assert config_from_dict(data) == config
    assert config_from_dict({**data, "quant_method": None, "method": "las"}) == config
    assert copy.deepcopy(config) == config
    assert pickle.loads(pickle.dumps(config)) == config  # noqa: S301
    assert json.loads(config.to_json_string(use_diff=False)) == json.loads(json.dumps(data))
    assert isinstance(config, QuantizationConfigMixin)
    assert LAS.from_dict(data, return_unused_kwargs=True, other=1) == (config, {"other": 1})


def test_unknown_keys_and_methods():
    with pytest.raises(ConfigError, match="unknown LAS option step; known: activations"):
        LAS.from_dict({"step": 8})
    with pytest.raises(TypeError, match="step"):
        LAS(step=8)
    with pytest.raises(ConfigError, match="unknown method 'fast'; known: las"):
        config_from_dict({"method": "fast"})
    with pytest.raises(ConfigError, match="unknown method ''"):
        config_from_dict({})
    with pytest.raises(ConfigError, match="gptq"):
        LAS.from_dict({"quant_method": "gptq", "steps": 4})


def test_a_newer_version():
    for data in ({"version": 2}, {"version": 99, "something_new": True}):
        with pytest.raises(NewerFormatError, match="upgrade spikeform"):
            LAS.from_dict(data)


def test_it_is_frozen():
    config = LAS(steps=4)
    with pytest.raises(ConfigError, match="frozen"):
        config.steps = 5
    assert config.update(steps=5) == {"steps": 5}
    assert config.steps == 4
