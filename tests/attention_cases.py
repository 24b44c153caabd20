"""Attention on codes to be tested: layers of random neurons, random caches, and how far results may lie apart."""

import torch

from kernels import DEVICE
from spikeform.layers import SpikingAttention
from spikeform.neurons import GIF, MT, OAT, Dynamic, FixedPointHG
from spikeform.neurons.oat import ROUNDINGS
from spikeform.spikes import Radix2


class Case:
    """Random queries, keys and values of a batch of two, of which the first is padded on the left."""

    def __init__(self, length, keys, size, heads=4, groups=2, dtype=torch.float32, padding=5, per_head=False):
        generator = torch.Generator().manual_seed(length * 1000 + keys + size)
        self.generator, self.scaling = generator, size**-0.5

        def random(*shape):
            return torch.randn(shape, generator=generator).to(DEVICE, dtype)

        # As a model has them: heads split off a projection, keys in a longer cache.
        self.q = (2 * random(2, length, heads, size)).transpose(1, 2)
        self.k, self.v = random(2, groups, keys, size), random(2, groups, keys, size)
        self.size, self.groups, self.keys = size, groups, keys
        least = torch.finfo(dtype).min
        self.mask = None
        if padding is not None:
            late = torch.arange(keys)[None] > torch.arange(length)[:, None] + keys - length
            mask = torch.zeros(2, heads if per_head else 1, length, keys + 3)
            mask[..., :keys].masked_fill_(late, least)
            mask[..., keys:] = least
            mask[0, ..., :padding] = least
            if per_head:  # a bias of each head
                mask[..., :keys] += torch.randn(mask[..., :keys].shape, generator=generator).clamp(min=-2)
                mask.clamp_(min=least)
            self.mask = mask.to(DEVICE, dtype)

    def cached(self, spiking):
        """Keys and values as they lie in a cache that is longer than what is used of it."""
        k, v = spiking.encode(self.k, self.v)
        packed = (spiking.key.pack(k), spiking.value.pack(v))
        room = [x.new_zeros(x.shape[0], x.shape[1], x.shape[2] + 4, x.shape[3]) for x in packed]
        for wide, x in zip(room, packed, strict=True):
            wide[:, :, : self.keys] = x
        return [wide[:, :, : self.keys] for wide in room]

    def reference(self, spiking, k, v):
        spiking._fused = lambda *_: None
        return spiking(self.q, k, v, self.mask, self.scaling)


def oat_layer(two, rounding, steps, bits, powers=False):
    coding = Radix2(steps)

    def neuron(normal, outlier):
        return (OAT if two else MT)(coding, (normal, outlier) if two else (outlier,), rounding).to(DEVICE)

    pairs = [(1.0, 4.0), (0.5, 2.0), (1.0, 4.0)] if powers else [(1.1, 5.3), (0.7, 3.1), (1.3, 3.7)]
    hg = [FixedPointHG(name, Radix2(bits), rounding) if bits else None for name in ("exp", "reciprocal")]
    return SpikingAttention(*(neuron(*pair) for pair in pairs), neuron(0.3, 1.01), *hg)


def oat_parameters(spiking):
    """What the operator takes behind the scaling."""
    neurons = spiking.query, spiking.key, spiking.value, spiking.probability
    coding, rounding = spiking.query.coding, ROUNDINGS.index(spiking.query.rounding)
    bank = (0, True, 0, 0)
    if spiking.exp is not None:
        bank = (spiking.exp.coding.steps, spiking.exp.rounding == "nearest", spiking.exp.low, spiking.exp.high)
    thresholds = [neuron.threshold for neuron in neurons]
    limits = coding.limit, coding.limit, coding.resolution, rounding
    return *thresholds, *limits, *bank


def run_oat(spiking, case, k, v):
    from spikeform.layers.triton.attention import oat_attention

    return oat_attention(case.q, k, v, case.mask, case.scaling, *oat_parameters(spiking))


def gif_layer(case, steps, signs):
    def neuron(channels, steps):
        gif = GIF(4, channels, steps=steps)
        exponents = torch.randint(0, steps.bit_length(), channels, generator=case.generator)
        gif.set_times(2**exponents)
        return gif.to(DEVICE)

    channels = (case.groups, 1, case.size)
    spiking = SpikingAttention(
        neuron((case.size,), 1 if signs else steps), neuron(channels, steps), neuron(channels, steps), Dynamic(),
        None, None,
    )  # fmt: skip
    if signs:
        spiking.signs = (torch.randint(0, 2, (case.size,), generator=case.generator) * 2 - 1).to(DEVICE, torch.int8)
    return spiking


def gif_parameters(spiking):
    """What the operator takes behind the scaling."""
    neurons = spiking.query, spiking.key, spiking.value
    tables = [x for n in neurons for x in (n.tables().top, n.tables().multiple, n.steps)]
    return spiking.signs, *tables, spiking.query.levels, spiking.probability.coding.limit


def run_gif(spiking, case, k, v):
    from spikeform.layers.triton.attention import gif_attention

    return gif_attention(case.q, k, v, case.mask, case.scaling, *gif_parameters(spiking))


def agrees(mine, expected, unit, v, rotated=False):
    """To the fp32 rounding, but where a probability lies at the edge of two codes: that moves it by a unit.

    Rotated queries are sums, and a device's own matrix product adds in another order: where a query then lies at the
    edge of two codes its row moves, which may befall one row in a hundred.
    """
    assert mine.shape == expected.shape
    assert mine.dtype == expected.dtype
    most = float(v.float().abs().max())
    error, step = (mine.float() - expected.float()).abs(), float(expected.float().abs().max()) * 2**-20
    if mine.dtype == torch.bfloat16:
        step = float(expected.float().abs().max()) * 2**-8
    if rotated:
        rows = error.amax(-1)
        moved = rows > 2 * unit * most + step
        assert float(moved.float().mean()) <= 0.01
        error = error[~moved]
    assert float(error.max()) <= 2 * unit * most + step
    assert float(error.mean()) <= 0.2 * unit * most + step
    assert bool(mine.any())
