"""SpikeLLM's int8 output head: the same bits in every executor and after a reload; and what it costs in quality."""

import copy

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import families
import spikeform
from spikeform import pretrained
from spikeform.conversion.weights import row_codes
from spikeform.energy import Counter
from spikeform.errors import ConversionError, DamagedCheckpointError
from spikeform.evaluation import load_text, perplexity, tokenize
from spikeform.layers import CodedLinear, SpikingLinear
from spikeform.neurons import GIF
from spikeform.spikes.trace import Firing, Product, observe
from spikeform.synapses import EXECUTORS, fused
from spikeform.synapses.dispatch import kernels

CALIBRATION, IDS = families.tokens(rows=2, length=12, seed=5), families.tokens()
OWN = ("llama", "qwen2", "gpt_neox", "phi")  # heads of their own; phi's has a bias
TIED = ("gpt2", "qwen3", "gemma", "opt_post_norm", "bert_mlm")
OPTIONS = {
    "default": {},
    "unsigned": {"signed": False},
    "official": {"form": "official", "span": "separate"},
    "gptq": {"pipeline": "gptq", "bits": 8, "weight_bits": 3},
    "rotated": {"rotate": True},
}


def convert(family="llama", head="int8", **options):
    model = families.build(family) if isinstance(family, str) else family
    return spikeform.convert(model, spikeform.SpikeLLM(**{"epochs": 0, "lm_head": head, **options}), CALIBRATION)


def untied(model):
    """The same function, its head with weights of its own."""
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    model.config.tie_word_embeddings, model.all_tied_weights_keys = False, {}
    return model


@torch.no_grad()
def logits(model, ids=IDS):
    return model(input_ids=ids).logits


def row_of(model):
    head = model.get_output_embeddings()
    name = next(name for name, module in model.named_modules() if module is head)
    return next(row for row in model.spikeform_report.rows if row.name == name)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("family", OWN)
def test_the_same_bits_in_every_executor_and_after_a_reload(family, options, tmp_path):
    model = convert(family, **options)
    head, dense = model.get_output_embeddings(), families.build(family).get_output_embeddings()
    assert type(head) is CodedLinear
    assert head is model.get_submodule(head.site)
    assert head.neuron.site == head.site
    if not options.get("rotate"):  # which folds the norm before it into its weights, and into a bias
        assert (head.bias is None) == (dense.bias is None)
        assert torch.equal(head.weight, row_codes(dense.weight).codes)
    found = {}
    for name in EXECUTORS:
        with spikeform.executor(name):
            found[name] = logits(model)
    assert found["collapsed"].std() > 0
    assert all(torch.equal(found["collapsed"], other) for other in found.values())
    assert families.difference(found["collapsed"], logits(model)) < 1e-5  # fused attention sums in another order
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert torch.equal(logits(loaded), logits(model))
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert loaded.spikeform_report.rows == model.spikeform_report.rows
    assert loaded.config.quantization_config.lm_head == "int8"
    row = row_of(model)
    assert (row.replaced_by, row.reason) == ("CodedLinear", "GIF of 7 bits, 8-bit weights")


def test_it_is_the_product_of_the_rounded_numbers():
    """And only the head differs from a conversion that leaves it real."""
    model, real = convert(), convert(head="real")
    for name, tensor in real.state_dict().items():
        assert name == "lm_head.weight" or torch.equal(tensor, model.state_dict()[name]), name
    hidden = torch.randn(3, 5, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        out, wanted = model.lm_head(hidden), real.lm_head(hidden)
        value = model.lm_head.neuron(hidden).decode() @ model.lm_head.integer_weight().dequantise().T
    assert families.difference(value, out) < 1e-6
    for name in EXECUTORS:
        with spikeform.executor(name), torch.no_grad():
            assert torch.equal(model.lm_head(hidden), out), name
    assert 1e-4 < families.difference(wanted, out) < 0.02
    span = hidden.amax(-1, keepdim=True) - hidden.amin(-1, keepdim=True)
    error = (model.lm_head.neuron(hidden).decode() - hidden).abs()
    assert bool((error <= span / 127 * 0.5001).all())


@pytest.mark.skipif(not kernels("cpu")[0], reason=kernels("cpu")[1])
def test_one_fused_product_where_neurons_are_the_usual_ones(monkeypatch):
    calls, run = [], fused.gif_linear

    def counted(x, weight, *rest):
        calls.append(tuple(weight.shape))
        return run(x, weight, *rest)

    monkeypatch.setattr("spikeform.layers.coded.gif_linear", counted)
    model = convert(bits=8)  # two steps of 8 bits are beyond int8: the blocks have no fused product then
    logits(model)
    assert calls == [(families.VOCABULARY, 64)]


@pytest.mark.parametrize("family", TIED)
def test_a_tied_head_stays_real_and_the_report_says_so(family, tmp_path):
    model, real = convert(family), convert(family, head="real")
    assert type(model.get_output_embeddings()) is nn.Linear
    assert torch.equal(logits(model), logits(real))
    row = row_of(model)
    assert row.replaced_by is None
    assert row.reason == "outside the blocks, and tied to the embedding, whose weights stay real"
    assert row_of(real).reason == "outside the blocks (lm_head is real)"
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert torch.equal(logits(loaded), logits(model))
    assert loaded.spikeform_report.rows == model.spikeform_report.rows


def test_skipped_absent_or_of_no_use():
    model = convert(skip=("lm_head",))
    assert type(model.lm_head) is nn.Linear
    assert row_of(model).reason == "named in skip"
    assert not [row for row in convert("bert").spikeform_report.replaced if "classifier" in row.name]
    broken = families.build("llama")
    with torch.no_grad():
        broken.lm_head.weight[3, 5] = float("nan")
    with pytest.raises(ConversionError, match="lm_head: a weight to be coded is not finite"):
        convert(broken)


def test_of_real_activations_and_of_real_weights():
    model = convert(bits=16)
    assert model.lm_head.neuron is None
    assert row_of(model).reason == "real activations, 8-bit weights"
    real = convert(bits=16, head="real")
    assert families.difference(logits(real), logits(model)) < 0.01
    model = convert(weight_bits=16)
    coded = [name for name, m in model.named_modules() if isinstance(m, CodedLinear)]
    assert coded == ["lm_head"]
    rows = {row.replaced_by for row in model.spikeform_report.replaced if row.kind == "linear"}
    assert rows == {"CodedLinear", "SpikingLinear"}


def test_a_resumed_conversion_and_half_precision(tmp_path):
    config, work = spikeform.SpikeLLM(epochs=0, lm_head="int8"), tmp_path / "work"

    def stop(done, blocks):
        if done == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        spikeform.convert(families.build("llama"), config, CALIBRATION, workdir=work, progress=stop)
    resumed = spikeform.convert(families.build("llama"), config, CALIBRATION, workdir=work)
    assert torch.equal(logits(resumed), logits(convert()))
    families.build("llama").save_pretrained(tmp_path / "dense")
    model = convert(AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.bfloat16))
    assert model.lm_head.scale.dtype == torch.float32
    assert logits(model).dtype == torch.bfloat16
    model.save_pretrained(tmp_path / "half")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "half", dtype=torch.bfloat16)
    assert torch.equal(logits(loaded), logits(model))


def test_a_damaged_head_is_named(tmp_path):
    from safetensors.torch import load_file, save_file

    convert().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    assert (tensors["lm_head.weight"].dtype, tensors["lm_head.weight"].shape) == (torch.uint8, (1, 120, 64))
    for key, change in {
        "lm_head.neuron.times": {"lm_head.neuron.times": tensors["lm_head.neuron.times"] * 0},
        "lm_head.scale": {"lm_head.scale": tensors["lm_head.scale"] * float("nan")},
    }.items():
        save_file({**tensors, **change}, file, metadata={"format": "pt"})
        with pytest.raises(DamagedCheckpointError, match=key):
            AutoModelForCausalLM.from_pretrained(tmp_path)


def test_energy_counts_it():
    model, counter = convert(), Counter()
    with torch.no_grad(), spikeform.executor("temporal"), counter.watch(model):
        model(IDS)
    tally = next(tally for (site, _), tally in counter.products.items() if site == "lm_head")
    assert tally.sent == sum(operand.spikes for operand in tally.operands) > 0
    report, real = (spikeform.energy(m, IDS, dense=families.build("llama")) for m in (model, convert(head="real")))
    assert report.ace["additive_fraction"] == 1
    more = report.ace["macs_per_token"] - real.ace["macs_per_token"]
    assert more == families.VOCABULARY * 64
    assert report.ace["macs_per_token"] * IDS.numel() == report.ops["dense"]["linear_macs"]
    fired = []
    with torch.no_grad(), observe(lambda e: fired.append(e) if isinstance(e, Firing | Product) else None):
        model(input_ids=IDS)
    assert {e.site for e in fired if isinstance(e, Firing)} >= {"lm_head"}
    assert "lm_head" in {e.site for e in fired if isinstance(e, Product)}


def test_cached_decoding_is_the_full_forward():
    model, ids = convert(), families.tokens(length=12)
    past, parts = None, []
    with torch.no_grad():
        for chunk in ids.split([5, 1, 1, 5], 1):
            out = model(input_ids=chunk, past_key_values=past, use_cache=True)
            past = out.past_key_values
            parts.append(out.logits)
    assert families.difference(logits(model, ids), torch.cat(parts, 1)) < 0.02  # codes may flip: real sums are real
    alone = torch.cat([logits(model, row[None]) for row in ids])
    assert families.difference(logits(model, ids), alone) < 0.02


def test_what_it_costs_in_quality(data_root):
    """The embedded llama, its head untied: perplexity of 5,120 tokens moves by less than 1 in 400."""
    dense = AutoModelForCausalLM.from_pretrained(pretrained.path("llama")).eval()
    tokenizer, books = AutoTokenizer.from_pretrained(pretrained.path("llama")), data_root / "books"
    ids = tokenize(tokenizer, load_text(books / "valid.txt.xz"))[:5_120]
    head = load_text(books / "train-00.txt.xz")[0][:20_000]
    calibration = torch.tensor(tokenizer(head)["input_ids"])[:512][None]
    found = {}
    for kind in ("real", "int8"):
        config = spikeform.SpikeLLM(pipeline="rtn", lm_head=kind)
        model = spikeform.convert(untied(copy.deepcopy(dense)), config, calibration)
        assert isinstance(model.lm_head, SpikingLinear) == (kind == "int8")
        found[kind] = perplexity(model, ids).perplexity
    assert isinstance(model.lm_head.neuron, GIF)
    assert found["real"] < 100
    assert abs(found["int8"] / found["real"] - 1) < 0.0025, found
