"""The CPU's fused products against the neurons and synapses that define them."""

import pytest
import torch
from torch import nn

from spikeform.layers import CodedLinear
from spikeform.native.library import level
from spikeform.neurons import GIF, MT, OAT, SignedInteger
from spikeform.neurons.cpu import gif as gif_kernels
from spikeform.neurons.cpu import oat
from spikeform.neurons.oat import ROUNDINGS
from spikeform.spikes import Radix2
from spikeform.synapses import IntegerWeight, executor, fused, fusible, linear
from spikeform.synapses.cpu import products

LEVELS = {"portable": 0, "avx2": 1, "avx512": 2}


@pytest.fixture(params=["plain", *LEVELS])
def level_in_use(request, monkeypatch):
    """Each instruction set that this machine has, and no library at all."""
    best = level()
    if request.param == "plain":
        for module in (products, oat, gif_kernels):
            monkeypatch.setattr(module, "function", lambda *_: None)
        yield
        return
    if LEVELS[request.param] > best:
        pytest.skip("this machine has no such instructions, or no library is built")
    level(LEVELS[request.param])
    yield
    level(best)


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def integers(*shape, low=-128, high=128, seed=1):
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.int64)


def rows_with_edges(M, K, neuron):
    """Random rows, then ties, exact multiples, the thresholds themselves, zeros and what saturates."""
    x = 2 * random(M, K)
    units = neuron.threshold / neuron.coding.resolution
    edges = torch.cat([torch.tensor([0.0, -0.0, 1e9, -1e9]), neuron.threshold, -neuron.threshold])
    edges = torch.cat([edges, *(u * torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, 1.0, -3.0]) for u in units)])
    x[0, : min(K, len(edges))] = edges[:K]
    x[-1] = x[-1] if M < 3 else 0.0
    return x


def population(kind, steps, rounding):
    coding = Radix2(steps)
    return OAT(coding, (1.0, 8.0), rounding) if kind == "oat" else MT(coding, (3.0,), rounding)


def parameters(neuron):
    return neuron.coding.limit, neuron.coding.resolution, ROUNDINGS.index(neuron.rounding)


# Rows: few, then those that fill panels of 8 or 16 not at all, in part and whole, in one tile or several.
# Inputs and outputs: multiples of a word, a line and a step, and not; more inputs than a pass over a tile takes.
PANELS = [(9, 5, 1), (13, 64, 48), (16, 130, 96), (20, 65, 49), (33, 257, 97), (72, 63, 7), (100, 128, 50)]
PANELS += [(130, 2051, 13)]
SHAPES = [(1, 64, 32), (1, 200, 37), (2, 31, 5), (3, 257, 66), (5, 640, 33), (7, 96, 40), (35, 130, 70), (0, 64, 8)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("kind", "steps"), [("oat", 7), ("oat", 8), ("oat", 16), ("mt", 4), ("mt", 15)])
@pytest.mark.usefixtures("level_in_use")
def test_oat_with_integer_weights_has_the_temporal_sums(shape, kind, steps):
    M, K, N = shape
    neuron = population(kind, steps, ROUNDINGS[(M + steps) % 3])
    x = rows_with_edges(M, K, neuron) if M else torch.empty(0, K)
    weight = integers(N, K).to(torch.int8)
    scale, bias = random(N, seed=2).abs(), random(N, seed=3)
    whole = IntegerWeight(weight, scale[None], torch.zeros(1, N, dtype=torch.int16), None, 8)
    train = neuron.encode(x)
    train = type(train)(train.codes.to(torch.int32), train.quantum, train.coding, train.branch, exact=True)
    wanted = linear(train, whole, bias)
    found = fused.oat_linear_int(x, weight, scale, bias, neuron.threshold, *parameters(neuron))
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("shape", PANELS)
@pytest.mark.parametrize("outliers", ["none", "few columns", "anywhere"])
@pytest.mark.parametrize("steps", [7, 15])
@pytest.mark.usefixtures("level_in_use")
def test_many_rows_have_exact_sums(shape, outliers, steps):
    (M, K, N), neuron = shape, population("oat", steps, "nearest")
    x, weight = random(M, K).clamp(-0.99, 0.99), integers(N, K).to(torch.int8)
    if outliers == "anywhere":
        x = x * 3
    elif outliers == "few columns":
        x[:, :: max(K // 4, 1)] *= 9
    weight[0], x[M // 2] = -128, -0.99  # the largest sums there are
    scale, bias = random(N, seed=2), random(N, seed=3)
    sums = [part.double() @ weight.double().T for part in branches(neuron.encode(x))]
    unit = neuron.threshold / neuron.coding.resolution
    wanted = sum(s.float() * scale * u for s, u in zip(sums, unit, strict=True)) + bias
    assert torch.equal(fused.oat_linear_int(x, weight, scale, bias, neuron.threshold, *parameters(neuron)), wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 200, 37), (3, 66, 9), (12, 64, 40), (30, 90, 50)])
@pytest.mark.usefixtures("level_in_use")
def test_half_precision_and_no_bias(shape, dtype):
    M, K, N = shape
    neuron = population("oat", 8, "nearest")
    x = random(2, M, K).to(dtype).transpose(0, 1)
    weight, scale = integers(N, K).to(torch.int8), random(N, seed=2)
    sums = [part.double() @ weight.double().T for part in branches(neuron.encode(x))]
    unit = neuron.threshold / neuron.coding.resolution
    wanted = sum(s.float() * scale * u for s, u in zip(sums, unit, strict=True))
    found = fused.oat_linear_int(x, weight, scale, None, neuron.threshold, *parameters(neuron))
    assert found.dtype == dtype
    assert torch.equal(found, wanted.to(dtype))


def branches(train):
    return [train.codes * (train.branch == r) for r in range(2)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("types", [("fp32", "fp32"), ("fp32", "bf16"), ("bf16", "bf16")])
@pytest.mark.parametrize("kind", ["oat", "mt"])
@pytest.mark.usefixtures("level_in_use")
def test_oat_with_real_weights(shape, types, kind):
    (M, K, N), (x_type, w_type) = shape, [{"fp32": torch.float32, "bf16": torch.bfloat16}[t] for t in types]
    neuron = population(kind, 8, "nearest")
    neuron.channel_shift, neuron.folded = integers(K, low=-2, high=3).to(torch.int8), True
    x = (rows_with_edges(M, K, neuron) if M else torch.empty(0, K)).to(x_type)
    weight, bias = random(N, K, seed=2).to(w_type), random(N, seed=3).to(x_type)
    values = neuron.encode(x).decode()
    wanted = values.double() @ weight.double().T + bias
    shift = neuron.channel_shift
    found = fused.oat_linear(x, weight, bias, neuron.threshold, shift, *parameters(neuron), x_type == torch.bfloat16)
    assert found.dtype == x_type
    size = values.abs().double() @ weight.abs().double().T + bias.abs()
    unit = 2.0**-8 if x_type == torch.bfloat16 else 2.0**-21
    assert bool(((found - wanted).abs() <= unit * size).all())


def gif(K, bits, steps, seed=5):
    neuron = GIF(bits, (K,), steps=steps)
    neuron.set_times(2 ** integers(K, low=0, high=steps.bit_length(), seed=seed).to(torch.uint8))
    return neuron


@pytest.mark.parametrize("shape", [*SHAPES[1:], *PANELS, (1, 64, 3), (2, 128, 40), (1, 192, 35), (3, 320, 33)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("bits", "steps"), [(4, 1), (4, 8), (6, 2)])
@pytest.mark.usefixtures("level_in_use")
def test_gif_with_integer_weights_has_the_temporal_sums(shape, dtype, bits, steps):
    M, K, N = shape
    neuron = gif(K, bits, steps)
    x = (3 * random(M, K)).to(dtype)
    if M > 1:
        x[1] = x[1].abs()
        x[-1] = 0
    q, zero = integers(N, K, low=0, high=16), integers(N, low=0, high=16).to(torch.int16)
    weight = (q - zero[:, None]).to(torch.int8)
    scale, bias = random(N, seed=2).abs(), random(N, seed=3)
    wanted = linear(neuron.encode(x), IntegerWeight(weight, scale[None], zero[None], None, 4), bias).to(dtype)
    packed = fused.pack_nibbles(q) if K % 64 == 0 else None
    tables = neuron.tables()
    args = (tables.top, tables.multiple, neuron.levels, neuron.steps)
    for own in (None, packed):
        found = fused.gif_linear(x, weight, scale, own, None if own is None else zero, bias, *args)
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("shape", [(1, 64, 64), (2, 200, 192), (3, 130, 37), (1, 77, 200), (1, 64, 8400), (0, 64, 64)])
@pytest.mark.parametrize("zeros", [0.0, 0.7, 0.97, 1.0])
@pytest.mark.parametrize(
    "kinds",
    [
        *(("int8", "int8"), ("int8", "int4"), ("int8", "bf16"), ("int8", "fp32")),
        *(("fp32", "fp32"), ("fp32", "bf16"), ("fp32", "int8"), ("fp32", "int4")),
    ],
)
@pytest.mark.usefixtures("level_in_use")
def test_events(shape, zeros, kinds):
    M, K, N = shape
    if kinds[1] == "int4" and N % 64:
        pytest.skip("nibbles come in groups of 64")
    silent = torch.rand(M, K, generator=torch.Generator().manual_seed(7)) < zeros
    values = random(M, K) if kinds[0] == "fp32" else integers(M, K).to(torch.int8)
    values = values.masked_fill(silent, 0)
    real = integers(K, N, low=-8, high=8) if kinds[1] == "int4" else integers(K, N, low=-128, high=128)
    rows = {
        "int8": lambda: real.to(torch.int8),
        "int4": lambda: fused.pack_nibbles(real + 8),
        "bf16": lambda: (real / 64).bfloat16(),
        "fp32": lambda: real / 64 + random(K, N, seed=5),
    }[kinds[1]]()
    real = rows.double() if rows.is_floating_point() else real.double()
    scale = random(N, seed=3)
    found = fused.event_product(values, rows, scale, N)
    whole = fused.event_product(values, rows, None, N)
    wanted = values.double() @ real
    assert found.dtype == torch.float32
    if kinds[0] == "int8" and not rows.is_floating_point():
        assert torch.equal(whole, wanted.float())
        assert torch.equal(found, wanted.float() * scale)
    else:
        size = values.abs().double() @ real.abs()
        assert bool(((whole - wanted).abs() <= 2.0**-21 * size).all())
        assert bool(((found - wanted * scale).abs() <= 2.0**-20 * size * scale.abs()).all())


@pytest.mark.parametrize("rows", [1, 3, 4])
@pytest.mark.parametrize(("steps", "K", "N"), [(4, 256, 130), (8, 77, 37), (1, 64, 64)])
@pytest.mark.usefixtures("level_in_use")
def test_signed_integers_unrolled_summed_and_visited_are_one(rows, steps, K, N):
    """int8 weights: step by step, one product of the integers, and the active rows alone, bit for bit."""
    neuron = SignedInteger(steps, site="up")
    neuron.set_threshold(0.7)
    dense = nn.Linear(K, N)
    dense.neuron = neuron
    weight = IntegerWeight(
        integers(N, K).to(torch.int8), random(1, N, seed=2).abs(), torch.full((1, N), 128, dtype=torch.int16), None, 8
    )
    layer = CodedLinear.from_spiking(dense, weight, "up").requires_grad_(False)
    x = random(rows, K)
    x[0, :5] = torch.tensor([0.35, -1.05, 0.0, 99.0, -99.0])  # ties, silence, saturation
    with executor("temporal"):
        wanted = layer(x)
    found = [layer(x)]
    with executor("collapsed"):
        found.append(layer(x))
    with executor("event"):
        found.append(layer(x))
    layer.event_rows = layer.weight.T.contiguous()
    found.append(layer(x))
    assert all(torch.equal(y, wanted) for y in found)
    if neuron.closed_form() is not None and fusible(x):
        layer.event_rows = torch.zeros_like(layer.event_rows)
        assert torch.equal(layer(x), layer.bias.expand(rows, N))  # so it was these rows that were visited


@pytest.mark.parametrize("peak", [1, 4, 16, 31, 32, 127])
@pytest.mark.usefixtures("level_in_use")
def test_sums_of_many_like_signs_do_not_overflow(peak):
    """Sums that are as large as can be, at every number of rows that is added up in 16 bits."""
    values = torch.full((1, 600), peak, dtype=torch.int8)
    rows = torch.full((600, 96), -128, dtype=torch.int8)
    rows[:, 1::2] = 127
    assert torch.equal(fused.event_product(values, rows, None, 96), (values.double() @ rows.double()).float())
    values[0, ::3] = -peak
    assert torch.equal(fused.event_product(values, rows, None, 96), (values.double() @ rows.double()).float())


def test_values_of_other_types_are_read_as_they_are():
    values, rows = random(2, 40).bfloat16(), random(40, 64, seed=2)
    assert torch.allclose(fused.event_product(values, rows, None, 64), values.float() @ rows, atol=1e-5)
    assert torch.allclose(fused.event_product(values.float(), rows.half(), None, 64), values.float() @ rows, atol=2e-2)


def test_many_rows():
    """More rows than a pass over the weights takes, outliers in some columns only."""
    neuron = population("oat", 8, "floor")
    x, weight, scale = random(300, 70).clamp(-0.9, 0.9), integers(40, 70).to(torch.int8), random(40, seed=2)
    x[::7, 3], x[11, 60:] = 5.0, -9.0
    sums = [part.double() @ weight.double().T for part in branches(neuron.encode(x))]
    unit = neuron.threshold / neuron.coding.resolution
    wanted = sum(s.float() * scale * u for s, u in zip(sums, unit, strict=True))
    assert torch.equal(fused.oat_linear_int(x, weight, scale, None, neuron.threshold, *parameters(neuron)), wanted)


def test_threads_change_nothing():
    """Integer sums and their scaling do not depend on how rows are shared out; there is work for several threads."""
    neuron = gif(1024, 4, 2)
    x, weight, scale = random(3, 1024), integers(1400, 1024).to(torch.int8), random(1400, seed=2)
    tables = neuron.tables()
    args = (x, weight, scale, None, None, None, tables.top, tables.multiple, neuron.levels, neuron.steps)
    values = x.masked_fill(random(3, 1024, seed=4) < -1, 0)
    before, found = torch.get_num_threads(), []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        found.append((fused.gif_linear(*args), fused.event_product(values, weight.T.contiguous(), scale, 1400)))
    torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
