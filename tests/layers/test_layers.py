"""Each layer against the module that it replaces, and what it keeps of it."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers.cache_utils import DynamicCache
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.pytorch_utils import Conv1D

from families import difference
from spikeform.layers import SpikingActivation, SpikingAttention, SpikingGatedMLP, SpikingLinear, SpikingNorm
from spikeform.layers.attention import CodeCache
from spikeform.neurons import MT, OAT, FixedPointHG
from spikeform.spikes import MultiThreshold, Radix2, SignedDigit

T16 = Radix2(16)


def oat(coding=T16, outlier=True, top=64.0):
    return OAT(coding, (4.0, top)) if outlier else MT(coding, (top,))


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("bias", [True, False])
def test_linear(bias):
    dense = nn.Linear(12, 5, bias=bias)
    layer = SpikingLinear.from_dense(dense, oat())
    x = draw(3, 4, 12)
    assert isinstance(layer, nn.Linear)
    assert layer.weight is dense.weight
    assert layer.bias is dense.bias
    assert (layer.in_features, layer.out_features) == (12, 5)
    assert difference(dense(x), layer(x)) < 1e-4
    assert layer(x.to(torch.bfloat16)).dtype == torch.bfloat16


def test_linear_from_conv1d():
    dense = Conv1D(5, 12)
    layer = SpikingLinear.from_dense(dense, oat())
    assert layer.weight.shape == (5, 12)
    assert layer.weight.is_contiguous()
    x = draw(3, 4, 12)
    assert difference(dense(x), layer(x)) < 1e-4
    assert list(layer.state_dict()) == ["weight", "bias", "neuron.threshold"]


def test_folding_changes_no_bit():
    """Powers of two in the weights instead of the codes: every product rounds as before."""
    shift = torch.randint(-10, 11, (12,), generator=torch.Generator().manual_seed(0)).to(torch.int8)
    x = draw(6, 12) * 2.0**shift
    for dtype in (torch.float32, torch.bfloat16):
        dense = nn.Linear(12, 5, dtype=dtype)
        original, neuron = dense.weight.detach().clone(), oat(Radix2(8))
        neuron.channel_shift = shift
        layer = SpikingLinear.from_dense(dense, neuron)
        before, value = layer(x), layer.neuron(x).decode()
        layer.fold()
        assert torch.equal(layer(x), before)
        assert torch.equal(layer.neuron(x).decode() * 2.0**shift, value)
        assert torch.equal(layer.weight, original * 2.0**shift)
        assert torch.equal(dense.weight, original)  # it may be shared: the layer took a new one
        layer.fold()  # once is enough
        assert torch.equal(layer(x), before)


NORMS = {
    "layer": (lambda: nn.LayerNorm(24, eps=1e-5), 1e-5, True, 0.0),
    "layer_plain": (lambda: nn.LayerNorm(24, elementwise_affine=False), 1e-5, True, 0.0),
    "rms": (lambda: LlamaRMSNorm(24, eps=1e-6), 1e-6, False, 0.0),
    "gemma": (lambda: GemmaRMSNorm(24, eps=1e-6), 1e-6, False, 1.0),
}


@pytest.mark.parametrize("kind", NORMS)
@pytest.mark.parametrize("scale", [1e-4, 1.0, 300.0])
def test_norm(kind, scale):
    build, eps, centred, offset = NORMS[kind]
    dense = build()
    with torch.no_grad():
        for parameter in dense.parameters():
            parameter += 0.3 * draw(24)
    layer = SpikingNorm(
        dense.weight,
        getattr(dense, "bias", None),
        eps,
        centred,
        offset,
        OAT(T16, (scale, 16 * scale)),
        FixedPointHG("square", T16),
        FixedPointHG("inverse_sqrt", T16),
    )
    x = draw(2, 5, 24) * scale + scale
    assert difference(dense(x), layer(x)) < 2e-4
    assert layer(x.to(torch.bfloat16)).dtype == torch.bfloat16
    assert layer(torch.zeros(1, 24)).isfinite().all()


def test_norm_does_not_care_for_the_scale_of_bfloat16_streams():
    """The mean square is taken in fp32 whatever the stream is."""
    dense = LlamaRMSNorm(24, eps=1e-6).to(torch.bfloat16)
    layer = SpikingNorm(
        dense.weight,
        None,
        1e-6,
        False,
        0.0,
        oat(),
        FixedPointHG("square", T16),
        FixedPointHG("inverse_sqrt", T16),
    )
    x = draw(5, 24).to(torch.bfloat16)
    assert difference(dense(x), layer(x)) < 5e-3


@pytest.mark.parametrize("spiking_activation", [True, False])
def test_gated_block(spiking_activation):
    gate, up, down = nn.Linear(8, 12), nn.Linear(8, 12), nn.Linear(12, 8)
    act = SpikingActivation(FixedPointHG("silu", T16)) if spiking_activation else nn.SiLU()
    layer = SpikingGatedMLP(gate, up, down, act, oat(), None if spiking_activation else oat())
    x = draw(3, 8)
    assert difference(down(F.silu(gate(x)) * up(x)), layer(x)) < 1e-4


@pytest.mark.parametrize("function", ["gelu", "gelu_tanh", "relu", "tanh", "silu", "gelu_quick"])
def test_activation(function):
    from spikeform.neurons import FUNCTIONS

    x = draw(50) * 3
    layer = SpikingActivation(FixedPointHG(function, T16))
    assert difference(FUNCTIONS[function](x), layer(x)) < 1e-4
    assert layer(x.to(torch.bfloat16)).dtype == torch.bfloat16


def attention(softmax=True, coding=T16):
    hg = [FixedPointHG(f, Radix2(coding.steps)) if softmax else None for f in ("exp", "reciprocal")]
    probability = OAT(coding, (0.1, coding.resolution / coding.limit))
    return SpikingAttention(oat(coding), oat(coding), oat(coding), probability, *hg, site="attention")


def dense_attention(q, k, v, mask, scaling):
    repeat = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)
    scores = q @ k.transpose(-1, -2) * scaling
    return (torch.softmax(scores if mask is None else scores + mask, -1) @ v).transpose(1, 2)


@pytest.mark.parametrize("softmax", [True, False])
@pytest.mark.parametrize("lowest", [torch.finfo(torch.float32).min, float("-inf"), -65504.0])
@pytest.mark.parametrize("heads", ["one mask", "a mask a head", "no mask"])
def test_attention_with_groups(softmax, lowest, heads):
    """Four query heads on two key heads, hidden keys, and soft biases (ALiBi) where seen."""
    q, k, v = draw(2, 4, 5, 8), draw(2, 2, 7, 8, seed=1), draw(2, 2, 7, 8, seed=2)
    mask = None
    if heads != "no mask":
        seen = torch.rand(2, 1, 5, 7, generator=torch.Generator().manual_seed(3)) < 0.6
        seen[..., 0] = True
        bias = draw(2, 1 if heads == "one mask" else 4, 5, 7, seed=4)
        mask = bias.masked_fill(~seen, lowest)
    found = attention(softmax)(q, k, v, mask, 8**-0.5)
    assert found.shape == (2, 5, 4, 8)
    assert difference(dense_attention(q, k, v, mask, 8**-0.5), found) < 2e-4


@pytest.mark.parametrize("softmax", [True, False])
@pytest.mark.parametrize("lowest", [torch.finfo(torch.float32).min, float("-inf")])
def test_a_row_that_sees_nothing_sends_nothing(softmax, lowest):
    q, k, v = draw(1, 2, 3, 8), draw(1, 2, 3, 8, seed=1), draw(1, 2, 3, 8, seed=2)
    mask = torch.zeros(1, 1, 3, 3)
    mask[:, :, 1] = lowest
    found = attention(softmax)(q, k, v, mask, 1.0)
    assert torch.equal(found[:, 1], torch.zeros(1, 2, 8))
    assert (found[:, 0] != 0).any()


def test_a_mask_longer_than_the_keys_is_cut():
    q, k, v = draw(1, 2, 3, 8), draw(1, 2, 3, 8, seed=1), draw(1, 2, 3, 8, seed=2)
    mask = torch.zeros(1, 1, 3, 9)
    assert torch.equal(attention()(q, k, v, mask, 1.0), attention()(q, k, v, mask[..., :3], 1.0))


@pytest.mark.parametrize("outlier", [True, False])
@pytest.mark.parametrize(
    "coding",
    [
        Radix2(1),
        Radix2(8),
        Radix2(13),
        Radix2(14),
        Radix2(16),
        SignedDigit(16),
        MultiThreshold(12, 4),
        MultiThreshold(16, 4),
    ],
    ids=str,
)
def test_packed_codes_are_the_train(coding, outlier):
    neuron = oat(coding, outlier)
    train = neuron(torch.cat([draw(200) * 8, torch.tensor([0.0, 1e9, -1e9, 63.9, -64.0])]))
    packed = neuron.pack(train)
    assert not packed.is_floating_point()
    assert packed.dtype == (torch.int16 if coding.limit < 2**14 else torch.int32)
    back = neuron.unpack(packed)
    assert torch.equal(back.codes.float(), train.codes.float())
    assert torch.equal(back.decode(), train.decode())
    assert torch.equal(back.count(), train.count())
    assert neuron.unpack(packed, torch.float64).decode().dtype == torch.float64


def test_the_cache_is_a_view():
    spiking, cache = attention(), DynamicCache()
    view = CodeCache(cache, spiking)
    k, v = draw(1, 2, 3, 8), draw(1, 2, 3, 8, seed=1)
    keys, values = view.update(k, v, 0)
    assert torch.equal(spiking.key.unpack(keys).decode(), spiking.key(k).decode())
    keys, values = view.update(draw(1, 2, 1, 8, seed=2), v[:, :, :1], 0)
    assert keys.shape == values.shape == (1, 2, 4, 8)
    assert view.get_seq_length() == cache.get_seq_length() == 4
    q = draw(1, 4, 1, 8, seed=3)
    real_k = torch.cat([k, draw(1, 2, 1, 8, seed=2)], 2)
    real_v = torch.cat([v, v[:, :, :1]], 2)
    assert torch.equal(spiking(q, keys, values, None, 1.0), spiking(q, real_k, real_v, None, 1.0))
