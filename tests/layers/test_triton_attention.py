"""Fused attention against SpikingAttention in PyTorch.

Without a CUDA device the same tests run on Triton's interpreter, in a process of their own.
"""

import pytest
import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from attention_cases import Case, agrees, gif_layer, oat_layer, run_gif, run_oat
from kernels import DEVICE, INTERPRETED, fused, let_bounds_be_scalars, needs_triton, not_interpreted, on_the_interpreter


@pytest.fixture(autouse=True)
def loops(monkeypatch):
    if INTERPRETED:
        let_bounds_be_scalars(monkeypatch)


@fused
@pytest.mark.parametrize(
    ("length", "keys", "size", "two", "rounding", "steps", "bits"),
    [
        (1, 40, 16, True, "nearest", 8, 8),
        (1, 33, 24, False, "nearest", 16, 16),
        (3, 21, 32, True, "floor", 4, 4),
        (3, 40, 16, True, "strict", 8, 0),
        (17, 40, 16, True, "nearest", 8, 8),
        (17, 17, 24, False, "nearest", 8, 8),
        (17, 20, 32, True, "floor", 16, 16),
        (17, 40, 16, False, "strict", 4, 0),
    ],
)
def test_multi_threshold(length, keys, size, two, rounding, steps, bits):
    case, spiking = Case(length, keys, size), oat_layer(two, rounding, steps, bits)
    k, v = case.cached(spiking)
    expected = case.reference(spiking, k, v)
    agrees(run_oat(spiking, case, k, v), expected, float(spiking.probability.quantum().max()), case.v)


@fused
@pytest.mark.parametrize("length", [1, 17])
@pytest.mark.parametrize("padding", [None, 20])
def test_bf16_powers_of_two_and_other_masks(length, padding):
    # with a padding of 20 the first sequence's first queries see no key
    case = Case(length, 24, 16, heads=2, dtype=torch.bfloat16, padding=padding, per_head=True)
    spiking = oat_layer(True, "nearest", 8, 8, powers=True)
    k, v = case.cached(spiking)
    mine, expected = run_oat(spiking, case, k, v), case.reference(spiking, k, v)
    agrees(mine, expected, float(spiking.probability.quantum().max()), case.v)
    if padding and length > 1:
        assert not bool(mine[0, : 20 - (24 - length)].any())


@fused
@pytest.mark.parametrize(
    ("length", "keys", "size", "steps", "signs", "padding"),
    [(1, 40, 16, 2, True, 5), (1, 21, 32, 1, False, None), (3, 33, 24, 2, True, 5), (3, 33, 24, 2, False, 5),
     (17, 40, 16, 2, False, 30), (17, 20, 24, 1, True, None)],
)  # fmt: skip
def test_gif(length, keys, size, steps, signs, padding):
    case = Case(length, keys, size, padding=padding)
    spiking = gif_layer(case, steps, signs)
    k, v = case.cached(spiking)
    expected = case.reference(spiking, k, v)
    agrees(run_gif(spiking, case, k, v), expected, 1 / spiking.probability.coding.limit, case.v, signs)


@fused
def test_many_heads_share_keys_and_hidden_blocks_are_skipped():
    for heads, groups, length in ((17, 1, 1), (3, 1, 2)):
        case = Case(length, 150, 16, heads=heads, groups=groups, padding=140)
        spiking = oat_layer(True, "nearest", 8, 8)
        k, v = case.cached(spiking)
        unit = float(spiking.probability.quantum().max())
        agrees(run_oat(spiking, case, k, v), case.reference(spiking, k, v), unit, case.v)
        spiking = gif_layer(case, 2, False)
        k, v = case.cached(spiking)
        agrees(run_gif(spiking, case, k, v), case.reference(spiking, k, v), 1 / 65535, case.v)


@fused
@pytest.mark.parametrize(("padding", "per_head"), [(70, False), (5, True)])
def test_tiles_that_are_open_hidden_mixed_and_biased(padding, per_head):
    # 140 keys are three tiles; the first of a sequence with a padding of 70 is hidden, the first of another is open
    case = Case(9, 140, 16, heads=2, groups=1, padding=padding, per_head=per_head)
    for spiking, unit in ((oat_layer(True, "nearest", 8, 8), None), (gif_layer(case, 2, True), 1 / 65535)):
        k, v = case.cached(spiking)
        mine = (run_gif if unit else run_oat)(spiking, case, k, v)
        agrees(mine, case.reference(spiking, k, v), unit or float(spiking.probability.quantum().max()), case.v)


@fused
@pytest.mark.parametrize("size", [24, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rotated_queries_have_the_codes_of_the_neuron(size, dtype):
    from spikeform.layers.rotation import rotate_heads
    from spikeform.layers.triton.query import encode_gif

    case = Case(33, 33, size, dtype=dtype)
    spiking = gif_layer(case, 1, True)
    tables = spiking.query.tables()
    found, units = encode_gif(case.q, spiking.signs, tables.multiple, spiking.query.levels, 1)
    with torch.no_grad():
        expected, unit = spiking.query.encode(rotate_heads(case.q, spiking.signs)).integers()
    torch.testing.assert_close(units, unit[..., 0], rtol=1e-6, atol=0)
    apart = (found[..., :size].int() - expected.int()).abs()
    assert int(apart.max()) <= 1  # a sum in another order may lie on the other side of an edge
    assert float((apart > 0).float().mean()) < 1e-3


@fused
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("length", "size", "heads", "groups", "steps"), [(70, 40, 9, 3, 2), (20, 64, 2, 2, 1)])
@torch.no_grad()
def test_a_prompt_is_turned_and_encoded_on_the_way(length, size, heads, groups, steps, dtype):
    from spikeform.layers.triton.attention import gif_attention
    from spikeform.layers.triton.operands import padded
    from spikeform.layers.triton.prefill import form_of
    from spikeform.layers.triton.prompt import gif_prompt, mask_tiles
    from spikeform.neurons.triton.gif import gif_pack

    case = Case(length, length, size, heads, groups, dtype)
    spiking = gif_layer(case, steps, False)
    angle = torch.randn(2, 1, length, size // 2, generator=case.generator).repeat(1, 1, 1, 2)
    turn = [f(angle).to(DEVICE, dtype) for f in (torch.cos, torch.sin)]
    query, key = apply_rotary_pos_emb(case.q, case.k, *(x[:, 0] for x in turn))
    neurons = spiking.query, spiking.key, spiking.value
    tables = _, k_table, v_table = [(n.tables().top, n.tables().multiple, n.steps) for n in neurons]
    last = spiking.query.levels, spiking.probability.coding.limit
    packed = [gif_pack(x, *t[:2], last[0], t[2]) for x, t in ((key, k_table), (case.v, v_table))]
    flat = [x for table in tables for x in table]
    wanted = gif_attention(query, *packed, case.mask, case.scaling, None, *flat, *last)
    multiples = [x for table in tables for x in table[1:]]
    known = mask_tiles(case.mask, length, *form_of(length, padded(size), False)[:2])
    given = case.q, case.k, case.v, *turn, case.mask, case.scaling, *multiples, *last
    found, *caches = gif_prompt(*given)
    assert torch.equal(gif_prompt(*given, *known)[0], found)
    assert all(torch.equal(a, b) for a, b in zip(caches, packed, strict=True))
    assert torch.equal(found, wanted)


@fused
@pytest.mark.parametrize("length", [1, 2])
def test_keys_of_few_queries_are_shared_out(length, monkeypatch):
    from spikeform.layers.triton import decode, short

    usual = decode.form_of
    monkeypatch.setattr(short, "suits", lambda *_: False)
    monkeypatch.setattr(decode, "form_of", lambda *args: usual(*args)._replace(parts=3, step=16, block=32))
    case = Case(length, 80, 24, heads=3, groups=1, padding=20)
    for spiking, unit in ((oat_layer(True, "nearest", 8, 8), None), (gif_layer(case, 2, False), 1 / 65535)):
        k, v = case.cached(spiking)
        run = run_gif if unit else run_oat
        unit = unit or float(spiking.probability.quantum().max())
        agrees(run(spiking, case, k, v), case.reference(spiking, k, v), unit, case.v)


@needs_triton
@not_interpreted
def test_on_the_interpreter():
    on_the_interpreter(__file__)
