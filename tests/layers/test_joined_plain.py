"""Norms and gates that are not of spikes, before GIF neurons: what encodes them, and which of a graph's it takes.

Kernels run as in :mod:`test_joined`. What a compiled graph is made of needs none.
"""

from collections import Counter

import pytest
import torch
from torch._inductor.decomposition import select_decomp_table
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.functional import relu, silu

from kernels import DEVICE, INTERPRETED, fused, let_bounds_be_scalars, needs_triton, not_interpreted, on_the_interpreter
from spikeform.layers import joined, nodes
from spikeform.synapses.fused import pack_nibbles
from spikeform.synapses.rows import SUMMED

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


def random(*shape, seed=0, dtype=torch.float32):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    x.view(-1)[::11] *= 4
    return x.to(DEVICE, dtype)


def norm_and_scale(x, weight, eps=1e-6):
    wide = x.to(torch.float32)
    scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * (wide * scale).to(x.dtype), scale


def rms_norm(x, weight, eps=1e-6):
    return norm_and_scale(x, weight, eps)[0]


@pytest.fixture
def loops(monkeypatch):
    if INTERPRETED:
        let_bounds_be_scalars(monkeypatch)


def agree(apart, whole, width):
    """Codes, but for a few, where a last bit decides; the unit; and sums, which are those of the codes."""

    def taken(lines):
        codes, unit, sums = lines[:, : width // 4], lines[:, width // 4], lines[:, width // 4 + 1 :]
        return (
            codes.contiguous().view(torch.int8).int(),
            unit.contiguous().view(torch.float32),
            sums[:, : -(-width // SUMMED)],
        )

    (wanted, wanted_unit, _), (codes, unit, sums) = taken(apart), taken(whole)
    assert wanted.unique().numel() > 20
    assert (wanted != codes).sum() <= (2 if INTERPRETED else codes.numel() * 0.01)
    assert torch.allclose(wanted_unit, unit, rtol=1e-6 if INTERPRETED else 2**-7, atol=0)
    assert torch.equal(sums.sum(1), codes.sum(1))


@fused
@DTYPES
@pytest.mark.parametrize("packed", [False, True], ids=["bytes", "nibbles"])
@pytest.mark.parametrize(("width", "steps", "bite"), [(1088, 2, 16384), (1152, 1, 256), (320, 2, 16384)])
def test_codes_of_what_is_made(loops, monkeypatch, width, steps, bite, packed, dtype):
    """Of widths that programs and bites do not divide, and so many levels that each rounding is seen."""
    from spikeform.synapses.triton import produced_gif, row

    monkeypatch.setattr(row, "LONGEST", bite)
    monkeypatch.setattr(produced_gif, "BITE", min(bite, produced_gif.BITE))
    x, other = random(1, 1, width, dtype=dtype), random(1, 1, width, seed=1, dtype=dtype)
    weight, eps = (random(width, seed=5) * 0.1 + 1).to(dtype), 0.1
    multiples = [(1.0 + (torch.arange(width) % (i + 2) > 0)).to(DEVICE) for i in range(3)]
    how = multiples, 120 // steps, steps, packed
    agree(row.row_gif(rms_norm(x, weight, eps), *how), produced_gif.row_norm_gif(x, weight, eps, *how), width)
    gate = x * 0.3
    agree(row.row_gif(silu(gate) * other, *how), produced_gif.row_gated_gif(gate, other, "silu", *how), width)


@fused
@DTYPES
@pytest.mark.parametrize("packed", [False, True], ids=["bytes", "nibbles"])
def test_a_product_puts_the_function_on_the_gate(loops, packed, dtype):
    from spikeform.synapses.triton import produced_gif, row
    from spikeform.synapses.triton.stream import row_product

    inner, width = 320, 192
    codes = row.row_gif(random(1, 1, inner, dtype=dtype), [torch.ones(inner, device=DEVICE)] * 2, 15, 1, packed)
    integers = [(random(width, inner, seed=i) * 2).clamp(-8, 7).to(DEVICE, torch.int8) for i in (1, 2)]
    weights = [pack_nibbles(w + 8) for w in integers] if packed else integers
    zeros = [torch.full((width,), 8, dtype=torch.int16, device=DEVICE)] * 2 if packed else ()
    matrices = weights, [torch.full((width,), 0.01, device=DEVICE)] * 2, zeros, ()
    how = [torch.ones(width, device=DEVICE)], 15, 1, packed
    for at in range(2):
        apart = row_product(codes, *matrices, None, dtype, [1, 1], 1, 1)
        whole = row_product(codes, *matrices, None, dtype, [1, 1], 1, 1, "silu", at)
        assert torch.equal(apart[1 - at], whole[1 - at])
        assert not torch.equal(apart[at], whole[at])
        wanted = produced_gif.row_gated_gif(apart[at], apart[1 - at], "silu", *how)
        found = produced_gif.row_gated_gif(whole[at], whole[1 - at], "", *how)
        used = width // 4 + 2
        assert torch.equal(wanted[:, :used], found[:, :used])


class Step(torch.nn.Module):
    """Products of one row as a block of a LLaMA has them, and a norm or a gate that a test may change."""

    def __init__(self, dtype, norm=rms_norm, gate=silu):
        super().__init__()
        self.norm, self.gate = norm, gate
        self.gain = torch.nn.Parameter(torch.ones(64, dtype=dtype), requires_grad=False)

    def product(self, x):
        ones = torch.ones(64, device=x.device)
        weight = torch.ones(64, 64, dtype=torch.int8, device=x.device)
        return torch.ops.spikeform.gif_linear(x, weight, ones, None, None, None, ones, ones, 15, 2)

    def forward(self, x, gain):
        x = x + self.product(x)
        y = self.norm(x, gain)
        y, *more = y if isinstance(y, tuple) else (y,)
        gate, up = self.product(y), self.product(y)
        return x + self.product(self.gate(gate) * up), *more


def together(monkeypatch, dtype, **changed):
    """What the pass makes of a step: its own operators, all before and after, and the first product."""
    monkeypatch.setattr(nodes, "DEVICES", {"cpu"})
    monkeypatch.setattr(nodes, "CHAINED", set())
    step, x = Step(dtype, **changed), torch.ones(1, 1, 64, dtype=dtype)
    traced = make_fx(step, decomposition_table=select_decomp_table(), tracing_mode="fake")(x, step.gain)
    before = Counter(node.target for node in traced.graph.nodes)
    joined.Joined(0)(traced.graph)
    traced.graph.lint()
    after = Counter(node.target for node in traced.graph.nodes)
    own = {name: after[getattr(torch.ops.spikeform, name).default] for name in ("row_norm_gif", "row_gated_gif")}
    product = next(n for n in traced.graph.nodes if n.target is torch.ops.spikeform.row_product.default)
    return own, before, after, product


def turned_norm(x, weight):
    wide = x.to(torch.float32)
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)).to(x.dtype) * weight


def turned_silu(x):
    wide = x.to(torch.float32)
    return (wide * torch.sigmoid(wide)).to(x.dtype)


@DTYPES
@pytest.mark.parametrize("changed", [{}, {"norm": turned_norm, "gate": turned_silu}], ids=["", "turned"])
def test_they_are_found(monkeypatch, dtype, changed):
    own, before, after, product = together(monkeypatch, dtype, **changed)
    assert own == {"row_norm_gif": 1, "row_gated_gif": 1}
    assert product.args[5].op == "placeholder"  # the residual
    add, norm = torch.ops.aten.add.Tensor, torch.ops.aten.rsqrt.default
    assert (before[norm], after[norm], after[add]) == (1, 0, 1)  # the residual of what is next is not known here
    (made,) = (n for n in product.graph.nodes if n.target is torch.ops.spikeform.row_norm_gif.default)
    assert made.args[2] == (1e-5 if changed else 1e-6)
    (gated,) = (n for n in product.graph.nodes if n.target is torch.ops.spikeform.row_gated_gif.default)
    assert gated.args[2] == ""  # the product of gate and up has put its function on the gate
    makes, index = gated.args[0].args
    assert makes.args[-2:] == ("silu", index)


@DTYPES
@pytest.mark.parametrize(
    "norm",
    [
        lambda x, weight: (rms_norm(x, weight),) * 2,  # with another user
        norm_and_scale,
        lambda x, weight: rms_norm(x, weight + 1),  # whose weight a kernel makes
        lambda x, weight: rms_norm(x, weight) * 2,
        lambda x, weight: rms_norm(x, weight[:1]),
        lambda x, weight: rms_norm(x - x.mean(-1, keepdim=True), weight) + weight,
        lambda x, weight: weight * (x * torch.rsqrt(x.abs().mean(-1, keepdim=True) + 1e-6)),
    ],
    ids=["used", "its scale used", "gain", "scaled", "one weight", "biased", "mean of magnitudes"],
)
def test_a_norm_stays_as_it_was(monkeypatch, dtype, norm):
    own, before, after, product = together(monkeypatch, dtype, norm=norm)
    assert own == {"row_norm_gif": 0, "row_gated_gif": 1}
    assert product.args[5] is None
    assert after[torch.ops.aten.rsqrt.default] == before[torch.ops.aten.rsqrt.default] > 0


@DTYPES
@pytest.mark.parametrize("gate", [relu, torch.sigmoid, lambda x: silu(x) + 1, lambda x: silu(x)[..., :1]])
def test_a_gate_stays_as_it_was(monkeypatch, dtype, gate):
    own, *_ = together(monkeypatch, dtype, gate=gate)
    assert own == {"row_norm_gif": 1, "row_gated_gif": 0}


@needs_triton
@not_interpreted
def test_on_the_interpreter():
    on_the_interpreter(__file__)
