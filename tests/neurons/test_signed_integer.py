"""The signed-integer neuron: integers, their ternary steps, gradients, and the path that only training has."""

import copy

import pytest
import torch

from spikeform.errors import SpikeformError
from spikeform.neurons import Compensation, SignedInteger
from spikeform.neurons.hadamard import factors, turned
from spikeform.neurons.neuron import recording
from spikeform.neurons.signed_integer import integers


def neuron(steps=4, threshold=1.0, channels=None, **more):
    made = SignedInteger(steps, channels, **more)
    made.set_threshold(threshold)
    return made


def inputs(steps, dtype):
    """Normal draws, and every tie, integer and limit of the range."""
    torch.manual_seed(0)
    special = torch.arange(-2 * steps - 4, 2 * steps + 5) / 2
    return torch.cat([torch.randn(5000) * 1.5, special, torch.tensor([0.0, -0.0, 1e-30, -1e30])]).to(dtype)


def membrane(x, steps, threshold=1.0):
    """The printed dynamics, fed with the integer: beta = 1, soft reset, the sign carried beside."""
    n = (x.double() / threshold).round().clamp(-steps, steps)
    v, sent = torch.zeros_like(n), []
    for i in range(steps):
        v = v + (n.abs() if i == 0 else 0)
        s = (v >= 1).double()
        v = v - s
        sent.append(s * n.sign())
    return torch.stack(sent)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 8, 16])
def test_ternary_steps_add_up_to_the_integer(steps, dtype):
    x = inputs(steps, dtype)
    with torch.no_grad():
        train = neuron(steps).encode(x)
    wanted = torch.clip(torch.round(x.float()), -steps, steps)
    spikes = train.unroll()
    assert spikes.shape[0] == steps
    assert set(spikes.unique().tolist()) == {-1, 0, 1}
    assert torch.equal(spikes.sum(0).float(), wanted)
    assert torch.equal(spikes.double(), membrane(x.float(), steps))  # and each of them in its own step
    assert torch.equal(train.count(), wanted.abs().int())
    assert torch.equal(train.decode(), wanted)
    assert bool(train.decode().isfinite().all())


def test_feeding_the_input_itself_would_floor():
    """Why the integer is fed: the printed dynamics on |x| give its floor, and many values differ."""
    x = torch.randn(10000, generator=torch.Generator().manual_seed(0)).abs() * 1.5
    v, sent = torch.zeros_like(x), torch.zeros_like(x)
    for i in range(4):
        v = v + (x if i == 0 else 0)
        s = (v >= 1).float()
        v, sent = v - s, sent + s
    assert float((sent != integers(x, "signed", 4)).float().mean()) > 0.3


@pytest.mark.parametrize(
    ("spikes", "steps", "least", "most"), [("signed", 4, -4, 4), ("unsigned", 4, 0, 4), ("signed", 1, -1, 1)]
)
def test_the_gradient_is_a_rectangle(spikes, steps, least, most):
    made = neuron(steps, spikes=spikes, alpha=0.7)
    x = torch.tensor([least - 0.01, least, least + 0.3, 0.0, 0.5, most - 0.3, most, most + 0.01], requires_grad=True)
    made.encode(x).decode().sum().backward()
    inside = (x >= least) & (x <= most)
    assert torch.allclose(x.grad, 0.7 * inside.float())


def test_binary_spikes_fire_at_the_threshold():
    made = neuron(1, threshold=2.0, spikes="binary")
    x = torch.tensor([-5.0, 0.9, 1.99, 2.0, 2.9, 7.0], requires_grad=True)
    made.encode(x).decode().sum().backward()
    assert torch.equal(made.encode(x).decode().detach(), torch.tensor([0.0, 0, 0, 2, 2, 2]))
    assert torch.equal(x.grad, torch.tensor([0.0, 0, 1, 1, 1, 0]))


def test_the_threshold_learns():
    """d(n V)/dV = n - alpha x / V where the integer is within its range, and n beyond."""
    made = neuron(4, threshold=0.5)
    x = torch.tensor([0.6, -1.3, 9.0])
    made.encode(x).decode().sum().backward()
    n = torch.tensor([1.0, -3.0, 4.0])
    inside = torch.tensor([1.0, 1.0, 0.0])
    assert torch.allclose(made.threshold.grad, (n - inside * x / 0.5).sum()[None])


@pytest.mark.parametrize("smooth", ["tanh", "clip", "identity"])
def test_compensation_of_the_gradient_leaves_the_spikes(smooth):
    made = neuron(4, threshold=0.8, channels=3).train()
    x = torch.tensor([[0.3, -2.0, 9.0]], requires_grad=True)
    with torch.no_grad():
        at_rest = made.eval().encode(x).decode()
    made.train()
    made.compensation = Compensation("grad", 0.5, smooth)
    train = made.encode(x)
    assert torch.equal(train.decode(), at_rest)
    train.decode().sum().backward()
    beyond = {"tanh": 0.5 * (1 - torch.tanh(torch.tensor(9.0 / 0.8 / 4)) ** 2), "clip": 0.0, "identity": 0.5}[smooth]
    assert torch.allclose(x.grad[0, 2], torch.as_tensor(beyond), rtol=1e-5)
    slope = float(1 - torch.tanh(torch.tensor(0.3 / 0.8 / 4)) ** 2) if smooth == "tanh" else 1.0
    assert torch.allclose(x.grad[0, 0], torch.tensor(1 + 0.5 * slope), rtol=1e-5)


def test_mixing_is_of_training_alone():
    made = neuron(4).train()
    made.compensation = Compensation("mix", 0.25, "identity")
    x = torch.tensor([0.3, 2.6], requires_grad=True)
    assert torch.allclose(made.encode(x).decode(), 0.75 * x.round() + 0.25 * x)
    assert torch.equal(made.eval().encode(x).decode().detach(), x.detach().round())
    made.train().compensation.weight = 0.0
    assert torch.equal(made.encode(x).decode().detach(), x.detach().round())


def test_thresholds_of_channels():
    made = neuron(4, threshold=torch.tensor([0.5, 2.0]), channels=2)
    x = torch.tensor([[0.8, 0.9], [-9.0, 3.1]])
    with torch.no_grad():
        assert torch.equal(made.encode(x).decode(), torch.tensor([[1.0, 0.0], [-2.0, 4.0]]))
        made.folded = True
        assert torch.equal(made.encode(x).decode(), torch.tensor([[2.0, 0.0], [-4.0, 2.0]]))
    with pytest.raises(SpikeformError, match="folded"):
        made.set_threshold(1.0)


def test_a_cast_leaves_thresholds_alone():
    made = neuron(4, threshold=1 / 3)
    before = made.threshold.detach().clone()
    assert made.to(torch.bfloat16).threshold.dtype == torch.float32
    assert torch.equal(made.threshold, before)
    assert torch.equal(copy.deepcopy(made).half().float().threshold, before)


def test_bad_arguments_are_named():
    for arguments, named in [
        ({"steps": 0}, "steps"),
        ({"steps": 4, "spikes": "ternary"}, "spikes"),
        ({"steps": 4, "spikes": "binary"}, "binary"),
    ]:
        with pytest.raises(SpikeformError, match=named):
            SignedInteger(**arguments)
    with pytest.raises(SpikeformError, match="finite and positive"):
        SignedInteger(4).set_threshold(0.0)
    assert not SignedInteger(4).calibrated


def rotated(x):
    return turned(x, factors(x.shape[-1], x.device))


@pytest.mark.parametrize("channels", [1, 2, 3, 24, 96, 512])
def test_turning_is_orthogonal_and_mixes(channels):
    x, w = torch.randn(2, 5, channels, dtype=torch.float64), torch.randn(7, channels, dtype=torch.float64)
    assert torch.allclose(rotated(x) @ rotated(w).T, x @ w.T, atol=1e-12)
    assert rotated(x.bfloat16()).dtype == torch.float32
    block = channels & -channels
    one = torch.zeros(channels, dtype=torch.float64)
    one[0] = 1
    assert torch.allclose(rotated(one).abs().sort().values[-block:], torch.full((block,), block**-0.5).double())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(rotated(x.float()), rotated(x.float()).float())
        assert torch.allclose(rotated(x.float()).double(), rotated(x), atol=1e-5)


def test_a_neuron_that_rotates_sends_what_was_rotated():
    x = torch.randn(3, 24, generator=torch.Generator().manual_seed(0))
    plain, rotates = neuron(threshold=0.3), neuron(threshold=0.3, rotates=True)
    with torch.no_grad():
        assert torch.equal(rotates.encode(x).codes, plain.encode(rotated(x)).codes)
        assert torch.equal(rotates.integers(x), plain.integers(rotated(x)))
        rotates.paused = True
        assert torch.equal(rotates.encode(x).decode(), rotated(x))
        seen = []
        with recording(lambda _, v: seen.append(v)):
            rotates.encode(x)
    assert torch.equal(seen[0], rotated(x))
    rotates.paused = False
    y = x.clone().requires_grad_()
    place = rotates.encode(y).codes[0].abs().argmin()  # within the window
    rotates.encode(y).decode()[0, place].backward()
    assert (y.grad[0] != 0).sum() == 8  # a channel is a sum of its block
    assert not y.grad[1:].any()
