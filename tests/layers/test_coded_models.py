"""Whole models of coded layers and burst attention: cache, padding, later tokens, other rows, beams, grouped heads.

Where shapes are equal results are, bit for bit; where they differ, fp64 is compared, in which no code flips.
"""

from functools import cache

import coding
import pytest
import torch
from transformers import DynamicCache, StaticCache

import families
from families import close

IDS = families.tokens(rows=3, length=18)
FAMILIES = ("gpt2", "opt", "llama", "mistral_window", "qwen3", "gpt_neox", "phi", "gemma")
OPTIONS = {
    "plain": {},
    "channel": {"axis": "channel", "rotate": True},
    "tiers": {"weight_steps": (1, 2), "form": "official"},
    "unsigned": {"signed": False, "span": "separate"},
    "ternary": {"ternary": True, "weight_steps": (1, 2)},
}
CASES = [(family, "plain") for family in FAMILIES] + [("llama", name) for name in list(OPTIONS)[1:]]


@cache
def model_of(family, options="plain", dtype=torch.float64):
    return coding.build(family, **OPTIONS[options]).to(dtype)


@torch.no_grad()
def logits(model, ids=IDS, **more):
    return model(input_ids=ids, **more).logits


@torch.no_grad()
def decode(model, ids, chunks, past=None):
    parts = []
    for chunk in ids.split(chunks, dim=1):
        out = model(input_ids=chunk, past_key_values=past, use_cache=True)
        past = out.past_key_values
        parts.append(out.logits)
    return torch.cat(parts, 1), past


@pytest.mark.parametrize(("family", "options"), CASES)
def test_cached_decoding_is_the_full_forward(family, options):
    model = model_of(family, options)
    whole = logits(model)
    close(whole, logits(model, use_cache=False))
    for chunks in ([1] * 18, [7, 1, 1, 6, 3]):
        stepped, past = decode(model, IDS, chunks)
        close(whole, stepped)
        assert torch.equal(stepped.argmax(-1), whole.argmax(-1))
        assert not past.layers[0].keys.is_floating_point()
        assert not past.layers[0].values.is_floating_point()
    if family != "gpt2":
        static = StaticCache(config=model.config, max_cache_len=24)
        close(whole, decode(model, IDS, [7, 1, 1, 6, 3], static)[0])


@pytest.mark.parametrize(("family", "options"), CASES)
def test_no_output_depends_on_a_later_token_or_another_row(family, options):
    model = model_of(family, options, torch.float32)
    changed = IDS.clone()
    changed[:, 11:] = (changed[:, 11:] - 3 + 50) % (families.VOCABULARY - 3) + 3
    before, after = logits(model), logits(model, changed)
    assert torch.equal(before[:, :11], after[:, :11])
    assert not torch.equal(before[:, 11:], after[:, 11:])
    changed = IDS.clone()
    changed[1:] = families.tokens(rows=2, length=18, seed=7)
    assert torch.equal(before[0], logits(model, changed)[0])


@pytest.mark.parametrize(("family", "options"), CASES)
def test_padding_changes_nothing(family, options):
    model = model_of(family, options)
    filler, mask = families.tokens(rows=3, length=5, seed=9), torch.ones_like(IDS)
    left = torch.cat([torch.zeros_like(filler), mask], 1)
    more = {} if family == "opt" else {"position_ids": (left.cumsum(-1) - 1).clamp(min=0)}
    close(logits(model), logits(model, torch.cat([filler, IDS], 1), attention_mask=left, **more)[:, 5:])
    right = torch.cat([mask, torch.zeros_like(filler)], 1)
    close(logits(model), logits(model, torch.cat([IDS, filler], 1), attention_mask=right)[:, :18])


@pytest.mark.parametrize("options", OPTIONS)
def test_every_way_to_generate_is_the_same(options):
    """Beams reorder the cache, a static one is written in place."""
    model, ids = model_of("llama", options), IDS[:2, :8]
    given = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 10, "do_sample": False}
    given |= {"eos_token_id": None, "pad_token_id": 0}
    for beams in (1, 3):
        plain = model.generate(ids, use_cache=False, num_beams=beams, **given)
        assert torch.equal(model.generate(ids, num_beams=beams, **given), plain)
    plain = model.generate(ids, use_cache=False, **given)
    assert torch.equal(model.generate(ids, past_key_values=DynamicCache(), **given), plain)
    assert torch.equal(model.generate(ids, cache_implementation="static", disable_compile=True, **given), plain)
    short = torch.cat([torch.zeros(1, 4, dtype=torch.long), ids[:1, 4:]], 1)
    given["attention_mask"] = torch.cat([torch.zeros(1, 4), torch.ones(1, 4)], 1).long()
    alone = model.generate(ids[:1, 4:], **(given | {"attention_mask": torch.ones(1, 4).long()}))
    assert torch.equal(model.generate(short, **given)[:, 8:], alone[:, 4:])


def test_a_cache_of_another_kind_is_refused():
    _, past = decode(families.build("llama"), IDS[:, :9], [9])
    with pytest.raises(ValueError, match="begin with a new cache"):
        decode(model_of("llama", dtype=torch.float32), IDS[:, 9:], [9], past)


def test_a_row_that_sees_nothing_is_finite():
    model, mask = model_of("llama"), torch.ones_like(IDS)
    mask[0] = 0
    out = logits(model, attention_mask=mask)
    assert out.isfinite().all()
    close(out[1:], logits(model)[1:])
