"""MT and OAT against their literal dynamics: a membrane potential, step by step, in fp64."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from spikeform.neurons import MT, OAT, ROUNDINGS, recording
from spikeform.spikes import Burst, MultiThreshold, Radix2, SignedDigit, Thermometer
from spikeform.spikes.trace import observe

settings.register_profile("neurons", max_examples=60, deadline=None, derandomize=True)
settings.load_profile("neurons")

# Powers of two times small integers are exact in fp32: the loop in fp64 and the closed form in fp32 must
# agree.
THRESHOLDS = st.sampled_from([0.25, 1.0, 3.0, 700.0])


def dynamics(x, theta, steps, levels, rounding):
    """The neuron as it is defined: fire the largest available level that the potential reaches, subtract it.

    At step t there are ``levels`` of them, ``theta_t (1 + j / levels)``. ``nearest`` starts half a unit high;
    where the potential then stands exactly on a level, it fires only if that gives an even code (ties to
    even).
    """
    unit = theta / (levels * 2**steps)
    value = torch.zeros_like(x)
    for i, v in enumerate(x.abs().tolist()):
        v = min(v, theta - unit / 2)  # the last unit below the threshold is the largest code
        if rounding == "nearest":
            whole = v / unit
            v += unit / 2
            if whole % 1 == 0.5 and int(whole) % 2 == 0:
                v -= unit / 4  # a tie, and the code below is even
        out = 0.0
        for t in range(1, steps + 1):
            theta_t = theta * 2.0**-t
            available = [theta_t * (1 + j / levels) for j in range(levels)]
            reached = [a for a in available if (v > a if rounding == "strict" else v >= a)]
            if reached:
                v -= reached[-1]
                out += reached[-1]
        value[i] = out
    return value * x.sign()


@given(st.integers(1, 10), THRESHOLDS, st.sampled_from(ROUNDINGS), st.integers(0, 2**31 - 1))
def test_radix2_is_its_dynamics(steps, theta, rounding, seed):
    generator = torch.Generator().manual_seed(seed)
    unit = theta / 2**steps
    x = torch.randn(40, generator=generator) * theta
    on_levels = torch.randint(-(2**steps) - 3, 2**steps + 4, (40,), generator=generator) * unit
    halves = on_levels + unit / 2
    x = torch.cat([x, on_levels, halves, torch.tensor([0.0, -0.0, theta, -theta, 1e30, -1e30, 1e-40])])
    found = MT(Radix2(steps), (theta,), rounding)(x).decode()
    assert torch.equal(found.double(), dynamics(x.double(), theta, steps, 1, rounding))


@given(
    st.integers(1, 9),
    st.sampled_from([2, 4]),
    THRESHOLDS,
    st.sampled_from(["floor", "strict"]),
    st.integers(0, 2**31 - 1),
)
def test_sub_levels_are_their_dynamics(steps, levels, theta, rounding, seed):
    """Inputs between two code units: there the greedy levels and the closed form fire alike.

    ``strict`` differs from the dynamics where a residue falls exactly on a level in the middle of the window;
    no input here does, and on real data none does but by chance.
    """
    generator = torch.Generator().manual_seed(seed)
    unit = theta / (levels * 2**steps)
    whole = torch.randint(-levels * 2**steps - 3, levels * 2**steps + 4, (60,), generator=generator)
    x = (whole + torch.where(whole < 0, -0.5, 0.5)) * unit
    found = MT(MultiThreshold(steps, levels), (theta,), rounding)(x).decode()
    assert torch.equal(found.double(), dynamics(x.double(), theta, steps, levels, rounding))


@given(st.integers(1, 16), st.sampled_from([1, 2, 4]), st.integers(0, 2**31 - 1))
def test_sub_levels_err_by_less_than_a_unit_more(steps, levels, seed):
    coding = MultiThreshold(steps, levels)
    x = torch.rand(200, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    error = (MT(coding, (1.0,), "floor")(x).decode() - x).abs()
    assert float(error.max()) <= (levels + 1) / coding.resolution


def released(x, theta, steps=16):
    """The closed form of the official code, as measured: ``sign(x) q clip(ceil(a / q) - 1, 0, 2^T - 1)``."""
    q = theta * 2.0**-steps
    a = x.abs().clamp(max=theta)
    return x.sign() * q * (torch.ceil(a / q) - 1).clamp(0, 2**steps - 1)


@given(st.floats(-20, 20, width=32), st.floats(2**-10, 1000, width=32))
@example(0.0, 1.0)
@example(1.0, 1.0)
@example(0.5, 1.0)
def test_strict_is_the_released_code(x, theta):
    x = torch.tensor([x])
    theta32 = torch.tensor(theta, dtype=torch.float32)
    assert torch.equal(MT(Radix2(16), (theta,), "strict")(x).decode(), released(x, theta32))


@given(st.integers(1, 16), st.sampled_from(ROUNDINGS), st.integers(0, 2**31 - 1))
def test_the_gate_of_oat(steps, rounding, seed):
    """An element below the normal threshold is coded by one sub-neuron, all others whole by the other."""
    normal, outlier = 1.0, 10.0
    generator = torch.Generator().manual_seed(seed)
    x = torch.cat([torch.randn(80, generator=generator) * 4, torch.tensor([0.0, 1.0, -1.0, 0.999999, 10.0, -11.0])])
    neuron = OAT(Radix2(steps), (normal, outlier), rounding)
    train = neuron(x)
    below = MT(Radix2(steps), (normal,), rounding)(x).decode()
    above = MT(Radix2(steps), (outlier,), rounding)(x).decode()
    assert torch.equal(train.branch.bool(), x.abs() >= normal)
    assert torch.equal(train.decode(), torch.where(x.abs() >= normal, above, below))
    assert train.quantum.tolist() == pytest.approx([normal / 2**steps, outlier / 2**steps])


@pytest.mark.parametrize(
    "coding", [Radix2(7), SignedDigit(7), Thermometer(7), Burst(7, 3), MultiThreshold(7, 2)], ids=str
)
@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_error_bounds(coding, rounding):
    x = torch.linspace(-1, 1, 4001)
    error = (MT(coding, (1.0,), rounding)(x).decode() - x).abs()
    unit = 1.0 / coding.resolution
    widest = coding.levels if isinstance(coding, MultiThreshold) else 1
    bound = unit * (0.5 if rounding == "nearest" and widest == 1 else 1) + (widest - 1) * unit
    inside = x.abs() <= coding.limit * unit
    assert float(error[inside].max()) <= bound * (1 + 1e-5)
    assert float(error.max()) <= 1.0 / coding.resolution * (widest + 1) * (1 + 1e-5)


@given(st.integers(1, 16), st.integers(0, 2**31 - 1))
def test_floor_and_nearest_do_not_drift(steps, seed):
    """What is coded already is coded as it is: no drift in a cache. (Strict loses a unit each time.)"""
    x = torch.randn(200, generator=torch.Generator().manual_seed(seed)) * 3
    for rounding in ("nearest", "floor"):
        neuron = MT(Radix2(steps), (2.0,), rounding)
        once = neuron(x).decode()
        assert torch.equal(neuron(once).decode(), once)
    strict = MT(Radix2(steps), (2.0,), "strict")
    once = strict(x).decode()
    assert torch.equal(strict(once).decode().abs(), (once.abs() - 2.0 / 2**steps).clamp(min=0))


def test_channel_shifts_are_thresholds_per_channel():
    shift = torch.tensor([-3, 0, 5], dtype=torch.int8)
    neuron = OAT(Radix2(8), (1.0, 8.0))
    neuron.channel_shift = shift
    x = torch.randn(50, 3, generator=torch.Generator().manual_seed(0)) * 2.0**shift
    train = neuron(x)
    assert train.quantum.shape == (2, 3)
    for c in range(3):
        own = OAT(Radix2(8), (2.0 ** int(shift[c]), 8 * 2.0 ** int(shift[c])))(x[:, c])
        assert torch.equal(train.decode()[:, c], own.decode())
        assert torch.equal(train.codes[:, c], own.codes)
    neuron.folded = True  # the weights carry 2^shift now
    folded = neuron(x)
    assert folded.quantum.shape == (2,)
    assert torch.equal(folded.decode() * 2.0**shift, train.decode())


def test_fp64_and_bf16_inputs():
    x = torch.randn(50, generator=torch.Generator().manual_seed(0))
    neuron = OAT(Radix2(12), (1.0, 4.0))
    assert neuron(x.double()).decode().dtype == torch.float64
    assert torch.equal(neuron(x.double()).decode().float(), neuron(x).decode())
    half = x.to(torch.bfloat16)
    assert torch.equal(neuron(half).decode(), neuron(half.float()).decode())


def test_saturation_is_told():
    seen = []
    with observe(seen.append):
        OAT(Radix2(4), (1.0, 2.0), site="here")(torch.tensor([0.5, 2.0, -2.1, 9.0]))
    (firing,) = seen
    assert firing.site == "here"
    assert firing.function == "identity"
    assert int(firing.saturated) == 2


@pytest.mark.parametrize(
    "thresholds",
    [
        (1.0,),
        (1.0, 2.0, 3.0),
        (2.0, 1.0),
        (1.0, 1.0),
        (0.0, 1.0),
        (-1.0, 1.0),
        (1.0, float("inf")),
        (float("nan"), 1.0),
    ],
)
def test_bad_thresholds(thresholds):
    with pytest.raises(ValueError, match="q_proj: needs 2 finite positive thresholds"):
        OAT(Radix2(4), thresholds, site="q_proj")


def test_bad_rounding():
    with pytest.raises(ValueError, match="rounding must be one of"):
        MT(Radix2(4), (1.0,), "up")


def test_while_recording_the_input_passes_unchanged():
    seen = []
    open_, set_ = MT(Radix2(2), site="open"), MT(Radix2(2), (1.0,), site="set")
    x = torch.randn(5, generator=torch.Generator().manual_seed(0))
    with recording(lambda neuron, x: seen.append((neuron.site, x))):
        assert torch.equal(open_(x).decode(), x)
        assert not torch.equal(set_(x).decode(), x)
    assert [site for site, _ in seen] == ["open", "set"]
    assert not open_.calibrated


def test_thresholds_are_fp32_whatever_the_default():
    torch.set_default_dtype(torch.bfloat16)
    try:
        neuron = OAT(Radix2(4))
        assert neuron.threshold.dtype == torch.float32
        neuron.set_threshold((1.001, 2.002))
    finally:
        torch.set_default_dtype(torch.float32)
    assert neuron.to(torch.float16).double().bfloat16().threshold.dtype == torch.float32
    assert neuron.threshold.tolist() == pytest.approx([1.001, 2.002], rel=1e-6)
