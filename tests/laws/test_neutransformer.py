"""The laws on GPT-2 and LLaMA, converted with NeuTransformer."""

import copy
import subprocess
import sys
from functools import cache

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, StaticCache

import families
import spikeform
from families import difference
from spikeform.errors import ConfigError, ConversionError, DamagedCheckpointError, SpikeformError
from spikeform.layers import SpikingLinear
from spikeform.layers.self_attention import SpikingSelfAttention
from spikeform.layers.state_cache import StateLayer
from spikeform.spikes.trace import Product, observe

FAMILIES = ("gpt2", "llama")
IDS = families.tokens(rows=3, length=18)
OPTIONS = {
    "default": {},
    "signed": {"spikes": "signed", "reset": "soft", "ffn": "relu_if"},
    "windows": {"spikes": "signed", "windows": [2, 5, 0], "tau": 0.0, "reset": "soft"},
    "near": {"windows": [1, 3]},
    "one_step": {"steps": 1, "ffn": "none", "normalise": False},
    "many_steps": {"steps": 8, "ffn_steps": 32, "balance": "percentile"},
}
CASES = [(family, name) for family in FAMILIES for name in OPTIONS]
ROUNDING = 1e-5


@cache
def spiking_of(family, name="default"):
    config = spikeform.NeuTransformer(**OPTIONS[name])
    return spikeform.convert(families.build(family), config, families.tokens(rows=8, length=24, seed=5))


@torch.no_grad()
def logits_of(model, ids=IDS, **more):
    return model(input_ids=ids, **more).logits


@pytest.mark.parametrize(("family", "name"), CASES)
def test_both_forms_of_attention_are_the_same_bits(family, name):
    model = copy.deepcopy(spiking_of(family, name))
    wanted = logits_of(model)
    for chunk in (1, 7):
        for layer in model.modules():
            if isinstance(layer, SpikingSelfAttention):
                layer.chunk = chunk
        assert torch.equal(logits_of(model), wanted)


@pytest.mark.parametrize(("family", "name"), CASES)
@pytest.mark.parametrize("chunks", [[1] * 18, [7, 1, 1, 6, 3]], ids=["tokens", "chunks"])
def test_decoding_is_the_full_forward_with_a_cache_that_does_not_grow(family, name, chunks):
    model, parts, past, sizes = spiking_of(family, name), [], None, set()
    with torch.no_grad():
        for chunk in IDS.split(chunks, 1):
            out = model(input_ids=chunk, past_key_values=past, use_cache=True)
            past = out.past_key_values
            parts.append(out.logits)
            layer = past.layers[0]
            sizes.add((layer.keys.shape, None if layer.recent is None else layer.recent.shape))
    assert difference(logits_of(model), torch.cat(parts, 1)) <= ROUNDING
    assert len(sizes) == 1
    assert past.get_seq_length() == 18
    assert all(isinstance(layer, StateLayer) for layer in past.layers)


@pytest.mark.parametrize("family", FAMILIES)
def test_generation(family):
    model, ids = spiking_of(family), IDS[:2, :8]
    written = model.generate(ids, max_new_tokens=8, do_sample=False, eos_token_id=None)
    assert torch.equal(written[:, 8:], logits_of(model, written).argmax(-1)[:, 7:-1])
    assert model.generate(ids, max_new_tokens=4, num_beams=3, eos_token_id=None).shape == (2, 12)
    past = StaticCache(config=model.config, max_cache_len=24)
    again = model.generate(ids, max_new_tokens=8, do_sample=False, eos_token_id=None, past_key_values=past)
    assert torch.equal(again, written)
    mask = torch.ones(2, 8, dtype=torch.long)
    mask[0, :3] = 0
    padded = model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False, eos_token_id=None)
    alone = model.generate(ids[:1, 3:], max_new_tokens=6, do_sample=False, eos_token_id=None)
    assert torch.equal(padded[:1, 3:], alone)


@pytest.mark.parametrize(("family", "name"), CASES)
def test_nothing_depends_on_later_tokens_padding_or_other_rows(family, name):
    model = spiking_of(family, name)
    changed = IDS.clone()
    changed[:, 11:] = (changed[:, 11:] - 3 + 50) % (families.VOCABULARY - 3) + 3
    before, after = logits_of(model), logits_of(model, changed)
    assert torch.equal(before[:, :11], after[:, :11])
    assert not torch.equal(before[:, 11:], after[:, 11:])
    filler = families.tokens(rows=3, length=5, seed=9)
    mask = torch.cat([torch.zeros_like(filler), torch.ones_like(IDS)], 1)
    places = (mask.cumsum(-1) - 1).clamp(min=0)
    padded = logits_of(model, torch.cat([filler, IDS], 1), attention_mask=mask, position_ids=places)[:, 5:]
    assert difference(before, padded) <= ROUNDING
    changed = torch.cat([IDS[:1], families.tokens(rows=2, length=18, seed=7)])
    assert torch.equal(before[0], logits_of(model, changed)[0])
    assert torch.equal(before, logits_of(model))


@pytest.mark.parametrize(("family", "name"), CASES)
def test_executors_agree_and_count_is_sent(family, name):
    """In linear layers; attention's own products are integers in one form or the other."""
    model, found = spiking_of(family, name), {}
    for executor in ("temporal", "collapsed", "event"):
        told = []
        with spikeform.executor(executor), observe(lambda e, told=told: told.append(e)):
            logits = logits_of(model)
        found[executor] = logits
        for event in told:
            if isinstance(event, Product) and event.sent is not None:
                assert int(event.sent[0]) == int(event.operands[0].count().sum())
    assert difference(found["temporal"], found["collapsed"]) <= ROUNDING
    assert difference(found["temporal"], found["event"]) <= ROUNDING


@pytest.mark.parametrize(("family", "name"), CASES)
def test_save_and_load_are_the_same_bits(family, name, tmp_path):
    model = spiking_of(family, name)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is type(model)
    assert loaded.config.model_type == f"neutransformer_{family}"
    assert torch.equal(logits_of(loaded), logits_of(model))
    first, second = model.state_dict(), loaded.state_dict()
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    half = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    gains = [p for n, p in half.named_parameters() if n.endswith(".gain")]
    assert len(gains) == 8
    assert all(p.dtype == torch.float32 for p in gains)


def test_an_installation_without_spikeform_refuses_the_checkpoint(tmp_path):
    spiking_of("gpt2").save_pretrained(tmp_path)
    script = f"from transformers import AutoModelForCausalLM; AutoModelForCausalLM.from_pretrained({str(tmp_path)!r})"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "neutransformer_gpt2" in done.stderr
    done = subprocess.run([sys.executable, "-c", f"import spikeform; {script}"], capture_output=True, check=False)
    assert done.returncode == 0


def test_damage_is_named(tmp_path):
    spiking_of("gpt2").save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    name = next(key for key in tensors if key.endswith("spiking.key.gain"))
    for broken in ({k: v for k, v in tensors.items() if k != name}, {**tensors, name: tensors[name] * float("nan")}):
        save_file(broken, file, metadata={"format": "pt"})
        with pytest.raises(DamagedCheckpointError, match=r"spiking\.key\.gain"):
            AutoModelForCausalLM.from_pretrained(tmp_path)


def test_what_spikes_and_what_stays():
    for family in FAMILIES:
        model = spiking_of(family)
        report = {row.name: row for row in model.spikeform_report.rows}
        spiking = [m for m in model.modules() if isinstance(m, SpikingLinear)]
        assert len(spiking) == 4  # of each block: attention's output and the way down
        assert sum(row.kind == "attention" for row in model.spikeform_report.replaced) == 2
        assert all("real input" in row.reason for row in report.values() if row.name.endswith(("c_attn", "q_proj")))
        rates = model.spikeform_report.calibration["rates"]
        assert all(0.1 < rate < 0.35 for rate in rates.values())
    with pytest.raises(ConversionError, match="known are"):
        spikeform.convert(families.build("opt"), spikeform.NeuTransformer(), IDS)


def test_a_feed_forward_code_keeps_the_negative_lobe():
    model, dense = spiking_of("gpt2"), families.build("gpt2")
    inside = []
    model.transformer.h[0].mlp.c_proj.register_forward_pre_hook(lambda m, args: inside.append((m, args[0])))
    logits_of(model)
    layer, x = inside[0]
    with torch.no_grad():
        codes = layer.neuron(x).codes
    assert int(codes.min()) < 0 < int(codes.max())
    assert type(model.transformer.h[0].mlp.act) is type(dense.transformer.h[0].mlp.act)


def test_what_it_does_not_know_is_refused():
    for options, named in (({"windows": (0, 2)}, "windows"), ({"windows": (2.5,)}, "windows"), ({"tau": 0.5}, "tau")):
        with pytest.raises(ConfigError, match=named):
            spikeform.NeuTransformer(**options)
    with pytest.raises(ConversionError, match="all layers"):
        spikeform.convert(families.build("gpt2"), spikeform.NeuTransformer(skip=("*h.0.attn*",)), IDS)
    packed = torch.arange(9).repeat(1, 2)
    with pytest.raises(SpikeformError, match="packed sequences"):
        logits_of(spiking_of("llama"), IDS[:1], position_ids=packed, use_cache=False)
