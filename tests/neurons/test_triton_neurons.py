"""Fused kernels of neurons against the neurons themselves, code by code.

Without a CUDA device the same tests run on Triton's interpreter, in a process of their own.
"""

import pytest
import torch

from kernels import DEVICE, INTERPRETED, fused, needs_triton, not_interpreted, on_the_interpreter
from spikeform.layers.norm import SpikingNorm
from spikeform.neurons import GIF, MT, OAT, FewSpikeHG
from spikeform.neurons.functions import FUNCTIONS
from spikeform.neurons.hg import FixedPointHG
from spikeform.neurons.oat import ROUNDINGS
from spikeform.spikes import Radix2, Thermometer
from spikeform.synapses import hadamard


def random(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def population(coding, two, rounding="nearest", thresholds=(0.7, 4.3)):
    return (OAT if two else MT)(coding, thresholds if two else thresholds[-1:], rounding).to(DEVICE)


def parameters(neuron):
    return neuron.threshold, neuron.coding.limit, neuron.coding.resolution, ROUNDINGS.index(neuron.rounding)


def hard(neuron, shape, dtype=torch.float32, seed=0):
    """Random input, and all that is special: ties, multiples, thresholds, zeros, what saturates, infinities."""
    x = 2 * random(*shape, seed=seed)
    units = (neuron.threshold / neuron.coding.resolution).cpu()
    codes = torch.arange(0, 9) * 0.5
    special = torch.cat([*[unit * codes for unit in units], neuron.threshold.cpu(), 3 * neuron.threshold.cpu()])
    near = torch.cat([special, special.nextafter(torch.tensor(0.0)), special.nextafter(torch.tensor(9.0))])
    every = torch.cat([near, -near, torch.tensor([0.0, -0.0, float("inf"), -float("inf"), 1e30, 1e-40])]).to(DEVICE)
    flat = x.view(-1)
    flat[: min(len(every), len(flat))] = every[: len(flat)]
    return x.to(dtype)


CODINGS = [Radix2(4), Radix2(15), Thermometer(6)]


@fused
@pytest.mark.parametrize("coding", CODINGS, ids=str)
@pytest.mark.parametrize("two", [False, True])
@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_oat_codes(coding, two, rounding):
    from spikeform.neurons.triton.oat import oat_pack, oat_values

    neuron = population(coding, two, rounding)
    for dtype, shape in ((torch.float32, (3, 67)), (torch.bfloat16, (2, 3, 32))):
        x = hard(neuron, shape, dtype)
        train = neuron.encode(x)
        threshold, *rest = parameters(neuron)
        assert torch.equal(oat_pack(x, threshold, *rest), neuron.pack(train))
        for narrow in (False, True):
            values = oat_values(x, threshold, None, *rest, narrow)
            expected = train.decode().to(dtype if narrow else torch.float32)
            assert values.dtype == expected.dtype
            assert torch.equal(values, expected)


@fused
def test_oat_units_that_are_powers_of_two_and_odd_ones_agree_at_every_tie():
    from spikeform.neurons.triton.oat import oat_pack

    for threshold in (1.0, 0.3, 1.9999999):
        neuron = population(Radix2(8), False, thresholds=(threshold,))
        unit = float(neuron.threshold[0]) / 256
        x = (torch.arange(-600, 601) * 0.5 * torch.tensor(unit)).to(DEVICE)
        assert torch.equal(oat_pack(x, *parameters(neuron)), neuron.pack(neuron.encode(x)))


@fused
@pytest.mark.parametrize("shape", [(5, 33), (2, 3, 64)])
def test_oat_values_of_shifted_channels(shape):
    from spikeform.neurons.triton.oat import oat_values

    neuron = population(Radix2(6), True)
    shift = (torch.arange(shape[-1]) % 9 - 4).to(torch.int8).to(DEVICE)
    neuron.channel_shift, neuron.folded = shift, True
    x = random(*shape, seed=1) * 2.0**shift
    threshold, *rest = parameters(neuron)
    assert torch.equal(oat_values(x, threshold, shift, *rest, False), neuron.encode(x).decode())


@fused
def test_what_is_not_contiguous_is_read_where_it_lies():
    from spikeform.neurons.triton.oat import oat_pack

    neuron = population(Radix2(8), True)
    heads = hard(neuron, (2, 5, 3, 16)).transpose(1, 2)
    columns, five = hard(neuron, (12, 7)).t(), hard(neuron, (2, 3, 2, 4, 8)).transpose(1, 3)
    for x in (heads, heads[0], heads[..., 0], heads[:, :, :, 4:], columns, five, heads[:0], hard(neuron, ())):
        assert torch.equal(oat_pack(x, *parameters(neuron)), neuron.pack(neuron.encode(x)))


def within_a_unit(values, expected, bits, noise=0.0, equal=0.99):
    """Almost all equal, the others next to them: transcendental functions differ in their last bits."""
    unit = expected.float().abs().clamp(min=2.0**-20) * 2.0 ** (1 - bits) + noise
    assert bool(((values - expected).float().abs() <= unit).all())
    assert float((values == expected).float().mean()) >= equal


@fused
@pytest.mark.parametrize("name", FUNCTIONS)
def test_hg_values(name):
    from spikeform.neurons.triton.hg import hg_values

    cancels = name in ("gelu", "gelu_tanh")  # far to the left 1 + erf leaves little but its last bits
    x = (1 if cancels else 4) * random(4, 131, seed=2)
    x[0, :4] = torch.tensor([0.0, 1e-30, 1e4, 0.5])
    if name in ("reciprocal", "inverse_sqrt"):
        x = x.abs() + 1e-30
    elif name == "exp":
        x = x.clamp(max=30)
    for bits, rounding in ((4, "nearest"), (12, "floor"), (16, "nearest")):
        neuron = FixedPointHG(name, Radix2(bits), rounding, low=-20, high=12)
        values = hg_values(x, name, bits, rounding == "nearest", -20, 12)
        expected = neuron.encode(x).decode()
        if name in ("square", "relu", "reciprocal"):
            assert torch.equal(values, expected)
        else:
            within_a_unit(values, expected, bits, 1e-6 if cancels else 0.0, 0.95 if cancels else 0.99)
    assert hg_values(x.bfloat16(), name, 8, True, -20, 12).dtype == torch.bfloat16


@fused
def test_hg_keeps_signs_and_silence():
    from spikeform.neurons.triton.hg import hg_values

    x = torch.tensor([0.0, -0.0, 2.0**-9, -(2.0**-8), 1.5 * 2.0**-9, 3.25, -3.75, 100.0, -100.0, float("inf")]).to(
        DEVICE
    )
    for name in ("relu", "square", "tanh"):
        for rounding in ("nearest", "floor"):
            expected = FixedPointHG(name, Radix2(2), rounding, low=-8, high=3).encode(x).decode()
            assert torch.equal(hg_values(x, name, 2, rounding == "nearest", -8, 3), expected)


@fused
def test_hg_gated():
    from spikeform.neurons.triton.hg import hg_gated

    up, act = population(Radix2(8), True), FixedPointHG("silu", Radix2(8), low=-16, high=8)
    both = torch.cat([random(2, 3, 40, seed=3), hard(up, (2, 3, 40), seed=4).clamp(-9, 9)], -1)
    halves = both.chunk(2, -1)
    for gate, x in (halves, tuple(h.contiguous() for h in halves), (halves[0], halves[1].contiguous())):
        values = hg_gated(gate, x, "silu", 8, True, -16, 8, *parameters(up))
        expected = hadamard(act(gate), up(x))
        within_a_unit(values, expected, 8)


@fused
@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 100), (torch.bfloat16, 64)])
@pytest.mark.parametrize("affine", [False, True])
def test_norm(centred, dtype, size, affine):
    from spikeform.neurons.triton.norm import hg_norm

    neuron = population(Radix2(8), True)
    hgs = [FixedPointHG(name, Radix2(16), low=-24, high=24) for name in ("square", "inverse_sqrt")]
    weight = torch.nn.Parameter(random(size, seed=5, dtype=dtype)) if affine else None
    bias = torch.nn.Parameter(random(size, seed=6, dtype=dtype)) if affine and centred else None
    layer = SpikingNorm(weight, bias, 1e-5, centred, 1.0 if affine else 0.0, neuron, *hgs)
    # Halves, whose mean and squares are exact in any order: then all bits must be equal.
    x = (random(2, 3, size, seed=7) * 4).round().to(dtype) / 2
    if centred:
        x -= 0.5
        x[..., -1] -= x.sum(-1) - (x.sum(-1) / size).round() * size if dtype == torch.float32 else 0
    with torch.no_grad():
        expected = layer(x)
    values = hg_norm(x, weight, bias, 1e-5, centred, layer.gain_offset, *parameters(neuron), 16, True, -24, 24)
    assert values.dtype == dtype
    if centred and dtype == torch.bfloat16:
        torch.testing.assert_close(values, expected, rtol=0.02, atol=0.05)
        assert float((values == expected).float().mean()) > 0.97
    else:
        assert torch.equal(values, expected)


@pytest.fixture
def pieces(monkeypatch):
    """Rows are held in pieces of a few elements."""
    from spikeform.neurons.triton import gif, tiles

    monkeypatch.setattr(tiles, "SHORTEST_CHUNK", 16)
    monkeypatch.setattr(tiles, "LONGEST_CHUNK", 32)
    monkeypatch.setattr(gif, "FEW_ROWS", 0)


@fused
@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("size", [96, 70])
def test_norm_of_a_row_in_pieces(centred, size, pieces):
    test_norm(centred, torch.float32, size, True)


@fused
@pytest.mark.parametrize("shape", [(5, 96), (3, 70), (2, 4, 35)])
def test_gif_integers_of_a_row_in_pieces(shape, pieces):
    from spikeform.neurons.triton.gif import gif_integers, gif_pack

    neuron, tables = gif(4, shape[-1:], 2)
    x = tokens(*shape)
    with torch.no_grad():
        train = neuron.encode(x)
        expected, unit = train.integers()
        integers, units = gif_integers(x, *tables)
        assert torch.equal(integers, expected)
        assert torch.equal(units, unit)
        assert torch.equal(gif_pack(x, *tables), neuron.pack(train))


@fused
@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize(("regions", "steps"), [(1, 3), (2, 16), (13, 5), (130, 2)])
def test_few_spike(regions, steps, large, monkeypatch):
    from spikeform.neurons.triton import few_spike

    if large:
        monkeypatch.setattr(few_spike, "LARGE", 1)
    gates = torch.linspace(-3, 3, regions + 1)
    theta, h, d = (random(regions, steps, seed=8 + i).cpu() for i in range(3))
    neuron = FewSpikeHG("silu", gates, theta, h, d).to(DEVICE)
    x = torch.cat([random(301, seed=9) * 2, neuron.gates, neuron.theta.reshape(-1)])
    for given in (x, x.bfloat16()):
        values = few_spike.few_spike_values(given, neuron.gates, neuron.theta, neuron.h, neuron.d)
        assert torch.equal(values, neuron.encode(given).decode().to(given.dtype))


def gif(bits, channels, steps, seed=0):
    neuron = GIF(bits, channels, steps=steps).to(DEVICE)
    generator = torch.Generator().manual_seed(seed)
    neuron.set_times(2 ** torch.randint(0, steps.bit_length(), channels, generator=generator).to(DEVICE))
    return neuron, (neuron.tables().top, neuron.tables().multiple, neuron.levels, neuron.steps)


def tokens(*shape, seed=0, dtype=torch.float32):
    """Rows of every kind: two-sided, positive, of halves (ties), zero, tiny, beyond the largest unit."""
    x = random(*shape, seed=seed)
    rows = x.view(-1, shape[-1])
    kinds = (lambda r: r.abs(), lambda r: (r * 8).round() / 2, torch.zeros_like, lambda r: r * 1e-7, lambda r: r * 1e7)
    for i, kind in enumerate(kinds[: len(rows) - 1]):
        rows[i] = kind(rows[i])
    rows[-1, 0], rows[-1, 1:3] = -15.0, torch.tensor([0.5, 7.5], device=x.device)
    return x.to(dtype)


@fused
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("bits", "steps"), [(4, 1), (4, 2), (2, 16), (6, 2)])
def test_gif_integers(bits, steps, dtype):
    from spikeform.neurons.triton.gif import gif_integers

    for shape in ((7, 100), (2, 150, 16)):
        neuron, tables = gif(bits, shape[-1:], steps)
        x = tokens(*shape, dtype=dtype)
        with torch.no_grad():
            expected, unit = neuron.encode(x).integers()
        integers, units = gif_integers(x, *tables)
        assert integers.dtype == expected.dtype == torch.int8
        assert torch.equal(integers, expected)
        assert torch.equal(units, unit)


@fused
@pytest.mark.parametrize("channels", [(3, 1, 24), (24,), (2, 24), (2, 3, 2, 24)])
def test_gif_pack(channels):
    from spikeform.neurons.triton.gif import gif_pack

    neuron, tables = gif(4, channels, 2)
    apart = tokens(2, 2, 3, 24, seed=1, dtype=torch.bfloat16).transpose(1, 2)
    with torch.no_grad():
        for x in (apart, apart.contiguous().float()):
            assert torch.equal(gif_pack(x, *tables), neuron.pack(neuron.encode(x)))


@pytest.mark.gpu
@pytest.mark.skipif(INTERPRETED or not torch.cuda.is_available(), reason="needs a CUDA device")
def test_operators_dispatch_here_and_can_be_captured():
    from spikeform.neurons import fused

    oat, (_, tables) = population(Radix2(8), True), gif(4, (64,), 2)
    hg, x = ("silu", 8, True, -32, 32), random(6, 64, dtype=torch.bfloat16)
    table = torch.rand(3, 4, device=DEVICE)
    calls = [
        lambda: fused.oat_values(x, oat.threshold, None, *parameters(oat)[1:], True),
        lambda: fused.oat_pack(x, *parameters(oat)),
        lambda: fused.hg_values(x, *hg),
        lambda: fused.few_spike_values(x, torch.arange(4.0, device=DEVICE), table, table, table),
        lambda: fused.hg_norm(x, None, None, 1e-5, True, 0.0, *parameters(oat), *hg[1:]),
        lambda: fused.hg_gated(x, x, *hg, *parameters(oat)),
        lambda: fused.gif_integers(x, *tables)[0],
        lambda: fused.gif_pack(x, *tables),
    ]
    expected = [call() for call in calls]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = [call() for call in calls]
    graph.replay()
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


@needs_triton
@not_interpreted
def test_on_the_interpreter():
    on_the_interpreter(__file__)
