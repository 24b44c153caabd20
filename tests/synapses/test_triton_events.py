"""Event products on a GPU: integer sums are exact, and so are real ones of few bits, however the work is shared out.

Without a CUDA device the same tests run on Triton's interpreter, in a process of their own.
"""

import pytest
import torch

from kernels import DEVICE, INTERPRETED, fused, let_bounds_be_scalars, needs_triton, not_interpreted, on_the_interpreter
from spikeform.synapses.fused import pack_nibbles

# Dtypes of values and of rows; "int4": packed.
KINDS = {
    "bf16": (torch.float32, torch.bfloat16),
    "fp32": (torch.float32, torch.float32),
    "int8": (torch.int8, torch.int8),
    "int4": (torch.int8, "int4"),
    "int8 x bf16": (torch.int8, torch.bfloat16),
    "fp32 x int8": (torch.float32, torch.int8),
    "fp32 x int4": (torch.float32, "int4"),
}
# Bytes, slots, depth: one word a slot; two, and deeper than there are channels; five; three, in one program; more slots
# than runs of channels, a thread each.
CUTS = [(32, 8, 2), (64, 4, 12), (128, 1, 3), (512, 2, 1), (16, 32, 4)]


@pytest.fixture
def products(monkeypatch):
    from spikeform.synapses.triton import products

    if INTERPRETED:
        let_bounds_be_scalars(monkeypatch)
    return products


@pytest.fixture
def shared(monkeypatch):
    """Has event products cut as it is told."""
    from spikeform.synapses.triton import shapes
    from spikeform.synapses.triton.event import Share

    return lambda cut: monkeypatch.setattr(shapes, "event_share", lambda *_: Share(*cut))


def given(kind, shape, columns, zeros, seed=4):
    """Values, rows, rows as they are stored, scale."""
    generator = torch.Generator().manual_seed(seed)
    sent, stored = KINDS[kind]
    codes = torch.randint(-128, 128, shape, generator=generator).to(torch.int8)
    codes[torch.rand(shape, generator=generator) < zeros] = 0
    values = codes.float() / 32 if sent == torch.float32 else codes
    rows = torch.randint(-128, 128, (shape[-1], columns), generator=generator).to(torch.int8)
    scale = torch.rand(columns, generator=generator)
    if stored == "int4":
        rows = rows // 16
        return values, rows, pack_nibbles(rows + 8), scale
    rows = rows.to(stored)
    return values, rows, rows, scale


def check(products, values, rows, stored, scale):
    wanted = (values.double() @ rows.double()).float()
    there = [t.to(DEVICE) for t in (values, stored, scale)]
    found = products.event_product(*there, rows.shape[1]).cpu()
    assert found.shape == (*values.shape[:-1], rows.shape[1])
    assert torch.equal(found, wanted * scale)
    assert torch.equal(products.event_product(*there[:2], None, rows.shape[1]).cpu(), wanted)


@fused
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("shape", "columns", "zeros"), [((300,), 64, 0.6), ((1, 3, 70), 128, 0.8), ((2, 40), 64, 0.0), ((5, 70), 64, 1.0)]
)
def test_event_product(products, kind, shape, columns, zeros):
    check(products, *given(kind, shape, columns, zeros))


@fused
@pytest.mark.parametrize("kind", ["bf16", "int8", "fp32 x int8"])
@pytest.mark.parametrize("columns", [1, 44, 130])
def test_columns_that_fill_no_word(products, kind, columns):
    check(products, *given(kind, (2, 77), columns, 0.5))


@fused
@pytest.mark.parametrize("kind", ["bf16", "int8", "int4"])
@pytest.mark.parametrize("cut", CUTS)
def test_however_it_is_cut(products, shared, kind, cut):
    shared(cut)
    check(products, *given(kind, (1, 139), 128, 0.1))
    check(products, *given(kind, (2, 139), 128, 0.9))


@fused
@pytest.mark.parametrize("sent", [[], [0], [138], [31, 32], [0, 96, 138], range(64, 96), range(0, 139, 32)])
@pytest.mark.parametrize("cut", CUTS)
def test_words_without_a_channel(products, shared, cut, sent):
    """Steps without a channel, between words that have some, leave none out."""
    shared(cut)
    values, rows, stored, scale = given("int8", (1, 139), 128, 0.0)
    kept = torch.zeros(139, dtype=torch.int8)
    kept[list(sent)] = 1
    check(products, values * kept, rows, stored, scale)


@fused
@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_sums_as_large_as_can_be(products, kind):
    values = torch.full((1, 150), -128, dtype=torch.int8)
    rows = torch.full((150, 128), -128 if kind == "int8" else -8, dtype=torch.int8)
    rows[:, 1::2] = 127 if kind == "int8" else 7
    values[:, ::5] = 0
    check(products, values, rows, rows if kind == "int8" else pack_nibbles(rows + 8), torch.ones(128))


@fused
@pytest.mark.parametrize("zeros", [[3], [0, 31, 32, 63], [7, 8]])
def test_only_rows_of_others_are_read(products, zeros):
    """A row that no value needs may hold anything: nothing of it comes into a sum."""
    values, rows = torch.ones(2, 70), torch.ones(70, 64)
    values[:, zeros], rows[zeros] = 0.0, float("nan")
    values[0, 40] = -0.0
    wanted = (values.nan_to_num() @ rows.nan_to_num()).to(DEVICE)
    assert torch.equal(products.event_product(values.to(DEVICE), rows.to(DEVICE), None, 64), wanted)


@needs_triton
@not_interpreted
def test_on_the_interpreter():
    on_the_interpreter(__file__)
