"""Law 4 for SpikeLLM: save, load = the same bits, masks and report; damage is named; never a silent dense model."""

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
from spikeform.errors import DamagedCheckpointError
from spikeform.layers import CodedLinear
from spikeform.neurons import GIF

OPTIONS = [
    {"form": "official", "signed": False},
    {"span": "separate", "steps": 4},
    {"key_axis": "channel"},
    {"rotate": True},
    {"bits": 16},
    {"weight_bits": 16},
    {"weight_bits": 3, "weight_steps": (1, 2), "weight_salient": (0.2,)},
    {"weight_bits": 8, "weight_steps": (1, 8), "weight_salient": (0.2,), "pipeline": "rtn"},
    {"pipeline": "gptq", "weight_form": "ternary", "weight_steps": (1, 2, 4), "weight_salient": (0.2, 0.1)},
    {"pipeline": "gptq", "weight_form": "partial_binary", "weight_steps": (1, 8), "weight_salient": (0.1,)},
    {"attention": False},
]
CALIBRATION = families.tokens(rows=2, length=12, seed=5)


def same(model, loaded, logits):
    assert torch.equal(logits(loaded), logits(model))
    first, second = model.state_dict(), loaded.state_dict()
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) and first[name].dtype == second[name].dtype for name in first)
    assert loaded.spikeform_report.rows == model.spikeform_report.rows
    assert loaded.config.quantization_config == model.config.quantization_config
    masks = {n: m.times for n, m in model.named_modules() if isinstance(m, GIF)}
    assert all(torch.equal(times, loaded.get_submodule(n).times) for n, times in masks.items())  # T9
    return masks


@pytest.mark.parametrize(
    ("family", "options"),
    [(f, {}) for f in families.FAMILIES]
    + [("llama", o) for o in OPTIONS]
    + [(f, OPTIONS[index]) for f in ("gpt2", "qwen3") for index in (2, 3, 6)],
    ids=str,
)
def test_the_same_bits(family, options, saliency, logits, tmp_path):
    model = saliency(family, **options)
    model.save_pretrained(tmp_path)
    masks = same(model, type(model).from_pretrained(tmp_path), logits)
    assert bool(masks) == (options.get("bits") != 16)
    found = {t for times in masks.values() for t in times.unique().tolist()}
    assert found == ({1, 2, options.get("steps", 2)} if masks else set())  # keys and values have 2 at most


@pytest.mark.parametrize("options", [{}, OPTIONS[3], OPTIONS[8]], ids=str)
def test_our_own_save_keeps_the_facts_and_verifies(options, saliency, logits, tmp_path):
    model = saliency("llama", **options)
    path = spikeform.save(model, tmp_path / "out", max_shard_size="20KB")
    assert len(list(path.glob("*.safetensors"))) > 2
    assert spikeform.verify(path).values
    loaded = spikeform.load(path)
    same(model, loaded, logits)
    assert loaded.spikeform_report.to_dict() == model.spikeform_report.to_dict()
    assert len(loaded.spikeform_report.calibration["blocks"]) == 2
    again = spikeform.save(loaded, tmp_path / "again")
    same(model, spikeform.load(again), logits)


def test_files_are_as_small_as_their_bits(saliency, tmp_path):
    """A 4-bit weight takes half a byte, a ternary one its own width."""
    for options, per_column in (({}, 0.5), (OPTIONS[8], None), ({"weight_bits": 3, "pipeline": "rtn"}, 0.375)):
        folder = tmp_path / str(per_column)
        saliency("llama", **options).save_pretrained(folder)
        weight = load_file(folder / "model.safetensors")["model.layers.0.self_attn.q_proj.weight"]
        assert weight.dtype == torch.uint8
        least = 0.5 if per_column is None else per_column  # T = 1, 2, 4 take 2, 3 and 4 bits
        assert weight.shape[:2] == (1, 64)
        assert weight.shape[2] == 64 * per_column if per_column else weight.shape[2] <= 64 * least


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype, dense, logits, tmp_path):
    """Parameters are half precision; scales and ranges stay fp32, in memory, in the file and after a cast."""
    dense("llama").save_pretrained(tmp_path / "dense")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=dtype)
    spikeform.convert(model, spikeform.SpikeLLM(epochs=1, key_axis="channel"), CALIBRATION)
    model.save_pretrained(tmp_path / "spiking")
    for options in ({}, {"dtype": dtype}, {"dtype": "auto"}):
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "spiking", **options)
        same(model, loaded, logits)
        assert next(loaded.parameters()).dtype == dtype
    before = {n: b.clone() for n, b in model.named_buffers() if n.endswith((".scale", ".low", ".high"))}
    assert before
    assert all(b.dtype == torch.float32 for b in before.values())
    for cast in (lambda m: m.to(torch.float16), lambda m: m.bfloat16(), lambda m: m.double().to(torch.float16)):
        moved = dict(cast(copy.deepcopy(model)).named_buffers())
        assert all(torch.equal(moved[n], b) for n, b in before.items())


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_conversion_at_load(family, dense, logits, tmp_path):
    """``quantization_config=`` converts as it loads, on sequences of the model's own."""
    dense(family).save_pretrained(tmp_path / "dense")
    config = spikeform.SpikeLLM(epochs=0)
    model = type(dense(family)).from_pretrained(tmp_path / "dense", quantization_config=config)
    same(spikeform.convert(copy.deepcopy(dense(family)), config), model, logits)
    model.save_pretrained(tmp_path / "spiking")
    same(model, type(model).from_pretrained(tmp_path / "spiking"), logits)


def test_a_copy_is_independent(saliency, logits):
    model = saliency("llama")
    copied, before = copy.deepcopy(model), logits(model)
    assert torch.equal(logits(copied), before)
    for module in copied.modules():
        if isinstance(module, GIF):
            module.set_times(torch.full_like(module.times, module.steps))
        if isinstance(module, CodedLinear):
            module.weight[0] += 1
    assert not torch.equal(logits(copied), before)
    assert torch.equal(logits(model), before)


def test_the_backbone_of_a_checkpoint(saliency, tmp_path):
    model = saliency("llama")
    model.save_pretrained(tmp_path)
    backbone, ids = LlamaModel.from_pretrained(tmp_path), families.tokens()
    with torch.no_grad():
        assert torch.equal(backbone(ids).last_hidden_state, model.model(ids).last_hidden_state)


# Damage ----------------------------------------------------------------------------------------------------------

EVERYTHING = {
    "key_axis": "channel",
    "rotate": True,
    "weight_steps": (1, 2),
    "weight_salient": (0.2,),
    "weight_bits": 3,
    "epochs": 0,
}


@pytest.fixture(scope="module")
def saved(saliency, tmp_path_factory):
    path = tmp_path_factory.mktemp("whole") / "model"
    spikeform.save(saliency("llama", **EVERYTHING), path)
    return path


@pytest.fixture
def damage(saved, tmp_path):
    """Writes the checkpoint with changed tensors, loads it plainly, and returns the message of the error."""

    def attempt(change):
        tensors = load_file(saved / "model.safetensors")
        change(tensors)
        (tmp_path / "config.json").write_text((saved / "config.json").read_text())
        save_file({n: t.contiguous() for n, t in tensors.items()}, tmp_path / "model.safetensors", {"format": "pt"})
        with pytest.raises(DamagedCheckpointError) as caught:
            LlamaForCausalLM.from_pretrained(tmp_path)
        return str(caught.value)

    return attempt


def _block_names(saved):
    names = load_file(saved / "model.safetensors")
    return [n for n in names if ".layers.1." in n and (".self_attn." in n or "down_proj" in n)]


def test_every_tensor_of_a_block_is_missed(saved, damage):
    names = _block_names(saved)
    wanted = {"weight", "scale", "zero", "tier", "times", "low", "high", "signs"}
    assert {n.rsplit(".", 1)[1] for n in names} == wanted
    for kind in sorted(wanted):
        name = next(n for n in names if n.endswith(f".{kind}"))
        assert name in damage(lambda tensors, name=name: tensors.pop(name)), name
    for name in ("model.norm.weight", "lm_head.weight", "model.embed_tokens.weight"):
        assert name in damage(lambda tensors, name=name: tensors.pop(name)), name


@pytest.mark.parametrize("kind", ["weight", "scale", "zero", "tier", "times", "low", "high", "signs"])
def test_a_tensor_of_another_shape(kind, saved, damage):
    name = next(n for n in _block_names(saved) if n.endswith(f".{kind}"))

    def longer(tensors):
        tensors[name] = torch.cat([tensors[name]] * 2, -1)

    assert name in damage(longer)
    if tensors_of(saved)[name].shape[-1] > 1:
        assert name in damage(lambda tensors: tensors.update({name: tensors[name][..., :-1].clone()}))


def tensors_of(saved):
    return load_file(saved / "model.safetensors")


def _set(name, value):
    def change(tensors):
        tensors[name].view(-1)[1] = value

    return change


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("kind", ["scale", "low", "high", "input_layernorm.weight", "embed_tokens.weight"])
def test_a_tensor_that_is_not_finite(kind, value, saved, damage):
    name = next(n for n in tensors_of(saved) if n.endswith(kind))
    assert name in damage(_set(name, value))


@pytest.mark.parametrize(
    ("kind", "value"),
    [("times", 0), ("times", 3), ("times", 4), ("tier", 2), ("scale", -1.0), ("signs", 0), ("signs", 2)],
)
def test_a_value_out_of_range(kind, value, saved, damage):
    name = next(n for n in _block_names(saved) if n.endswith(f".{kind}"))
    assert name in damage(_set(name, value))


def test_a_range_the_wrong_way_round(saved, damage):
    low = next(n for n in _block_names(saved) if n.endswith(".low"))
    assert low.removesuffix(".low") in damage(lambda tensors: tensors[low].fill_(1e9))


def test_a_code_that_its_grid_does_not_have(saved, damage):
    """Tier 1 has codes of 0 to 14, in four bits: all ones is none of them."""
    name = next(n for n in _block_names(saved) if n.endswith("down_proj.weight"))
    assert name in damage(lambda tensors: tensors[name].fill_(255))


def test_a_zero_point_that_its_grid_does_not_have(saved, damage):
    """It would make every weight of the row larger or smaller by the same amount."""
    name = next(n for n in _block_names(saved) if n.endswith("down_proj.zero"))
    assert name in damage(_set(name, 100))


def test_tiers_that_are_not_those_of_the_packed_columns(saved, damage):
    """Another tier changes how many bytes a row has: the layer is named."""
    tier = next(n for n in _block_names(saved) if n.endswith("down_proj.tier"))
    assert tier.removesuffix(".tier") in damage(lambda tensors: tensors[tier].zero_())


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [("weight", torch.float32), ("times", torch.float32), ("tier", torch.float32), ("zero", torch.float32)],
)
def test_integers_that_are_none(kind, dtype, saved, damage):
    name = next(n for n in _block_names(saved) if n.endswith(f".{kind}"))
    assert name in damage(lambda tensors: tensors.update({name: tensors[name].to(dtype)}))


def test_a_weight_as_a_dense_model_has_it(saved, damage):
    name = next(n for n in _block_names(saved) if n.endswith("q_proj.weight"))
    assert name in damage(lambda tensors: tensors.update({name: torch.randn(64, 64)}))


def test_a_tensor_that_is_not_the_models(damage):
    assert "model.layers.7.extra" in damage(lambda tensors: tensors.update({"model.layers.7.extra": torch.ones(2)}))


def test_another_config_does_not_fit(saved, tmp_path):
    """The config says what the files hold; one that says something else is refused, not reinterpreted."""
    for change in (
        {"weight_bits": 4},
        {"weight_steps": [1, 4]},
        {"key_axis": "token"},
        {"rotate": False},
        {"bits": 16},
    ):
        config = json.loads((saved / "config.json").read_text())
        config["quantization_config"] |= change
        (tmp_path / "config.json").write_text(json.dumps(config))
        save_file(tensors_of(saved), tmp_path / "model.safetensors", {"format": "pt"})
        with pytest.raises(DamagedCheckpointError):
            LlamaForCausalLM.from_pretrained(tmp_path)


def test_a_damaged_model_is_not_saved(saliency, tmp_path):
    for kind, value in (("scale", float("nan")), ("low", float("inf"))):
        model = copy.deepcopy(saliency("llama", **EVERYTHING))
        buffer = next(b for n, b in model.named_buffers() if n.endswith(f".{kind}"))
        buffer.view(-1)[0] = value
        with pytest.raises(DamagedCheckpointError, match=kind):
            spikeform.save(model, tmp_path / "out")
        assert not (tmp_path / "out").exists()


# Without spikeform -----------------------------------------------------------------------------------------------

LOADS = """
import sys
from transformers import AutoModelForCausalLM
for path in sys.argv[1:]:
    try:
        AutoModelForCausalLM.from_pretrained(path)
        print("LOADED", path)
    except Exception as error:
        print("failed", path, type(error).__name__, str(error)[:300])
"""


def test_without_spikeform_every_load_fails(saliency, tmp_path):
    """Integer weights, real ones, real inputs, and partly binary weights that are stored real."""
    kinds = [("llama", {}), ("gpt2", {}), ("gpt2", OPTIONS[5]), ("llama", OPTIONS[4]), ("llama", OPTIONS[9])]
    folders = [str(tmp_path / str(index)) for index in range(len(kinds))]
    for folder, (family, options) in zip(folders, kinds, strict=True):
        saliency(family, **options).save_pretrained(folder)
    done = subprocess.run(
        [sys.executable, "-c", LOADS, *folders],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        check=False,
    )
    assert [line.split()[0] for line in done.stdout.splitlines()] == ["failed"] * len(kinds), done.stdout + done.stderr
    assert all(
        isinstance(AutoModelForCausalLM.from_pretrained(folder), type(saliency(f)))
        for folder, (f, _) in zip(folders, kinds, strict=True)
    )
