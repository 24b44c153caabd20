"""SpikingMamba: what is converted, where thresholds begin, and the options."""

import copy

import pytest
import torch
from transformers.models.mamba import modeling_mamba
from transformers.models.mamba2 import modeling_mamba2

import families
import spikeform
from spikeform.conversion.histogram import Histogram
from spikeform.errors import CalibrationError, ConfigError, ConversionError
from spikeform.layers import SpikingLinear
from spikeform.layers.state_space import ConvolvedProjection
from spikeform.methods.spiking_mamba.thresholds import fit
from spikeform.neurons import SignedInteger
from spikeform.neurons.hadamard import factors, turned
from spikeform.neurons.signed_integer import integers

IDS = families.tokens(rows=4, length=20)


def converted(family="mamba2", **options):
    return spikeform.convert(families.build(family), spikeform.SpikingMamba(**options), IDS)


@pytest.mark.parametrize("family", families.STATE_SPACE)
def test_the_projections_spike_and_the_core_stays_real(family):
    model = converted(family)
    report = {row.name: row for row in model.spikeform_report.rows}
    spiking = {name for name, row in report.items() if row.replaced_by}
    names = ("in_proj", "out_proj")
    assert spiking == {f"backbone.layers.{i}.mixer.{part}" for i in range(2) for part in names}
    assert "state-space core" in report["backbone.layers.0.mixer.conv1d"].reason
    assert "lm_head is false" in report["lm_head"].reason
    dense = families.build(family)
    for name in spiking:
        assert torch.equal(model.get_submodule(name).weight, dense.get_submodule(name).weight)


def test_options_add_the_convolution_and_the_head():
    for family in families.STATE_SPACE:
        model = converted(family, conv=True, lm_head=True)
        assert isinstance(model.lm_head, SpikingLinear)
        assert model.lm_head.weight is model.get_input_embeddings().weight
        for block in model.backbone.layers:
            layer = block.mixer.in_proj
            assert isinstance(layer, ConvolvedProjection)
            start, stop = layer.part
            assert stop - start == block.mixer.conv1d.weight.shape[0]
            x = torch.randn(1, 5, layer.in_features)
            with torch.no_grad():
                out, plain = layer(x), SpikingLinear.forward(layer, x)
                sent = out[..., start:stop] / layer.sends.threshold
            assert torch.allclose(sent, sent.round(), atol=1e-6)
            assert torch.equal(plain[..., :start], out[..., :start])
            assert torch.equal(plain[..., stop:], out[..., stop:])


def test_thresholds_of_channels_are_folded_into_the_weights_and_come_out_again():
    model, dense = converted(per_channel=True), families.build("mamba2")
    layer, before = model.backbone.layers[0].mixer.in_proj, dense.backbone.layers[0].mixer.in_proj
    assert layer.neuron.folded
    assert layer.neuron.threshold.numel() == layer.in_features
    assert torch.equal(layer.weight, before.weight * layer.neuron.threshold)
    x = torch.randn(2, 3, layer.in_features)
    with torch.no_grad():
        folded = layer(x)
        layer.unfold()
        assert torch.allclose(layer.weight, before.weight, rtol=1e-6)
        assert torch.allclose(layer(x), folded, rtol=1e-4, atol=1e-5)
        layer.fold()
        assert torch.allclose(layer(x), folded, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("spikes", ["signed", "unsigned", "binary"])
@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_the_threshold_has_about_the_least_squared_error(spikes, steps):
    steps = 1 if spikes == "binary" else steps
    x = torch.randn(20000, generator=torch.Generator().manual_seed(steps)) * 3
    x = x if spikes == "signed" else x.abs()
    neuron = SignedInteger(steps, spikes=spikes)
    fit(neuron, Histogram.of(x[None], (1,)), spikeform.SpikingMamba(steps=steps, spikes=spikes))

    def error(threshold):
        return float((x - threshold * integers(x / threshold, spikes, steps)).square().sum())

    best = min(error(c) for c in torch.linspace(0.05, 8, 400).tolist())
    assert error(neuron.threshold.item()) <= 1.03 * best


def test_given_thresholds_and_broken_inputs():
    model = converted(threshold=1.0)
    assert all(m.threshold.item() == 1.0 for m in model.modules() if isinstance(m, SignedInteger))
    assert model.spikeform_report.calibration == {"source": "thresholds given in the config"}
    with pytest.raises(CalibrationError, match="not finite"):
        fit(SignedInteger(4, site="here"), Histogram.of(torch.tensor([[1.0, float("inf")]]), (1,)), None)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"steps": 0}, "steps"),
        ({"steps": 17}, "steps"),
        ({"spikes": "ternary"}, "spikes"),
        ({"spikes": "binary"}, "one step"),
        ({"threshold": 0}, "threshold"),
        ({"alpha": -1.0}, "alpha"),
        ({"conv": "yes"}, "conv"),
        ({"conv": True, "weight_bits": 8}, "weight_bits"),
        ({"weight_bits": 4}, "weight_bits"),
        ({"skip": "in_proj"}, "skip"),
    ],
)
def test_bad_options_are_named(options, named):
    with pytest.raises(ConfigError, match=named):
        spikeform.SpikingMamba(**options)


@pytest.mark.parametrize("family", families.STATE_SPACE)
@pytest.mark.parametrize("options", [{}, {"per_channel": True}, {"weight_bits": 8}], ids=str)
def test_rotation_is_undone_by_the_weights(family, options, tmp_path):
    dense, model = families.build(family), converted(family, rotate=True, **options)
    neurons = {n: m for n, m in model.named_modules() if isinstance(m, SignedInteger)}
    assert {n: m.rotates for n, m in neurons.items()} == {n: "out_proj" in n for n in neurons}
    with torch.no_grad():
        sent = model(IDS).logits
        assert torch.equal(spikeform.load(spikeform.save(model, tmp_path / "m"))(IDS).logits, sent)
        prefix = model(IDS[:, :-1], use_cache=True)
        step = model(IDS[:, -1:], cache_params=prefix.cache_params, use_cache=True).logits[:, -1]
        assert torch.allclose(step, sent[:, -1], atol=1e-4)
        if not options:
            for neuron in neurons.values():
                neuron.paused = True
            assert torch.allclose(model(IDS).logits, dense(IDS).logits, rtol=1e-3, atol=1e-3)


def test_heavy_tails_are_told_better_when_rotated():
    """Seldom large, then very large: what a gate leaves."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, 64, generator=generator) * torch.randn(400, 64, generator=generator) ** 4
    error = {}
    for rotates in (False, True):
        neuron = SignedInteger(4, rotates=rotates)
        seen = turned(x, factors(64, x.device)) if rotates else x
        fit(neuron, Histogram.of(seen.reshape(1, -1), (1,)), spikeform.SpikingMamba())
        with torch.no_grad():
            error[rotates] = float((neuron.encode(x).decode() - seen).square().sum() / x.square().sum())
    assert error[True] < 0.5 * error[False]


def test_models_without_a_mixer_are_refused():
    with pytest.raises(ConversionError, match="no Mamba"):
        spikeform.convert(families.build("llama"), spikeform.SpikingMamba(), IDS)
    with pytest.raises(ConversionError, match="nothing"):
        converted(skip=("*proj",))


@pytest.mark.parametrize("options", [{}, {"per_channel": True}], ids=str)
def test_int8_weights_may_come_later(options):
    at_once, later = converted(weight_bits=8, **options), converted(**options)
    assert spikeform.set_weight_bits(later) is later
    with torch.no_grad():
        assert torch.equal(later(IDS).logits, at_once(IDS).logits)
    assert later.config.quantization_config == at_once.config.quantization_config
    assert later.spikeform_report.rows[3].replaced_by == at_once.spikeform_report.rows[3].replaced_by
    with pytest.raises(ConversionError, match="integers already"):
        spikeform.set_weight_bits(later)
    with pytest.raises(ConfigError, match="weight_bits=16"):
        spikeform.set_weight_bits(converted(conv=True))
    with pytest.raises(ConversionError, match="no such option"):
        spikeform.set_weight_bits(families.build("llama"))


def test_a_threshold_learns_where_all_else_is_frozen():
    """The fused operator has no gradient: it must not run where only a threshold wants one."""
    model = converted()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith("threshold"))
    model(IDS).logits.square().mean().backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    with spikeform.executor("collapsed"):
        model(IDS).logits.square().mean().backward()
    wanted = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert len(wanted) == 4
    assert all(torch.allclose(found[n], wanted[n], rtol=1e-3) for n in wanted)


def test_what_is_skipped_stays():
    model = converted(skip=("*.layers.0.*",))
    assert type(model.backbone.layers[0].mixer.in_proj) is torch.nn.Linear
    assert isinstance(model.backbone.layers[1].mixer.in_proj, SpikingLinear)


@pytest.mark.parametrize(
    ("family", "module", "kernel"),
    [
        ("mamba2", modeling_mamba2, "mamba2_split_conv1d_scan_combined"),
        ("mamba", modeling_mamba, "mamba_inner_fn"),
    ],
)
def test_no_fused_kernel_takes_the_output_projection(family, module, kernel, monkeypatch):
    """A kernel that multiplies with out_proj's weight itself would leave out its neuron, in training alone."""
    if not hasattr(module, kernel):
        pytest.skip(f"this transformers has no {kernel}")
    called = []

    def fused(*arguments, **options):
        called.append(kernel)
        return torch.zeros(4, 20, 64)

    monkeypatch.setattr(module, kernel, fused)
    dense = families.build(family).train()
    dense(IDS)
    assert called  # the trap is there
    called.clear()
    model = copy.deepcopy(converted(family)).train()
    fired = []
    hooks = [
        m.register_forward_hook(lambda *_: fired.append(1)) for m in model.modules() if isinstance(m, SignedInteger)
    ]
    for _ in range(2):  # trainers call train() before each step
        model.train()
        model(IDS).logits.sum().backward()
    assert not called
    assert len(fired) == 2 * len(hooks) == 2 * 2 * len(model.backbone.layers)
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
