"""Law 4: save, load = the same bits; damage is an error that names the tensor; never a silent dense model."""

import copy
import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM, LlamaModel

import families
import spikeform
from spikeform.errors import ConversionError, DamagedCheckpointError
from spikeform.neurons import MT


def reload(model, path, **options):
    model.save_pretrained(path, **options)
    return type(model).from_pretrained(path)


@pytest.mark.parametrize(("family", "twin"), families.ALL)
def test_the_same_bits(family, twin, spiking, logits, tmp_path):
    model = spiking(family, twin, per_channel=twin)
    loaded = reload(model, tmp_path)
    assert torch.equal(logits(loaded), logits(model))
    first, second = model.state_dict(), loaded.state_dict()
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert loaded.spikeform_report.rows == model.spikeform_report.rows
    assert loaded.config.quantization_config == model.config.quantization_config


@pytest.mark.parametrize(
    "options",
    [
        {"coding": "signed_digit", "rounding": "floor"},
        {"coding": "multi_threshold", "levels": 4, "rounding": "strict"},
        {"outlier": False, "softmax": False},
        {"norms": False, "activations": False},
        {"per_channel": True, "lm_head": True},
        {"skip": ("*.layers.0.*", "*.h.0.*"), "steps": 5},
    ],
    ids=str,
)
@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3"])  # head: of its own, tied, tied
def test_the_same_bits_with_options(family, options, dense, logits, tmp_path):
    if "skip" in options:
        options = {**options, "skip": [p for p in options["skip"] if (".h." in p) == (family == "gpt2")]}
    model = copy.deepcopy(dense(family))
    calibration = families.tokens(rows=4, length=12)
    spikeform.convert(model, spikeform.LAS(**{"steps": 9, **options}), calibration)
    loaded = reload(model, tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    assert torch.equal(logits(loaded), logits(model))
    if options.get("lm_head"):
        tied = loaded.lm_head.weight is loaded.get_input_embeddings().weight
        assert tied == (family != "llama")
        assert type(loaded.lm_head).__name__ == "SpikingLinear"


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "bert"])
def test_the_same_bits_with_learned_neurons(family, dense, logits, tmp_path):
    model = copy.deepcopy(dense(family))
    spikeform.convert(model, spikeform.LAS(steps=6, nonlinear="few_spike"), families.tokens(rows=4, length=12))
    loaded = reload(model, tmp_path)
    assert torch.equal(logits(loaded), logits(model))
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    name = next(n for n in tensors if n.endswith(".theta"))
    save_file({**tensors, name: tensors[name] * float("nan")}, path, metadata={"format": "pt"})
    with pytest.raises(DamagedCheckpointError, match=name):
        type(model).from_pretrained(tmp_path)


def test_bfloat16(dense, logits, tmp_path):
    """Parameters are bfloat16; thresholds stay as they were, in memory, in the file and after a cast.

    The dense model is loaded in bfloat16, not cast: a cast would round its rotary frequencies too.
    """
    dense("llama").save_pretrained(tmp_path / "dense")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.bfloat16)
    spikeform.convert(model, spikeform.LAS(steps=8, per_channel=True), families.tokens(rows=4))
    model.save_pretrained(tmp_path / "spiking")
    for options in ({}, {"dtype": torch.bfloat16}, {"dtype": "auto"}):
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "spiking", **options)
        assert all(n.threshold.dtype == torch.float32 for n in loaded.modules() if isinstance(n, MT))
        assert next(loaded.parameters()).dtype == torch.bfloat16
        assert torch.equal(logits(loaded), logits(model))
    before = {name: buffer.clone() for name, buffer in model.named_buffers() if name.endswith("threshold")}
    for cast in (lambda m: m.to(torch.float16), lambda m: m.to(dtype=torch.bfloat16), lambda m: m.bfloat16()):
        moved = dict(cast(copy.deepcopy(model)).named_buffers())
        assert all(torch.equal(moved[name], threshold) for name, threshold in before.items())


def test_float16_has_no_room_for_channel_shifts(dense, tmp_path):
    dense("llama").save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float16)
    with pytest.raises(ConversionError, match="overflows float16"):
        spikeform.convert(model, spikeform.LAS(steps=8, per_channel=True), families.tokens(rows=4))
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float16)
    spikeform.convert(model, spikeform.LAS(steps=8), families.tokens(rows=4))
    reloaded = reload(model, tmp_path / "spiking")
    with torch.no_grad():
        assert torch.equal(reloaded(families.tokens()).logits, model(families.tokens()).logits)


def test_a_float32_checkpoint_loaded_in_bfloat16(spiking, tmp_path):
    model = spiking("llama")
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    for name, neuron in model.named_modules():
        if isinstance(neuron, MT):
            assert torch.equal(loaded.get_submodule(name).threshold, neuron.threshold)
    assert loaded.lm_head.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_conversion_at_load(family, dense, logits, tmp_path):
    """``quantization_config=`` converts as it loads; it equals conversion in memory, and round-trips."""
    dense(family).save_pretrained(tmp_path / "dense")
    config = spikeform.LAS(steps=8)
    model = type(dense(family)).from_pretrained(tmp_path / "dense", quantization_config=config)
    assert torch.equal(logits(model), logits(spikeform.convert(copy.deepcopy(dense(family)), config)))
    assert torch.equal(logits(reload(model, tmp_path / "spiking")), logits(model))


def test_a_copy_is_independent(spiking, logits):
    model = spiking("llama")
    copied, before = copy.deepcopy(model), logits(model)
    assert torch.equal(logits(copied), before)
    with torch.no_grad():
        for module in copied.modules():
            if isinstance(module, MT):
                module.set_threshold(module.threshold * 0.1)
    assert not torch.equal(logits(copied), before)
    assert torch.equal(logits(model), before)


def test_the_backbone_of_a_checkpoint(spiking, tmp_path):
    """A class without the head leaves the head's weight over, and is the same backbone."""
    model = spiking("llama")
    model.save_pretrained(tmp_path)
    backbone, ids = LlamaModel.from_pretrained(tmp_path), families.tokens()
    with torch.no_grad():
        assert torch.equal(backbone(ids).last_hidden_state, model.model(ids).last_hidden_state)


# Damage ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(spiking, tmp_path_factory):
    path = tmp_path_factory.mktemp("whole")
    spiking("llama", per_channel=True).save_pretrained(path)
    return path


@pytest.fixture
def damage(saved, tmp_path):
    """Writes the checkpoint with changed tensors, loads it plainly, and returns the message of the error."""

    def attempt(change, loader=LlamaForCausalLM):
        tensors = load_file(saved / "model.safetensors")
        change(tensors)
        (tmp_path / "config.json").write_text((saved / "config.json").read_text())
        save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises((ValueError, RuntimeError)) as caught:
            loader.from_pretrained(tmp_path)
        return str(caught.value)

    return attempt


def test_every_tensor_of_a_block_is_missed(saved, damage):
    names = [n for n in load_file(saved / "model.safetensors") if ".layers.1." in n or ".layers." not in n]
    assert {n.rsplit(".", 1)[1] for n in names} >= {"weight", "threshold", "channel_shift"}
    for name in names:
        assert name in damage(lambda tensors, name=name: tensors.pop(name)), name


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.mlp.down_proj.weight",
        "model.layers.0.mlp.down_proj.neuron.threshold",
        "model.layers.0.self_attn.spiking.key.threshold",
        "model.layers.0.input_layernorm.weight",
        "model.embed_tokens.weight",
    ],
)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_tensor_that_is_not_finite(name, value, damage):
    def change(tensors):
        tensors[name].view(-1)[0] = value

    assert name in damage(change)


@pytest.mark.parametrize("value", [0.0, -1.0])
def test_a_threshold_that_is_not_positive(value, damage):
    name = "model.layers.0.self_attn.spiking.query.threshold"
    assert name in damage(lambda tensors: tensors[name].fill_(value))


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.mlp.down_proj.weight",
        "model.norm.weight",
        "model.layers.0.mlp.down_proj.neuron.threshold",
    ],
)
def test_a_tensor_of_another_shape(name, damage):
    def change(tensors):
        tensors[name] = tensors[name].repeat(*[2] * tensors[name].ndim)

    assert name in damage(change)


def test_a_weight_as_a_dense_model_has_it(damage):
    name = "model.layers.1.self_attn.q_proj.weight"
    assert name in damage(lambda tensors: tensors.update({name: tensors[name][0].contiguous()}))


def test_a_tensor_that_is_not_the_models(damage):
    """transformers would only warn of it; here it is refused: the file is another model's, or was changed."""
    assert "model.layers.7.extra" in damage(lambda tensors: tensors.update({"model.layers.7.extra": torch.ones(2)}))
    assert "threshold" in damage(
        lambda tensors: tensors.update({"model.layers.0.mlp.act_fn.neuron.threshold": torch.ones(2)}),
        AutoModelForCausalLM,
    )


def test_a_tensor_missing_from_a_shard(spiking, tmp_path):
    spiking("llama").save_pretrained(tmp_path, max_shard_size="40KB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    name = "model.layers.0.self_attn.spiking.query.threshold"
    shard = tmp_path / index["weight_map"].pop(name)
    tensors = load_file(shard)
    del tensors[name]
    save_file(tensors, shard, metadata={"format": "pt"})
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(DamagedCheckpointError, match=name):
        LlamaForCausalLM.from_pretrained(tmp_path)


# Without spikeform -----------------------------------------------------------------------------------------


def python(code, *arguments):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )


@pytest.fixture(scope="module")
def folders(spiking, tmp_path_factory):
    root = tmp_path_factory.mktemp("folders")
    for family in ("llama", "gpt2", "bert"):
        spiking(family, steps=8).save_pretrained(root / family)
    return root


LOADS = """
import sys, transformers
root, failed = sys.argv[1], 0
for name, family in (
    ("AutoModelForCausalLM", "llama"), ("LlamaForCausalLM", "llama"),
    ("AutoModelForCausalLM", "gpt2"), ("GPT2LMHeadModel", "gpt2"),
    ("AutoModelForSequenceClassification", "bert"), ("BertForSequenceClassification", "bert"),
    ("AutoModel", "llama"),
):
    try:
        getattr(transformers, name).from_pretrained(f"{root}/{family}")
        print("LOADED", name, family)
    except Exception as error:
        failed += 1
        print("failed", name, family, type(error).__name__, str(error)[:300])
print("failures", failed)
"""


def test_without_spikeform_every_load_fails(folders):
    done = python(LOADS, folders)
    assert "failures 7" in done.stdout, done.stdout + done.stderr
    assert "LOADED" not in done.stdout
    plain = python(
        f"import transformers; transformers.AutoModelForCausalLM.from_pretrained({str(folders / 'llama')!r})"
    )
    assert plain.returncode != 0


@pytest.mark.parametrize(
    "head",
    [
        "import spikeform",
        "import transformers, spikeform",
        "import transformers as t; t.LlamaConfig(); t.AutoModelForCausalLM; import spikeform",
        "from transformers.quantizers import auto; import spikeform",
        "import spikeform.spikes; import transformers",
    ],
)
def test_with_spikeform_in_any_order_every_load_works(head, folders):
    done = python(head + "\n" + LOADS, folders)
    assert "failures 0" in done.stdout, done.stdout + done.stderr
