"""Law 5: more steps are never worse beyond noise, and enough of them reach the dense model."""

from itertools import pairwise

import pytest
import torch

import families
import spikeform
from families import difference

STEPS = (2, 4, 6, 8, 12, 16)


@pytest.fixture(scope="module")
def errors(dense, twin, spiking, logits):
    def measure(family, on_twin=False, steps=STEPS, **options):
        ids = families.tokens(rows=8, length=20, seed=3)
        wanted = logits(twin(family) if on_twin else dense(family), ids)
        return [difference(wanted, logits(spiking(family, on_twin, steps=t, **options), ids)) for t in steps]

    return measure


@pytest.mark.parametrize("family", families.FAMILIES)
def test_the_error_falls_to_the_dense_model(family, errors):
    """Relative error of the logits. Measured at T = 16: 2.2e-5 (GPT-2) to 6.4e-5 (Qwen3)."""
    found = errors(family)
    assert all(later <= 1.1 * earlier for earlier, later in pairwise(found)), found
    assert found[-1] <= 1.5e-4, found
    assert found[-1] < 0.02 * found[0], found


@pytest.mark.parametrize("family", families.TWINS)
def test_on_outlier_twins_too(family, errors):
    """Channels up to 256 times larger. Measured at T = 16: 3.6e-5 (BERT) to 2.2e-4 (Qwen3)."""
    found = errors(family, True)
    assert all(later <= 1.15 * earlier for earlier, later in pairwise(found)), found
    assert found[-1] <= 5e-4, found


@pytest.mark.parametrize("family", [f for f in families.TWINS if f != "bert"])
def test_thresholds_per_channel_are_the_remedy_for_outlier_channels(family, errors):
    """BERT's norms come last: its twin has no outlier channels before its linear layers."""
    (plain,), (remedied,) = errors(family, True, (8,)), errors(family, True, (8,), per_channel=True)
    assert remedied < plain


@pytest.mark.parametrize(
    "options",
    [
        {"coding": "signed_digit"},
        {"coding": "multi_threshold", "levels": 2},
        {"coding": "multi_threshold", "levels": 4},
        {"rounding": "floor"},
        {"rounding": "strict"},
        {"outlier": False},
        {"threshold": "quantile"},
        {"per_channel": True},
        {"lm_head": True},
        {"softmax": False, "norms": False, "activations": False},
    ],
    ids=str,
)
def test_under_every_option(options, errors):
    found = errors("llama", False, (4, 8, 16), **options)
    assert found[0] > found[1] > found[2], found
    assert found[2] <= 1e-3, found


def test_roundings_rank_as_they_must(errors):
    """Floor loses up to a unit where nearest loses half; strict is floor but on exact multiples."""
    nearest, floor, strict = (errors("llama", False, (8,), rounding=r)[0] for r in ("nearest", "floor", "strict"))
    assert nearest < floor
    assert strict == pytest.approx(floor, rel=0.5)


def test_signed_digits_carry_the_codes_of_radix2(spiking, logits):
    """The same codes in fewer spikes: the same bits out."""
    assert torch.equal(logits(spiking("llama", steps=8)), logits(spiking("llama", steps=8, coding="signed_digit")))
    assert spikeform.LAS(steps=8).to_dict() != spikeform.LAS(steps=8, coding="signed_digit").to_dict()
