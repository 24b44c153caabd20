"""The fixed-point HG neuron keeps the error bound that it states, for every function and every T."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spikeform.neurons import FUNCTIONS, FixedPointHG
from spikeform.spikes import Radix2, SignedDigit
from spikeform.spikes.trace import observe

settings.register_profile("hg", max_examples=60, deadline=None, derandomize=True)
settings.load_profile("hg")

RANGES = {
    "exp": (-40.0, 10.0),
    "reciprocal": (1e-6, 1e6),
    "square": (-1e3, 1e3),
    "inverse_sqrt": (1e-8, 1e6),
}


def inputs(function, seed=0, count=2000):
    low, high = RANGES.get(function, (-30.0, 30.0))
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(count, generator=generator) * (high - low) + low
    if low > 0:
        x = torch.cat([x, torch.logspace(math.log10(low), math.log10(high), count)])
    return torch.cat([x, torch.tensor([1.0, 2.0, 0.5, 3.0])])


@pytest.mark.parametrize("steps", range(1, 17))
@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("rounding", ["nearest", "floor"])
def test_the_stated_bound(function, rounding, steps):
    """Against the function in fp32, on which the levels are set; that is off fp64 by its own rounding."""
    x = inputs(function)
    neuron = FixedPointHG(function, Radix2(steps), rounding)
    value, wanted = neuron(x).decode().double(), FUNCTIONS[function](x).double()
    inside = (wanted.abs() >= 2.0**neuron.low) & (wanted.abs() < 2.0**neuron.high)
    assert inside.sum() > 100
    assert bool(((value - wanted).abs() <= neuron.error_bound * wanted.abs())[inside].all())
    assert bool(((value - wanted).abs() <= 2.0**neuron.low)[~inside].all())
    if rounding == "floor":
        assert bool((value.abs() <= wanted.abs()).all())
    exact = FUNCTIONS[function](x.double())
    assert bool(((value - exact).abs() <= neuron.error_bound * exact.abs() + 1e-6 * exact.abs() + 1e-6)[inside].all())


@given(st.sampled_from(sorted(FUNCTIONS)), st.integers(1, 16), st.floats(width=32, allow_nan=False))
def test_any_float(function, steps, x):
    """Zeros, denormals, infinities, wrong signs: always finite, within the bound or saturated or silent."""
    neuron = FixedPointHG(function, Radix2(steps))
    wanted = FUNCTIONS[function](torch.tensor([x]))
    if bool(wanted.isnan()):  # 1/sqrt of a negative number, GELU of -inf: no value to code
        return
    train = neuron(torch.tensor([x]))
    value, wanted = float(train.decode()), float(wanted)
    assert math.isfinite(value)
    if abs(wanted) >= 2.0**neuron.high:
        assert abs(value) == pytest.approx((1 - 2.0**-steps) * 2.0**neuron.high)
        assert math.copysign(1, value) == math.copysign(1, wanted)
    elif abs(wanted) < 2.0**neuron.low:
        assert abs(value - wanted) <= 2.0**neuron.low
    else:
        assert abs(value - wanted) <= neuron.error_bound * abs(wanted) * (1 + 1e-7)
    codes, branch = train.codes, train.branch
    assert int(codes.abs().max()) <= neuron.coding.limit
    assert float(codes.double() * train.quantum.double()[branch.long()]) == value
    assert 0 <= int(branch) < neuron.high - neuron.low


@pytest.mark.parametrize("coding", [Radix2(8), SignedDigit(8)], ids=str)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_its_spikes_are_its_value(function, coding):
    train = FixedPointHG(function, coding)(inputs(function, 1, 200))
    assert torch.equal(train.step_values().double().sum(0).float(), train.decode())
    assert torch.equal(train.count().long(), (train.unroll() != 0).sum(0))
    live = train.decode() != 0
    assert bool(
        (train.codes.abs()[live] >= 2 ** (coding.steps - 1)).all()
    )  # each in its own binade: the top bit is set


def test_a_tie_rounds_away_from_zero():
    x = torch.tensor([0.53125, -0.53125, 0.96875])  # between two levels of 1/16; the last one carries
    assert FixedPointHG("relu", Radix2(4))(x).decode().tolist() == [0.5625, 0.0, 1.0]


def test_its_sub_neurons_are_binades():
    train = FixedPointHG("relu", Radix2(4), low=-2, high=3)(
        torch.tensor([0.2, 0.25, 0.49, 0.5, 1.0, 3.9, 7.0, 8.0, 1e9, -5.0])
    )
    assert train.decode().tolist() == [0.0, 0.25, 0.5, 0.5, 1.0, 4.0, 7.0, 7.5, 7.5, 0.0]
    assert train.branch.tolist() == [0, 0, 1, 1, 2, 4, 4, 4, 4, 0]
    assert train.quantum.tolist() == [2.0**e / 16 for e in (-1, 0, 1, 2, 3)]


def test_saturation_is_told():
    seen = []
    with observe(seen.append):
        FixedPointHG("square", Radix2(4), high=4, site="here")(torch.tensor([1.0, 3.8, 3.99, 4.0, -100.0]))
    (firing,) = seen
    assert firing.function == "square"
    assert int(firing.saturated) == 3


def test_fp64_inputs_are_computed_in_fp32_and_carried_in_fp64():
    x = inputs("gelu", 2, 100)
    neuron = FixedPointHG("gelu", Radix2(12))
    assert neuron(x.double()).decode().dtype == torch.float64
    assert torch.equal(neuron(x.double()).decode().float(), neuron(x).decode())


def test_shapes_and_strides():
    x = inputs("silu", 3, 236)[:240].view(12, 20)
    neuron = FixedPointHG("silu", Radix2(9))
    train, turned = neuron(x), neuron(x.T)
    assert train.shape == (12, 20)
    assert torch.equal(turned.decode(), train.decode().T)
    mapped = train.map(lambda t: t.T)
    assert torch.equal(mapped.decode(), train.decode().T)
    assert torch.equal(mapped.codes, train.codes.T)
    assert neuron(torch.empty(0, 4)).decode().shape == (0, 4)


def test_unknown_function():
    with pytest.raises(ValueError, match="no function named 'sine'"):
        FixedPointHG("sine", Radix2(4))
