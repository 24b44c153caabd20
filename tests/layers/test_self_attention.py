"""Spiking self-attention: its two forms, causality, padding and the state that a cache holds."""

import pytest
import torch
from transformers.cache_utils import DynamicCache

from spikeform.errors import SpikeformError
from spikeform.layers.self_attention import SpikingSelfAttention
from spikeform.layers.spike_counts import causal_counts, spread, window_counts
from spikeform.layers.state_cache import StateLayer


def spikes(*shape, signed=False, seed=0):
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(-1 if signed else 0, 2, shape, generator=generator)
    return drawn.float()


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("repeat", [1, 3])
def test_quadratic_and_recurrent_are_equal_bit_for_bit(repeat, signed):
    q = spikes(4, 2, 2, repeat, 37, 16, signed=signed)
    k, v = (spikes(4, 2, 2, 37, 16, signed=signed, seed=s) for s in (1, 2))
    whole, state = causal_counts(q, k, v, None, chunk=37)
    wide = torch.einsum("...grie,...gje->...grij", q.long(), k.long()).tril() @ v.long().unsqueeze(-3)
    assert torch.equal(whole, wide.float())
    for chunk in (1, 2, 8, 36, 64):
        other, last = causal_counts(q, k, v, None, chunk)
        assert torch.equal(other, whole)
        assert torch.equal(last, state)
    first, middle = causal_counts(q[..., :20, :], k[..., :20, :], v[..., :20, :], None, 8)
    second, last = causal_counts(q[..., 20:, :], k[..., 20:, :], v[..., 20:, :], middle, 8)
    assert torch.equal(torch.cat([first, second], -2), whole)
    assert torch.equal(last, state)


@pytest.mark.parametrize("windows", [(1,), (2, 7), (40, 3)])
@pytest.mark.parametrize("signed", [False, True])
def test_a_window_is_the_last_keys_bit_for_bit(windows, signed):
    q = spikes(4, 2, 2, 3, 37, 16, signed=signed)
    k, v = (spikes(4, 2, 2, 37, 16, signed=signed, seed=s) for s in (1, 2))
    each, width = torch.tensor(spread(windows, 2)), max(windows) - 1
    scores = torch.einsum("...grie,...gje->...grij", q.long(), k.long())
    apart = torch.arange(37)[:, None] - torch.arange(37)
    seen = (apart >= 0) & (apart < each[:, None, None, None])
    wanted = (scores * seen @ v.long().unsqueeze(-3)).float()
    for chunk in (1, 2, 8, 36, 37, 64):
        whole, recent = window_counts(q, k, v, None, each, width, chunk)
        assert torch.equal(whole, wanted)
        first, middle = window_counts(*(x[..., :5, :] for x in (q, k, v)), None, each, width, chunk)
        second, last = window_counts(*(x[..., 5:, :] for x in (q, k, v)), middle, each, width, chunk)
        assert torch.equal(torch.cat([first, second], -2), wanted)
        assert torch.equal(last, recent)
        assert recent.shape == (2, 4, 2, 2, width, 16)


def test_windows_are_spread_over_the_heads():
    assert spread((), 3) == (0, 0, 0)
    assert spread((2, 8, 32, 0), 4) == (2, 8, 32, 0)
    assert spread((2, 8, 32, 0), 6) == (2, 8, 8, 32, 32, 0)
    assert spread((2, 8, 32, 0), 8) == (2, 2, 8, 8, 32, 32, 0, 0)
    assert spread((2, 8, 32, 0), 2) == (2, 0)
    assert spread((2, 8, 32, 0), 1) == (0,)
    with pytest.raises(SpikeformError, match="windows end"):
        SpikingSelfAttention(4, 4, 2, windows=(0, 3))


def layer(**options):
    torch.manual_seed(0)
    made = SpikingSelfAttention(4, 2, 3, site="here", **options)
    for neuron in (made.query, made.key, made.value, made.output):
        neuron.gain.data = 1.5 + torch.rand(neuron.gain.shape)
    return made


def inputs(length=12, batch=2):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(batch, heads, length, 8, generator=generator) * 2 for heads in (4, 2, 2)]


@torch.no_grad()
@pytest.mark.parametrize(
    "options", [{}, {"normalise": False}, {"signed": True, "reset": "soft"}, {"windows": (3, 0)}], ids=str
)
def test_what_is_defined_is_what_runs(options):
    """Against loops over queries, keys and steps."""
    made, (q, k, v) = layer(**options), inputs()
    out = made(q, k, v, None, 1.0)
    Q, K, V = made.query(q).codes.float(), made.key(k).codes.float(), made.value(v).codes.float()
    for b in range(2):
        for h in range(4):
            for i in range(12):
                current = torch.zeros(3, 8)
                keys = range(max(i + 1 - (made.windows[h // 2] or 99), 0), i + 1)
                for t in range(3):
                    for j in keys:
                        current[t] += (Q[t, b, h, i] @ K[t, b, h // 2, j]) * V[t, b, h // 2, j]
                current = current / (len(keys) if made.normalise else 1) * made.output.gain[h]
                fired, potential = torch.zeros(3, 8), torch.zeros(8)
                for t in range(3):
                    u = potential + (current[t] - potential) / 2
                    s = (u >= 0.5).float() - ((u <= -0.5).float() if options.get("signed") else 0)
                    potential = u - 0.5 * s if options.get("reset") == "soft" else u * (1 - s.abs())
                    fired[t] = s
                assert torch.allclose(out[b, i, h], fired.mean(0))
    assert 0.02 < float(out.abs().mean()) < 0.98


@torch.no_grad()
def test_no_output_depends_on_a_later_token():
    made, (q, k, v) = layer(), inputs()
    before = made(q, k, v, None, 1.0)
    for x in (q, k, v):
        x[:, :, 7:] = torch.randn_like(x[:, :, 7:])
    after = made(q, k, v, None, 1.0)
    assert torch.equal(before[:, :7], after[:, :7])
    assert not torch.equal(before[:, 7:], after[:, 7:])


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("windows", [(), (3, 0)])
def test_padding_is_silent(side, windows):
    made, (q, k, v) = layer(windows=windows), inputs()
    seen = torch.ones(2, 12, dtype=torch.bool)
    real = slice(4, None) if side == "left" else slice(None, 8)
    seen[0, : 4 if side == "left" else 0] = False
    seen[0, 8 if side == "right" else 12 :] = False
    mask = torch.where(torch.ones(12, 12, dtype=torch.bool).tril() & seen[:, None, None], 0.0, torch.finfo().min)
    padded = made(q, k, v, mask, 1.0)
    alone = made(*(x[:1, :, real] for x in (q, k, v)), None, 1.0)
    assert torch.equal(padded[:1, real], alone)
    assert torch.equal(padded[1:], made(*(x[1:] for x in (q, k, v)), None, 1.0))


@torch.no_grad()
@pytest.mark.parametrize("windows", [(), (3, 0), (9, 2)])
def test_the_state_is_all_that_a_cache_holds(windows):
    made, (q, k, v) = layer(windows=windows), inputs()
    near = sum(window > 0 for window in windows)
    whole, cache, parts = made(q, k, v, None, 1.0), DynamicCache(), []
    for part in (slice(0, 5), slice(5, 6), slice(6, 12)):
        keys, values = made.view(cache).update(k[:, :, part], v[:, :, part], 0)
        parts.append(made(q[:, :, part], keys, values, None, 1.0))
        assert cache.get_seq_length() == part.stop
        assert cache.layers[0].keys.shape == (3, 2, 2 - near, 8, 8)
        recent = cache.layers[0].recent
        assert recent is None if not near else recent.shape == (2, 3, 2, near, max(windows) - 1, 8)
    assert torch.equal(torch.cat(parts, 1), whole)
    held = cache.layers[0]
    assert isinstance(held, StateLayer)
    before, spikes_before = held.keys.clone(), None if held.recent is None else held.recent.clone()
    places = [x.data_ptr() for x in (held.keys, held.number)]
    held.reorder_cache(torch.tensor([1, 1]))
    assert places == [x.data_ptr() for x in (held.keys, held.number)]
    assert torch.equal(held.keys, before[:, [1, 1]])
    assert not near or torch.equal(held.recent, spikes_before[:, :, [1, 1]])
    held.batch_repeat_interleave(2)
    assert held.keys.shape[1] == 4
    assert held.number.tolist() == [12] * 5
    assert not near or held.recent.shape[2] == 4
    with pytest.raises(SpikeformError, match="running sum"):
        held.crop(-1)
    with pytest.raises(SpikeformError, match="wants its keys"):
        held.update(k, v)
    held.reset()
    assert held.get_seq_length() == 0
    assert held.recent is None


@torch.no_grad()
@pytest.mark.parametrize("windows", [(), (3, 0)])
def test_what_is_forgotten_leaves_its_place(windows):
    made, (q, k, v) = layer(windows=windows), inputs()
    cache, wanted = DynamicCache(), made(q, k, v, None, 1.0)
    for chunk in (None, 4):  # with and without the operator
        made.chunk, places = chunk, []
        for _ in range(2):
            cache.reset()
            assert torch.equal(made(q, *made.view(cache).update(k, v, 0), None, 1.0), wanted)
            held = cache.layers[0]
            places.append([x.data_ptr() for x in (held.keys, held.number, held.recent) if x is not None])
            assert held.number.tolist() == [12] * 3
        assert places[0] == places[1]
    cache.reset()  # another batch has room of its own
    assert torch.equal(made(q[:1], *made.view(cache).update(k[:1], v[:1], 0), None, 1.0), wanted[:1])


def test_a_cache_of_a_dense_model_is_refused():
    made, (_, k, v) = layer(), inputs()
    cache = DynamicCache()
    cache.update(k, v, 0)
    with pytest.raises(SpikeformError, match="dense model"):
        made.view(cache).update(k, v, 0)


def test_gradients_reach_everything():
    made, tensors = layer(), inputs()
    for x in tensors:
        x.requires_grad_(True)
    made(*tensors, None, 1.0).square().sum().backward()
    for x in (*tensors, *(p for p in made.parameters())):
        assert x.grad is not None
        assert float(x.grad.abs().sum()) > 0


def test_integers_survive_autocast():
    made, (q, k, v) = layer(), inputs()
    with torch.no_grad():
        plain = made(q, k, v, None, 1.0)
        with torch.autocast("cpu", torch.bfloat16):
            cast = made(q, k, v, None, 1.0)
    assert torch.equal(plain, cast)
