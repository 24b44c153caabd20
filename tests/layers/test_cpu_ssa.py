"""Spiking self-attention as one CPU operator against its neurons and products, on each instruction set."""

import pytest
import torch
from transformers.cache_utils import DynamicCache

import spikeform
from spikeform.errors import SpikeformError
from spikeform.layers import self_attention
from spikeform.layers.fused import ssa_attention
from spikeform.layers.self_attention import SpikingSelfAttention
from spikeform.layers.state_cache import StateLayer
from spikeform.native import library
from spikeform.spikes.trace import observe

# B, H, G, L, E: whole vectors and words of bits or not, one position and more than a task takes at once
SIZES = [(2, 4, 2, 1, 64), (1, 3, 3, 33, 80), (2, 6, 2, 70, 7), (1, 4, 1, 9, 200), (3, 2, 2, 40, 16)]
OPTIONS = {
    "default": {},
    "signed": {"signed": True, "normalise": False},
    "soft": {"signed": True, "reset": "soft", "tau": 1.0},
    "tau": {"tau": 3.0, "reset": "soft"},
    "windows": {"windows": (1, 7, 40, 0)},
    "near": {"windows": (5, 2), "signed": True, "reset": "soft"},
    "no_leak": {"tau": 0.0, "reset": "soft", "signed": True},
}


def made(size, steps=3, **options):
    """A layer with a gain of its own for each head."""
    _, heads, groups, _, _ = size
    torch.manual_seed(0)
    layer = SpikingSelfAttention(heads, groups, steps, site="here", **options)
    for neuron in layer.neurons():
        neuron.gain.data = 0.7 + torch.rand(neuron.gain.shape)
    return layer.requires_grad_(False)


def enliven(layer, *given):
    """The output's gain so that it is neither silent nor always firing."""
    heard = []
    handle = layer.output.register_forward_pre_hook(lambda module, args: heard.append(args[0]))
    layer.attend(*given)
    handle.remove()
    layer.output.gain.fill_(1 / float(heard[0].abs().mean()))


def inputs(size, dtype=torch.float32):
    batch, heads, groups, length, channels = size
    torch.manual_seed(1)
    return [torch.randn(batch, length, n, channels).to(dtype).transpose(1, 2) * 2 for n in (heads, groups, groups)]


def direct(layer, q, k, v, seen, held):
    """The operator itself."""
    state, recent, number = (None,) * 3 if held is None else (held.keys, held.recent, held.number)
    one = layer.query
    return ssa_attention(
        *(q, k, v, seen, state, recent, number),
        *(neuron.gain for neuron in layer.neurons()),
        *(layer.steps, one.tau, one.threshold, layer.output.threshold),
        *(one.reset == "hard", one.signed, layer.normalise, layer.windows),
    )


def before(size, layer):
    """A cache after some tokens."""
    batch, _, groups, _, channels = size
    held, near = StateLayer(), layer.local
    torch.manual_seed(2)
    shape = (2, layer.steps, batch, near, max(layer.windows) - 1, channels)
    recent = torch.randint(-1 if layer.query.signed else 0, 2, shape) if near else None
    state = torch.randint(0, 40, (layer.steps, batch, groups - near, channels, channels)).float()
    held.keep(state, recent)
    held.advance(90, None)
    return held


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_the_operator_is_the_layer_bit_for_bit(machine, size, options):
    layer = made(size, **OPTIONS[options])
    torch.manual_seed(3)
    seen = torch.rand(size[0], size[3]) < 0.8
    for dtype, mask, cached in (
        (torch.float32, None, False),
        (torch.bfloat16, seen, False),
        (torch.float32, seen, True),
        (torch.bfloat16, None, True),
    ):
        q, k, v = inputs(size, dtype)
        ours, theirs, other = (before(size, layer) if cached else StateLayer() for _ in range(3))
        enliven(layer, q, k, v, mask, other)
        wanted = layer.attend(q, k, v, mask, theirs)
        found = direct(layer, q, k, v, mask, ours if cached else None)
        assert found.dtype == dtype
        assert torch.equal(found, wanted)
        assert 0.01 < float(wanted.float().abs().mean()) < 0.99
        if cached:
            assert ours.keys is not None
            assert theirs.keys is not None
            assert torch.equal(ours.keys, theirs.keys)
            if layer.local:
                assert torch.equal(ours.recent, theirs.recent)


@pytest.mark.skipif(library() is None, reason="the compiled library is missing")
def test_threads_change_nothing():
    size, threads = (2, 8, 4, 200, 64), torch.get_num_threads()
    layer, (q, k, v) = made(size), inputs(size)
    try:
        torch.set_num_threads(1)
        alone = direct(layer, q, k, v, None, None)
        torch.set_num_threads(3)
        assert torch.equal(direct(layer, q, k, v, None, None), alone)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.skipif(library() is None, reason="the compiled library is missing")
def test_it_runs_where_nobody_looks_on(monkeypatch):
    size, calls = SIZES[0], []
    layer, tensors = made(size), inputs(size)
    monkeypatch.setattr(self_attention, "ssa_attention", lambda *args: calls.append(1) or ssa_attention(*args))
    wanted = layer(*tensors, None, 1.0)
    assert len(calls) == 1
    handle = layer.key.register_forward_hook(lambda *_: None)
    assert torch.equal(layer(*tensors, None, 1.0), wanted)
    handle.remove()
    with observe(lambda told: None):
        assert torch.equal(layer(*tensors, None, 1.0), wanted)
    with spikeform.executor("collapsed"):
        assert torch.equal(layer(*tensors, None, 1.0), wanted)
    layer.chunk = 4
    assert torch.equal(layer(*tensors, None, 1.0), wanted)
    layer.chunk = None
    layer.key.gain.requires_grad_(True)
    layer(*tensors, None, 1.0).sum().backward()
    assert len(calls) == 1
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(*tensors, None, 1.0), wanted)
    assert len(calls) == 2


@pytest.mark.skipif(library() is None, reason="the compiled library is missing")
def test_one_token_after_another_is_the_whole_and_the_state_stays_in_its_place():
    size = (2, 4, 2, 12, 16)
    layer, (q, k, v) = made(size), inputs(size)
    whole, cache, parts, places = layer(q, k, v, None, 1.0), DynamicCache(), [], set()
    for i in range(12):
        keys, values = layer.view(cache).update(k[:, :, i : i + 1], v[:, :, i : i + 1], 0)
        parts.append(layer(q[:, :, i : i + 1], keys, values, None, 1.0))
        held = cache.layers[0]
        assert isinstance(held, StateLayer)
        assert held.keys is not None
        places.add(held.keys.data_ptr())
    assert torch.equal(torch.cat(parts, 1), whole)
    assert len(places) == 1
    keys, values = layer.view(cache).update(k[:1, :, :1], v[:1, :, :1], 0)
    with pytest.raises(SpikeformError, match="the cache holds a state"):
        layer(q[:1, :, :1], keys, values, None, 1.0)


def test_the_operator_is_known_to_the_compiler():
    size = SIZES[0]
    layer, (q, k, v) = made(size), inputs(size)
    names = [neuron.gain for neuron in layer.neurons()]
    held = before(size, layer)
    rule = 3, 2.0, 1.0, 0.5, True, False, True, layer.windows
    args = (q, k, v, None, held.keys, held.recent, held.number, *names, *rule)
    torch.library.opcheck(torch.ops.spikeform.ssa_attention.default, args)
