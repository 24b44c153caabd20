"""Pairs of layers: rescaling changes the weights and not the function; RoPE and grouped heads tie channels."""

import copy
from dataclasses import replace

import pytest
import torch
import transformers as hf
from torch import nn
from torch.func import functional_call
from transformers.pytorch_utils import Conv1D

import families
from spikeform.conversion.pairs import KINDS, apply, pairs, scaled
from spikeform.conversion.rotation import rotate
from spikeform.errors import ConversionError
from spikeform.layers import SpikingLinear

NORM, VALUE, QK, FEED = KINDS[0], KINDS[1], KINDS[3], KINDS[2]
# What a block of each family has, norms first, and whether the head makes a pair with the final norm.
BLOCKS = {
    "gpt2": ([NORM, NORM, VALUE, QK], False),
    "opt": ([NORM, NORM, VALUE, QK, FEED], False),
    "opt_post_norm": ([VALUE, QK, FEED], False),
    "llama": ([NORM, NORM, VALUE, QK, FEED], True),
    "mistral": ([NORM, NORM, VALUE, QK, FEED], True),
    "mistral_window": ([NORM, NORM, VALUE, QK, FEED], True),
    "qwen2": ([NORM, NORM, VALUE, QK, FEED], True),
    "qwen3": ([NORM, NORM, VALUE, FEED], False),
    "gpt_neox": ([NORM, NORM, VALUE, QK], True),
    "phi": ([NORM, VALUE, QK], True),
    "phi_qk_norm": ([NORM, VALUE], True),
    "gemma": ([NORM, NORM, VALUE, QK, FEED], False),
    "bert": ([VALUE, QK], False),
    "bert_mlm": ([VALUE, QK], False),
}


def scale_of(pair, seed=0):
    """Factors between a fifth and five, no two alike."""
    generator = torch.Generator().manual_seed(seed)
    return (1.6 * (2 * torch.rand(pair.channels, dtype=torch.float64, generator=generator) - 1)).exp()


@torch.no_grad()
def change(a, b):
    x, y = (model(input_ids=families.tokens()).logits for model in (a, b))
    return float((x - y).abs().max() / x.abs().max())


@pytest.mark.parametrize("family", families.FAMILIES)
def test_the_same_function(family, norms_keep_fp64):
    dense = families.build(family).double()
    model = copy.deepcopy(dense)
    kinds, head = BLOCKS[family]
    assert [pair.kind for pair in pairs(model)] == [*kinds, *kinds, *([NORM] if head else [])]
    for seed, pair in enumerate(pairs(model)):
        named = {name: model.get_submodule(name).weight.clone() for name in (pair.producer_name, *pair.consumer_names)}
        apply(pair, scale_of(pair, seed))
        for name, before in named.items():
            assert families.difference(before, model.get_submodule(name).weight) > 0.01
        assert change(dense, model) < 1e-10, pair


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma"])
def test_rotated_models_have_pairs_too(family, norms_keep_fp64):
    dense = families.build(family).double()
    model = rotate(copy.deepcopy(dense))
    for seed, pair in enumerate(pairs(model)):
        apply(pair, scale_of(pair, seed))
    assert [pair.kind for pair in pairs(model)] == [*BLOCKS[family][0] * 2, NORM]  # the head is no longer tied
    assert change(dense, model) < 1e-10


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "phi", "gemma"])
def test_rope_ties_its_partners(family, norms_keep_fp64):
    """Each of a head's dimensions for itself would change the scores, as OmniQuant's released code does."""
    dense = families.build(family).double()
    pair = next(pair for pair in pairs(dense) if pair.kind == "query_key")
    attention = next(m for m in dense.modules() if hasattr(m, "scaling"))
    size = getattr(attention, "head_dim", None) or attention.head_size
    rotary, heads = getattr(attention, "rotary_ndims", size), len(sum(pair.rows, ())) // size
    assert 0 < rotary <= size
    assert pair.channels == heads * (size - rotary // 2)
    for rows, columns in zip(pair.rows, pair.columns, strict=True):
        assert len(rows) in ((2,) if rotary == size else (1, 2))
        assert len(rows) == 1 or rows[1] - rows[0] == rotary // 2
        assert len(columns) % len(rows) == 0
    shared = len(pair.columns[0]) // 2
    untied = replace(
        pair,
        rows=tuple((row,) for rows in pair.rows for row in rows),
        columns=tuple(
            columns[i :: len(rows)]
            for rows, columns in zip(pair.rows, pair.columns, strict=True)
            for i in range(len(rows))
        ),
    )
    assert all(len(columns) == shared for columns in untied.columns)
    model = copy.deepcopy(dense)
    apply(
        replace(
            untied,
            producer=model.get_submodule(pair.producer_name),
            consumers=[model.get_submodule(n) for n in pair.consumer_names],
        ),
        scale_of(untied),
    )
    assert change(dense, model) > 1e-3


def test_grouped_queries():
    """Two key/value heads of 16 serve four query heads: head 2's queries meet key head 1."""
    by_kind = {pair.kind: pair for pair in pairs(families.build("llama"))}
    value, query_key = by_kind[VALUE], by_kind[QK]
    assert value.channels == 32
    assert (value.rows[3], value.columns[3]) == ((3,), (3, 19))
    assert (value.rows[17], value.columns[17]) == ((17,), (33, 49))
    assert query_key.channels == 16
    assert (query_key.rows[2], query_key.columns[2]) == ((2, 10), (2, 10, 18, 26))
    assert (query_key.rows[9], query_key.columns[9]) == ((17, 25), (33, 41, 49, 57))
    names = "model.layers.1.self_attn"
    assert (query_key.producer_name, query_key.consumer_names) == (f"{names}.k_proj", (f"{names}.q_proj",))


def test_directions():
    """Values shrink by s and the output projection grows; keys grow by s and queries shrink."""
    model = families.build("llama")
    before = copy.deepcopy(model.model.layers[0].self_attn)
    attention = model.model.layers[0].self_attn
    for pair in pairs(model)[2:4]:
        apply(pair, torch.full((pair.channels,), 2.0))
    assert torch.equal(attention.v_proj.weight, before.v_proj.weight / 2)
    assert torch.equal(attention.o_proj.weight, before.o_proj.weight * 2)
    assert torch.equal(attention.k_proj.weight, before.k_proj.weight * 2)
    assert torch.equal(attention.q_proj.weight, before.q_proj.weight / 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma"])
def test_functional_form_is_the_form_in_place(family, dtype):
    model = families.build(family).to(dtype)
    chosen = pairs(model)
    scales = [scale_of(pair, seed).float() for seed, pair in enumerate(chosen)]
    original = {name: p.detach().clone() for name, p in model.named_parameters()}
    params = dict(original)
    for pair, scale in zip(chosen, scales, strict=True):
        params = scaled(pair, scale, params)
    assert all(p.dtype == dtype for p in params.values())
    assert all(torch.equal(p, original[name]) for name, p in model.named_parameters())  # nothing was written
    functional = functional_call(model, params, kwargs={"input_ids": families.tokens()}).logits
    for pair, scale in zip(chosen, scales, strict=True):
        apply(pair, scale)
    assert torch.equal(functional, model(input_ids=families.tokens()).logits)
    assert all(torch.equal(p, params[name]) for name, p in model.named_parameters())


def test_functional_form_of_one_block(norms_keep_fp64):
    """Names relative to a block; gradients reach the scales, and are zero where the function cannot change."""
    model = families.build("llama").double()
    block, prefix = model.model.layers[1], "model.layers.1."
    x = torch.randn(1, 5, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    call = {"position_embeddings": model.model.rotary_emb(x, torch.arange(5)[None])}
    inside = [pair for pair in pairs(model) if pair.producer_name.startswith(prefix)]
    assert {pair.kind for pair in inside} == set(KINDS)
    params = {name: p.detach() for name, p in block.named_parameters()}
    scales = [scale_of(pair).requires_grad_() for pair in inside]
    for pair, scale in zip(inside, scales, strict=True):
        params = scaled(pair, scale, params, prefix)
    output = functional_call(block, params, (x,), call)
    assert torch.allclose(output, block(x, **call), rtol=0, atol=1e-10)
    size = params["self_attn.o_proj.weight"].square().sum()
    for gradient in torch.autograd.grad(output.square().mean(), scales, retain_graph=True):
        assert gradient.abs().max() < 1e-9  # the function does not depend on them
    value = next(i for i, pair in enumerate(inside) if pair.kind == "value")
    (gradient,) = torch.autograd.grad(size, scales[value])
    squares = block.self_attn.o_proj.weight.square().sum(0).view(2, 2, 16).sum(1).flatten()
    assert torch.allclose(gradient, 2 * scales[value] * squares)  # of sum_c (s_c w_c)^2


def test_converted_modules():
    """SpikingLinear keeps the names, and [out, in] where Conv1D had [in, out]."""
    for family in ("gpt2", "llama"):
        dense = families.build(family)
        model = copy.deepcopy(dense)
        for name, module in list(model.named_modules()):
            if isinstance(module, nn.Linear | Conv1D) and name != "lm_head":
                model.set_submodule(name, SpikingLinear.from_dense(module, None))
        places = [
            [(p.kind, p.rows, p.columns, p.producer_name, p.consumer_names) for p in pairs(m)] for m in (dense, model)
        ]
        assert places[0] == places[1]
        for pair in pairs(model):
            apply(pair, scale_of(pair).float())
        assert 0 < change(dense, model) < 1e-5


def test_largest():
    value = next(pair for pair in pairs(families.build("llama")) if pair.kind == VALUE)
    columns = torch.arange(64.0)
    assert torch.equal(value.largest(columns), torch.cat((torch.arange(16.0, 32), torch.arange(48.0, 64))))


def test_refuses():
    model = families.build("opt")
    norm, _, _, _, feed = pairs(model)[:5]
    before = copy.deepcopy(model.state_dict())
    for pair, scale, message in [
        (norm, torch.ones(3), r"scale has shape \[3\], not \[64\]"),
        (norm, torch.zeros(64), "scales must be finite and other than zero"),
        (norm, torch.full((64,), torch.nan), "norm pair of model.decoder.layers.0.self_attn_layer_norm: scales must"),
        (feed, torch.full((112,), -1.0), "scales must be finite and positive"),
    ]:
        with pytest.raises(ConversionError, match=message):
            apply(pair, scale)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    with pytest.raises(ConversionError, match=r"is not below 'model\.decoder\.layers\.1\.'"):
        scaled(norm, torch.ones(64), {}, "model.decoder.layers.1.")
    with pytest.raises(ConversionError, match=r"self_attn_layer_norm\.weight is no real parameter"):
        scaled(norm, torch.ones(64), {}, "model.decoder.layers.0.")
    with pytest.raises(ConversionError, match="the parts of 'mamba' are not known: supported are bert, gemma"):
        pairs(hf.MambaModel(hf.MambaConfig(vocab_size=8, hidden_size=8, num_hidden_layers=1)))
