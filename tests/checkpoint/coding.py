"""A method that codes without calibrating: GIF neurons of random steps, weights rounded to the nearest code.

What layers, cache and checkpoint need of a method with integer weights, and nothing else.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

import families
from spikeform.conversion import ConversionReport, Method, Row, register
from spikeform.conversion.config import MethodConfig
from spikeform.conversion.kinds import blocks, walk
from spikeform.conversion.quantizer import attach
from spikeform.layers import CodedLinear, SpikingAttention, SpikingLinear
from spikeform.layers.attention import NAME, install
from spikeform.neurons import GIF, Dynamic
from spikeform.spikes import Radix2
from spikeform.synapses.integer import IntegerWeight


@dataclass(eq=True)
class Coding(MethodConfig):
    quant_method: ClassVar[str] = "spikeform_coding"

    weight_bits: int = 4
    weight_steps: tuple = (1,)
    ternary: bool = False
    real: bool = False  # real activations
    attention: bool = True
    signed: bool = True
    form: str = "unified"
    span: str = "shared"
    axis: str = "token"
    rotate: bool = False
    version: int = 1

    def check(self):
        object.__setattr__(self, "weight_steps", tuple(self.weight_steps))


def prepare(model, config):
    report, inside = ConversionReport("coding"), tuple(f"{name}." for name, _ in blocks(model))

    def gif(channels, site, steps=2, **options):
        return GIF(4, channels, steps=steps, signed=config.signed, site=site, **options)

    for name, module, kind in walk(model):
        if not name.startswith(inside):
            continue
        if kind == "linear":
            columns = module.weight.shape[0 if type(module) is not nn.Linear else 1]
            neuron = None if config.real else gif((columns,), name, form=config.form, span=config.span)
            model.set_submodule(name, SpikingLinear.from_dense(module, neuron))
            report.rows.append(Row(name, kind, "CodedLinear", "integers"))
        elif kind == "attention" and config.attention and not config.real:
            text = model.config
            heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
            size = getattr(module, "head_dim", None) or text.hidden_size // text.num_attention_heads
            shape = (heads, 1, size)
            spiking = SpikingAttention(
                gif((size,), f"{name}.query", 1),
                gif(shape, f"{name}.key", axis=config.axis),
                gif(shape, f"{name}.value", form=config.form, span=config.span),
                Dynamic(Radix2(16), f"{name}.probability"),
                None,
                None,
                name,
            )
            if config.rotate:
                spiking.signs = torch.ones(size, dtype=torch.int8)
            install(module, spiking)
            report.rows.append(Row(name, kind, "SpikingAttention", "GIF"))
    if any(row.kind == "attention" for row in report.rows):
        model.set_attn_implementation(NAME)
    return report


def skeleton(model, config):
    report = prepare(model, config)
    for name, layer in list(model.named_modules()):
        if type(layer) is SpikingLinear:
            form = config.weight_bits, config.weight_steps, config.ternary
            sizes = layer.in_features, layer.out_features
            model.set_submodule(name, CodedLinear(*sizes, layer.bias, layer.neuron, *form))
    return report


register(Method("coding", Coding, prepare, lambda n, c: False, lambda n, h, c: 0.0, skeleton=skeleton))


def codes_of(weight, bits=4, tiers=(1,), ternary=False, seed=0):
    """``weight`` ``[N, K]`` rounded to the nearest code, columns of random tiers."""
    generator = torch.Generator().manual_seed(seed)
    tier = torch.randint(0, len(tiers), weight.shape[1:], generator=generator).to(torch.uint8)
    w, rows = weight.detach().float(), []
    low, high = w.amin(1).clamp(max=0), w.amax(1).clamp(min=0)
    codes = torch.zeros(w.shape, dtype=torch.int16)
    for r, t in enumerate(tiers):
        if ternary:
            scale, zero = w.abs().mean(1) * 1.5 / t, torch.full_like(low, t)
        else:
            scale = ((high - low) / (t * (2**bits - 1))).clamp(min=1e-6)
            zero = (-low / scale).round()
        top = 2 * t if ternary else t * (2**bits - 1)
        q = ((w / scale[:, None]).round() + zero[:, None]).clamp(min=0, max=top)
        codes = torch.where(tier == r, (q - zero[:, None]).to(torch.int16), codes)
        rows.append((scale, zero.to(torch.int16)))
    scale, zero = (torch.stack(x) for x in zip(*rows, strict=True))
    fits = int(codes.abs().max()) < 128
    return IntegerWeight(
        codes.to(torch.int8) if fits else codes, scale, zero, tier if len(tiers) > 1 else None, bits, tiers, ternary
    )


@torch.no_grad()
def converted(model, config=None, seed=0):
    """``model``, in place, as a real method would leave it."""
    config = Coding() if config is None else config
    generator = torch.Generator().manual_seed(seed)
    report = prepare(model, config)
    for neuron in model.modules():
        if isinstance(neuron, GIF):
            salient = torch.rand(neuron.channels, generator=generator) < 0.3
            neuron.set_times(torch.where(salient, neuron.steps, 1).to(torch.uint8))
            if neuron.axis == "channel":
                top = 2 + 4 * torch.rand(neuron.channels, generator=generator)
                neuron.set_range(-top, top * 0.8)
        if isinstance(neuron, SpikingAttention) and config.rotate:
            flips = torch.rand(neuron.signs.shape, generator=generator) < 0.5
            neuron.signs = torch.where(flips, -1, 1).to(torch.int8)
    for name, layer in list(model.named_modules()):
        if type(layer) is SpikingLinear:
            codes = codes_of(layer.weight, config.weight_bits, config.weight_steps, config.ternary)
            model.set_submodule(name, CodedLinear.from_spiking(layer, codes, name))
    attach(model, config, report)
    return model


def build(family="llama", **options):
    """A tiny model of a family, converted."""
    return converted(families.build(family), Coding(**options))
