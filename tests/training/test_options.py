import dataclasses

import pytest

from spikeform.errors import ConfigError, NewerFormatError
from spikeform.training import TrainOptions


def test_round_trip():
    options = TrainOptions(task="masked", steps=7, learning_rate=1e-3, bf16=True)
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
