"""Synapses: shapes, dispatch with its reason, what the observer is told, and errors."""

import pytest
import torch

import spikeform
from spikeform.neurons import OAT
from spikeform.spikes import Radix2, SignedDigit, SpikeTrain
from spikeform.spikes.trace import Product, observe
from spikeform.synapses import EXECUTORS, explain, hadamard, linear, matmul


def train(*shape, seed=0, scale=1.0, coding=None):
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale
    return OAT(coding or Radix2(6), (1.0, 4.0))(x)


@pytest.mark.parametrize("name", EXECUTORS)
@pytest.mark.parametrize("shape", [(7,), (1, 7), (3, 5, 7), (2, 1, 5, 7), (0, 7)])
def test_linear_shapes(name, shape):
    weight, bias = torch.randn(4, 7, generator=torch.Generator().manual_seed(1)), torch.arange(4.0)
    t = train(*shape)
    with spikeform.executor(name):
        out = linear(t, weight, bias)
        whole = linear(t, (weight * 10).to(torch.int8), bias)
    assert out.shape == (*shape[:-1], 4)
    torch.testing.assert_close(out, t.decode() @ weight.T + bias)
    torch.testing.assert_close(whole, t.decode() @ (weight * 10).to(torch.int8).float().T + bias)


@pytest.mark.parametrize("name", EXECUTORS)
def test_matmul_broadcasts(name):
    a, b = train(2, 3, 5, 7), train(1, 3, 4, 7, seed=1)
    with spikeform.executor(name):
        out = matmul(a, b, transpose_b=True)
        plain = matmul(train(5, 7), train(7, 4, seed=1))
    torch.testing.assert_close(out, a.decode() @ b.decode().transpose(-1, -2))
    assert plain.shape == (5, 4)


@pytest.mark.parametrize("name", EXECUTORS)
def test_hadamard_broadcasts(name):
    a, b = train(2, 5, 7), train(2, 5, 1, seed=1)
    with spikeform.executor(name):
        torch.testing.assert_close(hadamard(a, b), a.decode() * b.decode())


@pytest.mark.parametrize("name", EXECUTORS)
def test_windows_of_two_lengths(name):
    """The shorter window is silent in its last steps; the product is of the whole sums."""
    a, b = train(3, 7), train(3, 7, seed=1, coding=SignedDigit(9))
    with spikeform.executor(name):
        torch.testing.assert_close(hadamard(a, b), a.decode() * b.decode())
        torch.testing.assert_close(matmul(b, a, transpose_b=True), b.decode() @ a.decode().T)


@pytest.mark.parametrize("name", EXECUTORS)
def test_integer_sums_are_exact_where_fp32_is_not(name):
    """16-bit codes times 8-bit weights over 3000 channels: sums beyond 2^24, still exact."""
    codes = torch.full((1, 3000), 65535, dtype=torch.int32)
    t = SpikeTrain(codes, torch.tensor([1.0]), Radix2(16))
    weight = torch.full((1, 3000), 127, dtype=torch.int8)
    weight[0, 0] = 126
    with spikeform.executor(name):
        assert float(linear(t, weight)) == float(torch.tensor(65535 * (127 * 3000 - 1), dtype=torch.float64).float())


@pytest.mark.parametrize("name", EXECUTORS)
def test_bf16_weights_lose_nothing_of_the_codes(name):
    weight = torch.randn(4, 7, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    t = train(3, 7, coding=Radix2(16))
    with spikeform.executor(name):
        out = linear(t, weight)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, t.decode() @ weight.float().T)


def test_the_choice_says_why():
    for kind in ("linear", "matmul", "hadamard"):
        name, why = explain(kind)
        assert name == "collapsed"
        assert kind in why
        assert "default" in why
    with spikeform.executor("event"):
        assert explain("linear") == ("event", "chosen by spikeform.executor")
        with spikeform.executor("temporal"):
            assert explain("linear")[0] == "temporal"
        assert explain("linear")[0] == "event"


def test_what_the_observer_is_told():
    events = []
    a, b = train(2, 3, 5, 7), train(2, 3, 4, 7, seed=1)
    c, mask = train(2, 3, 5, 1), torch.ones(5, 4, dtype=torch.bool).tril()
    with observe(events.append):
        linear(a, torch.randn(6, 7), site="l")
        matmul(a, b, transpose_b=True, mask=mask, site="m")
        hadamard(a, c, site="h")
    assert all(isinstance(event, Product) and event.sent is None for event in events)
    one, two, three = events
    assert (one.site, one.kind, one.fan_out, one.macs) == ("l", "linear", (6,), 2 * 3 * 5 * 7 * 6)
    assert (two.site, two.kind, two.fan_out, two.macs) == ("m", "matmul", (4, 5), 2 * 3 * 5 * 4 * 7)
    assert two.mask is mask
    assert two.transposed
    assert (three.site, three.kind, three.fan_out, three.macs) == ("h", "hadamard", (1, 7), 2 * 3 * 5 * 7)
    linear(a, torch.randn(6, 7))
    assert len(events) == 3  # nobody listens any more


def test_both_masks_of_a_matmul_are_told():
    """``mask``: which outputs are wanted; ``connected``: where A has neurons at all."""
    events, a, b = [], train(5, 7), train(7, 4)
    connected = torch.ones(5, 7, dtype=torch.bool).tril()
    with observe(events.append):
        matmul(a, b, connected=connected)
    (event,) = events
    assert event.connected is connected
    assert event.mask is None


def test_shapes_that_do_not_fit():
    with pytest.raises(ValueError, match="q_proj: the train has 7 channels, the weight 8"):
        linear(train(3, 7), torch.randn(4, 8), site="q_proj")
