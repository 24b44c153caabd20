"""The converted model against one written down here: a dense model of plain fake quantisation, in plain torch.

Everything here is worked out anew: the quantiser of activations, the grid of weights, attention head by head. Only what
conversion decided is taken from the model: the steps of each channel, static ranges and, where they were learned,
weights. In fp64, where no sum flips a code, the two must agree; with nothing salient that is OmniQuant.
"""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, eager_mask
from transformers.pytorch_utils import Conv1D

import families
from families import close, difference
from spikeform.layers import CodedLinear, SpikingAttention, SpikingLinear
from spikeform.layers.rotation import head_matrix
from spikeform.neurons import GIF
from spikeform.spikes.trace import Firing, observe

IDS = families.tokens(rows=3, length=14)
NAME = "written_down_here"
START = 1 / (1 + math.exp(-4.0))  # OmniQuant's first clip factor
# Every token sees all: alone with itself, the first one's context would lie on a grid, where codes are ties.
SEEN = {
    "attention_mask": torch.zeros(3, 1, 14, 14, dtype=torch.float64),
    "position_ids": torch.arange(14).expand(3, -1),
}


class Quantiser:
    """Section 1.5: per token, asymmetric min-max, T times as fine in channels of T steps; zero is in the range."""

    def __init__(self, neuron, bits, form="unified", span="shared"):
        self.times, self.levels, self.form, self.span = neuron.times.long(), 2**bits - 1, form, span
        self.most = neuron.steps

    def parts(self, x):
        """(where, unit, zero, top) of the channels of each T."""
        for t in self.times.unique().tolist():
            where = (self.times == t).expand(x.shape)
            seen = torch.where(where, x, torch.zeros_like(x)) if self.span == "separate" else x
            low, high = (seen.amin(-1, keepdim=True).clamp(max=0), seen.amax(-1, keepdim=True).clamp(min=0))
            top = t * (self.levels + 1) - 1 if self.form == "official" else t * self.levels
            steps = top if self.form == "official" else self.levels
            unit = ((high - low) / steps).clamp(1e-5, 1e4) / (1 if self.form == "official" else t)
            yield where, unit, (-low / unit).round().clamp(-1e4, 1e4), top

    def codes(self, x):
        """Centred codes, and what one is worth."""
        codes, units = torch.zeros_like(x), torch.zeros_like(x)
        for where, unit, zero, top in self.parts(x):
            q = ((x / unit).round() + zero).clamp(0, top) - zero
            codes, units = torch.where(where, q, codes), torch.where(where, unit, units)
        return codes, units

    def __call__(self, x):
        codes, units = self.codes(x)
        return codes * units

    def finest(self, x):
        """The unit of the most steps that a channel may have, ``[..., 1]``."""
        low, high = x.amin(-1, keepdim=True).clamp(max=0), x.amax(-1, keepdim=True).clamp(min=0)
        return ((high - low) / self.levels).clamp(1e-5, 1e4) / self.most


def static(x, neuron, levels, form):
    """Keys with a range per channel, and the common unit of each channel."""
    t = neuron.times.to(x.dtype)
    top = t * (levels + 1) - 1 if form == "official" else t * levels
    low, high = neuron.low.double(), neuron.high.double()
    unit = ((neuron.high - neuron.low) / top.float()).clamp(1e-5, 1e4).double()
    zero = (-neuron.low / unit.float()).round().double()
    assert (low <= high).all()
    return ((x / unit).round() + zero).clamp(torch.zeros_like(zero), top) * unit - zero * unit, unit * t / neuron.steps


def probabilities(p, bits):
    """Codes of the probabilities, and what one is worth in each row."""
    unit = p.amax(-1, keepdim=True) / (2**bits - 1)
    return (p / unit).round(), unit


def attend(module, query, key, value, mask, scaling=None, **_):
    """Head by head; keys and values of a group are looked up for each of its query heads."""
    found, config, heads = module.written, module.written_config, query.shape[1]
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    sharing = heads // key.shape[1]
    form, levels = config.form, 2**config.bits - 1
    if found.signs is not None:
        matrix = head_matrix(found.signs, torch.float64)
        query, key = query @ matrix, key @ matrix
    out = []
    for head in range(heads):
        g = head // sharing
        q, k, v = query[:, head], key[:, g], value[:, g]
        one = copy.deepcopy(found.key)
        one.times = found.key.times[g, 0]
        worth = None
        if config.key_axis == "channel":
            one.low, one.high = found.key.low[g, 0], found.key.high[g, 0]
            k_hat, worth = static(k, one, levels, form)
            q, k_hat = q * worth, k_hat / worth
        else:
            k_hat = Quantiser(one, config.bits)(k)
        q_hat = Quantiser(found.query, config.bits)(q)
        scores = q_hat @ k_hat.transpose(-1, -2) * scaling
        if mask is not None:
            scores = scores + mask[:, min(head, mask.shape[1] - 1)]
        p = scores.softmax(-1)
        ends = copy.deepcopy(found.value)
        ends.times = found.value.times[g, 0]
        v_hat, unit = Quantiser(ends, config.bits)(v), Quantiser(ends, config.bits).finest(v)
        codes, worth = probabilities(p * unit.transpose(-1, -2), config.probability_bits)
        out.append(codes @ (v_hat / unit) * worth)  # a token's unit of V goes to its probability
    return torch.stack(out, 2).contiguous(), None


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, eager_mask)


def weights_of(layer):
    """The real weight of integer codes, fp64."""
    if not isinstance(layer, CodedLinear):
        return layer.weight.detach().double()
    tier = torch.zeros(layer.in_features).long() if layer.tier is None else layer.tier.long()
    return layer.weight.double() * layer.scale.double()[tier].T


@torch.no_grad()
def written(model, dense, weights=None):
    """``dense``, in fp64, as ``model`` should compute.

    Args:
        model: Converted.
        dense: A dense model of the same structure: its modules are used, and the parameters of those not converted.
        weights: ``(name, dense weight [N, K]) -> [N, K]``; None: the weights, biases and norms of ``model``.
    """
    config = model.config.quantization_config
    plain = copy.deepcopy(dense).double()
    if weights is None:
        own = dict(model.named_parameters())
        for name, parameter in plain.named_parameters():
            if name in own and own[name].shape == parameter.shape:
                parameter.copy_(own[name])
    for name, layer in model.named_modules():
        if isinstance(layer, SpikingLinear):
            linear = plain.get_submodule(name)
            conv = isinstance(linear, Conv1D)
            was = linear.weight.T if conv else linear.weight
            new = weights_of(layer) if weights is None else weights(name, was.float()).double()
            linear.weight.copy_(new.T if conv else new)
            if linear.bias is not None and weights is None:
                linear.bias.copy_(layer.bias)
            if layer.neuron is not None:
                quantise = Quantiser(layer.neuron, config.bits, config.form, config.span)
                linear.register_forward_pre_hook(lambda m, args, q=quantise: (q(args[0]),))
        elif isinstance(layer, SpikingAttention):
            attention = plain.get_submodule(name.rpartition(".")[0])
            attention.__dict__["written"], attention.__dict__["written_config"] = layer, config
            plain.set_attn_implementation(NAME)
    return plain


def both(model, reference):
    """Logits of the reference, and of ``model`` in fp64, where every token sees every other."""
    with torch.no_grad():
        return [m(input_ids=IDS, **SEEN).logits for m in (reference, wide(model))]


def wide(model):
    return copy.deepcopy(model).double()


def clipped(_name, w, bits=4, factor=START):
    """Section 3.3 where nothing was learned yet: rows from 0.982 min to 0.982 max, asymmetric, fp32."""
    high, low = factor * w.amax(1, keepdim=True).clamp(min=0), factor * w.amin(1, keepdim=True).clamp(max=0)
    scale = (high - low) / (2**bits - 1)
    zero = (-low / scale).round()
    return (((w / scale).round() + zero).clamp(0, 2**bits - 1) - zero).double() * scale.double()


# T8 --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "qwen3", "gpt_neox", "phi", "gemma", "bert"])
def test_with_nothing_salient_it_is_omniquant(family, saliency, dense, logits):
    """Its keys are rounded per token and head, as OmniQuant's; the weights of the reference are the dense model's."""
    model = saliency(family, salient=0.0, let=False, epochs=0)
    times = torch.cat([n.times.flatten() for n in model.modules() if isinstance(n, GIF)])
    assert bool((times == 1).all())
    close(*both(model, written(model, dense(family), clipped)))


def test_one_step_for_all_is_nothing_salient(saliency, logits):
    base = logits(saliency("llama", salient=0.0), IDS)
    for options in ({"saliency": "none"}, {"salient": 0.0, "form": "official"}, {"salient": 0.0, "span": "separate"}):
        assert torch.equal(logits(saliency("llama", **options), IDS), base), options
    other = logits(saliency("llama", steps=1), IDS)  # probabilities meet V in a unit half as fine
    assert difference(base, other) < 0.05
    assert difference(base, logits(saliency("llama"), IDS)) > 0.05


@pytest.mark.parametrize("epochs", [0, 1])
def test_the_transformation_leaves_the_function(epochs, saliency, dense):
    """Section 3.4: what divides the norm's gain multiplies the columns that read it; keys' pairs are tied by RoPE."""
    block = saliency("llama", salient=0.0, epochs=epochs, lwc=False).model.layers[0]
    plain = dense("llama").model.layers[0]
    scale = (plain.input_layernorm.weight / block.input_layernorm.weight).detach()
    assert bool((scale > 0).all())
    assert scale.std() / scale.mean() > 0.1
    ratio = []
    for name in ("q_proj", "k_proj"):
        moved, real = (
            weights_of(block.self_attn.get_submodule(name)),
            plain.self_attn.get_submodule(name).weight.detach(),
        )
        rows = (moved * (real * scale)).sum(1) / (real * scale).square().sum(1)  # least squares: what multiplied a row
        ratio.append(rows.unflatten(0, (-1, 2, 8)))
        assert difference(clipped("", (real * scale * rows.float()[:, None]), factor=1.0), moved) < 0.2 * (1 + epochs)
    if epochs:
        torch.testing.assert_close(ratio[1][:, 0], ratio[1][:, 1], rtol=0.1, atol=0)


# The whole method ------------------------------------------------------------------------------------------------

OPTIONS = {
    "default": {},
    "official": {"form": "official"},
    "unsigned": {"signed": False},
    "separate": {"span": "separate"},
    "official, separate, unsigned": {"form": "official", "span": "separate", "signed": False},
    "channel": {"key_axis": "channel"},
    "channel, unsigned": {"key_axis": "channel", "signed": False},
    "8 bits": {"bits": 8, "weight_bits": 8},
    "T=4": {"steps": 4, "salient": 0.05},
    "real weights": {"weight_bits": 16},
    "real inputs": {"bits": 16},
    "ternary": {
        "pipeline": "gptq",
        "weight_form": "ternary",
        "weight_steps": (1, 2, 4),
        "weight_salient": (0.2, 0.1),
    },
    "gptq": {"pipeline": "gptq"},
    "tiers": {"weight_steps": (1, 2), "weight_salient": (0.2,)},
    "probabilities": {"probability_bits": 13},
    "dense attention": {"attention": False},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_it_is_fake_quantisation(family, options, saliency, dense, logits):
    model = saliency(family, **options)
    if options.get("bits") != 16:
        times = torch.cat([m.neuron.times for m in model.modules() if isinstance(m, SpikingLinear)])
        assert 0 < float((times > 1).double().mean()) < 0.2
    found = both(model, written(model, dense(family)))
    close(*found)
    assert difference(found[0], both(dense(family), wide(dense(family)))[0]) > 1e-3  # both are not the dense model


@pytest.mark.parametrize("family", [f for f in families.FAMILIES if f not in ("llama", "gpt2")])
def test_of_every_family(family, saliency, dense, logits):
    model = saliency(family)
    close(*both(model, written(model, dense(family))))


def test_rotated_too(saliency, dense, logits):
    """LLaMA keeps its modules; only the head is its own and norms are all one before training."""
    model = saliency("llama", rotate=True)
    assert all(m.signs is not None for m in model.modules() if isinstance(m, SpikingAttention))
    close(*both(model, written(model, dense("llama"))))


# T10 and T12 -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"signed": False}, {"form": "official"}, {"span": "separate"}], ids=str)
@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_codes_and_outputs_of_every_layer(family, options, saliency, logits):
    """T10: the integers are those of fake quantisation, none differs; outputs agree to the rounding of fp32."""
    model = saliency(family, **options)
    config, fired, outputs = model.config.quantization_config, {}, {}
    layers = {n: m for n, m in model.named_modules() if isinstance(m, CodedLinear)}
    handles = [
        m.register_forward_hook(lambda m, a, out, n=n: outputs.update({n: (a[0], out)})) for n, m in layers.items()
    ]
    with observe(lambda event: fired.update({event.site: event}) if isinstance(event, Firing) else None):
        logits(model, IDS)
    for handle in handles:
        handle.remove()
    assert set(layers) < set(fired)
    for name, layer in layers.items():
        x, out = outputs[name]
        quantise = Quantiser(layer.neuron, config.bits, config.form, config.span)
        wanted, units = quantise.codes(x)
        assert int((fired[name].train.centred() != wanted).sum()) == 0, name
        fake = F.linear(
            (wanted * units).double(), weights_of(layer), None if layer.bias is None else layer.bias.double()
        )
        assert difference(fake, out) < 1e-6, name


@pytest.mark.parametrize("family", ["llama", "gemma", "gpt2"])
def test_grouped_queries(family, saliency):
    """T12: keys and values have one mask for all query heads that share them."""
    model = saliency(family)
    heads = model.config.num_attention_heads
    groups = getattr(model.config, "num_key_value_heads", heads)
    attentions = [m for m in model.modules() if isinstance(m, SpikingAttention)]
    fired = {}
    with (
        torch.no_grad(),
        observe(lambda event: fired.update({event.site: event.train}) if isinstance(event, Firing) else None),
    ):
        model(IDS)
    for attention in attentions:
        size = attention.query.channels[0]
        assert tuple(attention.key.times.shape) == tuple(attention.value.times.shape) == (groups, 1, size)
        quota = int(round(0.9 * groups * size, 9))
        for neuron in (attention.key, attention.value):  # one ranking over all heads of the layer
            assert int((neuron.times == 2).sum()) == groups * size - quota
        assert bool((attention.query.times == 1).all())
        assert fired[attention.query.site].shape == (3, groups, heads // groups * 14, size)
        assert fired[attention.key.site].shape == fired[attention.value.site].shape == (3, groups, 14, size)


# Which channels are salient --------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_masks_are_those_of_the_direct_formulas(family, saliency, dense, logits):
    """Sections 2.2 and 2.3, with no Gram matrix, on the first block: what reaches it is what the dense model sends.

    Without the transformation, which comes first here and rescales what channels are ranked by.
    """
    model, plain, seen = saliency(family, let=False), copy.deepcopy(dense(family)).double(), {}
    first = [n for n, m in model.named_modules() if isinstance(m, SpikingLinear) and (".0." in n)]
    for name in first:
        plain.get_submodule(name).register_forward_pre_hook(lambda m, args, n=name: seen.__setitem__(n, args[0]))
    attention = next(n for n, m in model.named_modules() if isinstance(m, SpikingAttention)).rpartition(".")[0]

    def look(module, query, key, value, mask, scaling=None, **_):
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        wide_k, wide_v = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
        p = (query @ wide_k.transpose(-1, -2) * scaling + (0 if mask is None else mask)).softmax(-1)
        if module is plain.get_submodule(attention):
            seen["q"], seen["k"], seen["v"], seen["p"] = query, wide_k, wide_v, p
        return (p @ wide_v).transpose(1, 2).contiguous(), None

    AttentionInterface.register("looking", look)
    AttentionMaskInterface.register("looking", eager_mask)
    plain.set_attn_implementation("looking")
    logits(plain, families.tokens(rows=4, length=24, seed=5))
    for name in first:
        w = plain.get_submodule(name).weight.detach()
        w = w.T if isinstance(plain.get_submodule(name), Conv1D) else w
        x = seen[name].flatten(0, -2)
        _check(model.get_submodule(name).neuron.times, (x * ((x @ w.T) @ w)).mean(0))
    q, k, v, p = seen["q"], seen["k"], seen["v"], seen["p"]
    key = (k * (k @ (q.transpose(-1, -2) @ q))).mean((0, 2))
    value = (v * (p.transpose(-1, -2) @ (p @ v))).mean((0, 2))
    spiking = model.get_submodule(attention).spiking
    groups = spiking.key.times.shape[0]
    _check(spiking.key.times[:, 0], key.unflatten(0, (groups, -1)).sum(1))
    _check(spiking.value.times[:, 0], value.unflatten(0, (groups, -1)).sum(1))


def _check(times, scores):
    quota = int(round(0.9 * scores.numel(), 9))
    threshold = scores.flatten().sort().values[quota - 1]
    assert torch.equal(times > 1, scores > threshold)


def test_a_reference_that_sees_every_mistake(saliency, dense):
    """One channel with another number of steps, or one weight's code one off."""
    reference, model = written(saliency("llama"), dense("llama")), wide(saliency("llama"))
    layer = model.model.layers[1].mlp.down_proj
    times = layer.neuron.times.clone()
    times[5] = 3 - times[5]
    layer.neuron.set_times(times)
    assert difference(*both(model, reference)) > 1e-6
    model = wide(saliency("llama"))
    model.model.layers[1].mlp.down_proj.weight[3, 4] += 1
    assert difference(*both(model, reference)) > 1e-6
