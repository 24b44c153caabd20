"""The neuron whose threshold is its row's largest element."""

import torch

from spikeform.neurons import Dynamic, recording
from spikeform.spikes import Radix2
from spikeform.spikes.trace import Firing, observe


def test_a_row_is_coded_in_units_of_its_largest_element():
    x = torch.softmax(6 * torch.randn(3, 4, 50, generator=torch.Generator().manual_seed(0)), -1)
    train = Dynamic()(x)
    assert train.exact
    assert train.quantum.shape == (1, 3, 4, 1)
    assert torch.equal(train.codes.amax(-1), torch.full((3, 4), 65535.0))
    error = (train.decode() - x).abs() / x.amax(-1, keepdim=True)
    assert 0 < float(error.max()) <= 0.5001 / 65535
    assert torch.equal(train.unroll().to(torch.int64).mul(torch.tensor(Radix2(16).weights()).view(-1, 1, 1, 1)).sum(0),
                       train.codes.long())  # fmt: skip


def test_rows_do_not_see_each_other():
    x = torch.rand(5, 9, generator=torch.Generator().manual_seed(1))
    alone, beside = Dynamic(Radix2(8))(x[:2]), Dynamic(Radix2(8))(torch.cat([x[:2], 1e6 * x[2:]]))
    assert torch.equal(alone.decode(), beside.decode()[:2])


def test_silent_rows_negative_inputs_and_both_ends_of_the_range():
    x = torch.tensor([[0.0, 0.0], [-3.0, 2.0], [-1.0, -2.0], [1e-38, 1e-38], [3e38, 1e38]])
    train = Dynamic(Radix2(4))(x)
    assert train.codes.tolist()[:3] == [[0, 0], [0, 15], [0, 0]]
    assert bool(train.decode().isfinite().all())
    assert train.codes.tolist()[4] == [15, 5]


def test_while_calibrating_the_input_passes_unchanged():
    x, seen = torch.rand(2, 3, dtype=torch.float64), []
    with recording(lambda neuron, value: seen.append(value)):
        train = Dynamic()(x)
    assert seen[0] is x
    assert not train.exact
    assert torch.equal(train.decode(), x)


def test_gradients_are_straight_through_and_the_train_is_then_not_exact():
    x = torch.rand(3, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(2)).requires_grad_()
    weight = torch.randn(3, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    train = Dynamic(Radix2(6))(x)
    assert not train.exact
    (train.decode() * weight).sum().backward()
    other = x.detach().requires_grad_()
    unit = other.amax(-1, keepdim=True) / 63
    scaled = other / unit
    (((scaled.round() - scaled).detach() + scaled) * unit * weight).sum().backward()
    torch.testing.assert_close(x.grad, other.grad, rtol=1e-12, atol=1e-12)
    assert x.grad.abs().sum() > 0


def test_its_firing_is_reported():
    events = []
    with observe(events.append):
        Dynamic(site="p")(torch.tensor([[0.5, -0.5]]))
    (event,) = events
    assert isinstance(event, Firing)
    assert (event.site, event.function, int(event.saturated)) == ("p", "identity", 1)
