import dataclasses
import json

import pytest

from spikeform.errors import ConfigError, NewerFormatError
from spikeform.training import TrainOptions


def test_round_trip():
    options = TrainOptions(task="masked", steps=7, learning_rate=1e-3, bf16=True, freeze=["*embed*"])
    assert json.loads(json.dumps(options.to_dict())) == options.to_dict()
    assert TrainOptions.from_dict(options.to_dict()) == options
    with pytest.raises(dataclasses.FrozenInstanceError):
        options.steps = 8


def test_numbers_that_yaml_takes_for_text():
    assert TrainOptions.from_dict({"learning_rate": "1e-3", "epochs": 2}).learning_rate == 1e-3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stepps": 3}, "unknown training option stepps; known: accumulate,"),
        ({"task": "sing"}, "task must be one of causal, masked, classify"),
        ({"schedule": None}, "schedule must be one of"),
        ({"window": 1}, "window must be a whole number of at least 2"),
        ({"batch_size": True}, "batch_size must be a whole number"),
        ({"accumulate": 1.5}, "accumulate must be a whole number"),
        ({"steps": 0}, "steps must be a whole number"),
        ({"steps": 3, "epochs": 1}, "steps or epochs, not both"),
        ({"epochs": 0}, "epochs must be a number above 0"),
        ({"learning_rate": 0}, "learning_rate must be a number above 0"),
        ({"learning_rate": "fast"}, "learning_rate must be a number above 0, got 'fast'"),
        ({"weight_decay": -1}, "weight_decay must be a number of at least 0"),
        ({"distil": float("nan")}, "distil must be a number"),
        ({"warm_up": 1}, "warm_up is a share"),
        ({"bf16": "yes"}, "bf16 must be true or false"),
        ({"seed": -1}, "seed must be a whole number of at least 0"),
        ({"streams": -1}, "streams must be a whole number"),
        ({"stream_share": 1.0}, "stream_share is above 0 and below 1"),
        ({"streams": 4, "batch_size": 1}, "batch_size of at least 2"),
        ({"ce": 0}, "nothing is minimised: give ce, distil or hidden a weight above 0"),
        ({"temperature": 0}, "temperature must be a number above 0"),
        ({"hidden": -1}, "hidden must be a number of at least 0"),
        ({"clip": -1}, "clip must be a number of at least 0"),
        ({"reverse": 1.5}, "reverse is a share, at most 1"),
        ({"thresholds_first": 2}, "thresholds_first is a share"),
        ({"freeze": "*embed*"}, "freeze must be a list of parameter name patterns"),
        ({"compensation": "soft"}, "compensation must be one of none, grad, mix, add"),
        ({"compensation_smooth": "relu"}, "compensation_smooth must be one of tanh, clip, identity"),
        ({"compensation": "mix", "compensation_weight": 1.5}, "compensation_weight is at most 1 with mix"),
        ({"compensation_share": 0}, "compensation_share must be a number above 0"),
        ({"compensation_rank": -1}, "compensation_rank must be a whole number of at least 0"),
        ({"version": 0}, "version must be a whole number"),
    ],
)
def test_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        TrainOptions.from_dict(options)


def test_newer():
    with pytest.raises(NewerFormatError, match="newer than 1"):
        TrainOptions.from_dict({"version": 2, "unheard_of": 1})


def test_steps_of_epochs():
    assert TrainOptions(steps=5).total_steps(1000, 1) == 5
    assert TrainOptions(batch_size=4, accumulate=2).total_steps(100, 1) == 13
    assert TrainOptions(batch_size=4, epochs=0.5).total_steps(100, 2) == 7
    assert TrainOptions(epochs=0.001).total_steps(10, 1) == 1
