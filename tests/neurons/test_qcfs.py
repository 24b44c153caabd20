"""QCFS: its values, its straight-through gradients, and that it is the rate of integrate-and-fire."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spikeform.errors import SpikeformError
from spikeform.neurons.if_ import scan
from spikeform.neurons.qcfs import qcfs, qcfs_codes

POWERS = [2.0**-3, 1.0, 2.0**4]


def naive(x, theta, levels, signed):
    """One number at a time, in Python's doubles."""
    share = min(max((abs(x) if signed else x) / theta, 0.0), 1.0)
    return math.copysign(math.floor(levels * share + 0.5), x if signed else 1.0)


def rate(x, theta, steps, signed):
    """Spikes that the neuron sends in ``steps`` steps of the constant input ``x``."""
    level, initial = (0.5, 0.0) if signed else (1.0, 0.5 * theta)
    spikes = scan(x.repeat_interleave(steps, 0), theta, initial, level, steps=steps, signed=signed)
    return spikes.unflatten(0, (-1, steps)).sum(1)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    st.floats(-10, 10, allow_subnormal=False),
    st.floats(0.01, 8, allow_subnormal=False),
    st.integers(1, 32),
    st.booleans(),
)
def test_codes_are_the_formula(x, theta, levels, signed):
    codes = qcfs_codes(torch.tensor([x], dtype=torch.float64), theta, levels, signed=signed)
    assert codes.dtype == torch.float64
    assert float(codes) == naive(x, theta, levels, signed)
    assert float(qcfs(torch.tensor([x], dtype=torch.float64), theta, levels, signed=signed)) == pytest.approx(
        theta / levels * float(codes), rel=1e-15
    )


def test_thresholds_of_channels_and_half_input():
    generator = torch.Generator().manual_seed(0)
    x, theta = torch.randn(4, 6, generator=generator), torch.rand(6, generator=generator) + 0.5
    each = torch.stack([qcfs_codes(x[:, c], float(theta[c]), 8) for c in range(6)], dim=1)
    assert torch.equal(qcfs_codes(x, theta, 8), each)
    for dtype in (torch.bfloat16, torch.float16):
        assert torch.equal(qcfs_codes(x.to(dtype), theta, 8), qcfs_codes(x.to(dtype).float(), theta, 8))
        assert qcfs(x.to(dtype), theta, 8).dtype == torch.float32


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("levels", [1, 3, 8])
def test_gradients_are_straight_through(signed, levels):
    theta = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)
    x = torch.tensor([-3.0, -1.4, -0.3, -0.01, 0.01, 0.3, 0.75, 1.2, 1.49, 1.6, 3.0], dtype=torch.float64)
    x = torch.cat([x, torch.linspace(-2, 2, 37, dtype=torch.float64)]).requires_grad_()
    y = qcfs(x, theta, levels, signed=signed)
    (by_x,) = torch.autograd.grad(y.sum(), x, retain_graph=True)
    by_theta = torch.stack([torch.autograd.grad(value, theta, retain_graph=True)[0] for value in y])
    share = (x / theta).detach()
    inside = (share.abs() <= 1) if signed else (share >= 0) & (share <= 1)
    assert torch.equal(by_x, inside.double())
    expected = torch.where(inside, y / theta - share, share.sign() if signed else (share > 1).double())
    torch.testing.assert_close(by_theta, expected.detach(), rtol=1e-12, atol=1e-12)


def test_gradients_of_channel_thresholds_are_summed():
    x = torch.linspace(-1, 3, 12).view(4, 3)
    theta = torch.tensor([0.5, 1.0, 2.0], requires_grad=True)
    qcfs(x, theta, 4).sum().backward()
    for c in range(3):
        one = theta[c].detach().clone().requires_grad_()
        qcfs(x[:, c], one, 4).sum().backward()
        assert float(theta.grad[c]) == pytest.approx(float(one.grad), rel=1e-6)


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("steps", range(1, 33))
def test_the_rate_of_a_constant_input_is_qcfs(signed, steps):
    """Exhaustive on a grid that holds every tie ``(k + 1/2) theta / T`` of T = 2^n, and both ends of the clip."""
    grid = torch.arange(-3 * 64, 3 * 64 + 1) / 64
    for theta in POWERS:
        counts = rate(grid * theta, theta, steps, signed)
        assert torch.equal(counts.float(), qcfs_codes(grid * theta, theta, steps, signed=signed))
    assert int(counts.max()) == steps
    assert int(counts.min()) == (-steps if signed else 0)


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("steps", [1, 3, 7, 8, 12, 32])
def test_the_rate_of_any_constant_input_is_qcfs_but_for_ties(signed, steps):
    generator = torch.Generator().manual_seed(steps)
    x = torch.rand(20_000, dtype=torch.float64, generator=generator) * 4 - 2
    theta = torch.rand(20_000, dtype=torch.float64, generator=generator) + 0.3
    jump = steps * x.abs() / theta + 0.5
    clear = (jump - jump.round()).abs() > 1e-9
    counts = rate(x[None], theta, steps, signed)[0].double()
    assert torch.equal(counts[clear], qcfs_codes(x, theta, steps, signed=signed)[clear])
    assert float(clear.double().mean()) > 0.999


def test_other_numbers_of_steps_are_another_function():
    """Levels 8: 25% of inputs in [-1, 3] at theta 2 change at T = 4 and at T = 16, 37% at T = 2."""
    x = torch.linspace(-1, 3, 40_001)[:-1] + 5e-5
    eight = qcfs(x, 2.0, 8)
    for steps, expected in ((4, 0.25), (16, 0.25), (2, 0.375), (8, 0.0)):
        other = rate(x[None], 2.0, steps, False)[0] * (2.0 / steps)
        assert float((other != eight).float().mean()) == pytest.approx(expected, abs=0.002)


@pytest.mark.parametrize(
    ("x", "threshold", "levels", "message"),
    [
        (torch.zeros(3), 1.0, 0, "levels must be a positive integer"),
        (torch.zeros(3), 1.0, 8.0, "levels must be"),
        (torch.zeros(3), 1.0, True, "levels must be"),
        (torch.zeros(3), 0.0, 8, "threshold must be positive"),
        (torch.zeros(3), float("nan"), 8, "threshold must be positive"),
        (torch.zeros(3), torch.tensor([1.0, -1.0, 1.0]), 8, "threshold must be positive"),
        (torch.zeros(3, dtype=torch.int64), 1.0, 8, "floating input"),
    ],
)
def test_bad_input(x, threshold, levels, message):
    with pytest.raises(SpikeformError, match=message):
        qcfs(x, threshold, levels)
