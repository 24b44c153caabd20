"""Fused products: the codes and integer sums of the executors in PyTorch, real sums to the rounding of fp32.

Without a CUDA device the same tests run on Triton's interpreter, in a process of their own.
"""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from kernels import DEVICE, INTERPRETED, fused, let_bounds_be_scalars, needs_triton, not_interpreted, on_the_interpreter
from spikeform.neurons import GIF, MT, OAT
from spikeform.neurons.oat import ROUNDINGS
from spikeform.spikes import Radix2
from spikeform.synapses import IntegerWeight, linear
from spikeform.synapses.fused import pack_nibbles


@pytest.fixture
def products(monkeypatch):
    from spikeform.synapses.triton import products

    if INTERPRETED:
        let_bounds_be_scalars(monkeypatch)
    return products


@pytest.fixture(params=[False, True], ids=["each program encodes", "encoded once"])
def once(request, monkeypatch):
    """One row goes either way."""
    from spikeform.synapses.triton import shapes

    monkeypatch.setattr(shapes, "encode_once", dict.fromkeys(shapes.encode_once, request.param))
    return request.param


def skip_same(once, *shape):
    """Many rows know one way."""
    if once and math.prod(shape[:-1]) > 1:
        pytest.skip("it is about one row")


def real(*shape, seed=0, dtype=torch.float32):
    """Normal, with outliers, zeros, exact multiples of a unit, ties and thresholds."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator)
    flat = x.view(-1)
    flat[::11] *= 30
    flat[1::13] = 0
    flat[2::7] = (flat[2::7] * 64).round() / 64
    flat[3::17] = 1.0
    flat[4::19] = -1.0
    flat[5::23] = (flat[5::23] * 32).round() / 32 + 1 / 64
    return x.to(dtype)


def weights(columns, inner, seed=1):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-128, 128, (columns, inner), generator=generator).to(torch.int8)
    scale = torch.rand(columns, generator=generator) * 0.01 + 0.001
    return codes, scale


def as_weight(codes, scale):
    return IntegerWeight(codes, scale[None], torch.zeros_like(scale, dtype=torch.int16)[None], None, 8)


def narrowed(y, dtype):
    """fp32 as the kernel's result type; the interpreter cuts what bf16 does not hold."""
    if INTERPRETED and dtype == torch.bfloat16:
        y = (y.view(torch.int32) & -(1 << 16)).view(torch.float32)
    return y.to(dtype)


def sent_to(*tensors):
    return tuple(None if t is None else t.to(DEVICE) for t in tensors)


def population(steps, rounding, two, powers=False):
    coding = Radix2(steps)
    if two:
        return OAT(coding, (1.0, 32.0 if powers else 37.5), rounding)
    return MT(coding, (2.0 if powers else 1.7,), rounding)


@fused
@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize(
    ("shape", "columns", "dtype", "steps", "two", "single", "shifted"),
    [
        ((1, 72), 21, torch.bfloat16, 8, True, True, False),
        ((1, 1, 530), 9, torch.float32, 15, True, False, True),
        ((2, 2, 520), 9, torch.float32, 15, True, False, True),
        ((9, 160), 70, torch.bfloat16, 12, False, False, True),
        ((9, 160), 70, torch.bfloat16, 6, False, True, False),
        ((2, 33, 80), 72, torch.bfloat16, 16, True, False, False),
        ((3, 22, 77), 65, torch.bfloat16, 16, True, False, True),
        ((1, 17, 80), 24, torch.float32, 10, True, False, False),
    ],
)
def test_oat_linear(products, once, rounding, shape, columns, dtype, steps, two, single, shifted):
    skip_same(once, *shape)
    neuron = population(steps, rounding, two, single)
    inner = shape[-1]
    x = real(*shape, dtype=dtype)
    shift = (torch.arange(inner) % 5 - 2).to(torch.int8) if shifted else None
    weight, bias = real(columns, inner, seed=2).to(dtype), real(columns, seed=3).to(dtype)
    neuron.channel_shift, neuron.folded = shift, True
    values = neuron.encode(x).decode()
    assert not single or torch.equal(values.to(dtype).float(), values)
    coding = neuron.coding
    given = sent_to(x, weight, bias, neuron.threshold, shift)
    args = (coding.limit, coding.resolution, ROUNDINGS.index(rounding))
    y = products.oat_linear(*given, *args, single).cpu()
    assert y.dtype == dtype
    assert y.shape == (*shape[:-1], columns)
    exact = F.linear(values.double(), weight.double(), bias.double())
    size = F.linear(values.abs().double(), weight.abs().double(), bias.abs().double())
    cut = 4 if INTERPRETED else 1  # see narrowed()
    within = cut * 2.0**-8 if dtype == torch.bfloat16 else 0
    assert bool(((y - exact).abs() <= exact.abs() * within + size * cut * 2.0**-15).all())


@fused
@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("steps", [7, 8, 14, 15, 16])
@pytest.mark.parametrize(
    ("shape", "columns", "two"),
    [
        ((76,), 19, True),
        ((1, 1100), 5, False),
        ((3, 70), 37, True),
        ((1, 4, 70), 33, False),
        ((2, 33, 80), 40, True),
        ((18, 80), 40, True),
    ],
)
def test_oat_linear_int(products, once, rounding, steps, shape, columns, two):
    skip_same(once, *shape)
    if rounding != "nearest" and (steps != 15 or len(shape) > 1):
        pytest.skip("limbs are the same for each rounding")
    neuron = population(steps, rounding, two)
    x = real(*shape, dtype=torch.bfloat16 if steps == 8 else torch.float32)
    codes, scale = weights(columns, shape[-1])
    bias = real(columns, seed=3).to(x.dtype) if steps != 16 else None
    train = neuron.encode(x)
    expected = linear(_exact(train), as_weight(codes, scale), None if bias is None else bias.float())
    coding = neuron.coding
    given = sent_to(x, codes, scale, bias, neuron.threshold)
    y = products.oat_linear_int(*given, coding.limit, coding.resolution, ROUNDINGS.index(rounding)).cpu()
    assert torch.equal(y, narrowed(expected, x.dtype))


def _exact(train):
    return replace(train, codes=train.codes.to(torch.int32), exact=True)


@fused
@pytest.mark.parametrize(("bits", "steps"), [(4, 1), (4, 8), (6, 2)])
@pytest.mark.parametrize(
    ("shape", "columns", "packed"),
    [
        ((128,), 21, True),
        ((1, 1152), 5, True),
        ((1, 1, 1084), 9, False),
        ((2, 2, 192), 7, True),
        ((6, 128), 35, True),
        ((3, 76), 9, False),
        ((3, 22, 80), 72, False),
        ((2, 9, 80), 72, False),
        ((5, 70), 33, False),
        ((2, 70), 9, False),
    ],
)
def test_gif_linear(products, once, bits, steps, shape, columns, packed):
    skip_same(once, *shape)
    inner = shape[-1]
    neuron = GIF(bits, (inner,), steps=steps)
    neuron.set_times(torch.tensor([2 ** (i % steps.bit_length()) for i in range(inner)], dtype=torch.uint8))
    x = real(*shape, dtype=torch.bfloat16 if packed else torch.float32)
    codes, scale = weights(columns, inner)
    zero = nibbles = None
    if packed:
        zero = (torch.arange(columns) % 16).to(torch.int16)
        unsigned = (codes.to(torch.int16) + 128) // 16
        codes, nibbles = (unsigned - zero[:, None]).to(torch.int8), pack_nibbles(unsigned)
    bias = real(columns, seed=3).to(x.dtype)
    expected = linear(neuron.encode(x), as_weight(codes, scale), bias.float())
    tables = neuron.tables()
    given = sent_to(x, codes, scale, nibbles, zero, bias, tables.top, tables.multiple)
    y = products.gif_linear(*given, neuron.levels, steps).cpu()
    assert torch.equal(y, narrowed(expected, x.dtype))


@fused
def test_no_rows(products):
    codes, scale = weights(8, 64)
    x = torch.zeros(0, 64)
    threshold = torch.tensor([1.0])
    given = sent_to(x, codes.float(), None, threshold, None)
    assert products.oat_linear(*given, 255, 256, 0, False).shape == (0, 8)
    assert products.oat_linear_int(*sent_to(x, codes, scale, None, threshold), 255, 256, 0).shape == (0, 8)
    tables = sent_to(torch.ones(64), torch.ones(64))
    assert products.gif_linear(*sent_to(x, codes, scale, None, None, None), *tables, 15, 1).shape == (0, 8)
    assert products.event_product(*sent_to(x, codes), None, 64).shape == (0, 64)


@needs_triton
@not_interpreted
def test_on_the_interpreter():
    on_the_interpreter(__file__)
