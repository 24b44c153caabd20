"""Spiking self-attention as Triton kernels: the bits of its neurons and products in PyTorch, and the cache's.

Without a CUDA device the same tests run on Triton's interpreter, in a process of their own.
"""

import copy

import pytest
import torch

from kernels import DEVICE, INTERPRETED, fused, let_bounds_be_scalars, needs_triton, not_interpreted, on_the_interpreter
from spikeform.layers.self_attention import SpikingSelfAttention
from spikeform.layers.state_cache import StateLayer

SIGNED = {"signed": True, "reset": "soft"}
OPTIONS = {
    "default": {},
    "signed": {"signed": True, "normalise": False},
    "tau": SIGNED | {"tau": 3.0},
    "windows": SIGNED | {"tau": 0.0, "windows": (1, 40, 0)},
    "near": {"windows": (5, 2)},
}
# B, H, G, E: several queries of a key head or one, channels that fill a tile or not, more than one program's
SIZES = [(2, 4, 2, 16), (1, 3, 3, 40), (2, 12, 3, 7)]
CASES = [(SIZES[0], name) for name in OPTIONS] + [(size, name) for size in SIZES[1:] for name in ("default", "windows")]


@pytest.fixture(autouse=True)
def loops(monkeypatch):
    if INTERPRETED:
        let_bounds_be_scalars(monkeypatch)


class Case:
    """A layer on the CPU, which is what is defined; random inputs of it."""

    def __init__(self, size, steps=3, **options):
        self.batch, self.heads, self.groups, self.size = size
        self.generator = torch.Generator().manual_seed(sum(size))
        self.layer = SpikingSelfAttention(self.heads, self.groups, steps, **options).requires_grad_(False)
        for neuron in self.layer.neurons():
            neuron.gain.copy_(0.7 + torch.rand(neuron.gain.shape, generator=self.generator))

    def inputs(self, length, dtype=torch.float32):
        shapes = [(self.batch, length, n, self.size) for n in (self.heads, self.groups, self.groups)]
        return [(2 * torch.randn(shape, generator=self.generator)).to(dtype).transpose(1, 2) for shape in shapes]

    def held(self, tokens):
        """A cache after some tokens, on the CPU and on the device."""
        layer, caches = self.layer, (StateLayer(), StateLayer())
        shape = layer.steps, self.batch, self.groups - layer.local, self.size, self.size
        low = -1 if layer.query.signed else 0
        state = torch.randint(40 * low, 3000, shape, generator=self.generator).float()
        shape = 2, layer.steps, self.batch, layer.local, max(layer.windows) - 1, self.size
        recent = torch.randint(low, 2, shape, generator=self.generator) if layer.local else None
        for cache, device in zip(caches, ("cpu", DEVICE), strict=True):
            cache.keep(state.to(device), None if recent is None else recent.to(device))
            cache.advance(tokens, None)
        return caches

    def found(self, q, k, v, seen, held):
        """What the kernels give."""
        from spikeform.layers.triton.ssa import ssa_attention

        layer, one = self.layer, self.layer.query
        return ssa_attention(
            *(None if x is None else x.to(DEVICE) for x in (q, k, v, seen)),
            *((None,) * 3 if held is None else (held.keys, held.recent, held.number)),
            *(neuron.gain.to(DEVICE) for neuron in layer.neurons()),
            *(layer.steps, one.tau, one.threshold, layer.output.threshold),
            *(one.reset == "hard", one.signed, layer.normalise, list(layer.windows)),
        ).cpu()

    def equal(self, tensors, seen, ours, theirs):
        """The same bits, neither silent nor always firing, and the same cache after it."""
        heard = []
        handle = self.layer.output.register_forward_pre_hook(lambda module, args: heard.append(args[0]))
        self.layer.attend(*tensors, seen, copy.deepcopy(theirs))
        handle.remove()
        self.layer.output.gain.fill_(1 / float(heard[0].abs().mean()))
        wanted = self.layer.attend(*tensors, seen, theirs)
        found = self.found(*tensors, seen, ours)
        assert found.dtype == tensors[0].dtype
        assert torch.equal(found, wanted)
        assert 0.01 < float(wanted.float().abs().mean()) < 0.99
        if ours is not None:
            assert torch.equal(ours.keys.cpu(), theirs.keys)
            assert theirs.recent is None or torch.equal(ours.recent.cpu(), theirs.recent)


def seen_of(batch, length):
    """Padding of the first row."""
    seen = torch.ones(batch, length, dtype=torch.bool)
    seen[0, : max(length // 3, 1)] = False
    return seen


@fused
@pytest.mark.parametrize(("size", "name"), CASES, ids=str)
def test_a_token_and_the_cache_moves_on(size, name):
    case = Case(size, **OPTIONS[name])
    theirs, ours = case.held(90)
    places = ours.keys.data_ptr(), None if ours.recent is None else ours.recent.data_ptr()
    for dtype, seen in ((torch.float32, None), (torch.bfloat16, seen_of(size[0], 1) if size[0] > 1 else None)):
        case.equal(case.inputs(1, dtype), seen, ours, theirs)
    assert places == (ours.keys.data_ptr(), None if ours.recent is None else ours.recent.data_ptr())


@fused
@pytest.mark.parametrize(("size", "name"), CASES, ids=str)
def test_many_tokens_in_chunks(size, name):
    """Fewer and more than a chunk, whole chunks too, with a cache that is full or none."""
    case = Case(size, **OPTIONS[name])
    lengths = (150, 9) if size[0] > 1 else (128,)
    for length, dtype, cached in zip(lengths, (torch.float32, torch.bfloat16), (True, False), strict=False):
        theirs, ours = case.held(90) if cached else (None, None)
        case.equal(case.inputs(length, dtype), seen_of(size[0], length) if cached else None, ours, theirs)


@fused
def test_a_large_state_is_exact():
    """What does not fit into one fp16 does into two."""
    case = Case((1, 4, 1, 16), steps=2, signed=True, normalise=False)
    theirs, ours = case.held(7)
    for cache, device in ((theirs, "cpu"), (ours, DEVICE)):
        numbers = torch.randint(-(2**20), 2**20, cache.keys.shape, generator=torch.Generator().manual_seed(5))
        cache.keys.copy_(numbers.float().to(device))
    case.equal(case.inputs(1), None, ours, theirs)
    case.equal(case.inputs(40), None, ours, theirs)


@needs_triton
@not_interpreted
def test_on_the_interpreter():
    on_the_interpreter(__file__)
