"""Checkpoints of integer weights: the same bits, small files, damage named, and nothing without spikeform."""

import json
import os
import shutil
import subprocess
import sys
from functools import cache

import coding
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, LlamaForCausalLM, LlamaModel

import families
import spikeform
from spikeform.errors import DamagedCheckpointError
from spikeform.layers import CodedLinear
from spikeform.neurons import GIF

OPTIONS = [
    {},
    {"weight_steps": (1, 2, 4)},
    {"weight_bits": 2, "weight_steps": (1, 2)},
    {"ternary": True},
    {"ternary": True, "weight_steps": (1, 2), "signed": False},
    {"weight_bits": 8, "axis": "channel", "rotate": True},
    {"real": True},
    {"form": "official", "attention": False},
]
model_of = cache(lambda family, **options: coding.build(family, **options))


@torch.no_grad()
def logits(model):
    return model(input_ids=families.tokens()).logits


def read(path):
    return {name: tensor for file in path.glob("*.safetensors") for name, tensor in load_file(file).items()}


def the_same(first, second):
    one, two = first.state_dict(), second.state_dict()
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) and one[name].dtype == two[name].dtype for name in one)
    assert torch.equal(logits(first), logits(second))
    assert first.spikeform_report.rows == second.spikeform_report.rows
    assert first.config.quantization_config == second.config.quantization_config


@pytest.mark.parametrize(
    ("family", "options"),
    [("llama", options) for options in OPTIONS]
    + [("gpt2", options) for options in OPTIONS[:3]]
    + [(family, OPTIONS[1]) for family in ("opt", "qwen3", "gpt_neox", "phi_qk_norm", "gemma")],
    ids=str,
)
@pytest.mark.parametrize("shards", [None, "20KB"])
def test_the_same_bits(family, options, shards, tmp_path):
    model = model_of(family, **options)
    model.save_pretrained(tmp_path / "plain", max_shard_size=shards or "5GB")
    assert (len(list((tmp_path / "plain").glob("*.safetensors"))) > 3) == bool(shards)
    the_same(model, type(model).from_pretrained(tmp_path / "plain"))
    spikeform.save(model, tmp_path / "ours", max_shard_size=shards or "5GB")
    loaded = spikeform.load(tmp_path / "ours")
    the_same(model, loaded)
    assert spikeform.verify(tmp_path / "ours").spiking_tensors > 20
    loaded.save_pretrained(tmp_path / "again", max_shard_size=shards or "5GB")
    first, second = read(tmp_path / "plain"), read(tmp_path / "again")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[n], second[n]) and first[n].dtype == second[n].dtype for n in first)


def test_bfloat16(tmp_path):
    """The other parameters are bfloat16, also where the file has fp32; scales never are."""
    families.build("llama").save_pretrained(tmp_path / "dense")
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.bfloat16)
    model = coding.converted(dense, coding.Coding(weight_steps=(1, 2)))
    model.save_pretrained(tmp_path / "spiking")
    for options in ({}, {"dtype": torch.bfloat16}, {"dtype": "auto"}):
        the_same(model, AutoModelForCausalLM.from_pretrained(tmp_path / "spiking", **options))
    whole = model_of("gpt2", weight_steps=(1, 2), axis="channel")
    whole.save_pretrained(tmp_path / "whole")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "whole", dtype=torch.bfloat16)
    assert loaded.transformer.h[0].attn.c_attn.bias.dtype == loaded.lm_head.weight.dtype == torch.bfloat16
    for name, buffer in whole.named_buffers():
        assert torch.equal(loaded.get_buffer(name), buffer)


def test_bytes_of_the_files(tmp_path):
    """Weights of four bits, with all that belongs to them, take less than 0.30 of what they take in bfloat16."""
    layers = torch.nn.ModuleDict({str(i): nn.Linear(192, 192, bias=False) for i in range(2)})
    coded = {}
    for name, layer in layers.items():
        neuron = GIF(4, (192,))
        neuron.set_times(torch.ones(192))
        layer.neuron = neuron
        weight = coding.codes_of(layer.weight, 4, (1, 2))
        weight.tier.copy_(torch.arange(192) % 10 == 0)
        weight.codes.zero_()
        linear = CodedLinear.from_spiking(layer, weight)
        state = {**linear.state_dict(), **linear.packed()}
        coded |= {f"{name}.{key}": tensor for key, tensor in state.items()}
    save_file(coded, tmp_path / "coded.safetensors")
    save_file({n: x.bfloat16() for n, x in layers.state_dict().items() if "weight" in n}, tmp_path / "b.safetensors")
    sizes = [(tmp_path / f"{name}.safetensors").stat().st_size for name in ("coded", "b")]
    assert sizes[0] <= 0.30 * sizes[1]


def test_the_backbone_of_a_checkpoint(tmp_path):
    model, ids = model_of("llama"), families.tokens()
    model.save_pretrained(tmp_path)
    backbone = LlamaModel.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(backbone(ids).last_hidden_state, model.model(ids).last_hidden_state)


# Damage ----------------------------------------------------------------------------------------------------

DOWN, ATTENTION = "model.layers.1.mlp.down_proj.", "model.layers.0.self_attn.spiking."


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("whole")
    model_of("llama", weight_steps=(1, 2), axis="channel", rotate=True).save_pretrained(path)
    return path


@pytest.fixture
def damage(saved, tmp_path):
    """Loads the checkpoint with changed tensors, and returns the problems that the error names."""

    def attempt(change):
        tensors = load_file(saved / "model.safetensors")
        change(tensors)
        shutil.copy(saved / "config.json", tmp_path)
        save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(DamagedCheckpointError) as caught:
            LlamaForCausalLM.from_pretrained(tmp_path)
        return caught.value.problems

    return attempt


def test_every_tensor_of_a_block_is_missed(saved, damage):
    names = [n for n in load_file(saved / "model.safetensors") if ".layers.1." in n]
    kinds = {n.rsplit(".", 1)[1] for n in names}
    assert kinds == {"weight", "scale", "zero", "tier", "times", "low", "high", "signs"}
    for name in names:
        assert damage(lambda tensors, name=name: tensors.pop(name)) == (f"{name} is missing from the files",)


def to(function):
    return lambda tensor: function(tensor).contiguous()


@pytest.mark.parametrize(
    ("name", "change"),
    [
        (DOWN + "weight", to(lambda x: x[..., :-1])),
        (DOWN + "weight", to(lambda x: x[0])),
        (DOWN + "weight", to(lambda x: torch.ones(64, 112))),
        (DOWN + "weight", to(lambda x: torch.ones(64, 112, dtype=torch.int8))),
        (DOWN + "weight", to(lambda x: torch.full_like(x, 255))),
        (DOWN + "scale", to(lambda x: x * float("nan"))),
        (DOWN + "scale", to(lambda x: x * float("inf"))),
        (DOWN + "scale", to(lambda x: -x)),
        (DOWN + "scale", to(lambda x: x[:1])),
        (DOWN + "zero", to(lambda x: x[:, 1:])),
        (DOWN + "zero", to(lambda x: x.float())),
        (DOWN + "zero", to(lambda x: x.int())),
        (DOWN + "tier", to(lambda x: x + 1)),
        (DOWN + "tier", to(lambda x: x[1:])),
        (DOWN + "tier", to(lambda x: x.float())),
        (DOWN + "neuron.times", to(lambda x: x * 0)),
        (DOWN + "neuron.times", to(lambda x: x + 2)),
        (DOWN + "neuron.times", to(lambda x: x[1:])),
        (ATTENTION + "key.low", to(lambda x: x * float("nan"))),
        (ATTENTION + "key.high", to(lambda x: x - 100)),
        (ATTENTION + "value.times", to(lambda x: x * 0)),
        (ATTENTION + "signs", to(lambda x: x * 0)),
        (ATTENTION + "signs", to(lambda x: x[1:])),
    ],
)
def test_damage_is_named(name, change, damage):
    problems = damage(lambda tensors: tensors.update({name: change(tensors[name])}))
    assert any(problem.startswith(f"{name} ") for problem in problems)
    layer = name.removesuffix(name.rsplit(".", 1)[1])
    assert all(problem.startswith(layer) for problem in problems)


def test_a_tier_that_does_not_fit_the_bytes(damage):
    problems = damage(lambda tensors: tensors.update({DOWN + "tier": 1 - tensors[DOWN + "tier"]}))
    assert len(problems) == 1
    assert problems[0].startswith(DOWN + "weight")
    assert "as its tiers say" in problems[0]


def test_a_tensor_that_is_not_the_models(damage):
    extra = {"model.layers.0.mlp.down_proj.codes": torch.ones(2)}
    assert damage(lambda tensors: tensors.update(extra)) == (f"{next(iter(extra))} is not of this model",)


def test_another_form_than_the_config_says(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "m")
    file = tmp_path / "m" / "config.json"
    config = json.loads(file.read_text())
    config["quantization_config"]["weight_bits"] = 3
    file.write_text(json.dumps(config))
    with pytest.raises(DamagedCheckpointError, match=r"q_proj\.weight is \[1, 64, \d+\] of torch\.uint8, not"):
        LlamaForCausalLM.from_pretrained(tmp_path / "m")


def test_what_is_off_its_grid_is_not_saved(tmp_path):
    model = coding.build("llama")
    model.model.layers[0].mlp.down_proj.weight[0, 0] = 99
    with pytest.raises(spikeform.errors.SpikeformError, match="outside of a grid of 16 levels"):
        spikeform.save(model, tmp_path / "m")
    assert not (tmp_path / "m").exists()


# Without spikeform -----------------------------------------------------------------------------------------

LOADS = """
import sys, transformers
for family in ("llama", "gpt2"):
    for options in ({}, {"dtype": "bfloat16"}):
        try:
            transformers.AutoModelForCausalLM.from_pretrained(f"{sys.argv[1]}/{family}", **options)
            print("LOADED", family)
        except Exception as error:
            print("failed", type(error).__name__, str(error)[:200])
"""


def test_without_spikeform_every_load_fails(tmp_path):
    for family in ("llama", "gpt2"):
        model_of(family).save_pretrained(tmp_path / family)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", LOADS, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.stdout.count("failed") == 4, done.stdout + done.stderr
    assert "LOADED" not in done.stdout
