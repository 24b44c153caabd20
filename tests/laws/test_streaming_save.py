"""Law 4 for models that stream: save, load = the same bits; damage is named; never a silent dense model."""

import copy
import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM

import families
import spikeform
from spikeform.errors import ConversionError, DamagedCheckpointError
from spikeform.layers.streaming import steps_of
from spikeform.neurons import StreamingNeuron

OPTIONS = [
    {"steps": 0, "levels": 16},
    {"per_channel": True, "granularity": "channel", "gated": "product"},
    {"granularity": "position", "positions": 20, "sites": "all"},
    {"operators": 6},
    {"operators": 6, "per_channel": True, "sites": "all", "gated": "product"},
]


def reload(model, path, **options):
    spikeform.save(model, path)
    return type(model).from_pretrained(path, **options)


@pytest.mark.parametrize(
    ("family", "options"),
    [(family, {}) for family in families.FAMILIES]
    + [(family, options) for family in ("gpt2", "opt", "llama", "qwen3", "bert") for options in OPTIONS],
    ids=str,
)
def test_the_same_bits(family, options, streaming, logits, tmp_path):
    model = streaming(family, wide=False, **options)
    loaded = reload(model, tmp_path / "out")
    assert torch.equal(logits(loaded), logits(model))
    first, second = model.state_dict(), loaded.state_dict()
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) and first[name].dtype == second[name].dtype for name in first)
    assert loaded.spikeform_report.rows == model.spikeform_report.rows
    assert loaded.config.quantization_config == model.config.quantization_config
    assert steps_of(loaded) == options.get("steps", 4)
    again = spikeform.load(tmp_path / "out")
    assert torch.equal(logits(again), logits(model))


def test_steps_are_saved_and_may_be_changed_after(streaming, logits, tmp_path):
    model = copy.deepcopy(streaming("gpt2", wide=False))
    wanted = logits(model)
    spikeform.set_steps(model, 0)
    loaded = reload(model, tmp_path / "out")
    assert steps_of(loaded) == 0
    assert torch.equal(logits(loaded), logits(model))
    assert torch.equal(logits(spikeform.set_steps(loaded, 4)), wanted)


def test_learning_goes_on_where_it_was(streaming, tmp_path):
    """Stage 1 trains weights and thresholds; what stage 2 finds waits for it."""
    model = copy.deepcopy(streaming("gpt2", wide=False))
    for each in (model, reload(model, tmp_path / "out")):
        learning = {name: p.requires_grad for name, p in each.named_parameters()}
        assert all(learns != name.endswith((".scale", ".initial")) for name, learns in learning.items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_thresholds_stay_fp32(dtype, streaming, logits, tmp_path):
    model = streaming("llama", wide=False, granularity="channel")
    loaded = reload(model, tmp_path / "out", dtype=dtype)
    for name, neuron in model.named_modules():
        if isinstance(neuron, StreamingNeuron):
            other = loaded.get_submodule(name)
            assert all(torch.equal(a, b) for a, b in zip(neuron.parameters(), other.parameters(), strict=True))
    assert loaded.lm_head.weight.dtype == dtype
    spikeform.save(loaded, tmp_path / "half")
    again = spikeform.load(tmp_path / "half", dtype=dtype)
    assert torch.equal(logits(again), logits(loaded))
    assert all(p.dtype == torch.float32 for n, p in again.named_parameters() if ".neuron." in n)


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_conversion_at_load(family, dense, logits, tmp_path):
    dense(family).save_pretrained(tmp_path / "dense")
    config = spikeform.FAS(steps=3)
    model = type(dense(family)).from_pretrained(tmp_path / "dense", quantization_config=config)
    assert torch.equal(logits(model), logits(spikeform.convert(copy.deepcopy(dense(family)), spikeform.FAS(steps=3))))
    assert torch.equal(logits(reload(model, tmp_path / "out")), logits(model))


def test_las_models_have_no_steps_to_set(spiking):
    with pytest.raises(ConversionError, match="does not stream: set_steps takes a model converted with FAS"):
        spikeform.set_steps(spiking("llama"), 4)


# Damage --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(streaming, tmp_path_factory):
    path = tmp_path_factory.mktemp("whole") / "model"
    options = {"granularity": "position", "positions": 20, "sites": "all", "gated": "product", "per_channel": True}
    spikeform.save(streaming("llama", wide=False, **options), path)
    return path


@pytest.fixture
def damage(saved, tmp_path):
    def attempt(change):
        tensors = load_file(saved / "model.safetensors")
        change(tensors)
        (tmp_path / "config.json").write_text((saved / "config.json").read_text())
        save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(DamagedCheckpointError) as caught:
            LlamaForCausalLM.from_pretrained(tmp_path)
        return str(caught.value)

    return attempt


def test_every_tensor_of_a_block_is_missed(saved, damage):
    names = [n for n in load_file(saved / "model.safetensors") if ".layers.1." in n or ".layers." not in n]
    assert {n.rsplit(".", 1)[1] for n in names} >= {"weight", "threshold", "scale", "initial"}
    for name in names:
        assert name in damage(lambda tensors, name=name: tensors.pop(name)), name


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0, -1.0])
@pytest.mark.parametrize("key", ["threshold", "scale"])
def test_a_threshold_that_is_none(key, value, damage):
    name = f"model.layers.1.mlp.down_proj.neuron.{key}"

    def change(tensors):
        tensors[name].view(-1)[3] = value

    assert "model.layers.1.mlp.down_proj.neuron" in damage(change)


@pytest.mark.parametrize("value", [float("nan"), 1.0, -0.5])
def test_an_initial_potential_out_of_range(value, damage):
    name = "model.layers.1.mlp.down_proj.neuron.initial"
    assert "model.layers.1.mlp.down_proj.neuron" in damage(lambda tensors: tensors[name].view(-1)[:1].fill_(value))


@pytest.mark.parametrize("key", ["threshold", "scale", "initial"])
def test_a_tensor_of_another_shape(key, damage):
    name = f"model.layers.0.self_attn.q_proj.neuron.{key}"
    assert name in damage(lambda tensors: tensors.update({name: torch.full((3,), 0.5)}))


def test_a_weight_as_a_dense_model_has_it(damage):
    name = "model.layers.0.mlp.down_proj.weight"
    assert name in damage(lambda tensors: tensors.update({name: tensors[name][0].contiguous()}))


def test_a_config_that_says_another_granularity(saved, tmp_path):
    config = json.loads((saved / "config.json").read_text())
    config["quantization_config"] |= {"granularity": "channel", "positions": None}
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(load_file(saved / "model.safetensors"), tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(DamagedCheckpointError, match="scale has shape"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


# Without spikeform ---------------------------------------------------------------------------------------------

LOADS = """
import sys, transformers
root, failed = sys.argv[1], 0
for name, folder in (
    ("AutoModelForCausalLM", "llama"), ("LlamaForCausalLM", "llama"), ("AutoModel", "llama"),
    ("LlamaForCausalLM", "llama-product"), ("LlamaForCausalLM", "llama-marked"), ("GPT2LMHeadModel", "gpt2"),
    ("AutoModelForSequenceClassification", "bert"), ("AutoModelForCausalLM", "opt-0"),
):
    try:
        getattr(transformers, name).from_pretrained(f"{root}/{folder}")
        print("LOADED", name, folder)
    except Exception as error:
        failed += 1
print("failures", failed)
"""


@pytest.mark.parametrize(("head", "failures"), [("", 8), ("import spikeform", 0)], ids=["without", "with"])
def test_other_programs_fail_visibly(head, failures, dense, streaming, tmp_path):
    for folder, family, options in (
        ("llama", "llama", {}),
        ("llama-product", "llama", {"gated": "product"}),
        ("gpt2", "gpt2", {}),
        ("bert", "bert", {}),
        ("opt-0", "opt", {"steps": 0}),
    ):
        spikeform.save(streaming(family, wide=False, **options), tmp_path / folder)
    marked = spikeform.convert(
        copy.deepcopy(dense("llama")), spikeform.FAS(skip=("*.down_proj",)), families.tokens(rows=4)
    )
    spikeform.save(marked, tmp_path / "llama-marked")
    done = subprocess.run(
        [sys.executable, "-c", head + "\n" + LOADS, str(tmp_path)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        check=False,
    )
    assert f"failures {failures}" in done.stdout, done.stdout + done.stderr
    assert done.stdout.count("LOADED") == 8 - failures
