"""Law 3 for SpikeLLM: decoding with a cache is the full forward; no later token, padding or other row has a say.

Products are of integers, but norms, softmax and activations are real, and their last bit may depend on the shape of a
call: what is fed in other chunks is compared in fp64, where no code flips; what has equal shapes, bit for bit.
"""

import copy
from functools import cache

import pytest
import torch
from transformers import DynamicCache, StaticCache

import families
from families import close
from spikeform.layers import SpikingAttention

IDS = families.tokens(rows=3, length=13)
OPTIONS = [
    {"key_axis": "channel"},
    {"key_axis": "channel", "signed": False},
    {"form": "official", "signed": False},
    {"span": "separate"},
    {"bits": 8},
    {"rotate": True},
]


@cache
def _wide(saliency, family, options):
    return copy.deepcopy(saliency(family, **dict(options))).double()


@pytest.fixture
def wide(saliency):
    """The converted model in fp64."""
    return lambda family, **options: _wide(saliency, family, tuple(options.items()))


@torch.no_grad()
def decode(model, ids, chunks, past=None, **more):
    """Logits of ``ids`` fed in chunks of the given lengths, and the cache."""
    parts = []
    for chunk in ids.split(chunks, dim=1):
        out = model(input_ids=chunk, past_key_values=past, use_cache=True, **more)
        past = out.past_key_values
        parts.append(out.logits)
    return torch.cat(parts, 1), past


@pytest.mark.parametrize(
    ("family", "options"),
    [(f, {}) for f in families.CAUSAL]
    + [("llama", o) for o in OPTIONS]
    + [("mistral_window", o) for o in OPTIONS[1:3]],
    ids=str,
)
def test_cached_decoding_is_the_full_forward(family, options, wide, logits):
    model = wide(family, **options)
    wanted = logits(model, IDS)
    for chunks in ([1] * 13, [5, 1, 1, 4, 2]):
        stepped, past = decode(model, IDS, chunks)
        close(stepped, wanted)
    attention = next(m for m in model.modules() if isinstance(m, SpikingAttention))
    held = past.layers[0].keys
    assert held.dtype == (torch.int16 if options.get("bits") == 8 else torch.int8)
    groups, _, size = attention.key.channels
    tokens = families.WINDOW - 1 if family == "mistral_window" else 13
    assert held.shape[:3] == (3, groups, tokens)  # one copy for all query heads of a group
    assert held.shape[3] == size if options.get("key_axis") else size < held.shape[3] <= size + 18


@pytest.mark.parametrize(
    ("family", "options"),
    [(f, {}) for f in ("gpt2", "llama", "mistral_window", "phi_qk_norm")] + [("llama", o) for o in OPTIONS],
    ids=str,
)
def test_a_static_cache_too(family, options, wide, logits):
    model = wide(family, **options)
    past = StaticCache(config=model.config, max_cache_len=16)
    stepped, past = decode(model, IDS, [5, 1, 1, 4, 2], past)
    close(stepped, logits(model, IDS))
    assert not past.layers[0].keys.is_floating_point()


def test_caches_of_dense_models_are_refused(dense, saliency):
    _, past = decode(dense("llama"), IDS[:, :9], [9])
    with pytest.raises(ValueError, match="begin with a new cache"):
        decode(saliency("llama"), IDS[:, 9:], [4], past)


@pytest.mark.parametrize(
    ("family", "options"), [(f, {}) for f in families.CAUSAL] + [("llama", o) for o in OPTIONS], ids=str
)
def test_no_output_depends_on_a_later_token(family, options, saliency, logits):
    """T7. The released code's keys have a range over the whole sequence, and fail this."""
    model = saliency(family, **options)
    changed = IDS.clone()
    changed[:, 8:] = (changed[:, 8:] - 3 + 50) % (families.VOCABULARY - 3) + 3
    before, after = logits(model, IDS), logits(model, changed)
    assert torch.equal(before[:, :8], after[:, :8])
    assert not torch.equal(before[:, 8:], after[:, 8:])


def left_padded(ids, pad, seed, family):
    filler = families.tokens(rows=len(ids), length=pad, seed=seed)  # whatever stands there
    mask = torch.cat([torch.zeros_like(filler), torch.ones_like(ids)], 1)
    more = {} if family.startswith("opt") else {"position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}
    return {"ids": torch.cat([filler, ids], 1), "attention_mask": mask, **more}


@pytest.mark.parametrize(
    ("family", "options"), [(f, {}) for f in families.CAUSAL] + [("llama", o) for o in OPTIONS], ids=str
)
def test_padding_changes_nothing(family, options, wide, logits):
    model = wide(family, **options)
    wanted = logits(model, IDS)
    padded = logits(model, **left_padded(IDS, 5, 9, family))[:, 5:]
    close(padded, wanted)
    assert torch.equal(padded, logits(model, **left_padded(IDS, 5, 10, family))[:, 5:])
    right, mask = families.tokens(rows=3, length=5, seed=9), torch.ones(3, 18, dtype=torch.long)
    mask[:, 13:] = 0
    close(logits(model, torch.cat([IDS, right], 1), attention_mask=mask)[:, :13], wanted)


@pytest.mark.parametrize("family", ["bert", "bert_mlm"])
def test_padding_changes_nothing_in_an_encoder(family, wide, logits):
    model, mask = wide(family), torch.ones(3, 18, dtype=torch.long)
    mask[:, 13:] = 0
    padded = logits(model, torch.cat([IDS, families.tokens(rows=3, length=5, seed=9)], 1), attention_mask=mask)
    close(padded if family == "bert" else padded[:, :13], logits(model, IDS))


@pytest.mark.parametrize("family", families.FAMILIES)
def test_no_output_depends_on_other_rows(family, wide, saliency, logits):
    model = wide(family)
    close(torch.cat([logits(model, row[None]) for row in IDS]), logits(model, IDS))
    changed = IDS.clone()
    changed[1:] = families.tokens(rows=2, length=13, seed=7)
    model = saliency(family)
    assert torch.equal(logits(model, IDS)[0], logits(model, changed)[0])


@pytest.mark.parametrize(
    ("family", "options"), [("gpt2", {}), ("llama", {}), ("mistral_window", {}), ("llama", OPTIONS[1])], ids=str
)
def test_ways_to_generate(family, options, wide):
    """Beams reorder the cache; a static cache is written in place. Each gives what no cache at all gives."""
    model, ids = wide(family, **options), IDS[:2, :8]
    settings = {
        "attention_mask": torch.ones_like(ids),
        "max_new_tokens": 7,
        "do_sample": False,
        "eos_token_id": None,
        "pad_token_id": 0,
    }
    for more in ({}, {"num_beams": 3}):
        plain = model.generate(ids, use_cache=False, **settings, **more)
        assert torch.equal(model.generate(ids, use_cache=True, **settings, **more), plain)
        assert torch.equal(model.generate(ids, past_key_values=DynamicCache(), **settings), plain) or more
    static = model.generate(ids, cache_implementation="static", disable_compile=True, **settings)
    assert torch.equal(static, model.generate(ids, use_cache=False, **settings))


def test_generation_with_left_padding(wide):
    model, settings = wide("llama"), {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    short = IDS[:1, :6]
    alone = model.generate(short, attention_mask=torch.ones_like(short), **settings)[:, 6:]
    batch = torch.cat([torch.cat([torch.zeros(1, 6, dtype=torch.long), short], 1), IDS[1:2, :12]])
    mask = torch.ones_like(batch)
    mask[0, :6] = 0
    assert torch.equal(model.generate(batch, attention_mask=mask, **settings)[:1, 12:], alone)


def test_one_token_nothing_but_padding_and_rows_that_see_nothing(wide, saliency, logits):
    for options in ({}, {"signed": False}, {"key_axis": "channel"}, {"form": "official"}, {"bits": 16}):
        model = wide("llama", **options)
        close(logits(model, torch.tensor([[7]])), logits(model, torch.full((1, 5), 7))[:, :1])
        model = saliency("llama", **options)
        pads = torch.zeros(2, 6, dtype=torch.long)
        assert logits(model, pads).isfinite().all()
        assert logits(model, pads, attention_mask=pads).isfinite().all()
        mask = torch.ones_like(IDS)
        mask[0] = 0
        out = logits(model, IDS, attention_mask=mask)
        assert out.isfinite().all()
        assert torch.equal(out[1:], logits(model, IDS, attention_mask=torch.ones_like(IDS))[1:])
