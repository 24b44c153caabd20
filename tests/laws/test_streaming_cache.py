"""Law 3 for models that stream: the cache is the full forward; nothing depends on the future, padding or other rows."""

import copy

import pytest
import torch
from transformers import DynamicCache, StaticCache

import families
import spikeform
from families import close
from spikeform.errors import SpikeformError
from spikeform.layers.cache import StreamCache

IDS = families.tokens(rows=3, length=18)
BY_POSITION = {"granularity": "position", "positions": 40}
GENERATE = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}


@torch.no_grad()
def decode(model, ids, chunks, past=None, **more):
    parts = []
    for chunk in ids.split(chunks, dim=1):
        out = model(input_ids=chunk, past_key_values=past, use_cache=True, **more)
        past = out.past_key_values
        parts.append(out.logits)
    return torch.cat(parts, 1), past


@pytest.mark.parametrize("options", [{}, {"sites": "all"}, BY_POSITION], ids=["plain", "everywhere", "position"])
@pytest.mark.parametrize("family", families.CAUSAL)
def test_cached_decoding_is_the_full_forward(family, options, streaming, logits):
    model = streaming(family, **options)
    stepped, past = decode(model, IDS, [7, 1, 1, 6, 3])
    close(stepped, logits(model, IDS))
    heads = [layer.keys.shape[1] for layer in past.layers]
    once = 1 if options.get("sites") != "all" else 4  # the first block's attention knows no time
    assert heads[0] * 4 == heads[1] * once
    assert past.layers[1].keys.shape[0] == len(IDS)


@pytest.mark.parametrize("family", ["gpt2", "llama", "mistral_window", "qwen3", "phi_qk_norm", "gemma"])
def test_a_static_cache_too(family, streaming, logits):
    model = streaming(family)
    stepped, _ = decode(model, IDS, [7, 1, 1, 6, 3], StaticCache(config=model.config, max_cache_len=24))
    close(stepped, logits(model, IDS))


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_operators_in_every_stream(family, streaming, logits):
    model = streaming(family, operators=8)
    stepped, past = decode(model, IDS, [7, 1, 1, 6, 3])
    close(stepped, logits(model, IDS))
    assert all(not layer.keys.is_floating_point() for layer in past.layers)


@pytest.mark.parametrize("family", families.CAUSAL)
def test_no_output_depends_on_a_later_token(family, streaming, logits):
    model = streaming(family)
    changed = IDS.clone()
    changed[:, 11:] = (changed[:, 11:] - 3 + 50) % (families.VOCABULARY - 3) + 3
    before, after = logits(model, IDS), logits(model, changed)
    assert torch.equal(before[:, :11], after[:, :11])
    assert not torch.equal(before[:, 11:], after[:, 11:])


@pytest.mark.parametrize("family", families.FAMILIES)
def test_no_output_depends_on_other_rows(family, streaming, logits):
    model = streaming(family)
    close(torch.cat([logits(model, row[None]) for row in IDS]), logits(model, IDS))
    changed = IDS.clone()
    changed[1:] = families.tokens(rows=2, length=18, seed=7)
    assert torch.equal(logits(model, IDS)[0], logits(model, changed)[0])


@pytest.mark.parametrize("options", [{}, BY_POSITION], ids=["plain", "position"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", families.CAUSAL)
def test_padding_changes_nothing(family, side, options, streaming, logits):
    """Parameters by position go by the position in the sequence, not in the padded row."""
    model, lengths = streaming(family, **options), (18, 13, 6)
    mask = torch.zeros_like(IDS)
    ids = families.tokens(rows=3, length=18, seed=9)  # whatever stands there
    for row, length in enumerate(lengths):
        kept = slice(18 - length, 18) if side == "left" else slice(0, length)
        mask[row, kept], ids[row, kept] = 1, IDS[row, :length]
    more = {"position_ids": (mask.cumsum(-1) - 1).clamp(min=0)} if side == "left" else {}
    padded = logits(model, ids, attention_mask=mask, **more)
    for row, length in enumerate(lengths):
        close(logits(model, IDS[row : row + 1, :length])[0], padded[row][mask[row].bool()])


def test_opt_counts_positions_by_its_mask(streaming, logits):
    """It finds the positions of a padded row itself, and calls padding -1."""
    model, mask = streaming("opt", **BY_POSITION), torch.ones_like(IDS)
    mask[:, :5] = 0
    close(logits(model, IDS, attention_mask=mask)[:, 5:], logits(model, IDS[:, 5:]))


@pytest.mark.parametrize("family", ["bert", "bert_mlm"])
def test_padding_changes_nothing_in_an_encoder(family, streaming, logits):
    model = streaming(family)
    mask = torch.ones_like(IDS)
    mask[1, 11:], mask[2, 4:] = 0, 0
    padded = logits(model, IDS, attention_mask=mask)
    for row, length in enumerate((18, 11, 4)):
        alone = logits(model, IDS[row : row + 1, :length])[0]
        close(alone, padded[row] if family == "bert" else padded[row, :length])


@pytest.mark.parametrize("family", ["gpt2", "opt", "llama", "mistral_window", "gemma"])
@pytest.mark.parametrize("options", [{}, BY_POSITION], ids=["plain", "position"])
def test_generation_is_the_full_forwards_argmax(family, options, streaming, logits):
    model, ids = streaming(family, **options), IDS[:2, :8]
    written = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, **GENERATE)
    assert torch.equal(logits(model, written)[:, 7:-1].argmax(-1), written[:, 8:])
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    together = model.generate(ids, attention_mask=mask, max_new_tokens=6, **GENERATE)[:1, 8:]
    short = ids[:1, 3:]
    alone = model.generate(short, attention_mask=torch.ones_like(short), max_new_tokens=6, **GENERATE)
    assert torch.equal(together, alone[:, 5:])


@pytest.mark.parametrize("family", ["gpt2", "llama", "mistral_window"])
def test_other_ways_to_generate(family, streaming):
    """Beams reorder the cache; a static cache is written in place. Each gives what no cache at all gives."""
    model, ids = streaming(family), IDS[:2, :8]
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 8, **GENERATE}
    for more in ({"num_beams": 3}, {"cache_implementation": "static"}, {"num_return_sequences": 2, "num_beams": 2}):
        plain = {k: v for k, v in more.items() if k != "cache_implementation"}
        wanted = model.generate(ids, use_cache=False, **plain, **options)
        assert torch.equal(model.generate(ids, **more, **options), wanted), more


def test_guessed_tokens_are_taken_back(streaming):
    """Prompt look-up crops what it guessed wrongly from the cache."""
    model, ids = streaming("llama"), IDS[:1, :8].repeat(1, 2)
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 12, **GENERATE}
    assert torch.equal(model.generate(ids, prompt_lookup_num_tokens=3, **options), model.generate(ids, **options))


def test_two_hundred_tokens(tiny_llama):
    """Decoded one by one with a cache, they are the most likely ones of the full forward."""
    model = tiny_llama(context=256).double()
    spikeform.convert(model, spikeform.FAS(steps=2), torch.randint(1, 257, (4, 32)))
    ids = torch.arange(5, 13)[None]
    written = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=200, **GENERATE)
    with torch.no_grad():
        assert torch.equal(model(input_ids=written).logits[:, 7:-1].argmax(-1), written[:, 8:])


@pytest.mark.parametrize(("filled", "used"), [(4, 2), (0, 4), (4, 0), (0, 1), (1, 0)])
def test_a_cache_filled_with_other_steps_is_refused(filled, used, streaming):
    model = copy.deepcopy(streaming("llama"))
    _, past = decode(spikeform.set_steps(model, filled), IDS[:, :9], [9])
    with pytest.raises(SpikeformError, match=f"filled with {filled} time steps, and the model runs with {used}"):
        decode(spikeform.set_steps(model, used), IDS[:, 9:], [9], past)


def test_a_new_cache_may_be_used_with_any_steps(streaming, logits):
    model = copy.deepcopy(streaming("llama"))
    for steps in (0, 1, 3):
        spikeform.set_steps(model, steps)
        for past in (DynamicCache(config=model.config), StaticCache(config=model.config, max_cache_len=18)):
            close(decode(model, IDS, [9, 9], past)[0], logits(model, IDS))


def test_the_cache_copies_nothing_that_it_holds(streaming):
    """What attention reads is the cache's own memory in another form."""
    cache = StaticCache(config=streaming("llama").config, max_cache_len=16)
    new = torch.randn(2 * 4, 2, 3, 16).double()
    keys, values = StreamCache(cache, 4).update(new, new, 1, {"cache_position": torch.arange(3)})
    held = cache.layers[1]
    assert keys.data_ptr() == held.keys.data_ptr()
    assert values.data_ptr() == held.values.data_ptr()
    assert torch.equal(keys[:, :, :3], new)


def test_positions_end(streaming, logits):
    model = streaming("llama", granularity="position", positions=14)
    with pytest.raises(SpikeformError, match="calibrated for 14 positions, asked for position 18"):
        logits(model, IDS)
    assert logits(model, IDS[:, :14]).isfinite().all()
    _, past = decode(model, IDS[:, :14], [14])
    with pytest.raises(SpikeformError, match="asked for position 15"):
        decode(model, IDS[:, 14:15], [1], past)
