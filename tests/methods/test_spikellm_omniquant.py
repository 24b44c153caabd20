"""Learned clipping and equivalent transformation of one block, on tiny models of every family."""

from __future__ import annotations

import copy

import pytest
import torch

import families
from spikeform.conversion.blocks import Block, capture
from spikeform.conversion.kinds import blocks
from spikeform.conversion.pairs import pairs
from spikeform.errors import CalibrationError
from spikeform.layers import SpikingLinear
from spikeform.methods.spikellm.balance import balance, start
from spikeform.methods.spikellm.clipping import fake_quantise
from spikeform.methods.spikellm.config import SpikeLLM
from spikeform.methods.spikellm.convert import prepare
from spikeform.methods.spikellm.grids import encode
from spikeform.methods.spikellm.omniquant import train_block
from spikeform.neurons import GIF, recording
from spikeform.pretrained.twin import outlier_twin


def unseen(_neuron, _x):
    pass


class Case:
    """The second block of a model, what it is given, and what it should answer."""

    def __init__(self, model, ids=None, **options):
        self.model, self.config = (
            model,
            SpikeLLM(**{"epochs": 2, "let_lr": 2e-2, "lwc_lr": 0.1, "alpha": 0.75, **options}),
        )
        prepare(model, self.config)
        found = [Block(name, module, []) for name, module in blocks(model)]
        with torch.no_grad():
            inputs = capture(
                model, [families.tokens(4, 12), families.tokens(2, 9)] if ids is None else ids, found, unseen
            )
        with torch.no_grad(), recording(unseen):
            self.inputs = found[0].run_all(inputs)
            self.block = found[1]
            self.actmax = self._largest()
            self.targets = self.block.run_all(self.inputs)
        self.set_times()
        self.losses = []

    def _largest(self):
        seen = {}
        names = {m.neuron: f"{self.block.name}.{n}" for n, m in self.layers()}

        def see(neuron, x):
            if neuron in names:
                peak = x.abs().reshape(-1, x.shape[-1]).amax(0).float()
                seen[names[neuron]] = torch.maximum(seen.get(names[neuron], peak), peak)

        with recording(see):
            self.block.run_all(self.inputs)
        return seen

    def set_times(self):
        for neuron in self.block.module.modules():
            if isinstance(neuron, GIF):
                count = torch.arange(neuron.times.numel()).view(neuron.times.shape)
                neuron.set_times(torch.where(count % 8 == 3, neuron.steps, 1))

    def layers(self):
        return [(n, m) for n, m in self.block.module.named_modules() if isinstance(m, SpikingLinear)]

    def train(self, tiers=None):
        name = self.block.name
        inside = [p for p in pairs(self.model) if p.producer_name.startswith(f"{name}.")]
        if self.config.transforms:
            balance(self.block.module, name, inside, self.actmax, self.config.alpha)
        arguments = (self.inputs, self.targets, self.block.calls, self.config, tiers)
        self.clips = train_block(
            self.block.module, name, inside, *arguments, lambda _, error: self.losses.append(error)
        )
        return self

    def coded(self, tiers=None):
        """A copy of the block, its weights the values of their codes."""
        block, options = copy.deepcopy(self.block.module), {"bits": 4, "tiers": self.config.weight_steps}
        for n, m in block.named_modules():
            if isinstance(m, SpikingLinear):
                full = f"{self.block.name}.{n}"
                code = encode(m.weight, **options, tier=(tiers or {}).get(full), clip=self.clips.get(full))
                m.weight.data = code.dequantise().to(m.weight.dtype)
        return Block(self.block.name, block, self.block.calls)

    @torch.no_grad()
    def error(self, tiers=None):
        outs = self.coded(tiers).run_all(self.inputs)
        squares = sum(float((o - t).square().sum()) for o, t in zip(outs, self.targets, strict=True))
        return squares / sum(t.numel() for t in self.targets)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "gemma", "gpt_neox", "phi", "bert"])
def test_training_lowers_the_error_of_the_block_that_is_saved(family):
    case = Case(families.build(family), epochs=4).train()
    assert min(case.losses) < 0.9 * case.losses[0]
    # What was measured in training is what the folded block with its integer weights does.
    assert case.error() == pytest.approx(min(case.losses), rel=1e-2)


@pytest.mark.parametrize("family", families.TWINS)
def test_an_outlier_twin_is_given_the_same_block(family):
    """Powers of two between producers and consumers change neither the start nor what is learned, in one epoch."""
    outs = []
    for model in (families.build(family), outlier_twin(families.build(family), scales=(16.0, 256.0))):
        case = Case(model, epochs=1).train()
        outs.append((case.coded().run_all(case.inputs), case.losses))
    for a, b in zip(outs[0][0], outs[1][0], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    assert outs[0][1] == pytest.approx(outs[1][1], rel=1e-5)


def test_without_the_transformation_a_twin_is_another_block():
    """The test above could not fail for a transformation that does nothing."""
    errors = []
    for model in (families.build("llama"), outlier_twin(families.build("llama"), scales=(16.0, 256.0))):
        errors.append(Case(model, epochs=0, let=False).train().error())
    assert errors[1] > 2 * errors[0]


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "opt"])
def test_the_real_block_computes_the_same_after_folding(family):
    case = Case(families.build(family).double()).train()
    for layer in case.block.module.modules():
        if isinstance(layer, GIF):
            layer.times = torch.zeros_like(layer.times)
    with torch.no_grad(), recording(unseen):  # neurons without steps pass their input on
        for out, target in zip(case.block.run_all(case.inputs), case.targets, strict=True):
            assert families.difference(target, out) < 1e-6


@pytest.mark.parametrize("options", [{"epochs": 0}, {"pipeline": "gptq", "let": True}])
def test_closed_form_start_needs_no_training_and_no_data(options):
    case = Case(families.build("llama"), **options)
    held, case.inputs = case.inputs, []
    case.train()
    assert not case.losses
    case.inputs = held
    trained = Case(families.build("llama"), epochs=1, lwc=case.config.clips).train()
    assert case.error() == pytest.approx(trained.losses[0], rel=1e-2)


def test_training_never_keeps_what_is_worse():
    case = Case(families.build("llama"), lwc_lr=1e-3, let_lr=1.0, epochs=1).train()
    assert case.losses[1] > case.losses[0]
    assert case.error() == pytest.approx(case.losses[0], rel=1e-2)


def test_the_seed_decides():
    def learned(seed):
        case = Case(families.build("llama"), seed=seed, epochs=1).train()
        return torch.cat([t.flatten() for factors in case.clips.values() for t in factors])

    assert learned(0).equal(learned(0))
    assert not learned(0).equal(learned(1))


def test_tiers_are_clipped_by_factors_of_their_own():
    case = Case(families.build("llama"), weight_steps=(1, 2), weight_salient=(0.2,))
    tiers = {f"{case.block.name}.{n}": (torch.arange(m.in_features) % 5 == 0).to(torch.uint8) for n, m in case.layers()}
    case.train(tiers)
    assert all(gamma.shape[0] == 2 for gamma, _ in case.clips.values())
    assert case.error(tiers) == pytest.approx(min(case.losses), rel=1e-2)
    assert min(case.losses) < case.losses[0]


def test_padding_and_batches_are_cut_by_sequence():
    """Sequences of one batch differ in what they see; one by one they are what they are together."""
    model = families.build("llama")
    mask = torch.ones(4, 12, dtype=torch.long)
    mask[1, :5], mask[3, :2] = 0, 0
    case = Case(model)
    case.block.calls.clear()
    found = [Block(n, m, []) for n, m in blocks(model)]
    inner, model.forward = model.forward, lambda **more: inner(attention_mask=mask, use_cache=False, **more)
    with torch.no_grad():
        inputs = capture(model, [families.tokens(4, 12)], found, unseen)
    with torch.no_grad(), recording(unseen):
        case.inputs = found[0].run_all(inputs)
    case.block.calls.extend(found[1].calls)
    with torch.no_grad():
        case.targets = [out + 0.1 for out in case.block.run_all(case.inputs)]
    case.train()
    assert case.error() == pytest.approx(min(case.losses), rel=1e-2)


def test_half_precision_is_trained_in_fp32():
    case = Case(families.build("llama").bfloat16(), epochs=3).train()
    assert all(p.dtype == torch.bfloat16 for p in case.block.module.parameters())
    assert all(f.dtype == torch.float32 for pair in case.clips.values() for f in pair)
    assert min(case.losses) < 0.95 * case.losses[0]


def test_real_weights_learn_scales_alone():
    case = Case(families.build("llama"), weight_bits=16).train()
    assert case.clips == {}
    assert min(case.losses) < case.losses[0]


def test_scales_of_silent_channels():
    act, weight = torch.tensor([4.0, 0.0, 2.0, 0.0, 1.0]), torch.tensor([1.0, 0.5, 0.0, 0.0, 1.0])
    scale = start(act.double(), weight.double(), 0.5)
    assert scale.tolist() == [2.0, 2.0, 2.0, 1.0, 1.0]  # the median product, 1, stands in for what is not known
    assert start(act * 0, weight, 0.5).tolist() == [1.0] * 5


def test_fake_quantisation_is_what_codes_stand_for():
    generator = torch.Generator().manual_seed(0)
    weight, tier = torch.randn(6, 40, generator=generator), (torch.arange(40) % 3 == 1).to(torch.uint8)
    factors = (0.5 + 0.5 * torch.rand(2, 6, generator=generator), 0.5 + 0.5 * torch.rand(2, 6, generator=generator))
    values = fake_quantise(weight, (15, 30), tier, factors)
    code = encode(weight, bits=4, tiers=(1, 2), tier=tier, clip=factors)
    torch.testing.assert_close(values, code.dequantise(), rtol=0, atol=1e-6)
    assert not values.allclose(fake_quantise(weight, (15, 30), tier, None), atol=1e-3)


def test_errors_name_what_is_wrong():
    case = Case(families.build("llama"))
    case.inputs[0][0, 0, 0] = float("nan")
    with pytest.raises(CalibrationError, match="not finite"):
        case.train()
    case = Case(families.build("llama"))
    neuron = next(m for m in case.block.module.modules() if isinstance(m, GIF))
    neuron.times = torch.zeros_like(neuron.times)
    with pytest.raises(CalibrationError, match=r"layers\.1\..*not calibrated"):
        case.train()
