"""Operators that fuse a neuron with what follows it mean what the modules mean that they stand for.

Each module of a converted model is given the same real input twice: fused, and as a train and a product. Codes and
integer sums are the same; what is real agrees to fp32's summation order. Whole models then differ by the few codes that
a last bit moves across a threshold.
"""

import copy
from contextlib import contextmanager

import pytest
import torch
from transformers import StaticCache

import families
import spikeform
from families import difference
from spikeform.layers import (
    CodedLinear,
    SpikingActivation,
    SpikingAttention,
    SpikingGatedMLP,
    SpikingLinear,
    SpikingNorm,
)
from spikeform.synapses import dispatch

MODULES = (SpikingLinear, SpikingNorm, SpikingActivation, SpikingAttention, SpikingGatedMLP)
IDS = families.tokens(rows=3, length=18)
LAS_OPTIONS = {
    "las": {},
    "las8": {"steps": 8},
    "signed": {"steps": 7, "coding": "signed_digit", "rounding": "floor"},
    "strict": {"steps": 6, "rounding": "strict", "outlier": False},
    "real_softmax": {"steps": 12, "softmax": False, "lm_head": True},
    "few_spike": {"steps": 8, "nonlinear": "few_spike"},
    "per_channel": {"steps": 8, "per_channel": True},
    "powers": {"steps": 16, "units": "power_of_two"},
    "int8": {"steps": 15, "weight_bits": 8},
    "int8_t7": {"steps": 7, "weight_bits": 8, "lm_head": True},
}
SPIKELLM_OPTIONS = {
    "spikellm": {"weight_bits": 4},
    "static_keys": {"key_axis": "channel"},
    "rotated": {"rotate": True},
    "one_step": {"steps": 1, "bits": 6, "weight_bits": 8},
}
CASES = [
    *((family, "las") for family in families.FAMILIES),
    *(("llama", name) for name in LAS_OPTIONS if name != "las"),
    *(("opt", name) for name in ("las8", "int8", "few_spike", "powers")),
    *(("gpt2", name) for name in ("las8", "int8")),
    *((family, "spikellm") for family in families.FAMILIES),
    *(("llama", name) for name in SPIKELLM_OPTIONS if name != "spikellm"),
]
DEVICES = [
    pytest.param("cpu", marks=pytest.mark.skipif(not dispatch.kernels("cpu")[0], reason=dispatch.kernels("cpu")[1])),
    pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]),
]
BLOCKED = {"cpu": (False, "for this test"), "cuda": (False, "for this test")}


@contextmanager
def apart():
    """Neurons and synapses one after the other."""
    whole = dispatch.kernels
    dispatch.kernels = lambda device: BLOCKED[device]
    try:
        yield
    finally:
        dispatch.kernels = whole


@pytest.fixture
def converted(spiking, saliency):
    def make(family, name, device="cpu", dtype=torch.float32):
        if name in LAS_OPTIONS:
            model = spiking(family, **LAS_OPTIONS[name])
        else:
            model = saliency(family, **SPIKELLM_OPTIONS[name])
        return copy.deepcopy(model).to(device, dtype)

    return make


@torch.no_grad()
def calls(model, ids):
    """Module, name, arguments and output of each spiking module's call in a forward pass, nothing fused."""
    seen = []

    def hook(name):
        def after(module, args, kwargs, output):
            seen.append((name, module, args, kwargs, output))

        return after

    hooks = [
        m.register_forward_hook(hook(n), with_kwargs=True) for n, m in model.named_modules() if isinstance(m, MODULES)
    ]
    with apart():
        model(input_ids=ids)
    for handle in hooks:
        handle.remove()
    return seen


def rows_of(x, rows):
    return x.reshape(-1, x.shape[-1])[:rows] if rows else x


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("family", "name"), CASES)
@torch.no_grad()
def test_each_module_alone(family, name, device, dtype, converted):
    if dtype == torch.bfloat16 and family not in ("llama", "opt", "gpt2"):
        pytest.skip("the other families differ in how modules are put together, not in the modules")
    model = converted(family, name, device, dtype)
    seen = calls(model, IDS.to(device))
    assert seen
    for site, module, args, kwargs, wanted in seen:
        for rows in (0,) if isinstance(module, SpikingAttention) else (0, 1, 3):  # prefill, and decoding
            given = (rows_of(args[0], rows), *args[1:])
            got = module(*given, **kwargs)
            with apart():
                wanted = module(*given, **kwargs)
            assert got.shape == wanted.shape, site
            assert got.dtype == wanted.dtype, site
            bound = 2e-5 if dtype == torch.float32 else 4e-3
            if isinstance(module, SpikingAttention | SpikingGatedMLP | SpikingNorm | SpikingActivation):
                bound = max(bound, 3 * 2.0 ** -min(module_steps(model), 12) / 10)  # a code at a rounding edge
            assert difference(wanted, got) <= bound, (site, type(module).__name__, rows)
            if isinstance(module, CodedLinear) and dtype == torch.float32:
                assert torch.equal(wanted, got), (site, rows)  # integer sums, then the same few roundings


def module_steps(model):
    config = model.config.quantization_config
    return config.steps if config.quant_method == "spikeform_las" else 16


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("family", "name"), [case for case in CASES if not case[0].startswith("bert")])
@torch.no_grad()
def test_decoding_is_the_full_forward(family, name, device, converted):
    model, ids = converted(family, name, device), IDS.to(device)
    full = model(input_ids=ids).logits
    with apart():
        reference = model(input_ids=ids).logits
    coarse = 0.15 if name in SPIKELLM_OPTIONS else 4 * 2.0 ** -module_steps(model) + 1e-3
    assert difference(reference, full) <= coarse
    past = StaticCache(config=model.config, max_cache_len=24)
    steps = [7, 1, 1, 6, 3]
    parts = [model(input_ids=chunk, past_key_values=past, use_cache=True).logits for chunk in ids.split(steps, dim=1)]
    assert difference(full, torch.cat(parts, 1)) <= coarse


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ["las8", "int8", "spikellm"])
@torch.no_grad()
def test_decoding_compiles_to_one_graph(name, device, converted):
    model, ids = converted("llama", name, device), IDS.to(device)
    past = StaticCache(config=model.config, max_cache_len=24)
    model(input_ids=ids[:, :8], past_key_values=past)
    backend = "aot_eager" if device == "cpu" else "inductor"
    step = torch.compile(model.forward, fullgraph=True, dynamic=False, backend=backend)
    parts = [step(input_ids=ids[:, t : t + 1], past_key_values=past).logits for t in range(8, 18)]
    coarse = 0.15 if name in SPIKELLM_OPTIONS else 4 * 2.0 ** -module_steps(model) + 1e-3
    assert difference(model(input_ids=ids).logits[:, 8:], torch.cat(parts, 1)) <= coarse
    torch.compiler.reset()


@pytest.mark.parametrize("device", DEVICES)
@torch.no_grad()
def test_padding_and_other_rows_do_not_matter(device, converted):
    model, ids = converted("llama", "las", device), IDS.to(device)
    alone = model(input_ids=ids[:1, 4:]).logits
    padded = ids.clone()
    padded[:, :4] = 0
    mask = torch.ones_like(padded)
    mask[:, :4] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    together = model(input_ids=padded, attention_mask=mask, position_ids=positions).logits
    assert difference(alone[0], together[0, 4:]) < 1e-3


def test_what_watches_or_learns_is_not_fused(converted):
    model = converted("llama", "las")
    layer = next(m for m in model.modules() if isinstance(m, SpikingLinear))
    x = torch.randn(2, layer.in_features)
    with torch.no_grad():
        assert dispatch.fusible(x, layer.weight) == dispatch.kernels("cpu")[0]
        assert not dispatch.fusible(x.double())
        with spikeform.executor("temporal"):
            assert not dispatch.fusible(x)
    assert not dispatch.fusible(x, layer.weight)
    out = layer(x)
    out.sum().backward()
    assert layer.weight.grad is not None
