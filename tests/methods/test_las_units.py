"""Thresholds that are powers of two: what is sent for a bf16 input is one bf16 number; else codes are as ever."""

import pytest
import torch
from safetensors.torch import load_file, save_file

import families
import spikeform
from spikeform.conversion.histogram import Histogram
from spikeform.errors import ConfigError, DamagedCheckpointError
from spikeform.methods.las.config import MULTIPLIED
from spikeform.methods.las.thresholds import fit, given
from spikeform.neurons import MT, OAT
from spikeform.neurons.oat import ROUNDINGS, powers_of_two
from spikeform.spikes import MultiThreshold, Radix2, SignedDigit, power_of_two
from spikeform.spikes.trace import Firing, observe
from spikeform.synapses import EXECUTORS

LAS = spikeform.LAS
BF16 = torch.bfloat16


def every_bf16(low=-40, high=6):
    """All bf16 magnitudes of these binades, both signs, and zero."""
    mantissas = torch.arange(128, 256, dtype=torch.float32) / 128
    values = (power_of_two(torch.arange(low, high))[:, None] * mantissas).reshape(-1)
    values = torch.cat([values, -values, torch.zeros(2)])
    assert torch.equal(values.to(BF16).float(), values)
    return values.to(BF16)


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("steps", range(1, 17))
@pytest.mark.parametrize(("kind", "coding"), [(OAT, Radix2), (MT, SignedDigit)])
def test_a_value_sent_for_bf16_is_one_bf16_number(kind, coding, steps, rounding):
    threshold = (0.5, 8.0)[: kind.populations]
    neuron = kind(coding(steps), threshold, rounding, power_of_two=True)
    assert neuron.single(torch.float32)
    assert neuron.single(torch.float64)
    assert not neuron.single(torch.float16)
    assert neuron.single(BF16) == (rounding != "strict" or steps <= 8)
    assert not kind(coding(steps), threshold, rounding).single(BF16)
    train = neuron(every_bf16())
    value = train.decode()
    assert torch.equal(value.to(BF16).float(), value) or not neuron.single(BF16)
    assert int(train.codes.abs().max()) == neuron.limit  # inputs reach 64 times the threshold
    spikes = train.unroll()
    assert torch.equal(train.count().sum(), train.coding.sent(spikes))
    assert torch.equal((train.steps().sum(0)).float(), train.codes)
    again = neuron.unpack(neuron.pack(train))
    assert torch.equal(again.decode(), value)


def test_strict_may_need_more_bits():
    """An exact multiple k codes as k - 1, so that ``single`` must not be claimed."""
    value = MT(Radix2(16), (1.0,), "strict", power_of_two=True)(torch.tensor([0.5], dtype=BF16)).decode()
    assert not torch.equal(value.to(BF16).float(), value)


@pytest.mark.parametrize("steps", range(1, 17))
def test_the_limit(steps):
    """The largest code of 8 significant bits; every code below it is as without the flag."""
    plain, neuron = OAT(Radix2(steps), (1.0, 4.0)), OAT(Radix2(steps), (1.0, 4.0), power_of_two=True)
    codes = torch.arange(plain.limit + 1)
    fits = torch.tensor(
        [int(c) == 0 or int(c).bit_length() - ((int(c) & -int(c)).bit_length() - 1) <= 8 for c in codes]
    )
    assert neuron.limit == int(codes[fits].max())
    assert plain.limit == (1 << steps) - 1
    x = torch.randn(4000, generator=torch.Generator().manual_seed(steps))
    assert torch.equal(neuron(x).codes, plain(x).codes.clamp(-neuron.limit, neuron.limit))


def test_what_kernels_are_told():
    neuron = OAT(SignedDigit(12), (0.25, 4.0), "floor", power_of_two=True)
    form = neuron.closed_form()
    assert form[1:] == (None, 0xFF0, 4096, 1)
    assert form.threshold is neuron.threshold
    assert OAT(Radix2(12), (0.3, 4.0)).closed_form().limit == 4095
    assert MT(MultiThreshold(4, 2), (1.0,)).closed_form() is None
    neuron.channel_shift = torch.ones(3, dtype=torch.int8)
    assert neuron.closed_form() is None  # no kernel multiplies by a shift that the weights do not carry
    neuron.folded = True
    assert neuron.closed_form().shift is neuron.channel_shift


def test_what_is_refused():
    with pytest.raises(ValueError, match="gaps"):
        OAT(MultiThreshold(4, 2), power_of_two=True)
    neuron = OAT(Radix2(8), site="here", power_of_two=True)
    with pytest.raises(ValueError, match=r"here.*powers of two.*3\.0"):
        neuron.set_threshold((1.0, 3.0))
    assert not neuron.calibrated
    with pytest.raises(ConfigError, match="multi_threshold"):
        LAS(units="power_of_two", coding="multi_threshold")
    for name in MULTIPLIED:
        with pytest.raises(ConfigError, match=f"{name}.*powers of two"):
            LAS(units="power_of_two", thresholds={name: (1.0, 3.0)})
        LAS(thresholds={name: (1.0, 3.0)})
    config = LAS(units="power_of_two", thresholds={"norm": (1.0, 3.0), "linear": (0.5, 4), "he*": (1.0, 3.0)})
    with pytest.raises(ConfigError, match=r"'he\*'.*powers of two"):
        given(neuron, config)


@pytest.mark.parametrize("threshold", ["least_error", "quantile"])
@pytest.mark.parametrize("outlier", [True, False])
@pytest.mark.parametrize("scale", [1e-12, 1e-8, 1e-3, 1.0, 3e4])
def test_calibration_finds_powers_of_two(scale, outlier, threshold):
    config = LAS(steps=8, units="power_of_two", outlier=outlier, threshold=threshold)
    neuron = (OAT if outlier else MT)(config.make_coding(), None, config.rounding, "site", power_of_two=True)
    x = torch.randn(20000, generator=torch.Generator().manual_seed(0))
    x[:20] *= 50
    x = x * scale
    assert fit(neuron, Histogram.of(x[None], (1,)), config) < 1e-3
    assert powers_of_two(neuron.threshold)
    assert neuron.calibrated
    if threshold == "quantile":
        top = float(neuron.threshold[-1])
        room = float(x.abs().max()) * config.margin
        assert top / 2 < room <= top or top < 1e-7
        if outlier and scale >= 1e-3:
            assert 0.999 <= float((x.abs() <= neuron.threshold[0]).float().mean()) < 1


@pytest.mark.parametrize("rounding", ["nearest", "floor"])
@pytest.mark.parametrize("steps", [4, 8, 12])
def test_the_least_error_is_near_the_least(steps, rounding):
    """Of all pairs of powers of two, tried on the samples themselves; so no room is to be left above them."""
    config = LAS(steps=steps, units="power_of_two", rounding=rounding, margin=1.0)
    neuron = OAT(config.make_coding(), None, rounding, "site", power_of_two=True)
    x = torch.randn(20000, generator=torch.Generator().manual_seed(0))
    x[:40] *= 100
    fit(neuron, Histogram.of(x[None], (1,)), config)

    def error(neuron):
        return float((neuron(x).decode() - x).square().sum())

    pairs = [(2.0**i, 2.0**j) for j in range(-4, 12) for i in range(-8, j)]
    least = min(error(OAT(config.make_coding(), pair, rounding, power_of_two=True)) for pair in pairs)
    assert error(neuron) <= 1.35 * least


@pytest.fixture(scope="module")
def converted():
    model = families.build("llama")
    config = LAS(steps=12, units="power_of_two", lm_head=True, per_channel=True)
    return spikeform.convert(model, config, families.tokens(rows=16, length=24, seed=5))


def test_which_sites_are_restricted(converted):
    neurons = [n for n in converted.modules() if isinstance(n, MT)]
    assert {n.role for n in neurons if n.power_of_two} == set(MULTIPLIED)
    assert all(powers_of_two(n.threshold) for n in neurons if n.power_of_two)
    assert not all(powers_of_two(n.threshold) for n in neurons if not n.power_of_two)
    assert not any(
        n.power_of_two for n in spikeform.convert(families.build("gpt2"), LAS(steps=4)).modules() if hasattr(n, "role")
    )


@pytest.mark.parametrize("family", families.FAMILIES)
def test_every_family_in_bf16(family):
    """Whatever a linear layer, a query, key or value population sends is one bf16 number, outliers and all."""
    model = families.build(family).to(BF16)
    spikeform.convert(model, LAS(steps=16, units="power_of_two"), families.tokens(rows=4, length=24, seed=5))
    fired = []
    with torch.no_grad(), observe(lambda e: fired.append(e) if isinstance(e, Firing) else None):
        out = model(input_ids=families.tokens()).logits
    assert out.isfinite().all()
    neurons = {n.site: n for n in model.modules() if isinstance(n, MT) and n.power_of_two}
    seen = [e for e in fired if e.site in neurons]
    assert {e.site for e in seen} == set(neurons)
    for event in seen:
        neuron, value = neurons[event.site], event.train.decode()
        if event.x.dtype == BF16:
            assert neuron.single(BF16)
            assert torch.equal(value.to(BF16).float(), value), event.site


def test_save_and_load(converted, tmp_path):
    converted.save_pretrained(tmp_path)
    loaded, ids = type(converted).from_pretrained(tmp_path), families.tokens()
    assert loaded.config.quantization_config == converted.config.quantization_config
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, converted(ids).logits)
    path = tmp_path / "model.safetensors"
    name = "model.layers.1.mlp.down_proj.neuron.threshold"
    tensors = load_file(path)
    save_file({**tensors, name: tensors[name] * 1.5}, path, metadata={"format": "pt"})
    with pytest.raises(DamagedCheckpointError, match=f"{name} is not made of powers of two"):
        type(converted).from_pretrained(tmp_path)


@pytest.mark.parametrize("family", families.CAUSAL)
def test_one_meaning_in_fp64(family):
    """Three executors, and decoding with a cache."""
    model, ids = families.build(family), families.tokens(length=12)
    config = LAS(steps=12, units="power_of_two")
    spikeform.convert(model, config, families.tokens(rows=4, length=24, seed=5)).double()
    past, parts = None, []
    with torch.no_grad():
        whole = model(input_ids=ids).logits
        for name in EXECUTORS:
            with spikeform.executor(name):
                families.close(model(input_ids=ids).logits, whole)
        for chunk in ids.split([5, 1, 1, 5], 1):
            out = model(input_ids=chunk, past_key_values=past, use_cache=True)
            past = out.past_key_values
            parts.append(out.logits)
    families.close(torch.cat(parts, 1), whole)
