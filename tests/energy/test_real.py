"""What hooks count of real attention is what events tell of spiking attention: by the same rules."""

import pytest
import torch

import spikeform
from families import FAMILIES, build, tokens
from spikeform.energy.real import real_hooks

LENGTH = 12
THRESHOLDS = {role: (2.0, 16.0) for role in ("linear", "query", "key", "value", "norm", "up", "act", "lm_head")} | {
    "probability": (0.25, 1.0)
}


def watched(model, **inputs):
    """Tallies of one forward, and what it returned."""
    tallies = {}
    handles = real_hooks(tallies, model)
    with torch.no_grad():
        out = model(**inputs)
    for handle in handles:
        handle.remove()
    return tallies, out


def attention(tallies):
    return sum(tally.macs for tally in tallies.values())


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_attention_is_counted_as_its_spiking_twin(family, implementation) -> None:
    ids = tokens(length=LENGTH)
    model = build(family)
    model.set_attn_implementation(implementation)
    tallies, _ = watched(model, input_ids=ids)
    report = spikeform.energy(spikeform.convert(build(family), spikeform.LAS(steps=4, thresholds=THRESHOLDS)), ids)
    assert attention(tallies) == report.ops["dense"]["matmul_macs"] > 0
    exponentials = sum(tally.functions for tally in tallies.values() if tally.kind == "attention")
    assert exponentials == sum(r["elements"] for r in report.per_site if r.get("function") == "exp")
    inner = {"llama", "mistral", "mistral_window", "qwen2", "qwen3", "gemma"}
    gated = sum(tally.multiplications for tally in tallies.values())
    assert gated == (ids.numel() * 2 * 112 if family in inner else 0)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "mistral_window"])
def test_a_cached_step_sees_what_went_before(family) -> None:
    model, ids = build(family), tokens(length=LENGTH)
    whole = attention(watched(model, input_ids=ids, use_cache=False)[0])
    first, out = watched(model, input_ids=ids[:, :5], use_cache=True)
    pieces = attention(first)
    for piece in (ids[:, 5:6], ids[:, 6:]):
        tallies, out = watched(model, input_ids=piece, past_key_values=out.past_key_values, use_cache=True)
        pieces += attention(tallies)
    assert pieces == whole


def test_padding_is_not_seen() -> None:
    model, ids = build("llama"), tokens(rows=2, length=8)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    pairs = 8 * 9 // 2 + 5 * 6 // 2
    tallies, _ = watched(model, input_ids=ids, attention_mask=mask, use_cache=False)
    assert attention(tallies) == 2 * 2 * 64 * pairs


def test_spiking_attention_and_removed_hooks_count_nothing() -> None:
    model, ids = spikeform.convert(build("llama"), spikeform.LAS(steps=4, thresholds=THRESHOLDS)), tokens()
    assert attention(watched(model, input_ids=ids)[0]) == 0
    dense = build("llama")
    watched(dense, input_ids=ids)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in dense.modules())


def test_real_activations_by_hand() -> None:
    tallies, _ = watched(build("llama"), input_ids=tokens(rows=1, length=LENGTH))
    layer = "model.layers.0."
    assert tallies[layer + "mlp.down_proj"].elements == LENGTH * 112
    assert tallies[layer + "self_attn"].elements == LENGTH * (64 + 2 * 32)  # queries; keys and values of two heads
    assert tallies[layer + "mlp.act_fn"].functions == LENGTH * 112
    assert tallies["model.norm"].functions == LENGTH * 64
    assert "lm_head" in tallies
