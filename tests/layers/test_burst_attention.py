"""Attention on bursts: units of each token or channel, integer products, grouped heads, rotation, the cache."""

import pytest
import torch
from transformers.cache_utils import DynamicCache

import spikeform
from families import difference
from spikeform.layers import SpikingAttention
from spikeform.layers.attention import CodeCache
from spikeform.neurons import GIF, Dynamic, recording
from spikeform.spikes import Radix2
from spikeform.spikes.trace import Product, observe

B, H, G, L, E = 2, 4, 2, 5, 8


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def inputs(keys=L):
    return draw(B, H, L, E), draw(B, G, keys, E, seed=1) * 3, draw(B, G, keys, E, seed=2) * 2


def causal(length=L, keys=L):
    hidden = torch.ones(length, keys, dtype=torch.bool).triu(1 + keys - length)
    return torch.zeros(1, 1, length, keys).masked_fill(hidden, torch.finfo(torch.float32).min)


def gif(channels, steps=2, bits=4, seed=0, **options):
    neuron = GIF(bits, channels, steps=steps, **options)
    salient = torch.rand(channels, generator=torch.Generator().manual_seed(seed)) < 0.4
    neuron.set_times(torch.where(salient, steps, 1))
    if neuron.axis == "channel":
        top = 5 + 5 * torch.rand(channels, generator=torch.Generator().manual_seed(seed))
        neuron.set_range(-top, 0.9 * top)
    return neuron


def attention(bits=4, key_axis="token", value_axis="token", signs=None, **options):
    shape = (G, 1, E)
    spiking = SpikingAttention(
        gif((E,), 1, bits, **options),
        gif(shape, 2, bits, 1, axis=key_axis, **options),
        gif(shape, 2, bits, 2, axis=value_axis, **options),
        Dynamic(Radix2(16)),
        None,
        None,
        "attention",
    )
    spiking.signs = signs
    return spiking


def dense(q, k, v, mask, scaling=1.0):
    k, v = (x.repeat_interleave(H // G, 1) for x in (k, v))
    scores = q @ k.transpose(-1, -2) * scaling
    return (torch.softmax(scores if mask is None else scores + mask, -1) @ v).transpose(1, 2)


SIGNS = torch.tensor([1, -1, 1, 1, -1, -1, 1, -1], dtype=torch.int8)
FORMS = [
    {},
    {"signs": SIGNS},
    {"key_axis": "channel"},
    {"key_axis": "channel", "signs": SIGNS},
    {"value_axis": "channel"},
    {"signed": False},
    {"signed": False, "key_axis": "channel"},
]
TOKEN_FORMS = [{"form": "official"}, {"span": "separate"}, {"span": "separate", "signed": False}]


@pytest.mark.parametrize("options", FORMS + TOKEN_FORMS, ids=str)
def test_it_is_attention_of_the_values_that_the_trains_carry(options):
    """Encode, decode, and attend in real numbers: only the sixteen bits of the probabilities lie between."""
    spiking, (q, k, v), mask = attention(**options), inputs(), causal()
    q, k, v = (x.double() for x in (q, k, v))
    turned = spiking._rotated(q)
    scale = spiking.key.channel_scale if options.get("key_axis") == "channel" else torch.ones(G, 1, E)
    asked = (turned.view(B, G, -1, E) * scale.double()).view(B, H, L, E)
    keys, values = (train.decode() for train in spiking.encode(k, v))
    if options.get("value_axis") == "channel":
        values = values * spiking.value.channel_scale.double()
    queries = spiking.query(asked.view(B, G, -1, E)).decode().view(B, H, L, E)
    found = spiking(q, k, v, mask.double(), 0.3)
    assert difference(dense(queries, keys, values, mask, 0.3), found) < 2e-5
    assert 1e-3 < difference(dense(q, k, v, mask, 0.3), found) < 0.4  # four bits, and not real numbers


@pytest.mark.parametrize("options", [{"key_axis": "channel"}, {"signs": SIGNS}, {}], ids=str)
def test_more_bits_are_closer(options):
    q, k, v = inputs()
    k, v = k.clamp(-4, 4), v.clamp(-4, 4)
    error = [difference(dense(q, k, v, causal(), 0.3), attention(b, **options)(q, k, v, causal(), 0.3)) for b in (4, 8)]
    assert error[1] < error[0] / 4
    assert error[1] < 0.02


@pytest.mark.parametrize("options", FORMS, ids=str)
def test_every_product_runs_on_integers(options):
    """So the executors agree to the bit, and what is told of the values has a unit of one."""
    spiking, (q, k, v), mask, out = attention(**options), inputs(), causal(), {}
    for name in ("collapsed", "temporal", "event"):
        with spikeform.executor(name):
            out[name] = spiking(q, k, v, mask, 0.3)
    assert torch.equal(out["temporal"], out["collapsed"])
    assert torch.equal(out["event"], out["collapsed"])
    seen = []
    with observe(lambda told: seen.append(told) if isinstance(told, Product) else None):
        spiking(q, k, v, mask, 0.3)
    assert [product.site for product in seen] == ["attention.scores", "attention.context"]
    assert all(train.integers() is not None for product in seen for train in product.operands)
    assert set(seen[1].operands[1].unit().unique().tolist()) <= {1.0, 2.0}


@pytest.mark.parametrize("signs", [None, SIGNS])
@pytest.mark.parametrize("key_axis", ["token", "channel"])
def test_while_calibrating_it_is_dense(signs, key_axis):
    shape, fresh = (G, 1, E), []
    neurons = [GIF(4, (E,), steps=1), GIF(4, shape, axis=key_axis), GIF(4, shape), Dynamic(Radix2(16))]
    spiking, (q, k, v) = SpikingAttention(*neurons, None, None), inputs()
    spiking.signs = signs
    with recording(lambda neuron, x: fresh.append((neuron, x.shape))):
        found = spiking(q, k, v, causal(), 0.3)
    assert difference(dense(q, k, v, causal(), 0.3), found) < 1e-6
    assert {n for n, _ in fresh} == set(neurons)
    assert dict(fresh)[neurons[0]] == (B, G, H // G * L, E)


@pytest.mark.parametrize("options", FORMS + TOKEN_FORMS, ids=str)
def test_the_cache_holds_the_trains(options):
    """Keys and values in two portions are keys and values at once, to the bit; in fp64 too."""
    for dtype in (torch.float32, torch.float64):
        spiking, (q, k, v) = attention(**options), (x.to(dtype) for x in inputs(7))
        cache = DynamicCache()
        view = CodeCache(cache, spiking)
        view.update(k[:, :, :4], v[:, :, :4], 0)
        keys, values = view.update(k[:, :, 4:], v[:, :, 4:], 0)
        assert keys.shape[:3] == (B, G, 7)
        assert not keys.is_floating_point()
        assert cache.get_seq_length() == 7
        mask = causal(L, 7).to(dtype)
        assert torch.equal(spiking(q, keys, values, mask, 0.3), spiking(q, k, v, mask, 0.3))


def test_a_cached_key_takes_about_a_byte_a_channel():
    spiking, (_, k, v) = attention(), inputs()
    keys, values = CodeCache(DynamicCache(), spiking).update(k, v, 0)
    assert keys.dtype == values.dtype == torch.int8
    assert keys.shape[-1] == values.shape[-1] == E + 4  # the token's unit, in fp32


@pytest.mark.parametrize("options", FORMS, ids=str)
def test_no_row_depends_on_hidden_keys(options):
    spiking, (q, k, v), mask = attention(**options), inputs(), causal()
    before = spiking(q, k, v, mask, 0.3)
    other_k, other_v = k.clone(), v.clone()
    other_k[:, :, -1], other_v[:, :, -1] = 50.0, -70.0
    after = spiking(q, other_k, other_v, mask, 0.3)
    assert torch.equal(before[:, :-1], after[:, :-1])
    assert not torch.equal(before[:, -1], after[:, -1])
    lowest = torch.finfo(torch.float32).min
    nothing = spiking(q, k, v, torch.full_like(mask, lowest), 0.3)
    assert torch.equal(nothing, torch.zeros_like(nothing))


def test_gradients_reach_all_three():
    """In training the same products run on real numbers."""
    spiking, leaves = attention(), [x.requires_grad_() for x in inputs()]
    found = spiking(*leaves, causal(), 0.3)
    with torch.no_grad():
        assert difference(spiking(*leaves, causal(), 0.3), found) < 1e-5
    found.square().sum().backward()
    assert all(x.grad.isfinite().all() and x.grad.abs().sum() > 0 for x in leaves)
