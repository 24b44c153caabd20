"""Law 3: decoding with a cache is the full forward; nothing depends on later tokens, padding or other rows.

Where shapes are equal the results are too, bit for bit. Where they differ, the matrix library sums in another
order, and a code may flip (see test_executors_agree): those are compared in fp64, where nothing flips.
"""

import copy
from functools import cache

import pytest
import torch
from transformers import DynamicCache, StaticCache

import families
from families import close

IDS = families.tokens(rows=3, length=18)


@cache
def _wide(spiking, family, twin=False):
    return copy.deepcopy(spiking(family, twin)).double()


@pytest.fixture
def wide(spiking):
    """The converted model in fp64."""
    return lambda family, twin=False: _wide(spiking, family, twin)


@torch.no_grad()
def decode(model, ids, chunks, past=None, **more):
    """Logits of ``ids`` fed in chunks of the given lengths, and the cache."""
    parts = []
    for chunk in ids.split(chunks, dim=1):
        out = model(input_ids=chunk, past_key_values=past, use_cache=True, **more)
        past = out.past_key_values
        parts.append(out.logits)
    return torch.cat(parts, 1), past


@pytest.mark.parametrize("chunks", [[1] * 18, [7, 1, 1, 6, 3]], ids=["tokens", "chunks"])
@pytest.mark.parametrize("family", families.CAUSAL)
def test_cached_decoding_is_the_full_forward(family, chunks, wide, logits):
    model = wide(family)
    stepped, past = decode(model, IDS, chunks)
    close(stepped, logits(model, IDS))
    keys, values = past.layers[0].keys, past.layers[0].values
    assert not keys.is_floating_point()
    assert not values.is_floating_point()
    kept = families.WINDOW - 1 if family == "mistral_window" else 18
    assert keys.shape[-2] == kept


@pytest.mark.parametrize("family", ["gpt2", "llama", "mistral_window", "qwen3", "phi_qk_norm", "gemma"])
def test_a_static_cache_too(family, wide, logits):
    model = wide(family)
    past = StaticCache(config=model.config, max_cache_len=24)
    stepped, past = decode(model, IDS, [7, 1, 1, 6, 3], past)
    close(stepped, logits(model, IDS))
    assert not past.layers[0].keys.is_floating_point()


def test_codes_take_two_bytes_where_they_fit(spiking):
    for steps, dtype in ((8, torch.int16), (13, torch.int16), (16, torch.int32)):
        _, past = decode(spiking("llama", steps=steps), IDS, [18])
        assert past.layers[0].keys.dtype == dtype


def test_a_cache_filled_by_a_dense_model_is_refused(dense, spiking):
    _, past = decode(dense("llama"), IDS[:, :9], [9])
    with pytest.raises(ValueError, match="begin with a new cache"):
        decode(spiking("llama"), IDS[:, 9:], [9], past)


@pytest.mark.parametrize("family", families.CAUSAL)
def test_no_output_depends_on_a_later_token(family, spiking, logits):
    model = spiking(family)
    changed = IDS.clone()
    changed[:, 11:] = (changed[:, 11:] - 3 + 50) % (families.VOCABULARY - 3) + 3
    before, after = logits(model, IDS), logits(model, changed)
    assert torch.equal(before[:, :11], after[:, :11])
    assert not torch.equal(before[:, 11:], after[:, 11:])


@pytest.mark.parametrize("family", families.CAUSAL)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(family, side, wide, logits):
    model, pad = wide(family), 5
    filler = families.tokens(rows=3, length=pad, seed=9)  # whatever stands there
    mask = torch.ones_like(IDS)
    if side == "left":
        ids, mask = torch.cat([filler, IDS], 1), torch.cat([torch.zeros_like(filler), mask], 1)
        more = {} if family.startswith("opt") else {"position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}
        padded = logits(model, ids, attention_mask=mask, **more)[:, pad:]
    else:
        ids, mask = torch.cat([IDS, filler], 1), torch.cat([mask, torch.zeros_like(filler)], 1)
        padded = logits(model, ids, attention_mask=mask)[:, :18]
    close(padded, logits(model, IDS))
    other = families.tokens(rows=3, length=pad, seed=10)
    swapped = torch.cat([other, IDS], 1) if side == "left" else torch.cat([IDS, other], 1)
    more = more if side == "left" else {}
    again = logits(model, swapped, attention_mask=mask, **more)
    assert torch.equal(padded, again[:, pad:] if side == "left" else again[:, :18])


@pytest.mark.parametrize("family", ["bert", "bert_mlm"])
def test_padding_changes_nothing_in_an_encoder(family, wide, logits):
    model = wide(family)
    ids = torch.cat([IDS, families.tokens(rows=3, length=5, seed=9)], 1)
    mask = torch.cat([torch.ones_like(IDS), torch.zeros(3, 5, dtype=torch.long)], 1)
    padded, plain = logits(model, ids, attention_mask=mask), logits(model, IDS)
    close(padded if family == "bert" else padded[:, :18], plain)


@pytest.mark.parametrize("family", families.FAMILIES)
def test_no_output_depends_on_other_rows(family, wide, spiking, logits):
    model = wide(family)
    close(torch.cat([logits(model, row[None]) for row in IDS]), logits(model, IDS))
    changed = IDS.clone()
    changed[1:] = families.tokens(rows=2, length=18, seed=7)
    assert torch.equal(logits(spiking(family), IDS)[0], logits(spiking(family), changed)[0])


def test_a_row_that_sees_nothing_is_finite_and_silent(spiking, logits):
    for softmax in (True, False):
        model = spiking("llama", softmax=softmax)
        mask = torch.ones_like(IDS)
        mask[0, :] = 0
        out = logits(model, IDS, attention_mask=mask)
        assert out.isfinite().all()
        assert torch.equal(out[1:], logits(model, IDS, attention_mask=torch.ones_like(IDS))[1:])


@pytest.mark.parametrize("family", families.CAUSAL)
def test_generation_is_the_full_forwards_argmax(family, wide, logits):
    model = wide(family)
    ids = IDS[:2, :8]
    written = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=30,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    assert written.shape == (2, 38)
    assert torch.equal(logits(model, written)[:, 7:-1].argmax(-1), written[:, 8:])


def test_generation_with_left_padding(wide):
    model, options = (
        wide("llama"),
        {"max_new_tokens": 10, "do_sample": False, "eos_token_id": None, "pad_token_id": 0},
    )
    short = IDS[:1, :6]
    alone = model.generate(short, attention_mask=torch.ones_like(short), **options)[:, 6:]
    batch = torch.cat([torch.cat([torch.zeros(1, 6, dtype=torch.long), short], 1), IDS[1:2, :12]])
    mask = torch.ones_like(batch)
    mask[0, :6] = 0
    together = model.generate(batch, attention_mask=mask, **options)[:, 12:]
    assert torch.equal(together[:1], alone)


@pytest.mark.parametrize("family", ["gpt2", "llama", "mistral_window"])
def test_other_ways_to_generate(family, wide):
    """Beams reorder the cache; a static cache is written in place. Each gives what no cache at all gives."""
    model, ids = wide(family), IDS[:2, :8]
    options = {
        "attention_mask": torch.ones_like(ids),
        "max_new_tokens": 12,
        "do_sample": False,
        "eos_token_id": None,
        "pad_token_id": 0,
    }
    for more in ({}, {"num_beams": 3}):
        plain = model.generate(ids, use_cache=False, **options, **more)
        assert torch.equal(model.generate(ids, use_cache=True, **options, **more), plain)
        assert torch.equal(model.generate(ids, past_key_values=DynamicCache(), **options), plain) or more
    static = model.generate(ids, cache_implementation="static", disable_compile=True, **options)
    assert torch.equal(static, model.generate(ids, use_cache=False, **options))


def test_a_mask_of_four_axes(wide, logits):
    """As transformers takes it: additive, and used as it is."""
    model = wide("llama")
    length = IDS.shape[1]
    seen = torch.ones(length, length, dtype=torch.bool).tril()
    additive = torch.zeros(3, 1, length, length, dtype=torch.float64).masked_fill(~seen, torch.finfo(torch.float64).min)
    close(logits(model, IDS, attention_mask=additive), logits(model, IDS))
