"""IF and LIF: the recursion, its identities, the closed form, the folded scan, and its gradients."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spikeform.errors import SpikeformError
from spikeform.neurons.if_ import constant_input_spikes, integrate_and_fire, scan, step
from spikeform.neurons.surrogate import spike


def naive(x, theta, v, leak=1.0, ternary=False, level=1.0):
    """One number at a time."""
    spikes = []
    for current in x:
        v = leak * v + current
        s = 1 if v >= level * theta else -1 if ternary and v <= -level * theta else 0
        v -= theta * s
        spikes.append(s)
    return spikes, v


def dyadic(*shape, seed=0):
    """Random multiples of 1/64 in [-2, 2]: sums of them are exact."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-128, 129, shape, generator=generator) / 64.0


def by_autograd(x, theta, initial, level, width, ternary, leak=1.0):
    """The recursion as a graph of single operations; time on the first axis."""
    v, spikes = initial, []
    for current in x:
        v = leak * v + current
        s = spike(v - level * theta, width)
        if ternary:
            s = s - spike(-v - level * theta, width)
        v = v - theta * s
        spikes.append(s)
    return torch.stack(spikes), v


@pytest.mark.parametrize("ternary", [False, True])
@pytest.mark.parametrize(("leak", "level"), [(1.0, 1.0), (0.5, 1.0), (1.0, 0.5), (0.5, 1.25)])
def test_it_is_the_recursion(ternary, leak, level):
    x = dyadic(9, 20)
    fired = integrate_and_fire(x, 0.75, 0.25, leak=leak, ternary=ternary, level=level)
    assert fired.spikes.dtype == torch.int8
    for i in range(20):
        spikes, v = naive(x[:, i].tolist(), 0.75, 0.25, leak, ternary, level)
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
    assert torch.equal(integrate_and_fire(x, 1.0, leak=1.0).spikes, integrate_and_fire(x, 1.0).spikes)
    assert integrate_and_fire(x, 1.0, leak=0.5).spikes.sum() < integrate_and_fire(x, 1.0).spikes.sum()


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
    for level in (0.5, 0.625, 1.0):
        loop = integrate_and_fire(x.expand(steps, -1, -1), theta, level=level)
        assert torch.equal(constant_input_spikes(x, theta, steps, level=level), loop.spikes)
        signed = integrate_and_fire(x.expand(steps, -1, -1), theta, ternary=True, level=level)
        assert torch.equal(constant_input_spikes(x, theta, steps, ternary=True, level=level), signed.spikes)
        count = torch.floor(steps * x.abs() / theta + 1 - level).clamp(0, steps) * x.sign()
        assert torch.equal(signed.spikes.sum(0).float(), count)


def test_the_closed_form_needs_a_signed_level_of_a_half():
    """Below it a reset may end where the opposite spike fires, so that the refusal is not idle."""
    x = torch.full((3,), 0.0625)
    spikes = integrate_and_fire(x.expand(20, -1), 1.0, ternary=True, level=0.25).spikes
    assert bool((spikes < 0).any())
    with pytest.raises(SpikeformError, match="level at least 1/2"):
        constant_input_spikes(x, 1.0, 20, ternary=True, level=0.25)


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
        (torch.zeros(3, 3), {"threshold": torch.tensor([1.0, float("inf"), 1.0])}, "positive and finite"),
        (torch.zeros(3, 3), {"threshold": 1.0, "level": 0.0}, "level must be positive"),
        (torch.zeros(3, 3), {"threshold": torch.ones(4)}, r"shape \(4,\) does not broadcast to one step of \(3,\)"),
        (torch.zeros(3, 3), {"threshold": 1.0, "initial": torch.zeros(2, 3)}, "initial potential of shape"),
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
    for initial, ternary, level in ((1.0, False, 1.0), (-0.1, False, 1.0), (0.5, True, 1.0), (0.5, False, 0.5)):
        with pytest.raises(ValueError, match="closed form"):
            constant_input_spikes(x, 1.0, 4, initial, ternary=ternary, level=level)
    with pytest.raises(ValueError, match="closed form"):
        constant_input_spikes(x, 1.0, 4, level=1.25)
    with pytest.raises(ValueError, match="positive integer"):
        constant_input_spikes(x, 1.0, 0)


# --- the signed neuron, and the order of time ---


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.lists(st.integers(-64, 64), min_size=1, max_size=24), st.sampled_from([0.25, 1.0, 2.0]))
def test_signed_at_level_a_half_rounds_the_running_sum(units, theta):
    x = torch.tensor(units, dtype=torch.float64) / 64 * theta  # |x| <= theta
    spikes, potential = integrate_and_fire(x[:, None], theta, ternary=True, level=0.5)
    total, sent = x.cumsum(0) / theta, spikes[:, 0].double().cumsum(0)
    assert float(potential.abs()) <= theta / 2
    assert float((total - sent).abs().max()) <= 0.5
    clear = (total - total.floor()) != 0.5
    assert torch.equal(sent[clear], total.round()[clear])


def test_in_a_tie_the_last_input_decides():
    """The running sum 1/2 is sent as 1, and taken back by a step that brings nothing."""
    assert integrate_and_fire(torch.tensor([0.5]), 1.0, ternary=True, level=0.5).spikes.tolist() == [1]
    assert integrate_and_fire(torch.tensor([0.5, 0.0]), 1.0, ternary=True, level=0.5).spikes.tolist() == [1, -1]


def test_the_unsigned_count_depends_on_the_order_and_the_signed_one_does_not():
    x = dyadic(8, 400, seed=3) / 2 + 1 / 256  # |x| <= theta, and no running sum of eight is a tie
    x = x.clamp(-1, 1)
    turned = x.flip(0)
    unsigned = [integrate_and_fire(each, 1.0, 0.5).spikes.sum(0) for each in (x, turned)]
    signed = [integrate_and_fire(each, 1.0, ternary=True, level=0.5).spikes.sum(0) for each in (x, turned)]
    assert float((unsigned[0] != unsigned[1]).float().mean()) > 0.1
    clear = (x.sum(0) % 1) != 0.5
    assert torch.equal(signed[0][clear], signed[1][clear])
    assert torch.equal(signed[0][clear].float(), x.sum(0).round()[clear])


@pytest.mark.parametrize("share", [0.125, 0.5, 0.875])
def test_a_head_start_is_a_lower_level(share):
    x = dyadic(16, 300, seed=4)
    theta = 0.75
    early = integrate_and_fire(x, theta, share * theta).spikes
    assert torch.equal(integrate_and_fire(x, theta, level=1 - share).spikes, early)


# --- time folded into the batch ---


def folded(x):
    """``[T, B, ...]`` as rows ``b T + t``."""
    return x.transpose(0, 1).flatten(0, 1)


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("shape", [(1, 2, 3), (4, 3, 5), (4, 2, 6, 5), (8, 1, 6, 5), (3, 2, 2, 6, 5)])
@pytest.mark.parametrize("kind", ["scalar", "number", "channel", "position", "row"])
def test_scan_is_the_same_neuron(signed, shape, kind):
    x = dyadic(*shape, seed=5)
    sizes = {"scalar": (), "number": (), "channel": shape[-1:], "position": shape[-2:], "row": (shape[1],)}
    size = sizes[kind] + (1,) * (len(shape) - 2 if kind == "row" else 0)
    theta, initial, level = dyadic(*size, seed=6).abs() + 0.5, dyadic(*size, seed=7) / 8, dyadic(*size, seed=8) / 8 + 1
    if kind == "number":
        theta, initial, level = float(theta), float(initial), float(level)
    spikes = scan(folded(x), theta, initial, level, steps=shape[0], signed=signed)
    assert spikes.dtype == torch.int8
    expected = integrate_and_fire(x, theta, initial, ternary=signed, level=level).spikes
    assert torch.equal(spikes, folded(expected))
    assert bool(expected.any()) or expected.numel() < 10


def test_rows_are_independent_and_sequences_may_be_cut():
    x = folded(dyadic(4, 6, 3, 5, seed=9))
    whole = scan(x, 1.0, 0.5, steps=4)
    assert torch.equal(torch.cat([scan(x[:8], 1.0, 0.5, steps=4), scan(x[8:], 1.0, 0.5, steps=4)]), whole)
    theta = dyadic(3, 5, seed=10).abs() + 0.5
    assert torch.equal(scan(x, theta, steps=4)[:, 1:], scan(x[:, 1:], theta[1:], steps=4))
    assert scan(x[:0], theta, steps=4).shape == (0, 3, 5)


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("steps", [1, 2, 5, 8, 32])
@pytest.mark.parametrize("size", [(), (5,), (3, 5), (3, 1), (2, 3, 5)])
def test_gradients_are_those_of_the_graph_of_single_operations(signed, steps, size):
    generator = torch.Generator().manual_seed(steps)
    x = torch.randn(steps, 2, 3, 5, dtype=torch.float64, generator=generator)
    draw = [torch.rand(size, dtype=torch.float64, generator=generator) for _ in range(3)]
    leaves = [x, draw[0] + 0.5, draw[1] - 0.3, 0.5 + draw[2]]
    weight = torch.randn(x.shape, dtype=torch.float64, generator=generator)
    for width in (0.5, 1.0, 2.0):
        mine, reference = ([leaf.clone().requires_grad_() for leaf in leaves] for _ in range(2))
        codes = scan(folded(mine[0]), *mine[1:], steps=steps, signed=signed, surrogate=width)
        (codes * folded(weight)).sum().backward()
        spikes, _ = by_autograd(*reference, reference[1].detach() * width, signed)
        (spikes * weight).sum().backward()
        assert torch.equal(codes.detach(), folded(spikes.detach()))
        for a, b in zip(mine, reference, strict=True):
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-10, atol=1e-10)
        assert all(float(leaf.grad.abs().max()) > 0 for leaf in mine)


@pytest.mark.parametrize("ternary", [False, True])
@pytest.mark.parametrize("leak", [1.0, 0.8])
@pytest.mark.parametrize("through", ["spikes", "potential", "both"])
def test_gradients_through_the_potential_and_the_leak(ternary, leak, through):
    generator = torch.Generator().manual_seed(1)
    x, weight = torch.randn(2, 6, 4, 3, dtype=torch.float64, generator=generator)
    leaves = [x, *torch.rand(3, 3, dtype=torch.float64, generator=generator) + 0.5]
    gradients = []
    for run in ("mine", "reference"):
        own = [leaf.clone().requires_grad_() for leaf in leaves]
        if run == "mine":
            args = own[0], own[1], own[2]
            spikes, v = integrate_and_fire(*args, leak=leak, ternary=ternary, surrogate=0.7, level=own[3])
        else:
            spikes, v = by_autograd(*own, torch.tensor(0.7, dtype=torch.float64), ternary, leak)
        loss = (spikes * weight).sum() * (through != "potential") + (v**2).sum() * (through != "spikes")
        gradients.append(torch.autograd.grad(loss, own))
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_a_step_is_a_scan_of_one_and_differentiable():
    v, x = dyadic(2, 50, seed=11)
    v, x = v.clone().requires_grad_(), x.clone()
    spikes, after = step(v, x, torch.tensor(0.75), ternary=True)
    expected, potential = by_autograd(x[None], torch.tensor(0.75), v, 1.0, 1.0, True)
    assert torch.equal(spikes, expected[0])
    assert torch.equal(after, potential)
    assert torch.equal(*(torch.autograd.grad(s.sum(), v)[0] for s in (spikes, expected)))


def test_codes_are_floating_where_gradients_can_flow():
    x = dyadic(8, 5, seed=12)
    assert scan(x, 1.0, steps=4, surrogate=1.0).dtype == torch.float32
    with torch.no_grad():
        assert scan(x, 1.0, steps=4, surrogate=1.0).dtype == torch.int8
    assert scan(x.requires_grad_(), 1.0, steps=4).dtype == torch.int8
    assert scan(x.double(), 1.0, steps=4, surrogate=1.0).dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_input_is_scanned_in_full_precision(dtype):
    generator = torch.Generator().manual_seed(2)
    x = (torch.randn(32, 64, generator=generator) / 4).to(dtype)
    theta = torch.tensor(0.3)
    for parameter in (theta, torch.full((64,), 0.3), 0.3):
        assert torch.equal(scan(x, parameter, steps=16), scan(x.float(), theta, steps=16))
    own = x.clone().requires_grad_()
    scan(own, theta, steps=16, surrogate=1.0).sum().backward()
    assert own.grad.dtype == dtype
    assert integrate_and_fire(x, theta).potential.dtype == torch.float32


def test_one_node_keeps_the_input_alone():
    x, kept = dyadic(32, 7, seed=13).requires_grad_(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        codes = scan(x * 1, 1.0, 0.5, steps=16, surrogate=1.0)
    assert sum(kept) <= x.numel() + 10
    assert "Scan" in codes.grad_fn.next_functions[0][0].name() + codes.grad_fn.name()


@pytest.mark.parametrize(
    ("rows", "steps", "message"),
    [(6, 4, "whole windows of 4 steps"), (6, 0, "steps must be"), (6, 2.0, "steps must be"), (6, True, "steps must")],
)
def test_scan_refuses_what_is_not_windows(rows, steps, message):
    with pytest.raises(SpikeformError, match=message):
        scan(torch.zeros(rows, 3), 1.0, steps=steps)
