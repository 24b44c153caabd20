"""Integer products: exact in every arithmetic, the same in every executor, and equal to every other way to run them."""

import itertools

import pytest
import torch

import spikeform
from spikeform.errors import SpikeformError
from spikeform.neurons import GIF, MT, OAT, Dynamic
from spikeform.spikes import Burst, MultiThreshold, Radix2, SignedDigit, SpikeTrain
from spikeform.spikes.trace import observe
from spikeform.synapses import EXECUTORS, IntegerWeight, exact_sums, explain_sums, linear, matmul
from spikeform.synapses.sums import exact_product

FORMS = [("unified", "shared"), ("unified", "separate"), ("official", "shared"), ("official", "separate")]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def integers(low, high, *shape, seed=0, dtype=torch.int64):
    return torch.randint(low, high + 1, shape, generator=generator(seed)).to(dtype)


def weight_of(rows, columns, *, bits=4, tiers=(1,), ternary=False, seed=0):
    peak = torch.tensor([t if ternary else t * (2**bits - 1) for t in tiers])
    tier = integers(0, len(tiers) - 1, columns, seed=seed)
    share = torch.rand(rows, columns, generator=generator(seed)) * 2 - 1
    codes = (share * peak[tier]).round().to(torch.int8 if int(peak.max()) < 128 else torch.int16)
    scale = torch.rand(len(tiers), rows, generator=generator(seed + 1)) + 0.01
    zero = torch.zeros(len(tiers), rows, dtype=torch.int16)
    return IntegerWeight(codes, scale, zero, tier.to(torch.uint8) if len(tiers) > 1 else None, bits, tiers, ternary)


def gif(bits, channels, **options):
    neuron = GIF(bits, channels, **options)
    neuron.set_times(torch.tensor(neuron.tiers)[integers(0, len(neuron.tiers) - 1, *channels, seed=bits)])
    return neuron


def by_executor(product):
    results = []
    for name in EXECUTORS:
        with spikeform.executor(name):
            results.append(product())
    return results


def same(results):
    return all(torch.equal(results[0], other) for other in results[1:])


WEIGHTS = [{}, {"tiers": (1, 2)}, {"ternary": True, "tiers": (1, 2)}, {"bits": 8, "tiers": (2, 1, 4)}, {"bits": 2}]


@pytest.mark.parametrize("weight", WEIGHTS, ids=str)
@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize(("form", "span"), FORMS)
def test_linear_is_one_meaning_bit_for_bit(form, span, signed, weight):
    for bits, steps in itertools.product((2, 4, 8), (1, 2, 4)):
        x = torch.randn(2, 9, 70, generator=generator(bits))
        x[..., 3] *= 30
        neuron = gif(bits, (70,), steps=steps, form=form, span=span, signed=signed)
        train, w = neuron(x), weight_of(11, 70, **weight)
        bias = torch.randn(11, generator=generator())
        results = by_executor(lambda t=train, w=w, b=bias: linear(t, w, b))
        assert same(results)
        assert results[0].dtype == torch.float32
        # By real numbers, in fp64: to the rounding of the last multiplications, and no more.
        real = train.decode().double() @ w.dequantise().double().T + bias.double()
        size = train.decode().double().abs() @ w.dequantise().double().abs().T + 1
        assert float(((results[0] - real).abs() / size).max()) < 1e-6
        wide = by_executor(lambda n=neuron, x=x, w=w: linear(n(x.double()), w))
        assert same(wide)
        assert wide[0].dtype == torch.float64


@pytest.mark.parametrize("bits", [4, 8])
def test_many_channels(bits):
    x = torch.randn(5, 4096, generator=generator())
    for signed, tiers in itertools.product((True, False), ((1,), (1, 2))):
        train = gif(bits, (4096,), steps=4, signed=signed)(x)
        w = weight_of(6, 4096, bits=bits, tiers=tiers)
        results = by_executor(lambda t=train, w=w: linear(t, w))
        assert same(results)
        real = train.decode().double() @ w.dequantise().double().T
        assert float((results[0] - real).norm() / real.norm()) < 1e-6


@pytest.mark.parametrize(
    "coding", [Radix2(7), SignedDigit(7), SignedDigit(15), MultiThreshold(5, 4), Burst(4, 15)], ids=str
)
def test_trains_of_other_codings_meet_integer_weights_too(coding):
    x = 3 * torch.randn(4, 50, generator=generator())
    for encode in (MT(coding, (2.0,)), OAT(coding, (1.0, 9.0))):
        results = by_executor(lambda e=encode: linear(e(x), weight_of(7, 50, tiers=(1, 2))))
        assert same(results)
        real = encode(x).decode() @ weight_of(7, 50, tiers=(1, 2)).dequantise().T
        torch.testing.assert_close(results[0], real)
    shifted = MT(coding, (2.0,))
    shifted.channel_shift = torch.ones(50, dtype=torch.int8)
    for name in EXECUTORS:
        with spikeform.executor(name), pytest.raises(SpikeformError, match="fold the channel shifts"):
            linear(shifted(x), weight_of(7, 50))


def test_an_integer_tensor_is_a_weight_worth_one():
    train = gif(4, (70,))(torch.randn(3, 70, generator=generator()))
    w = weight_of(5, 70).codes
    results = by_executor(lambda: linear(train, w))
    assert same(results)
    ints, unit = train.integers()
    assert torch.equal(results[0], (ints.long() @ w.long().T).float() * unit)


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_two_trains_bit_for_bit(bits, signed):
    for steps, dtype in itertools.product((1, 2, 4), (torch.float32, torch.float64)):
        x, y = (torch.randn(2, 3, 6, 16, generator=generator(s), dtype=dtype) for s in (0, 1))
        query = gif(bits, (3, 1, 16), steps=1)(x)
        key = gif(bits, (3, 1, 16), steps=steps, signed=signed)(y)
        results = by_executor(lambda q=query, k=key: matmul(q, k, transpose_b=True))
        assert same(results)
        left, right = query.integers(), key.integers()
        whole = left[0].long() @ right[0].long().transpose(-1, -2)
        assert torch.equal(results[0], whole.to(dtype) * left[1] * right[1].transpose(-1, -2))
        torch.testing.assert_close(results[0], query.decode() @ key.decode().transpose(-1, -2))
        # Probabilities of sixteen bits, and values whose units went into them.
        value = gif(bits, (3, 1, 16), steps=steps, signed=signed)(y)
        plain = SpikeTrain(
            value.integers()[0], torch.ones(1, dtype=dtype), Burst(steps, value.coding.levels), exact=True
        )
        weights = Dynamic()(torch.softmax(x @ y.transpose(-1, -2), -1))
        results = by_executor(lambda p=weights, v=plain: matmul(p, v))
        assert same(results)
        torch.testing.assert_close(results[0], weights.decode() @ plain.decode())
        # Units that differ along K: real numbers, to summation order.
        results = by_executor(lambda p=weights, v=value: matmul(p, v))
        for other in results[1:]:
            torch.testing.assert_close(results[0], other)


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("form", ["unified", "official"])
def test_keys_of_static_ranges_bit_for_bit(form, signed):
    y = torch.randn(2, 3, 6, 16, generator=generator()) + 40 * torch.randn(3, 1, 16, generator=generator(1))
    neuron = gif(4, (3, 1, 16), steps=2, axis="channel", form=form, signed=signed)
    neuron.set_range(y.amin((0, 2))[:, None], y.amax((0, 2))[:, None])
    query = gif(4, (3, 1, 16), steps=1)(torch.randn(2, 3, 5, 16, generator=generator(2)) * neuron.channel_scale)
    key = neuron(y)
    results = by_executor(lambda: matmul(query, key, transpose_b=True))
    assert same(results)
    torch.testing.assert_close(results[0], query.decode() @ key.decode().transpose(-1, -2), rtol=1e-5, atol=1e-4)


def test_what_is_sent_is_what_is_counted():
    events = []
    train = gif(4, (40,), signed=False)(torch.randn(3, 40, generator=generator()))
    key = gif(4, (40,))(torch.randn(5, 40, generator=generator(1)))
    x = torch.randn(2, 3, 40, generator=generator())
    weight = weight_of(7, 40, tiers=(1, 2), ternary=True)
    with observe(events.append), spikeform.executor("temporal"):
        linear(train, weight, site="l")
        matmul(key, train, transpose_b=True, site="m")
        linear(x, weight, site="w")
    one, two, three = events
    assert (one.kind, one.fan_out, one.macs) == ("linear", (7,), 3 * 40 * 7)
    assert int(one.sent[0]) == int(train.count().sum()) > 0
    assert [int(s) for s in two.sent] == [int(t.count().sum()) for t in (key, train)]
    assert (three.site, three.kind, three.fan_out, three.macs) == ("w", "weights", (6,), 7 * 40 * 6)
    (spikes,) = three.operands
    assert int(three.sent[0]) == int(spikes.count().sum()) == int(weight.codes.abs().sum()) > 0
    assert torch.equal(spikes.decode(), weight.dequantise())
    assert spikes.coding.levels == 1
    with observe(events.append):
        linear(x, weight)
    assert events[-1].sent is None


@pytest.mark.parametrize("weight", WEIGHTS, ids=str)
def test_real_input_and_spiking_weights(weight):
    x = torch.randn(2, 3, 70, generator=generator())
    x[..., ::3] = 0  # gated
    w, bias = weight_of(11, 70, **weight), torch.randn(11, generator=generator())
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        results = by_executor(lambda d=dtype: linear(x.to(d), w, bias))
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        for out in results:
            assert out.dtype == wide
            real = x.to(dtype).double() @ w.dequantise().double().T + bias
            assert float((out - real).norm() / real.norm()) < 1e-6
    with pytest.raises(ValueError, match="both real"):
        linear(x, w.dequantise())


def test_gradients_reach_the_input_through_integer_weights():
    neuron, w = gif(4, (70,)), weight_of(11, 70, tiers=(1, 2))
    x = torch.randn(3, 70, generator=generator()).requires_grad_()
    for name in EXECUTORS:
        with spikeform.executor(name):
            (grad,) = torch.autograd.grad(linear(neuron(x), w).square().sum(), x)
        (wanted,) = torch.autograd.grad((neuron(x).decode() @ w.dequantise().T).square().sum(), x)
        torch.testing.assert_close(grad, wanted)
        assert grad.abs().sum() > 0
        with torch.no_grad():
            torch.testing.assert_close(linear(neuron(x), w), neuron(x).decode() @ w.dequantise().T)
        (grad,) = torch.autograd.grad(linear(x, w).sum(), x)
        torch.testing.assert_close(grad, w.dequantise().sum(0).expand(3, 70))


@pytest.mark.parametrize("steps", [2, 4])
@pytest.mark.parametrize("salient", [0.0, 0.1, 1.0])
def test_t3_every_other_way_to_run_the_product_gives_the_same_integers(steps, salient):
    """Greedy planes; duplicated salient columns; coarse codes and residual; bit planes: one integer product."""
    levels, rows, columns = 15, 9, 64
    is_salient = torch.arange(columns) < int(salient * columns)
    neuron = GIF(4, (columns,), steps=steps, signed=False)
    neuron.set_times(torch.where(is_salient, steps, 1))
    train = neuron(torch.randn(50, columns, generator=generator()))
    w = weight_of(rows, columns).codes.long()
    q = train.codes.long()
    u = torch.where(is_salient, q, steps * q)
    assert bool((q.amax(-1) >= 14).all())
    wanted = u @ w.T
    zero = train.zero.long().squeeze(-1)  # [R, tokens]
    bias = zero[-1, :, None] * w[:, is_salient].sum(1) + steps * zero[0, :, None] * w[:, ~is_salient].sum(1)
    # (a) greedy planes of at most L
    planes = train.unroll().long()
    assert int(planes.max()) <= levels
    factor = torch.where(is_salient, 1, steps)
    assert torch.equal(sum((plane * factor) @ w.T for plane in planes), wanted)
    # (b) channel expansion: salient weight columns once for every step, codes of b bits, a shift
    expanded = torch.cat([w[:, is_salient]] * steps, 1)
    inner = torch.cat([plane[:, is_salient] for plane in planes], 1)
    assert torch.equal(steps * (planes[0][:, ~is_salient] @ w[:, ~is_salient].T) + inner @ expanded.T, wanted)
    # (c) coarse codes for all, and a residual of the salient
    coarse = torch.where(is_salient, q // steps, q)
    assert int(coarse.max()) <= levels
    residual = (q - steps * coarse)[:, is_salient]
    assert torch.equal(steps * (coarse @ w.T) + residual @ w[:, is_salient].T, wanted)
    # (d) bit planes
    assert torch.equal(sum(2**b * (((u >> b) & 1) @ w.T) for b in range(7)), wanted)
    # And what the package computes, arithmetic by arithmetic: the same, less the bias current.
    ints, unit = train.integers()
    assert torch.equal(exact_sums(ints, w.to(torch.int8)).long(), wanted - bias)
    assert torch.equal(linear(train, w.to(torch.int8)), (wanted - bias).float() * unit)


@pytest.mark.parametrize(
    ("codes", "weight", "limit", "peak", "name"),
    [
        (torch.int8, torch.int8, 30, 15, "int8"),
        (torch.int16, torch.int8, 1020, 15, "planes"),
        (torch.int8, torch.int16, 30, 510, "planes"),
        (torch.int16, torch.int16, 4080, 1020, "planes"),
        (torch.int16, torch.int16, 16319, 127, "planes"),
        (torch.int16, torch.int8, 16320, 5, "fp32"),
        (torch.int16, torch.int16, 4080, 16319, "fp64"),
        (torch.float32, torch.int8, 30, 15, "fp32"),
        (torch.int32, torch.int8, 65535, 127, "fp64"),
    ],
)
def test_the_arithmetic_is_the_fastest_exact_one_and_says_why(codes, weight, limit, peak, name):
    a, b = integers(-limit, limit, 5, 100, dtype=codes), integers(-peak, peak, 7, 100, seed=1, dtype=weight)
    chosen, why = explain_sums(a, b, limit, peak)
    assert chosen == name
    assert why
    wanted = a.long() @ b.long().T
    assert torch.equal(exact_sums(a, b, limit, peak).long(), wanted)
    assert torch.equal(exact_sums(a, b).long(), wanted)
    assert torch.equal(exact_sums(-a.abs(), b.abs(), limit, peak).long(), -a.abs().long() @ b.abs().long().T)
    assert torch.equal(exact_product(a, b.T, limit, peak).long(), wanted)


def test_the_largest_sums_are_exact_and_larger_ones_are_refused():
    ones = torch.full((1, 4096), 127, dtype=torch.int8)
    assert int(exact_sums(ones, ones)) == 127 * 127 * 4096  # beyond 2^24
    assert int(exact_sums(-ones - 1, ones)) == -128 * 127 * 4096
    many = torch.full((1, 140000), -128, dtype=torch.int8)  # beyond int32: not int8
    assert int(exact_sums(many, many)) == 128 * 128 * 140000
    with pytest.raises(SpikeformError, match=r"may exceed 2\^53"):
        exact_sums(torch.ones(1, 2**10, dtype=torch.int32), torch.ones(1, 2**10, dtype=torch.int32), 2**31, 2**31)
    assert exact_sums(torch.ones(2, 0, dtype=torch.int8), torch.ones(3, 0, dtype=torch.int8)).tolist() == [[0] * 3] * 2
    assert exact_sums(torch.ones(0, 4, dtype=torch.int8), torch.ones(3, 4, dtype=torch.int8)).shape == (0, 3)


def test_an_integer_weight_knows_its_levels():
    affine, ternary = weight_of(3, 5, bits=4, tiers=(1, 2)), weight_of(3, 5, tiers=(1, 4), ternary=True)
    assert [affine.levels(r) for r in range(2)] == [15, 30]
    assert [ternary.levels(r) for r in range(2)] == [2, 8]
    assert affine.shape == (3, 5)
    wide = weight_of(3, 5, bits=8)
    assert (affine.peak, wide.peak) == (128, int(wide.codes.abs().max()))
    for w in (affine, ternary):
        for n, k in itertools.product(range(3), range(5)):
            assert float(w.dequantise()[n, k]) == float(w.codes[n, k] * w.scale[int(w.tier[k]), n])
