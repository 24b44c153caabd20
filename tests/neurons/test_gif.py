"""The generalised integrate-and-fire neuron: against sub-steps one by one, and a fake quantiser with autograd."""

import itertools

import pytest
import torch

from spikeform.errors import SpikeformError
from spikeform.neurons import GIF, recording
from spikeform.spikes.trace import observe

FORMS = [("unified", "shared"), ("unified", "separate"), ("official", "shared"), ("official", "separate")]
BITS, STEPS = (2, 4, 8), (1, 2, 4)


def draw(*shape, seed=0, dtype=torch.float32):
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    x[..., ::7] *= 12  # channels of large values
    return x


def times_of(neuron, seed=0):
    pick = torch.randint(0, len(neuron.tiers), neuron.channels, generator=torch.Generator().manual_seed(seed))
    return torch.tensor(neuron.tiers)[pick]


def make(bits=4, channels=(40,), **options):
    neuron = GIF(bits, channels, **options)
    neuron.set_times(times_of(neuron))
    return neuron


def grid(neuron, x):
    """Unit, zero-point and largest code of each element, by the equations of the released quantiser, in loops."""
    unit, zero, top = (torch.zeros_like(x) for _ in range(3))
    for t in neuron.tiers:
        where = (neuron.times == t).expand(x.shape)
        of = x * where if neuron.span == "separate" else x
        low, high = of.amin(-1, keepdim=True).clamp(max=0), of.amax(-1, keepdim=True).clamp(min=0)
        if neuron.form == "unified":
            tops = t * (2**neuron.bits - 1)
            own = ((high - low) / (2**neuron.bits - 1)).clamp(1e-5, 1e4) / t
        else:
            tops = 2**neuron.bits * t - 1
            own = ((high - low) / tops).clamp(1e-5, 1e4)
        z = (-low / own).round().detach()
        unit, zero = torch.where(where, own, unit), torch.where(where, z, zero)
        top = torch.where(where, tops, top)
    return unit, zero, top


class Round(torch.autograd.Function):
    """``(x.round() - x).detach() + x`` with the forward value of ``round`` itself."""

    @staticmethod
    def forward(ctx, x):
        return x.round()

    @staticmethod
    def backward(ctx, grad):
        return grad


def fake_quantised(neuron, x):
    unit, zero, top = grid(neuron, x)
    shifted = Round.apply(x / unit) + zero
    inside = (shifted >= 0) & (shifted <= top)  # the clamp passes gradient here alone
    q = torch.where(inside, shifted, torch.where(shifted < 0, 0.0, top))
    return (q - zero) * unit


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize(("form", "span"), FORMS)
@pytest.mark.parametrize(("bits", "steps"), itertools.product(BITS, STEPS))
def test_it_is_the_fake_quantiser_to_the_bit(bits, steps, form, span, signed):
    for channels, shape in (((40,), (3, 5, 40)), ((2, 1, 20), (3, 2, 5, 20))):
        neuron = make(bits, channels, steps=steps, form=form, span=span, signed=signed)
        x = draw(*shape, seed=bits)
        train = neuron(x)
        assert train.exact
        assert torch.equal(train.decode(), fake_quantised(neuron, x))
        _, zero, top = grid(neuron, x)
        q = train.codes if not signed else train.codes + zero
        assert bool((q >= 0).all() and (q <= top).all())
        assert int(train.codes.abs().max()) <= train.coding.limit
        assert torch.equal(train.steps().sum(0), train.centred().int())


@pytest.mark.parametrize(("bits", "steps"), itertools.product(BITS, STEPS))
def test_integers_are_the_train_in_one_unit(bits, steps):
    for signed in (True, False):
        train = make(bits, steps=steps, signed=signed)(draw(3, 40))
        integers, unit = train.integers()
        assert integers.dtype == (torch.int8 if train.coding.limit < 128 else torch.int16)
        assert torch.equal(integers * unit, train.decode())
    for form, span in FORMS[1:]:
        train = make(bits, steps=steps, form=form, span=span)(draw(3, 40))
        assert (train.integers() is None) == (steps > 1)


def sub_steps(drive, levels, steps, constant):
    """Integrate-and-fire, threshold 1, soft reset, half a unit at the start: spikes of each GIF step ``[T, ...]``."""
    count = levels * steps
    v, sent = torch.full_like(drive, 0.5), []
    v = v if constant else v + drive
    for _ in range(steps):
        spikes = torch.zeros_like(drive)
        for _ in range(levels):
            v = v + drive / count if constant else v
            s = (v >= 1).to(v.dtype)
            v, spikes = v - s, spikes + s
        sent.append(spikes)
    return torch.stack(sent)


@pytest.mark.parametrize(("bits", "steps"), itertools.product((2, 4), STEPS))
def test_t1_a_step_is_the_sum_of_its_integrate_and_fire_sub_steps(bits, steps):
    neuron = make(bits, steps=steps, signed=False)
    x = draw(30, 40, dtype=torch.float64)
    unit, zero, _ = grid(neuron, x)
    train = neuron(x)
    literal = torch.zeros(steps, 30, 40, dtype=torch.float64)
    for t in neuron.tiers:
        where = neuron.times == t
        literal[:t, :, where] = sub_steps((x / unit + zero)[:, where].clamp(min=0), 2**bits - 1, t, constant=False)
    assert torch.equal(train.unroll().double(), literal)
    assert torch.equal(train.count().double(), literal.sum(0))
    # Signed: a positive and a negative neuron, each driven by its half of x.
    signed = make(bits, steps=steps)(x)
    drive = x / unit
    counts = torch.zeros(30, 40, dtype=torch.float64)
    for t in neuron.tiers:
        where = neuron.times == t
        for sign in (1, -1):
            inner = (sign * drive[:, where]).clamp(min=0)
            counts[:, where] += sign * sub_steps(inner, 2**bits - 1, t, constant=False).sum(0)
    # The clamp to the range of q takes at most one unit, at the very ends.
    assert bool(((signed.codes - counts).abs() <= 1).all())
    inside = (drive.round() + zero >= 0) & (drive.round() + zero <= grid(neuron, x)[2])
    assert torch.equal(signed.codes[inside].double(), counts[inside])
    assert float(inside.double().mean()) > 0.9


@pytest.mark.parametrize(("levels", "steps"), [(15, 2), (15, 4), (3, 2), (1, 4)])
def test_t4_constant_current_is_load_at_the_start_is_the_floor(levels, steps):
    x = torch.rand(20000, dtype=torch.float64, generator=torch.Generator().manual_seed(levels)) * levels * steps
    x = x[((x % 1) - 0.5).abs() > 1e-6]
    loaded, driven = (sub_steps(x, levels, steps, constant).sum(0) for constant in (False, True))
    assert torch.equal(loaded, driven)
    assert torch.equal(loaded, (x + 0.5).floor())
    assert torch.equal(loaded, x.round())
    ties = torch.arange(0, 4, dtype=torch.float64) + 0.5  # where round goes to the even neighbour, floor upwards
    assert torch.equal((ties + 0.5).floor() - ties.round(), torch.tensor([1.0, 0.0, 1.0, 0.0], dtype=torch.float64))


@pytest.mark.parametrize(("form", "span"), FORMS)
@pytest.mark.parametrize("signed", [True, False])
def test_gradients_are_those_of_the_fake_quantiser(form, span, signed):
    neuron = make(3, steps=4, form=form, span=span, signed=signed)
    weight = draw(6, 40, seed=9, dtype=torch.float64)
    x, other = (draw(6, 40, seed=5, dtype=torch.float64).requires_grad_() for _ in range(2))
    train = neuron(x)
    assert not train.exact
    assert train.integers() is None
    (train.decode() * weight).sum().backward()
    (fake_quantised(neuron, other) * weight).sum().backward()
    torch.testing.assert_close(x.grad, other.grad, rtol=1e-12, atol=1e-12)
    straight = (x.grad - weight).abs() < 1e-9
    assert 0 < int(straight.sum()) < x.numel()  # elsewhere the unit's gradient, or the clamp's zero, shows
    with torch.no_grad():
        assert torch.equal(neuron(x).decode(), train.decode())
        assert neuron(x).exact


def test_what_is_clamped_passes_no_gradient_of_its_own():
    neuron = GIF(2, (2, 1, 2), steps=1, axis="channel")
    neuron.set_times(torch.ones(2, 1, 2))
    neuron.set_range(torch.full((2, 1, 2), -1.0), torch.full((2, 1, 2), 2.0))
    x = torch.tensor([-5.0, 0.4]).expand(1, 2, 3, 2).clone().requires_grad_()
    (neuron(x).decode() * neuron.channel_scale).sum().backward()
    assert torch.equal(x.grad, torch.tensor([0.0, 1.0]).expand(1, 2, 3, 2))


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("form", ["unified", "official"])
def test_static_ranges_far_from_zero(form, signed):
    """Keys whose bias is large: the codes stay within the window, the rest is a constant zero-point."""
    neuron = make(4, (2, 1, 12), steps=2, axis="channel", form=form, signed=signed)
    bias = 40 * torch.randn(2, 1, 12, generator=torch.Generator().manual_seed(0))
    x = draw(3, 2, 50, 12) + bias
    neuron.set_range(x.amin((0, 2))[:, None], x.amax((0, 2))[:, None])
    train = neuron(x)
    assert int(train.codes.abs().max()) <= train.coding.limit
    assert float(train.zero.abs().max()) > train.coding.limit  # some channel's range is far from zero
    scale = neuron.channel_scale
    own = scale * torch.where(neuron.times == 2, 1, 2)
    # Half a unit of rounding; another half at the ends, where the zero-point's own rounding clamps.
    assert bool(((train.decode() * scale - x).abs() <= 1.01 * own).all())
    integers, unit = train.integers()
    assert torch.equal(integers * unit, train.decode())
    tops = torch.where(neuron.times == 2, 30 if form == "unified" else 31, 15)
    assert torch.equal(own, (neuron.high - neuron.low) / tops)
    seen = []
    with observe(seen.append):
        neuron(x + 1000)
    assert int(seen[0].saturated) == x.numel()


@pytest.mark.parametrize("axis", ["token", "channel"])
def test_t7_a_token_depends_on_no_other(axis):
    neuron = make(4, (2, 1, 12), axis=axis)
    x = draw(3, 2, 6, 12)
    if axis == "channel":
        neuron.set_range(torch.full((2, 1, 12), -9.0), torch.full((2, 1, 12), 9.0))
    longer = torch.cat([x, 100 * draw(3, 2, 2, 12, seed=1)], 2)
    rows = torch.cat([draw(1, 2, 6, 12, seed=2), x])
    assert torch.equal(neuron(longer).decode()[:, :, :6], neuron(x).decode())
    assert torch.equal(neuron(rows).decode()[1:], neuron(x).decode())


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize(("form", "span"), FORMS)
@pytest.mark.parametrize("bits", BITS)
def test_packed_and_back(bits, form, span, signed):
    for steps, dtype in itertools.product(STEPS, (torch.float32, torch.float64)):
        neuron = make(bits, (2, 1, 11), steps=steps, form=form, span=span, signed=signed)
        train = neuron(draw(3, 2, 5, 11, dtype=dtype))
        packed = neuron.pack(train)
        assert packed.dtype == (torch.int8 if train.coding.limit < 128 else torch.int16)
        assert packed.shape[:-1] == (3, 2, 5)
        # As a cache does: parts of the batch, tokens one by one, another memory layout.
        packed = torch.cat([token.transpose(0, 1).contiguous().transpose(0, 1) for token in packed.split(1, 2)], 2)[1:]
        back = neuron.unpack(packed, dtype)
        assert back.exact
        assert torch.equal(back.decode(), train.decode()[1:])
        assert torch.equal(back.count(), train.count()[1:])
    static = make(bits, (2, 1, 11), axis="channel", signed=signed, form=form)
    static.set_range(torch.full((2, 1, 11), -3.0), torch.full((2, 1, 11), 5.0))
    train = static(draw(3, 2, 5, 11))
    assert static.pack(train).shape == (3, 2, 5, 11)
    assert torch.equal(static.unpack(static.pack(train)).decode(), train.decode())


def test_ternary_spikes():
    neuron = GIF.ternary((9,), steps=2)
    neuron.set_times(torch.tensor([1, 2] * 4 + [1]))
    x = torch.tensor([[-1.0, -1.0, -0.4, -0.4, 0.0, 0.3, 0.6, 0.8, 0.2]])
    train = neuron(x)
    assert train.codes.tolist() == [[-1, -2, 0, -1, 0, 1, 1, 2, 0]]
    assert torch.equal(train.decode(), torch.tensor([[-1, -1, 0, -0.5, 0, 0.5, 1, 1, 0]]))
    assert train.unroll().tolist() == [[[-1, -1, 0, -1, 0, 1, 1, 1, 0]], [[0, -1, 0, 0, 0, 0, 0, 1, 0]]]


def test_edges_of_the_range():
    neuron = make(4, (4,), steps=2)
    neuron.set_times(torch.tensor([1, 2, 1, 2]))
    x = torch.tensor([[0.0, 0, 0, 0], [5, 6, 7, 8], [-5, -6, -7, -8], [1e-7, -1e-7, 0, 0], [3e38, -3e38, 0, 0]])
    train = neuron(x)
    assert train.codes[0].tolist() == [0, 0, 0, 0]
    assert bool(train.decode().isfinite().all())
    assert float((train.decode()[1:3] - x[1:3]).abs().max()) <= 8 / 15 / 2 * 1.001  # a range of one sign is coded too
    assert train.codes[4].tolist() == [0, -30, 0, 0]  # beyond the largest unit: saturated, and no code wraps around
    empty = neuron(torch.zeros(0, 4))
    assert empty.shape == (0, 4)
    assert empty.decode().shape == (0, 4)


def test_dtypes():
    neuron = make(4)
    x = draw(3, 40)
    assert neuron(x.bfloat16()).decode().dtype == torch.float32
    assert torch.equal(neuron(x.bfloat16()).decode(), neuron(x.bfloat16().float()).decode())
    assert neuron(x.double()).decode().dtype == torch.float64
    static = GIF(4, (40,), axis="channel").to(torch.bfloat16)
    assert static.low.dtype == torch.float32
    assert static.times.dtype == torch.uint8


def test_calibration():
    neuron, seen, x = GIF(4, (40,)), [], draw(3, 40)
    assert not neuron.calibrated
    with recording(lambda who, value: seen.append((who, value))):
        train = neuron(x)
        assert torch.equal(train.decode(), x)
        assert not train.exact
        neuron.set_times(torch.ones(40))
        assert not torch.equal(neuron(x).decode(), x)
    assert len(seen) == 2
    assert seen[0] == (neuron, x)
    static = GIF(4, (40,), axis="channel", site="k")
    static.set_times(torch.ones(40))
    assert not static.calibrated
    with pytest.raises(SpikeformError, match="k is not calibrated"):
        static(x)
    static.set_range(x.amin(0), x.amax(0))
    assert static.calibrated
    static.low[3] = float("nan")
    assert not static.calibrated


def test_new_times_are_seen_at_once_however_they_came():
    neuron, x = GIF(4, (40,), steps=2), draw(3, 40)
    neuron.set_times(torch.ones(40))
    with torch.inference_mode():
        plain = neuron(x).decode().clone()
    other = make(4)
    assert not torch.equal(other(x).decode(), plain)
    neuron.load_state_dict(other.state_dict())
    assert torch.equal(neuron(x).decode(), other(x).decode())
    neuron.set_times(torch.ones(40))
    assert torch.equal(neuron(x).decode(), plain)
    leaf = x.clone().requires_grad_()
    neuron(leaf).decode().sum().backward()  # though its tables were first met in inference mode
    assert leaf.grad is not None


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"bits": 0}, "bits must be"),
        ({"bits": 9}, "bits must be"),
        ({"steps": 3}, "steps must be"),
        ({"steps": True}, "steps must be"),
        ({"form": "exact"}, "form must be one of unified, official, ternary"),
        ({"span": "own"}, "span must be one of"),
        ({"axis": "head"}, "axis must be one of"),
        ({"axis": "channel", "span": "separate"}, "range of each channel"),
        ({"form": "ternary", "signed": False}, "signed=True"),
    ],
)
def test_bad_arguments(options, words):
    options = dict(options)
    with pytest.raises(SpikeformError, match=words):
        GIF(options.pop("bits", 4), (8,), **options)


def test_bad_settings_and_inputs():
    neuron = GIF(4, (8,), steps=2, site="q_proj.neuron")
    for times in (torch.ones(9), torch.full((8,), 3), torch.full((8,), 4), torch.zeros(8)):
        with pytest.raises(SpikeformError, match=r"q_proj.neuron: needs steps of \[1, 2\] for channels \[8\]"):
            neuron.set_times(times)
    with pytest.raises(SpikeformError, match="the range is the token's own"):
        neuron.set_range(torch.zeros(8), torch.ones(8))
    with pytest.raises(SpikeformError, match="the unit is the token's own"):
        make(4, (8,)).channel_scale  # noqa: B018
    with pytest.raises(SpikeformError, match=r"q_proj.neuron is not calibrated"):
        neuron(torch.zeros(2, 8))
    neuron.set_times(torch.ones(8))
    with pytest.raises(SpikeformError, match=r"has channels \[8\], got an input \[2, 9\]"):
        neuron(torch.zeros(2, 9))
    static = GIF(4, (8,), axis="channel")
    infinite = torch.full((8,), torch.inf)
    for low, high in ((torch.zeros(7), torch.ones(7)), (torch.ones(8), torch.zeros(8)), (torch.zeros(8), infinite)):
        with pytest.raises(SpikeformError, match="finite low <= high"):
            static.set_range(low, high)
