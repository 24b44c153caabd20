"""IF and LIF: the step, its identity, the closed form, and the surrogate."""

import math

import pytest
import torch

from spikeform.neurons.if_ import constant_input_spikes, integrate_and_fire
from spikeform.neurons.lif import leaky_integrate_and_fire
from spikeform.neurons.surrogate import spike


def naive(x, theta, v, leak=1.0, ternary=False):
    """One number at a time."""
    spikes = []
    for current in x:
        v = leak * v + current
        s = 1 if v >= theta else -1 if ternary and v <= -theta else 0
        v -= theta * s
        spikes.append(s)
    return spikes, v


def dyadic(*shape, seed=0):
    """Random multiples of 1/64 in [-2, 2]: sums of them are exact."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-128, 129, shape, generator=generator) / 64.0


@pytest.mark.parametrize("ternary", [False, True])
@pytest.mark.parametrize("leak", [1.0, 0.5])
def test_it_is_the_recursion(ternary, leak):
    x = dyadic(9, 20)
    fired = leaky_integrate_and_fire(x, 0.75, leak, 0.25, ternary=ternary)
    assert fired.spikes.dtype == torch.int8
    for i in range(20):
        spikes, v = naive(x[:, i].tolist(), 0.75, 0.25, leak, ternary)
        assert fired.spikes[:, i].tolist() == spikes
        assert float(fired.potential[i]) == v
    assert ternary == bool((fired.spikes < 0).any())


def test_what_went_in_is_what_was_sent_plus_what_is_left():
    x, theta = dyadic(12, 3, 8), torch.tensor([0.5, 0.75, 1.0, 1.25, 0.25, 2.0, 0.5, 1.5])
    for ternary in (False, True):
        fired = integrate_and_fire(x, theta, theta / 2, ternary=ternary)
        assert torch.equal(theta * fired.spikes.sum(0), theta / 2 + x.sum(0) - fired.potential)


def test_nothing_is_hidden_between_calls_and_the_potential_carries_on():
    x = dyadic(10, 6)
    whole = integrate_and_fire(x, 1.0)
    first = integrate_and_fire(x[:4], 1.0)
    second = integrate_and_fire(x[4:], 1.0, first.potential)
    assert torch.equal(torch.cat([first.spikes, second.spikes]), whole.spikes)
    assert torch.equal(second.potential, whole.potential)
    assert torch.equal(integrate_and_fire(x, 1.0).spikes, whole.spikes)


def test_leak_one_is_integrate_and_fire_and_leaking_loses():
    x = dyadic(16, 50).abs()
    assert torch.equal(leaky_integrate_and_fire(x, 1.0, 1.0).spikes, integrate_and_fire(x, 1.0).spikes)
    assert leaky_integrate_and_fire(x, 1.0, 0.5).spikes.sum() < integrate_and_fire(x, 1.0).spikes.sum()


def test_the_order_of_the_inputs_matters():
    early = integrate_and_fire(torch.tensor([2.0, -2.0]), 1.0).spikes.sum()
    late = integrate_and_fire(torch.tensor([-2.0, 2.0]), 1.0).spikes.sum()
    assert early == 1
    assert late == 0


@pytest.mark.parametrize("steps", [1, 4, 7, 16])
def test_closed_form_for_constant_input(steps):
    x, theta = dyadic(40, 8, seed=1), torch.tensor([0.5, 1.0, 0.25, 2.0, 0.5, 1.0, 0.25, 2.0])
    for share in (0.0, 0.25, 0.5):
        loop = integrate_and_fire(x.expand(steps, -1, -1), theta, share * theta)
        assert torch.equal(constant_input_spikes(x, theta, steps, share * theta), loop.spikes)
        count = torch.floor((steps * x + share * theta) / theta).clamp(0, steps)
        assert torch.equal(loop.spikes.sum(0).float(), count)
    signed = integrate_and_fire(x.expand(steps, -1, -1), theta, ternary=True)
    assert torch.equal(constant_input_spikes(x, theta, steps, ternary=True), signed.spikes)


def test_half_a_threshold_of_initial_potential_rounds():
    x, steps = torch.linspace(-0.5, 1.5, 400), 8
    rate = integrate_and_fire(x.expand(steps, -1), 1.0, 0.5).spikes.float().mean(0)
    quantised = torch.floor(steps * x.clamp(0, 1) + 0.5) / steps
    assert float((rate - quantised).abs().max()) <= 1 / steps
    assert float(((rate - quantised).abs() > 1e-6).float().mean()) < 0.02  # ties only


def test_surrogate_is_a_triangle_of_unit_area():
    u = torch.linspace(-3, 3, 6001, requires_grad=True)
    z = spike(u, 2.0)
    assert torch.equal(z, (u >= 0).float())
    z.sum().backward()
    expected = (2.0 - u.detach().abs()).clamp(min=0) / 4
    assert torch.allclose(u.grad, expected)
    assert math.isclose(float(u.grad.sum()) * 6 / 6000, 1.0, rel_tol=1e-3)
    assert float(spike(torch.zeros(1))) == 1.0
    assert float(spike(torch.zeros(1), strict=True)) == 0.0


def test_gradients_flow_through_time_only_when_asked():
    x = dyadic(6, 5).requires_grad_()
    theta = torch.full((5,), 0.9, requires_grad=True)
    hard = integrate_and_fire(x, theta)
    soft = integrate_and_fire(x, theta, surrogate=1.0)
    assert not hard.potential.requires_grad
    assert torch.equal(soft.spikes.detach().to(torch.int8), hard.spikes)
    soft.spikes[-1].sum().backward()
    assert float(x.grad[0].abs().sum()) > 0
    assert float(theta.grad.abs().sum()) > 0


@pytest.mark.parametrize(
    ("x", "kwargs", "message"),
    [
        (torch.zeros(0, 3), {"threshold": 1.0}, "at least one time step"),
        (torch.zeros(3, 3, dtype=torch.int32), {"threshold": 1.0}, "floating input"),
        (torch.zeros(3, 3), {"threshold": 0.0}, "positive and finite"),
        (torch.zeros(3, 3), {"threshold": float("nan")}, "positive and finite"),
        (torch.zeros(3, 3), {"threshold": 1.0, "leak": 0.0}, "leak must be"),
        (torch.zeros(3, 3), {"threshold": 1.0, "leak": 1.5}, "leak must be"),
        (torch.zeros(3, 3), {"threshold": 1.0, "surrogate": 0.0}, "width must be positive"),
    ],
)
def test_bad_input(x, kwargs, message):
    with pytest.raises(ValueError, match=message):
        integrate_and_fire(x, **kwargs)


def test_the_closed_form_says_where_it_ends():
    x = torch.zeros(3)
    for initial, ternary in ((1.0, False), (-0.1, False), (0.5, True)):
        with pytest.raises(ValueError, match="closed form"):
            constant_input_spikes(x, 1.0, 4, initial, ternary=ternary)
    with pytest.raises(ValueError, match="positive integer"):
        constant_input_spikes(x, 1.0, 0)
