"""Checkpoints of models that LAS really converted."""

import json

import pytest
import standin
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
)

import spikeform
from spikeform.errors import CheckpointError, DamagedCheckpointError, NewerFormatError

IDS = torch.arange(20).view(2, 10)


def gpt2():
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=100, n_embd=64, n_layer=2, n_head=4, n_positions=64, bos_token_id=0, eos_token_id=0)
    return GPT2LMHeadModel(config).eval()


def bert():
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=100,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=96,
        max_position_embeddings=64,
        num_labels=3,
    )
    return BertForSequenceClassification(config).eval()


def convert(model, **options):
    return spikeform.convert(model, spikeform.LAS(steps=8, **options), calibration=torch.randint(100, (4, 16)))


@pytest.fixture(scope="module")
def spiking():
    torch.manual_seed(0)
    return convert(standin.dense())


@pytest.fixture
def path(spiking, tmp_path):
    return spikeform.save(spiking, tmp_path / "m")


def tensors(path):
    return {name: tensor for file in path.glob("*.safetensors") for name, tensor in load_file(file).items()}


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.parametrize(
    ("build", "options"),
    [
        (standin.dense, {}),
        (standin.dense, {"per_channel": True, "lm_head": True}),
        # The sub-neurons of few_spike are fitted at conversion, which is what takes the time.
        pytest.param(standin.dense, {"nonlinear": "few_spike"}, marks=pytest.mark.slow),
        (gpt2, {}),
        (gpt2, {"lm_head": True}),  # the head is tied to the embedding
        (bert, {}),
    ],
)
def test_same_bits_after_save_and_load(build, options, tmp_path):
    model = convert(build(), **options)
    path = spikeform.save(model, tmp_path / "m", max_shard_size="100KB")
    loaded = spikeform.load(path)
    assert type(loaded) is type(model)
    assert torch.equal(logits(model), logits(loaded))
    again = spikeform.save(loaded, tmp_path / "again", max_shard_size="100KB")
    first, second = tensors(path), tensors(again)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_manifest_of_a_conversion(spiking, path):
    manifest = spikeform.checkpoint.read_manifest(path)
    assert manifest.config == json.loads(json.dumps(spiking.config.quantization_config.to_dict()))
    assert manifest.report == json.loads(json.dumps(spiking.spikeform_report.to_dict()))
    assert "model.layers.0.self_attn.q_proj.weight" in manifest.spiking_tensors
    assert "model.embed_tokens.weight" not in manifest.spiking_tensors
    thresholds = [name for name in manifest.tensors if name.endswith("threshold")]
    assert len(thresholds) > 10
    assert {*thresholds} <= {*manifest.spiking_tensors}


@pytest.mark.parametrize("plain", [False, True])
def test_every_tensor_is_needed(spiking, path, tmp_path, plain):
    """Whichever spiking tensor is lost, the load names it, with a manifest and without."""
    if plain:
        path = tmp_path / "plain"
        spiking.save_pretrained(path)
    whole = tensors(path)
    for name in [n for n in whole if ".layers.1." in n or n == "model.norm.weight"]:
        rest = {k: v for k, v in whole.items() if k != name}
        save_file(rest, path / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(DamagedCheckpointError) as caught:
            spikeform.load(path, cheap=True)
        assert name in str(caught.value)


def test_plain_reader_gets_the_same_model(spiking, path):
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(path)), logits(spiking))


def test_replacing_a_conversion_by_another_one(path):
    torch.manual_seed(1)
    other = convert(standin.dense(seed=1), rounding="floor")
    spikeform.save(other, path)
    assert torch.equal(logits(spikeform.load(path)), logits(other))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"stepz": 3}, CheckpointError, "stepz"),
        ({"steps": 17}, CheckpointError, "steps"),
        ({"version": 2}, NewerFormatError, "upgrade"),
    ],
)
def test_bad_configuration(spiking, tmp_path, change, error, message):
    spiking.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"].update(change)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(error, match=message):
        spikeform.verify(tmp_path)
