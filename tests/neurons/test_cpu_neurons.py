"""CPU operators of neurons against the neurons themselves, on each instruction set and without the library."""

import pytest
import torch

from spikeform.neurons import GIF, MT, OAT, FixedPointHG, few_spike_bank, fused
from spikeform.neurons.functions import FUNCTIONS
from spikeform.neurons.oat import ROUNDINGS
from spikeform.spikes import Radix2

SHAPES = [(1, 64), (3, 7, 129), (5, 1), (0, 16), (2, 700)]
REAL = [torch.float32, torch.bfloat16]


def inputs(shape, dtype=torch.float32, scale=1.0, seed=0):
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)


def at_edges(threshold, unit, count=700):
    """Ties, whole units, thresholds, zeros and saturation, of either sign."""
    units = torch.arange(count) * 0.5 * unit
    x = torch.cat(
        [units, torch.tensor([0.0, *threshold, 1e-30, 3e5]), torch.tensor(threshold).nextafter(torch.zeros(1))]
    )
    return torch.cat([x, -x])


def population(kind, rounding, steps=8, threshold=None):
    return kind(Radix2(steps), threshold or ((0.7, 9.3) if kind is OAT else (1.3,)), rounding)


def of(neuron):
    return neuron.threshold, neuron.coding.limit, neuron.coding.resolution, ROUNDINGS.index(neuron.rounding)


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("kind", [MT, OAT])
def test_populations_send_the_codes_of_the_neuron(machine, kind, rounding):
    for steps in (3, 8, 14, 16):
        neuron = population(kind, rounding, steps)
        threshold, *rest = of(neuron)
        for dtype in REAL:
            for shape in SHAPES:
                x = inputs(shape, dtype, 2.0)
                train = neuron(x)
                packed = fused.oat_pack(x, threshold, *rest)
                assert packed.dtype == neuron.pack(train).dtype
                assert torch.equal(packed, neuron.pack(train))
                assert torch.equal(fused.oat_values(x, threshold, None, *rest, False), train.decode())
                narrow = fused.oat_values(x, threshold, None, *rest, True)
                assert torch.equal(narrow, train.decode().to(dtype))


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_ties_thresholds_and_saturation(machine, rounding):
    for threshold in ((1.0, 16.0), (0.7, 9.3)):  # units that are powers of two, so that inputs lie on ties; and others
        neuron = population(OAT, rounding, 6, threshold)
        own, *rest = of(neuron)
        for unit in neuron.quantum().tolist():
            x = at_edges(threshold, unit)
            assert torch.equal(fused.oat_pack(x, own, *rest), neuron.pack(neuron(x)))
            assert torch.equal(fused.oat_values(x, own, None, *rest, False), neuron(x).decode())


def test_channel_shifts_and_strided_input(machine):
    neuron = population(OAT, "nearest")
    neuron.channel_shift, neuron.folded = torch.arange(-5, 6, dtype=torch.int8), True
    threshold, *rest = of(neuron)
    for dtype in REAL:
        x = inputs((11, 40), dtype).T
        assert torch.equal(fused.oat_values(x, threshold, neuron.channel_shift, *rest, False), neuron(x).decode())


@pytest.mark.parametrize("function", FUNCTIONS)
def test_hg_values_are_within_one_code_unit(machine, function):
    for bits, rounding in ((4, "nearest"), (8, "floor"), (16, "nearest")):
        neuron = FixedPointHG(function, Radix2(bits), rounding)
        for dtype in REAL:
            x = inputs((3, 7001), dtype, 4.0)
            if function in ("reciprocal", "inverse_sqrt"):
                x = x.abs() + 1e-3
            found = fused.hg_values(x, function, bits, rounding == "nearest", neuron.low, neuron.high)
            wanted = neuron(x).decode()
            assert found.dtype == dtype
            # PyTorch's GELU has an absolute error beside the relative one of the code: 1 + erf cancels far left.
            noise = 4e-7 * x.float().abs() if function in ("gelu", "gelu_tanh") else 0.0
            bound = wanted.abs() * 2.0 ** (1 - bits) + noise + (wanted.abs() * 2**-8 if dtype == torch.bfloat16 else 0)
            assert ((found.float() - wanted).abs() <= bound).all()
            if (function, bits) != ("gelu", 16):  # there PyTorch's is some units off
                near = x.float().abs() < 3
                assert (found == wanted.to(dtype))[near].float().mean() >= 0.99


@pytest.mark.parametrize("function", FUNCTIONS)
def test_hg_values_are_the_function(machine, function):
    x = inputs(20001, scale=4.0)
    x = x.abs() + 1e-3 if function in ("reciprocal", "inverse_sqrt") else x
    exact = FUNCTIONS[function](x.double())
    found = fused.hg_values(x, function, 16, True, -32, 32)
    slack = 4e-7 * x.abs() if function.startswith("gelu") else 0.0  # 1 + erf, 1 + tanh cancel in fp32
    assert ((found - exact).abs() <= exact.abs() * 2.0**-16 * 1.02 + slack + 2.0**-32).all()


@pytest.mark.parametrize("function", ["exp", "tanh", "gelu", "silu"])
def test_functions_at_their_ends(machine, function):
    x = torch.tensor(
        [0.0, -0.0, 1e-30, -1e-30, 20.0, -20.0, 87.0, -87.0, 88.5, -88.5, 1e4, -1e4, 3e38, -3e38, 0.625, 4.0]
    )
    neuron = FixedPointHG(function, Radix2(12))
    torch.testing.assert_close(
        fused.hg_values(x, function, 12, True, -32, 32), neuron(x).decode(), rtol=2.0**-11, atol=1e-5
    )


@pytest.mark.parametrize("kind", [MT, OAT])
def test_gated_product(machine, kind):
    neuron, fired = population(kind, "nearest", 12), FixedPointHG("silu", Radix2(12))
    threshold, *rest = of(neuron)
    for dtype in REAL:
        for shape in SHAPES:
            gate, up = inputs(shape, dtype, 3.0), inputs(shape, dtype, 2.0, 1)
            found = fused.hg_gated(gate, up, "silu", 12, True, -32, 32, threshold, *rest)
            wanted = (fired(gate).decode() * neuron(up).decode()).to(dtype)
            assert found.dtype == dtype
            torch.testing.assert_close(found, wanted, rtol=2.0**-11 if dtype == torch.float32 else 2.0**-7, atol=0)
            assert shape[0] < 2 or (found == wanted).float().mean() >= 0.99


@pytest.mark.parametrize("size", [1, 24, 64, 257])
@pytest.mark.parametrize("centred", [False, True])
def test_norm(machine, centred, size):
    neuron, bits = population(OAT, "nearest", 12), 12
    square, inverse_sqrt = (FixedPointHG(name, Radix2(bits)) for name in ("square", "inverse_sqrt"))
    threshold, *rest = of(neuron)
    weight, bias = inputs(size, seed=1) + 1, inputs(size, torch.bfloat16, seed=2)
    for dtype in REAL:
        for gain, offset in ((None, None), (weight, None), (weight.bfloat16(), bias)):
            x = inputs((300, size), dtype, 1.5)
            found = fused.hg_norm(x, gain, offset, 1e-5, centred, 0.5, threshold, *rest, bits, True, -32, 32)
            d = x.float()
            d = d - d.mean(-1, keepdim=True) if centred else d
            scale = inverse_sqrt(square(d).decode().mean(-1, keepdim=True) + 1e-5).decode()
            wanted = neuron(d).decode() * scale
            wanted = wanted if gain is None else wanted * (gain.float() + 0.5)
            wanted = wanted if offset is None else wanted + offset.float()
            assert found.dtype == dtype
            # One unit of the inverse root's code; where a mean is taken off, one of the input's beside it.
            one = neuron.quantum()[0] * scale * (1.0 if gain is None else (gain.float() + 0.5).abs()) * centred
            bound = wanted.abs() * (2.0 ** (1 - bits) + (2**-7 if dtype == torch.bfloat16 else 0)) + one + 1e-6
            assert ((found.float() - wanted).abs() <= bound).all()
            assert size == 1 or (found == wanted.to(dtype)).float().mean() >= (0.97 if centred else 0.99)


@pytest.mark.parametrize(("function", "steps"), [("silu", 4), ("exp", 8)])
def test_few_spike_values(machine, function, steps):
    neuron = few_spike_bank(function, steps)
    tables = neuron.gates, neuron.theta, neuron.h, neuron.d
    for dtype in REAL:
        x = torch.cat([inputs(999, scale=5.0), neuron.gates, torch.tensor([1e9, -1e9, 0.0])]).to(dtype)
        found = fused.few_spike_values(x, *tables)
        assert found.dtype == dtype
        assert torch.equal(found, neuron(x).decode().to(dtype))


def times(channels, steps, seed=3):
    return 2 ** torch.randint(steps.bit_length(), channels, generator=torch.Generator().manual_seed(seed)).to(
        torch.uint8
    )


@pytest.mark.parametrize(("bits", "steps"), [(4, 1), (4, 2), (3, 4), (2, 16)])
def test_gif_integers(machine, bits, steps):
    for size in (1, 24, 64, 129):
        neuron = GIF(bits, (size,), steps=steps)
        neuron.set_times(times((size,), steps))
        tables = neuron.tables()
        for dtype in REAL:
            x = inputs((5, 3, size), dtype, 2.0)
            x[0], x[1], x[2, 0] = 0.0, x[1].abs(), x[2, 0] * 1e-9
            x[3] = torch.arange(size) - size // 3  # ties, where the range is a multiple of the levels
            codes, unit = fused.gif_integers(x, tables.top, tables.multiple, neuron.levels, steps)
            wanted = neuron(x).integers()
            assert codes.dtype == torch.int8
            assert torch.equal(codes.int(), wanted[0].int())
            assert torch.equal(unit, wanted[1])


@pytest.mark.parametrize(("bits", "steps"), [(4, 1), (4, 2), (2, 4)])
def test_gif_pack(machine, bits, steps):
    for heads, size in ((1, 64), (3, 24), (2, 7)):
        neuron = GIF(bits, (heads, 1, size), steps=steps)
        neuron.set_times(times((heads, 1, size), steps))
        tables = neuron.tables()
        for dtype in REAL:
            for x in (inputs((2, heads, 5, size), dtype), inputs((2, 5, heads, size), dtype).transpose(1, 2)):
                found = fused.gif_pack(x, tables.top, tables.multiple, neuron.levels, steps)
                assert torch.equal(found, neuron.pack(neuron(x)))
    neuron = GIF(bits, (9,), steps=steps)
    neuron.set_times(times((9,), steps))
    tables, x = neuron.tables(), inputs((4, 9))
    assert torch.equal(fused.gif_pack(x, tables.top, tables.multiple, neuron.levels, steps), neuron.pack(neuron(x)))


def test_threads_change_nothing(machine):
    neuron = population(OAT, "nearest", 12)
    threshold, *rest = of(neuron)
    x, before = inputs((301, 777)), torch.get_num_threads()
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        found.append(fused.hg_norm(x, None, None, 1e-5, False, 0.0, threshold, *rest, 12, True, -32, 32))
        found.append(fused.hg_gated(x, x, "silu", 12, True, -32, 32, threshold, *rest))
    torch.set_num_threads(before)
    assert torch.equal(found[0], found[2])
    assert torch.equal(found[1], found[3])
