"""Many rows before GIF neurons: encoded once for several matrices, or by what makes them, as they were apart.

Without a CUDA device the kernels run on Triton's interpreter, in a process of their own.
"""

import pytest
import torch
from torch.nn.functional import silu

from kernels import DEVICE, INTERPRETED, fused, let_bounds_be_scalars, needs_triton, not_interpreted, on_the_interpreter
from spikeform.synapses.rows import SKINNY


@pytest.fixture(autouse=True)
def loops(monkeypatch):
    if INTERPRETED:
        let_bounds_be_scalars(monkeypatch)


def random(*shape, seed=0, dtype=torch.float32):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    x.view(-1)[::11] *= 4
    return x.to(DEVICE, dtype)


def taken(lines, parts, width):
    """Codes ``[P, M, K]`` and units ``[P, M]``."""
    lines = lines.view(parts, -1, lines.shape[1])
    units = lines[..., width // 4].contiguous().view(torch.float32)
    return lines[..., : width // 4].contiguous().view(torch.int8), units


def multiples_of(width, count):
    return [(1.0 + (torch.arange(width) % (i + 2) > 0)).to(DEVICE) for i in range(count)]


@fused
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("rows", "width", "steps"), [(5, 1088, 2), (3, 5200, 1), (300, 64, 2)])
def test_codes_are_those_of_the_neuron(rows, width, steps, dtype):
    """Of numbers of rows that programs do not divide, and of rows in several pieces; the second is all zeros."""
    from spikeform.neurons.triton.gif import gif_integers
    from spikeform.synapses.triton.row import row_gif

    x = random(1, rows, width, dtype=dtype)
    x[:, 1] = 0
    multiples = multiples_of(width, 3) if steps > 1 else [torch.ones(width, device=DEVICE)]
    codes, units = taken(row_gif(x, multiples, 120 // steps, steps, False), len(multiples), width)
    for multiple, found, unit in zip(multiples, codes, units, strict=True):
        wanted, wanted_unit = gif_integers(x, multiple, multiple, 120 // steps, steps)
        assert wanted.unique().numel() > 20
        assert torch.equal(found, wanted[0])
        assert torch.equal(unit, wanted_unit[0, :, 0])


@fused
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_rows_whose_codes_are_cut(dtype):
    """The ends of a row are halves of a channel's unit, or the unit is the largest there is; and rows beside these."""
    from spikeform.neurons.triton.gif import gif_integers
    from spikeform.synapses.triton.row import row_gif

    x = random(1, 5, 1088, dtype=dtype)
    x[:, 1] = (torch.arange(1088) % 31 - 11).to(x)  # the unit is 1
    x[:, 2] = 40 * x[:, 2].abs().clamp(max=1e4) * 1e6 * (1 - 2 * (torch.arange(1088) % 3 == 0).to(x))
    x[:, 3, :2] = torch.tensor([-3.5, 11.5]).to(x)
    multiple = multiples_of(1088, 2)[1]
    (codes,), (units,) = taken(row_gif(x, [multiple], 15, 2, False), 1, 1088)
    wanted, wanted_unit = gif_integers(x, multiple, multiple, 15, 2)
    exact = (x[0] / wanted_unit[0] / multiple).round() * multiple
    assert (exact[1] - codes[1]).abs().max() == 2
    assert float(units[2]) == 5e3
    assert torch.equal(codes, wanted[0])
    assert torch.equal(units, wanted_unit[0, :, 0])


@fused
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("rows", "width"), [(5, 1088), (3, 5200)])
def test_codes_of_what_is_made(rows, width, dtype):
    from spikeform.synapses.triton.produced_gif import row_gated_gif, row_norm_gif
    from spikeform.synapses.triton.row import row_gif

    x, other = (random(1, rows, width, seed=seed, dtype=dtype) for seed in range(2))
    weight, eps = (random(width, seed=5) * 0.1 + 1).to(dtype), 0.1
    wide = x.to(torch.float32)
    norm = weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(dtype)
    gate, how = x * 0.3, (multiples_of(width, 2), 60, 2, False)
    both = (
        (norm, row_norm_gif(x, weight, eps, *how)),
        (silu(gate) * other, row_gated_gif(gate, other, "silu", *how)),
    )
    for made, lines in both:
        (wanted, wanted_units), (codes, units) = (taken(y, 2, width) for y in (row_gif(made, *how), lines))
        assert wanted.unique().numel() > 20
        assert (wanted != codes).float().mean() < 0.005  # a last bit
        assert torch.allclose(units, wanted_units, rtol=2**-7, atol=0)


@fused
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("inner", "shared"), [(320, False), (68, True)], ids=["", "unaligned, one neuron"])
def test_products_are_what_they_were_apart(inner, shared, dtype):
    from spikeform.synapses.triton import products
    from spikeform.synapses.triton.row import row_gif
    from spikeform.synapses.triton.stream import row_product

    lead, sizes = (2, SKINNY), (17, 8)
    x, steps = random(*lead, inner, dtype=dtype), 1 if shared else 2
    multiples = [torch.ones(inner, device=DEVICE)] * 2 if shared else multiples_of(inner, 2)
    weights = [(random(n, inner, seed=n) * 2).clamp(-8, 7).to(torch.int8) for n in sizes]
    scales = [torch.rand(n, device=DEVICE) * 0.01 for n in sizes]
    biases = [random(n, seed=4, dtype=dtype) for n in sizes]
    given = list(zip(weights, scales, biases, multiples, strict=True))
    wanted = [products.gif_linear(x, w, s, None, None, b, m, m, 15, steps) for w, s, b, m in given]
    codes = row_gif(x, multiples[:1] if shared else multiples, 15, steps, False)
    found = row_product(codes, weights, scales, (), biases, None, dtype, lead, 1, 1)
    assert all(torch.equal(a, b) for a, b in zip(wanted, found, strict=True))
    residual = random(*lead, sizes[0], seed=5, dtype=dtype)
    alone = [some[:1] for some in (weights, scales, (), biases)]
    (y,) = row_product(codes[: len(x) * SKINNY], *alone, residual, dtype, lead, 1, 1)
    if INTERPRETED and dtype == torch.bfloat16:  # whose conversions of products cut
        torch.testing.assert_close(y, wanted[0] + residual, rtol=2**-6, atol=2**-6)
    else:
        assert torch.equal(y, wanted[0] + residual)


@pytest.mark.gpu
@pytest.mark.skipif(INTERPRETED or not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("rows", "columns", "inner"), [(65, 264, 80), (300, 520, 1104), (1500, 1032, 4096)])
@pytest.mark.parametrize("more", [False, True], ids=["", "bias, residual"])
def test_products_whose_steps_overlap(rows, columns, inner, more):
    """Of codes whose rows lie apart, and of tiles that stand over: integers as large as they come."""
    from spikeform.synapses.triton import hopper
    from spikeform.synapses.triton.gemm import gemm
    from spikeform.synapses.triton.shapes import hopper_tile, int_tile

    generator = torch.Generator().manual_seed(0)
    codes, weight = (
        torch.randint(-128, 128, shape, generator=generator).to(DEVICE, torch.int8)
        for shape in ((rows, inner + 32), (columns, inner))
    )
    codes[0], weight[0] = -128, -128
    scale, units = torch.rand(columns, device=DEVICE), torch.rand(rows, 3, device=DEVICE)
    bias = random(columns, dtype=torch.bfloat16) if more else None
    residual = random(rows, columns, dtype=torch.bfloat16) if more else None
    outs = [torch.full((rows, columns), 7.0, dtype=torch.bfloat16, device=DEVICE) for _ in range(3)]
    given = codes[:, :inner], [weight], [scale], units[:, 1], [bias] if more else []
    assert hopper.takes(given[0], [weight], outs[:1]) == (torch.cuda.get_device_capability()[0] == 9)
    gemm(given[0], weight, scale, given[3], bias, outs[0], int_tile(rows), residual)
    hopper.scaled_products(*given, outs[1:2], residual)
    assert torch.equal(outs[0], outs[1])
    if torch.cuda.get_device_capability()[0] == 9:
        hopper.multiply(*given, outs[2:], residual, hopper_tile(2048 if rows < 1024 else 512))
        assert torch.equal(outs[0], outs[2])


@pytest.mark.gpu
@pytest.mark.skipif(INTERPRETED or not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("apart", [False, True], ids=["one code", "codes apart"])
def test_several_matrices_whose_steps_overlap(apart):
    from spikeform.synapses.triton import hopper

    rows, columns, inner, parts = 300, 520, 208, 3
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-128, 128, (rows * (parts if apart else 1), inner), generator=generator)
    codes = codes.to(DEVICE, torch.int8)
    weights = [torch.randint(-128, 128, (columns, inner), generator=generator).to(DEVICE, torch.int8) for _ in range(3)]
    scales = [torch.rand(columns, device=DEVICE) for _ in range(parts)]
    biases = [random(columns, seed=i, dtype=torch.bfloat16) for i in range(parts)]
    unit = torch.rand(len(codes), device=DEVICE)
    both = [[torch.empty(rows, columns, dtype=torch.bfloat16, device=DEVICE) for _ in range(parts)] for _ in range(2)]
    hopper.scaled_products(codes, weights, scales, unit, biases, both[0])
    for i in range(parts):
        own = slice(i * rows, (i + 1) * rows) if apart else slice(None)
        hopper.scaled_products(
            codes[own], weights[i : i + 1], scales[i : i + 1], unit[own], biases[i : i + 1], both[1][i : i + 1]
        )
    assert all(torch.equal(a, b) for a, b in zip(*both, strict=True))


@needs_triton
@not_interpreted
def test_on_the_interpreter():
    on_the_interpreter(__file__)
