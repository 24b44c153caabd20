"""CPU attention on codes against the layer itself, on each instruction set and without the library."""

import pytest
import torch

from spikeform.layers import SpikingAttention, fused
from spikeform.layers.rotation import rotate_heads
from spikeform.neurons import GIF, MT, OAT, Dynamic, FixedPointHG
from spikeform.neurons.oat import ROUNDINGS
from spikeform.spikes import Radix2
from spikeform.synapses import dispatch

REAL = [torch.float32, torch.bfloat16]
# B, H, G, L, S, E
SIZES = [(1, 8, 2, 1, 37, 64), (2, 3, 3, 5, 5, 24), (2, 6, 1, 7, 70, 80), (1, 4, 4, 1, 1, 7), (1, 4, 2, 33, 65, 16)]


def real(shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def masks(size, dtype):
    """None, causal, padding on the left (some rows see nothing), scattered by head, all of them additive."""
    batch, heads, _, length, keys, _ = size
    least = torch.finfo(dtype).min
    causal = torch.arange(keys) > torch.arange(length)[:, None] + keys - length
    padded = causal[None, None] | (torch.arange(keys) < torch.tensor([0, keys // 2])[:batch, None])[:, None, None]
    padded = padded | (torch.arange(length) == 0)[:, None] if length > 1 else padded
    scattered = real((batch, heads, length, keys), seed=9) > 0.5
    yield None
    yield torch.zeros(1, 1, length, keys, dtype=dtype).masked_fill(causal, least)
    yield torch.zeros(batch, 1, length, keys, dtype=dtype).masked_fill(padded, -torch.inf)
    yield torch.where(scattered, least, real((batch, heads, length, keys), seed=8)).to(dtype)
    wider = torch.zeros(batch, 1, length, keys + 3, dtype=dtype).masked_fill(torch.arange(keys + 3) >= keys - 1, least)
    yield wider[..., :keys]


def apart(monkeypatch, spiking, *inputs):
    """The layer's neurons and products, one after the other."""
    with monkeypatch.context() as patch:
        patch.setattr(dispatch, "kernels", lambda device: (False, "for this test"))
        return spiking(*inputs)


def check(found, wanted, unit):
    """At most two probability units times the largest value, and on average much less."""
    assert found.dtype == wanted.dtype
    assert found.shape == wanted.shape
    distance = (found.float() - wanted.float()).abs()
    slack = wanted.float().abs() * (2.0**-7 if found.dtype == torch.bfloat16 else 2.0**-20)
    assert (distance <= 2 * unit + slack + 1e-6).all()
    assert distance.mean() <= 0.25 * unit + slack.mean() + 1e-6


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", [MT, OAT])
def test_populations(machine, monkeypatch, kind, size):
    batch, heads, groups, length, keys, channels = size
    for steps, bits, rounding, dtype in (
        (8, 8, "nearest", torch.float32),
        (8, 0, "floor", torch.bfloat16),
        (12, 12, "strict", torch.float32),
        (16, 16, "nearest", torch.bfloat16),
    ):
        both = kind is OAT
        spiking = SpikingAttention(
            *(kind(Radix2(steps), (t, 4 * t) if both else (4 * t,), rounding) for t in (0.9, 1.1, 1.2)),
            kind(Radix2(steps), (0.1, 1.0) if both else (1.0,), rounding),
            FixedPointHG("exp", Radix2(bits)) if bits else None,
            FixedPointHG("reciprocal", Radix2(bits)) if bits else None,
        )
        q = real((batch, length, heads, channels), dtype).transpose(1, 2)
        k, v = (real((batch, groups, keys, channels), dtype, seed) for seed in (1, 2))
        packed = [spiking.key.pack(spiking.key(k)), spiking.value.pack(spiking.value(v))]
        later = torch.zeros(batch, groups, keys + 9, channels, dtype=packed[0].dtype)
        later[:, :, :keys] = packed[1]
        thresholds = [n.threshold for n in (spiking.query, spiking.key, spiking.value, spiking.probability)]
        limit = spiking.key.coding.limit
        numbers = limit, limit, spiking.key.coding.resolution, ROUNDINGS.index(rounding)
        for mask in masks(size, dtype):
            wanted = apart(monkeypatch, spiking, q, *packed, mask, 0.3)
            found = fused.oat_attention(
                q, packed[0], later[:, :, :keys], mask, 0.3, *thresholds, *numbers, bits, True, -32, 32
            )
            # A probability near the outliers' threshold may come in units of either sub-neuron.
            unit = float(spiking.probability.quantum()[-1]) + 2.0**-bits * (bits > 0)
            check(found, wanted, unit * float(v.float().abs().max()))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("bits", "steps", "probability"), [(4, 1, 8), (4, 2, 16), (2, 4, 4)])
def test_bursts(machine, monkeypatch, bits, steps, probability, size):
    batch, heads, groups, length, keys, channels = size
    some = torch.Generator().manual_seed(4)
    spiking = SpikingAttention(
        GIF(bits, (channels,), steps=1),
        GIF(bits, (groups, 1, channels), steps=steps),
        GIF(bits, (groups, 1, channels), steps=steps),
        Dynamic(Radix2(probability)),
        None,
        None,
    )
    for neuron in (spiking.query, spiking.key, spiking.value):
        neuron.set_times(2 ** torch.randint(neuron.steps.bit_length(), neuron.channels, generator=some))
    for dtype in REAL:
        for signs in (None, torch.where(real(channels) > 0, 1, -1).to(torch.int8)):
            spiking.signs = signs
            q = real((batch, length, heads, channels), dtype).transpose(1, 2)
            k, v = (real((batch, groups, keys, channels), dtype, seed) for seed in (1, 2))
            k = k if signs is None else rotate_heads(k, signs)
            packed = spiking.key.pack(spiking.key(k)), spiking.value.pack(spiking.value(v))
            tables = [
                (n.tables().top, n.tables().multiple, n.steps) for n in (spiking.query, spiking.key, spiking.value)
            ]
            numbers = 2**bits - 1, 2**probability - 1
            for mask in masks(size, dtype):
                wanted = apart(monkeypatch, spiking, q, *packed, mask, 0.3)
                found = fused.gif_attention(q, *packed, mask, 0.3, signs, *tables[0], *tables[1], *tables[2], *numbers)
                check(found, wanted, float(v.float().abs().max()) / numbers[1])


def test_threads_change_nothing(machine):
    neurons = [OAT(Radix2(8), (0.5, 4.0)) for _ in range(4)]
    k, v = (neurons[0].pack(neurons[0](real((1, 1, 900, 64), seed=seed))) for seed in (1, 2))
    q, before, found = real((1, 12, 40, 64)), torch.get_num_threads(), []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        own = [n.threshold for n in neurons]
        found.append(fused.oat_attention(q, k, v, None, 0.1, *own, 255, 255, 256, 0, 8, True, -32, 32))
    torch.set_num_threads(before)
    assert torch.equal(*found) or machine == "no library"
