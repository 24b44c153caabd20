"""Learned few-spike neurons: the definition, what the fit reaches, and the gated bank."""

import math
from itertools import pairwise

import pytest
import torch

from spikeform.neurons.few_spike import FewSpikeHG, few_spike_bank, fitted_regions
from spikeform.neurons.few_spike_fit import few_spike_response, fit_few_spike, fit_few_spike_bank
from spikeform.neurons.few_spike_plan import plan
from spikeform.neurons.functions import FUNCTIONS
from spikeform.spikes.trace import observe
from spikeform.synapses import executor, hadamard, linear

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def exp16():
    return few_spike_bank("exp", 16)


@pytest.fixture(scope="module")
def silu8():
    return few_spike_bank("silu", 8)


def naive(hg: FewSpikeHG, x: float) -> tuple[list[int], float]:
    """The equations, one fp32 number at a time."""
    v = torch.tensor(x).clamp(hg.gates[0], hg.gates[-1])
    r = max(i for i in range(len(hg.theta)) if v >= hg.gates[i])
    spikes, y = [], torch.tensor(0.0)
    for theta, h, d in zip(hg.theta[r], hg.h[r], hg.d[r], strict=True):
        z = bool(v > theta)
        v = v - h * z  # each reset follows its own spike
        y = y + d * z
        spikes.append(int(z))
    return spikes, float(y)


def test_the_bank_is_the_definition(silu8):
    x = torch.randn(200, generator=torch.Generator().manual_seed(0)) * 6
    train = silu8.encode(x)
    for i, value in enumerate(x.tolist()):
        spikes, y = naive(silu8, value)
        assert train.unroll()[:, i].tolist() == spikes
        assert float(train.decode()[i]) == y


def test_hand_made_radix2_neuron():
    weights = 2.0 ** -torch.arange(1.0, 5.0)
    hg = FewSpikeHG("identity", torch.tensor([0.0, 1.0]), weights[None], weights[None], weights[None])
    x = torch.tensor([0.0, 0.0625, 0.07, 0.5, 0.8, 1.0])
    assert hg.encode(x).decode().tolist() == [0.0, 0.0, 0.0625, 0.4375, 0.75, 0.9375]  # strict threshold
    assert hg.encode(x).count().tolist() == [0, 0, 1, 3, 2, 4]


@pytest.mark.parametrize(
    ("name", "steps", "low", "high", "worst", "typical"),
    [
        ("exp", 4, -20, 0, 9e-3, 5e-3),
        ("exp", 8, -20, 0, 1.5e-3, 5e-4),
        ("exp", 16, -20, 0, 4e-4, 1.2e-4),
        ("reciprocal", 16, 1, 2.0**17, 1e-3, 2e-4),
        ("inverse_sqrt", 16, 2.0**-30, 2.0**20, 1e-3, 2e-4),
        ("square", 16, 2.0**-10, 2.0**10, 1.5e-3, 3e-4),
    ],
)
def test_relative_error_of_functions_that_scale(name, steps, low, high, worst, typical):
    generator = torch.Generator().manual_seed(1)
    u = torch.rand(100_000, generator=generator)
    x = low + (high - low) * u if name == "exp" else torch.exp(math.log(low) + math.log(high / low) * u)
    if name == "square":
        x = x * (1 - 2 * (torch.rand(x.shape, generator=generator) < 0.5))
    exact = FUNCTIONS[name](x.double())
    error = ((few_spike_bank(name, steps).encode(x).decode() - exact) / exact).abs()
    assert float(error.max()) < worst
    assert float(error.square().mean().sqrt()) < typical


@pytest.mark.parametrize(
    ("name", "steps", "worst", "typical"),
    [
        ("gelu", 16, 4e-3, 4e-4),
        ("silu", 16, 4e-3, 4e-4),
        ("relu", 16, 3e-4, 5e-5),
        ("tanh", 16, 2e-3, 1e-4),
        ("gelu_tanh", 8, 4e-2, 1e-2),
        ("gelu_quick", 8, 4e-2, 1e-2),
        ("silu", 8, 4e-2, 1e-2),
    ],
)
def test_error_of_activations(name, steps, worst, typical):
    x = torch.linspace(-30, 30, 100_001)
    error = (few_spike_bank(name, steps).encode(x).decode() - FUNCTIONS[name](x.double())).abs()
    assert float(error.max()) < worst
    assert float(error.square().mean().sqrt()) < typical


@pytest.mark.parametrize("name", FUNCTIONS)
def test_more_steps_are_better(name):
    errors = [
        sum(fit.rms_error for fit in fit_few_spike_bank(name, [(1.0, 1.25), (2.0, 2.5)], steps))
        for steps in (1, 2, 4, 8, 16)
    ]
    assert all(after < before for before, after in pairwise(errors))


def test_learning_is_better_than_the_start_and_never_worse():
    intervals = [(-math.log(2), 0.0), (-0.5, -0.25)]
    for steps in (4, 8, 16):
        start = fit_few_spike_bank("exp", intervals, steps, iterations=0)
        learned = fit_few_spike_bank("exp", intervals, steps)
        assert learned[0].rms_error < 0.9 * start[0].rms_error
        for before, after in zip(start, learned, strict=True):
            assert after.max_error <= 1.05 * before.max_error


def test_the_reported_error_is_the_error():
    fit = fit_few_spike("reciprocal", (1.0, 1.125), 8)
    lowest, highest = (torch.tensor(e).view(torch.int32).item() for e in fit.interval)
    x = torch.arange(lowest, highest, 3, dtype=torch.int32).view(torch.float32)
    error = (few_spike_response(x, fit.theta, fit.h, fit.d).double() - 1 / x.double()).abs()
    assert float(error.max()) <= 1.1 * fit.max_error
    assert float(error.mean()) == pytest.approx(fit.mean_error, rel=0.02)
    assert float(error.square().mean().sqrt()) == pytest.approx(fit.rms_error, rel=0.02)


def test_fits_are_deterministic_and_one_is_a_bank_of_one():
    once, again = (fit_few_spike("gelu", (0.0, 0.5), 6, seed=3) for _ in range(2))
    for name in ("theta", "h", "d"):
        assert torch.equal(getattr(once, name), getattr(again, name))
    assert once.max_error == again.max_error
    assert once.function == "gelu"


def test_a_density_moves_the_error_to_where_inputs_are_rare():
    def rising(x):
        return torch.exp(8 * x)

    even = fit_few_spike("exp", (-1.0, 1.0), 8)
    right = fit_few_spike("exp", (-1.0, 1.0), 8, density=rising)
    x = torch.linspace(0.5, 1.0, 2000)
    errors = [float((few_spike_response(x, f.theta, f.h, f.d) - x.exp()).square().mean()) for f in (even, right)]
    assert errors[1] < errors[0]


def test_a_callable_is_a_function_too():
    def cube(x):
        return x**3

    fit = fit_few_spike(cube, (1.0, 1.25), 12)
    assert fit.function == "cube"
    assert fit.max_error < 0.012


def test_moved_neurons_are_exact_copies():
    fit = fit_few_spike("reciprocal", (1.0, 1.125), 10)
    moved = fit.moved(2.0**7, 0.0, 2.0**-7)
    x = torch.rand(1000, generator=torch.Generator().manual_seed(0)) * 0.125 + 1
    near = few_spike_response(x, fit.theta, fit.h, fit.d)
    far = few_spike_response(x * 2.0**7, moved.theta, moved.h, moved.d)
    assert torch.equal(near * 2.0**-7, far)
    assert moved.interval == (128.0, 144.0)
    assert moved.max_error == fit.max_error * 2.0**-7


def test_every_octave_of_the_bank_has_the_same_relative_error():
    hg = few_spike_bank("inverse_sqrt", 8)
    x = torch.rand(5000, generator=torch.Generator().manual_seed(0)) * 3 + 1
    for k in (-18, -3, 5, 11):
        assert torch.equal(hg.encode(x * 4.0**k).decode() * 2.0**k, hg.encode(x).decode())


@pytest.mark.parametrize("name", FUNCTIONS)
def test_plans_adjoin(name):
    layout = plan(name)
    for before, after in pairwise(layout.regions):
        assert before.interval[1] == pytest.approx(after.interval[0], abs=1e-9)
        assert before.interval[0] < before.interval[1]
    used = {region.base for region in layout.regions} - {None}
    assert used <= set(range(len(layout.bases)))
    assert len(fitted_regions(name, 2)) == len(layout.regions)


def test_outside_the_bank_inputs_clamp_and_are_counted(exp16):
    x = torch.tensor([-50.0, float("-inf"), -20.0, -1.0, 0.0, 3.0])
    train = exp16.encode(x)
    edge = exp16.encode(torch.tensor([-20.2, 0.0])).decode()
    assert train.decode()[0] == train.decode()[1] == edge[0]
    assert train.decode()[-1] == edge[1]
    assert int(exp16.saturated(x)) == 3
    assert int(exp16.saturated(torch.tensor([float("nan")]))) == 1


def test_zero_and_large_negative_send_nothing():
    for name, x in (("square", 0.0), ("relu", -3.0), ("relu", 0.0), ("gelu", -40.0), ("silu", -200.0)):
        train = few_spike_bank(name, 8).encode(torch.tensor([x]))
        assert int(train.count()) == 0
        assert float(train.decode()) == 0.0


def test_count_unroll_decode_and_step_values_agree(silu8):
    x = torch.randn(4, 5, 6, generator=torch.Generator().manual_seed(2)) * 4
    train = silu8.encode(x)
    assert train.shape == x.shape
    assert train.unroll().dtype == torch.int8
    assert train.unroll().shape == train.step_values().shape == (8, 4, 5, 6)
    assert torch.equal(train.count(), train.unroll().sum(0, dtype=torch.int32))
    assert torch.equal(train.count(), (train.step_values() != 0).sum(0, dtype=torch.int32))
    assert torch.allclose(train.step_values().sum(0), train.decode(), rtol=1e-6, atol=1e-7)
    moved = train.map(lambda t: t.transpose(0, 2))
    assert type(moved) is type(train)
    assert torch.equal(moved.decode(), train.decode().transpose(0, 2))
    with pytest.raises(TypeError, match="no code unit"):
        train.unit()


def test_synapses_take_the_train_in_every_executor(silu8):
    generator = torch.Generator().manual_seed(3)
    x, weight = torch.randn(3, 4, 16, generator=generator) * 3, torch.randn(8, 16, generator=generator)
    train = silu8.encode(x)
    products, seen = {}, []
    for name in ("temporal", "collapsed", "event"):
        with executor(name), observe(seen.append):
            products[name] = linear(train, weight), hadamard(train, train)
    for name in ("collapsed", "event"):
        for a, b in zip(products["temporal"], products[name], strict=True):
            assert torch.allclose(a, b, rtol=1e-5, atol=1e-5)
    assert int(seen[0].sent[0]) == int(train.count().sum())


def test_the_firing_is_reported():
    hg, seen = few_spike_bank("tanh", 4, site="model.act"), []
    with observe(seen.append):
        train = hg(torch.tensor([0.3, 1e9]))
    assert (seen[0].site, seen[0].function, int(seen[0].saturated)) == ("model.act", "tanh", 1)
    assert seen[0].train is train


def test_buffers_are_persistent_fp32_and_not_shared(silu8):
    other = few_spike_bank("silu", 8).to(torch.bfloat16)
    assert set(other.state_dict()) == {"gates", "theta", "h", "d"}
    for name, value in other.state_dict().items():
        assert value.dtype == torch.float32
        assert torch.equal(value, silu8.state_dict()[name])
        assert value.data_ptr() != silu8.state_dict()[name].data_ptr()
    blank = FewSpikeHG.blank("silu", 8)
    x = torch.linspace(-5, 5, 1001)
    assert int(blank.encode(x).count().sum()) == 0
    blank.load_state_dict(silu8.state_dict())
    assert torch.equal(blank.encode(x).decode(), silu8.encode(x).decode())


def test_half_precision_empty_and_strided_inputs(silu8):
    x = torch.randn(6, 4, generator=torch.Generator().manual_seed(4))
    half = x.to(torch.bfloat16)
    assert torch.equal(silu8.encode(half).decode(), silu8.encode(half.float()).decode())
    assert torch.equal(silu8.encode(x.t()).decode(), silu8.encode(x).decode().t())
    assert silu8.encode(x[:0]).decode().shape == (0, 4)


@pytest.mark.parametrize("steps", [0, 17, 1.5, True])
def test_bad_steps(steps):
    for call in (lambda: fit_few_spike("exp", (0, 1), steps), lambda: few_spike_bank("exp", steps)):
        with pytest.raises(ValueError, match="steps must be an integer from 1 to 16"):
            call()


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"function": "sine"}, "no function named 'sine'"),
        ({"interval": (1.0, 1.0)}, "left < right"),
        ({"interval": (0.0, math.inf)}, "must be finite"),
        ({"function": "reciprocal", "interval": (0.0, 1.0)}, "not finite"),
        ({"samples": 8}, "samples >= 16"),
        ({"iterations": -1}, "iterations >= 0"),
        ({"density": lambda x: -torch.ones_like(x)}, "density must not be negative"),
        ({"density": torch.zeros_like}, "positive somewhere"),
    ],
)
def test_bad_fits(kwargs, message):
    arguments = {"function": "exp", "interval": (0.0, 1.0), "steps": 8} | kwargs
    with pytest.raises(ValueError, match=message):
        fit_few_spike(**arguments)


def test_bad_banks():
    gates, table = torch.tensor([0.0, 1.0, 2.0]), torch.zeros(2, 4)
    with pytest.raises(ValueError, match="increase strictly"):
        FewSpikeHG("f", torch.tensor([0.0, 1.0, 1.0]), table, table, table)
    with pytest.raises(ValueError, match="needs gates"):
        FewSpikeHG("f", gates[:2], table, table, table)
    with pytest.raises(ValueError, match="the h of a few-spike bank must be finite"):
        FewSpikeHG("f", gates, table, table + math.nan, table)
    with pytest.raises(ValueError, match="adjoin"):
        FewSpikeHG.from_fits(fit_few_spike_bank("exp", [(0.0, 1.0), (1.5, 2.0)], 2))
    with pytest.raises(ValueError, match="at least one"):
        FewSpikeHG.from_fits([])
    with pytest.raises(ValueError, match="no function named"):
        few_spike_bank("sine", 4)
