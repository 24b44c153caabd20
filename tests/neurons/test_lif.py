"""The LIF neuron of spiking attention: its dynamics, its gradients, its gains."""

import math

import pytest
import torch

from spikeform.errors import SpikeformError
from spikeform.neurons.lif import LIF
from spikeform.neurons.surrogate import SURROGATES, spike


def by_hand(current, steps, tau, theta, reset, signed):
    """One neuron, in Python's floats."""
    v, sent = 0.0, []
    for t in range(steps):
        i = current[t] if isinstance(current, list) else current
        u = v + (i - v) / tau if tau else v + i
        s = 1 if u >= theta else -1 if signed and u <= -theta else 0
        v = (0.0 if s else u) if reset == "hard" else u - theta * s
        sent.append(s)
    return sent


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("reset", ["hard", "soft"])
@pytest.mark.parametrize("tau", [0.0, 1.0, 2.0, 3.5])
def test_the_dynamics(tau, reset, signed):
    neuron = LIF(2, 5, threshold=0.5, tau=tau, reset=reset, signed=signed).double()
    neuron.gain.data = torch.tensor([1.0, 1.5])
    x = torch.randn(1, 2, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        codes = neuron(x).codes
        moving = neuron(torch.stack([x, -x, 2 * x, x, x]), varying=True).codes
    assert codes.dtype == torch.int8
    for h in range(2):
        for p in range(3):
            for e in range(4):
                value = float(x[0, h, p, e]) * neuron.gain[h].item()
                assert codes[:, 0, h, p, e].tolist() == by_hand(value, 5, tau, 0.5, reset, signed)
                currents = [value, -value, 2 * value, value, value]
                assert moving[:, 0, h, p, e].tolist() == by_hand(currents, 5, tau, 0.5, reset, signed)
    assert (codes < 0).any() == signed


@pytest.mark.parametrize("kind", SURROGATES)
def test_surrogates_have_unit_area_and_a_peak_at_the_threshold(kind):
    u = torch.linspace(-40, 40, 400001, dtype=torch.float64, requires_grad=True)
    out = spike(u, 1.3, kind=kind)
    out.sum().backward()
    assert torch.equal(out.detach(), (u >= 0).double())
    area = float(u.grad.sum()) * 80 / 400000
    assert math.isclose(area, 1.0, abs_tol=0.015)  # arctan has long tails
    assert abs(u[u.grad.argmax()].item()) < 1e-3


@pytest.mark.parametrize("kind", SURROGATES)
def test_the_gain_learns(kind):
    neuron = LIF(1, 4, surrogate=kind)
    x = torch.tensor([[[[0.9, 1.1, 2.5, -1.0]]]])
    neuron(x).codes.sum().backward()
    assert float(neuron.gain.grad) > 0  # a larger gain fires more


def test_gradients_reach_every_step_of_the_current():
    neuron = LIF(1, 3)
    x = torch.full((3, 1, 1, 1, 2), 0.8, requires_grad=True)
    neuron(x, varying=True).codes.sum().backward()
    assert (x.grad > 0).all()


@pytest.mark.parametrize("varying", [False, True])
@pytest.mark.parametrize("kind", SURROGATES)
@pytest.mark.parametrize(("reset", "signed"), [("hard", False), ("hard", True), ("soft", True)])
@pytest.mark.parametrize("tau", [0.0, 3.0])
def test_the_gradient_is_that_of_the_dynamics_step_by_step(tau, reset, signed, kind, varying):
    neuron = LIF(2, 4, threshold=0.5, tau=tau, reset=reset, signed=signed, surrogate=kind).double()
    generator = torch.Generator().manual_seed(0)
    x, grad = (torch.randn(4, 1, 2, 5, 7, dtype=torch.float64, generator=generator) for _ in range(2))
    found = (x if varying else x[0]).clone().requires_grad_()
    (neuron(found, varying).codes * grad).sum().backward()
    wanted = found.detach().clone().requires_grad_()
    v, loss = torch.zeros_like(x[0]), 0.0
    for current, each in zip(wanted if varying else [wanted] * 4, grad, strict=True):
        u = v + (current - v) / tau if tau else v + current
        s = spike(u - 0.5, 0.5, kind=kind) - (spike(-u - 0.5, 0.5, kind=kind) if signed else 0)
        v = u * (1 - s.detach().abs()) if reset == "hard" else u - 0.5 * s.detach()
        loss = loss + (s * each).sum()
    loss.backward()
    torch.testing.assert_close(found.grad, wanted.grad)


def test_the_same_spikes_with_and_without_gradients():
    neuron = LIF(2, 6, reset="soft", signed=True)
    x = torch.randn(2, 2, 5, 8)
    with torch.no_grad():
        plain = neuron(x).codes
    assert torch.equal(neuron(x).codes.detach(), plain.float())


def test_without_a_leak_a_constant_current_is_a_count():
    current = torch.linspace(-1.5, 1.5, 193).view(1, 1, 1, -1)
    codes = LIF(1, 4, tau=0.0, reset="soft", signed=True)(current).codes
    assert torch.equal(codes.sum(0), (4 * current.abs()).floor().clamp(max=4).mul(current.sign()).to(torch.int8))


@pytest.mark.parametrize("narrow", [False, True])
def test_the_operators_are_known_to_the_compiler(narrow):
    current, grad = torch.randn(1, 2, 5), torch.randn(3, 2, 5)
    rule = 2.0, 0.5, True, True
    torch.library.opcheck(torch.ops.spikeform.lif_spikes.default, (current, 3, *rule, narrow))
    torch.library.opcheck(torch.ops.spikeform.lif_gradient.default, (grad, current, *rule, 1))


def test_a_compiled_pass_has_the_same_gradient():
    neuron, x = LIF(2, 4, signed=True), torch.randn(1, 2, 3, 5)
    found = []
    for run in (neuron, torch.compile(neuron, backend="aot_eager", fullgraph=True)):
        given = x.clone().requires_grad_()
        (run(given).codes * torch.arange(5)).sum().backward()
        found.append(given.grad)
    assert torch.equal(*found)


def test_bad_arguments_are_named():
    for arguments, named in [({"reset": "none"}, "reset"), ({"surrogate": "box"}, "surrogate"), ({"tau": 0.5}, "tau")]:
        with pytest.raises(SpikeformError, match=named):
            LIF(1, 4, **arguments)
    with pytest.raises(SpikeformError, match="4 steps"):
        LIF(1, 4)(torch.zeros(3, 1, 1, 1, 1), varying=True)
