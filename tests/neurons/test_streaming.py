"""The streaming neuron: QCFS without steps, integrate-and-fire with them, and what joins the two."""

import copy

import pytest
import torch

from spikeform.errors import SpikeformError
from spikeform.neurons import Clock, StreamingNeuron
from spikeform.neurons.streaming import Pass, by_row, current


def neuron(steps=4, levels=4, theta=1.5, channels=3, **more):
    made = StreamingNeuron(Clock(steps), levels, channels=channels, site="here", **more)
    made.set_threshold(theta)
    return made


def draw(*shape, seed=0, spread=2.0):
    return spread * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("levels", [1, 2, 3, 8, 16])
def test_the_rate_of_a_constant_input_is_qcfs(levels, signed):
    x = draw(5, 7, 3)
    made = neuron(0, levels, signed=signed)
    wanted = made(x).decode()
    made.clock.steps = levels
    rate = made(x.repeat_interleave(levels, 0)).decode().unflatten(0, (5, levels)).mean(1)
    assert torch.allclose(rate, wanted, atol=1e-12)
    grid = 1.5 / levels * torch.floor(levels * (x / 1.5).clamp(-1 if signed else 0, 1) + 0.5)
    assert torch.allclose(wanted, grid, atol=1e-12)


@pytest.mark.parametrize("signed", [False, True])
def test_it_is_its_equation(signed):
    """The recursion of the docstring, written out, parameters by channel."""
    made = neuron(5, theta=torch.tensor([0.5, 1.0, 2.0]), per_channel=True, signed=signed)
    made.refine("channel")
    with torch.no_grad():
        made.scale.copy_(torch.tensor([0.9, 1.2, 1.0]))
        made.initial.copy_(torch.tensor([0.1, 0.5, 0.8]))
    x, theta, beta = draw(10, 4, 3), (made.threshold * made.scale).detach().double(), made.initial.detach().double()
    found = made(x).decode().unflatten(0, (2, 5))
    v = torch.zeros(2, 4, 3, dtype=torch.float64) if signed else (beta * theta).expand(2, 4, 3)
    for t in range(5):
        v = v + x.unflatten(0, (2, 5))[:, t]
        if signed:
            s = (v >= (1 - beta) * theta).double() - (v <= -(1 - beta) * theta).double()
        else:
            s = (v >= theta).double()
        v = v - theta * s
        assert torch.allclose(found[:, t], theta * s, atol=1e-7)


def test_codes_and_codings():
    made, x = neuron(4), draw(8, 3)
    with torch.no_grad():
        train = made(x)
        assert train.codes.dtype == torch.int8
        assert set(train.codes.unique().tolist()) == {0, 1}
        assert train.coding.limit == 1
        made.clock.steps = 0
        train = made(x)
        assert train.codes.dtype == torch.int8
        assert train.coding.limit == 4
    assert made(x.requires_grad_()).codes.is_floating_point()


def test_gradients():
    for steps in (0, 4):
        made, x = neuron(steps), draw(8, 6, 3).requires_grad_()
        for parameter in (made.scale, made.initial):
            parameter.requires_grad_(True)
        made(x).decode().square().sum().backward()
        assert float(x.grad.abs().sum()) > 0
        assert float(made.threshold.grad.abs()) > 0
        assert (made.scale.grad is None) == (made.initial.grad is None) == (steps == 0)


def test_a_step_too_few():
    with pytest.raises(SpikeformError, match="here: 7 rows are no multiple of 4 steps"):
        neuron(4)(draw(7, 3))


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_thresholds_are_positive(value):
    with pytest.raises(ValueError, match="here: thresholds must be finite and positive"):
        neuron(theta=value)


def test_what_is_calibrated():
    made = StreamingNeuron(Clock(4), 4, channels=3, site="here")
    assert not made.calibrated
    made.set_threshold(1.0)
    assert made.calibrated
    for name, value in (("scale", 0.0), ("scale", float("nan")), ("initial", 1.0), ("initial", -0.1)):
        other = copy.deepcopy(made)
        getattr(other, name).data.fill_(value)
        assert not other.calibrated, (name, value)


def test_refined_by_position():
    made = neuron()
    made.refine("position", 6)
    assert made.scale.shape == made.initial.shape == (6, 3)
    assert made.firing_threshold(2).shape == (2, 3)
    elsewhere = StreamingNeuron(Clock(4), 4, channels=3, positional=False)
    elsewhere.refine("position", 6)
    assert elsewhere.scale.shape == (3,)
    made.refine("position", 6)
    assert made.scale.shape == (6, 3)
    with pytest.raises(SpikeformError, match="calibrated for 6 positions, asked for position 7"):
        made(draw(4, 7, 3))


def test_parameters_by_position_go_by_where_a_sequence_stands():
    made = neuron(2)
    made.refine("position", 6)
    made.scale.data.copy_(0.5 + torch.rand(6, 3, generator=torch.Generator().manual_seed(0)))
    x = draw(4, 3, 3)
    told = torch.tensor([[0, 1, 2], [-1, 4, 5]])  # -1: padding
    token = current.set(Pass(rows=4, length=3, positions=told))
    try:
        together = made(x).decode()
        flat = made(x.flatten(0, 1)).decode()
        current.set(Pass(rows=4, length=3, positions=None))
        with pytest.raises(SpikeformError, match="does not tell its blocks position_ids"):
            made(x)
        current.set(Pass(rows=4, length=3, positions=torch.arange(4, 7)[None]))
        with pytest.raises(SpikeformError, match="asked for position 7"):
            made(x)
    finally:
        current.reset(token)
    assert torch.equal(together.flatten(0, 1), flat)
    for row, places in ((0, [0, 1, 2]), (1, [0, 4, 5])):
        alone = copy.deepcopy(made)
        alone.scale.data, alone.initial.data = made.scale.data[places], made.initial.data[places]
        assert torch.equal(alone(x[2 * row : 2 * row + 2]).decode(), together[2 * row : 2 * row + 2])


def test_parameters_are_fp32_whatever_happens():
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.bfloat16)
        made = neuron()
    finally:
        torch.set_default_dtype(before)
    for cast in (lambda m: m, lambda m: m.bfloat16(), lambda m: m.double(), lambda m: m.to(torch.float16)):
        assert all(p.dtype == torch.float32 for p in cast(copy.deepcopy(made)).parameters())
    same = made.to("cpu")
    assert same.threshold is made.threshold
    frozen = copy.deepcopy(made).requires_grad_(False).half()
    assert not frozen.threshold.requires_grad


def test_by_row():
    x = torch.arange(24.0).view(6, 4)
    assert torch.equal(by_row(x, 3), x.view(3, 2, 4))
    assert torch.equal(by_row(x, 6), x)
    assert torch.equal(by_row(x.view(3, 2, 4), 3), x.view(3, 2, 4))
