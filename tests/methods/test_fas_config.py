"""The configuration of FAS: what it takes, what it refuses, how it is written."""

import pytest

import families
import spikeform
from spikeform.errors import ConfigError, NewerFormatError


def test_round_trip():
    config = spikeform.FAS(
        steps=4, levels=16, sites="all", gated="product", granularity="position", positions=64, operators=8,
        threshold=2, skip=["*.lm_head"], surrogate=2.0, per_channel=True,
    )  # fmt: skip
    assert config.skip == ("*.lm_head",)
    assert spikeform.FAS.from_dict(config.to_dict()) == config
    assert config.to_dict()["quant_method"] == "spikeform_fas"
    assert spikeform.FAS().to_dict()["version"] == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": -1}, "steps must be .* from 0 to 64, got -1"),
        ({"steps": 65}, "steps must be"),
        ({"steps": 4.0}, "steps must be"),
        ({"steps": True}, "steps must be"),
        ({"levels": 0}, "levels must be .* from 1 to 16"),
        ({"levels": 17}, "levels must be"),
        ({"sites": "everywhere"}, "sites.*feed_forward.*all"),
        ({"gated": "silu"}, "gated.*activation.*product"),
        ({"granularity": "token"}, "granularity.*layer.*channel.*position"),
        ({"granularity": "position"}, "positions is needed with granularity position"),
        ({"positions": 8}, "positions is needed with granularity position, and has no meaning without it"),
        ({"granularity": "position", "positions": 0}, "positions must be"),
        ({"per_channel": 1}, "per_channel must be true or false"),
        ({"operators": 0}, "operators must be .* from 1 to 16"),
        ({"operators": 17}, "operators must be"),
        ({"threshold": 0}, "threshold must be a finite number above 0"),
        ({"threshold": float("nan")}, "threshold must be"),
        ({"threshold": float("inf")}, "threshold must be"),
        ({"threshold": "1"}, "threshold must be"),
        ({"surrogate": 0.25}, "surrogate must be a finite number of at least 0.5"),
        ({"surrogate": float("inf")}, "surrogate must be"),
        ({"skip": "lm_head"}, "skip must be a list of module name patterns"),
        ({"skip": (1,)}, "skip must be a list"),
        ({"version": 0}, "version"),
    ],
    ids=str,
)
def test_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        spikeform.FAS(**options)


def test_unknown_options_are_named():
    with pytest.raises(ConfigError, match="stepz"):
        spikeform.FAS.from_dict({**spikeform.FAS().to_dict(), "stepz": 3})


def test_newer():
    with pytest.raises(NewerFormatError, match="version 2 is newer"):
        spikeform.FAS.from_dict({**spikeform.FAS().to_dict(), "version": 2, "more": 1})


def test_setting_steps_is_checked():
    model = spikeform.convert(families.build("gpt2"), spikeform.FAS(steps=2, threshold=1.0))
    for steps in (-1, 65, 2.0, True, None):
        with pytest.raises(ConfigError, match=r"steps must be .* from 0 to 64"):
            spikeform.set_steps(model, steps)
    assert model.config.quantization_config.steps == 2
