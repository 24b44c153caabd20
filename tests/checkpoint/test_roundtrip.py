import datetime
import json

import pytest
import standin
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from spikeform import checkpoint
from spikeform.errors import CheckpointError, DamagedCheckpointError, ForeignFolderError

IDS = torch.arange(20).view(2, 10)


@pytest.mark.parametrize("shard", ["5GB", "100KB"])
def test_load_gives_the_same_bits(model, tmp_path, shard):
    path = checkpoint.save(model, tmp_path / "a" / "m", max_shard_size=shard)
    assert (path / "model.safetensors.index.json").exists() == (shard == "100KB")
    loaded = checkpoint.load(path)
    assert type(loaded) is type(model)
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, loaded(IDS).logits)
    assert loaded.model.layers[1].self_attn.q_proj.threshold.tolist() == [1, 1]
    assert [p.name for p in path.parent.iterdir()] == ["m"]  # nothing left beside it


def test_manifest_says_what_is_there(model, saved):
    manifest = checkpoint.read_manifest(saved)
    assert manifest is not None
    assert manifest.format_version == 1
    assert manifest.config == {"quant_method": standin.METHOD, "steps": 16, "version": 1}
    assert manifest.command == "spikeform convert"
    assert manifest.versions["torch"] == torch.__version__.split("+")[0] or manifest.versions["torch"]
    assert datetime.datetime.fromisoformat(manifest.created).utcoffset() == datetime.timedelta(0)
    assert set(manifest.files) == {"config.json", "generation_config.json", "model.safetensors"}
    assert set(manifest.tensors) == {k for k in model.state_dict() if "rotary" not in k}
    assert manifest.tensors["model.layers.0.self_attn.q_proj.threshold"] == {"shape": [2], "dtype": "F32"}


def test_tokenizer_is_part_of_the_checkpoint(model, tmp_path):
    words = Tokenizer(WordLevel({"a": 0, "b": 1, "[UNK]": 2}, unk_token="[UNK]"))
    path = checkpoint.save(model, tmp_path / "m", PreTrainedTokenizerFast(tokenizer_object=words))
    assert {"tokenizer.json", "tokenizer_config.json"} <= checkpoint.read_manifest(path).files.keys()
    assert AutoTokenizer.from_pretrained(path)("b")["input_ids"] == [1]
    (path / "tokenizer.json").unlink()
    with pytest.raises(DamagedCheckpointError, match=r"tokenizer\.json: missing"):
        checkpoint.verify(path)


def test_report_and_spiking_tensors_are_recorded(tmp_path):
    class Report:
        def to_dict(self):
            return {"rows": ["q_proj"]}

    class Neuron(torch.nn.Module):
        __module__ = "spikeform.neurons.oat"

        def __init__(self):
            super().__init__()
            self.register_buffer("threshold", torch.ones(1))

    model = standin.converted()
    model.spikeform_report = Report()
    model.model.norm.neuron = Neuron()
    model.config._name_or_path = "someone/llama"
    manifest = checkpoint.read_manifest(checkpoint.save(model, tmp_path / "m"))
    assert manifest.report == {"rows": ["q_proj"]}
    assert manifest.spiking_tensors == ["model.norm.neuron.threshold"]
    assert manifest.source["name"] == "someone/llama"


def test_verify_report(saved):
    (saved / "README.md").write_text("a note")
    report = checkpoint.verify(saved)
    assert (report.manifest, report.hashes, report.values, report.method) == (
        True,
        True,
        True,
        standin.METHOD,
    )
    assert (report.files, report.tensors, report.unlisted) == (3, 23, ("README.md",))
    assert report.bytes == sum(p.stat().st_size for p in saved.iterdir()) - sum(
        (saved / name).stat().st_size for name in ("README.md", "spikeform.json")
    )
    assert json.loads(json.dumps(report.to_dict()))["unlisted"] == ["README.md"]


def test_plain_save_pretrained_loads_and_is_checked_as_far_as_it_can_be(model, tmp_path):
    model.save_pretrained(tmp_path / "plain")
    report = checkpoint.verify(tmp_path / "plain")
    assert (report.manifest, report.hashes, report.format_version, report.spiking_tensors) == (
        False,
        False,
        None,
        None,
    )
    reference = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    loaded = checkpoint.load(tmp_path / "plain")
    with torch.no_grad():
        assert torch.equal(reference(IDS).logits, loaded(IDS).logits)


def test_cheap_load_skips_reading_but_not_the_structure(saved, tmp_path):
    assert checkpoint.load(saved, cheap=True) is not None
    with (saved / "model.safetensors").open("r+b") as file:
        file.truncate((saved / "model.safetensors").stat().st_size - 4)
    with pytest.raises(DamagedCheckpointError, match=r"model\.safetensors: truncated"):
        checkpoint.load(saved, cheap=True)


def test_load_refuses_arguments_that_weaken_it(saved):
    with pytest.raises(CheckpointError, match=r"does not take ignore_mismatched_sizes, trust_remote_code"):
        checkpoint.load(saved, trust_remote_code=True, ignore_mismatched_sizes=True)


def test_load_passes_arguments_on(saved):
    assert checkpoint.load(saved, attn_implementation="eager").config._attn_implementation == "eager"


@pytest.mark.parametrize("name", ["NoSuchForCausalThing", "os", "LlamaConfig"])
def test_unknown_architecture(model, tmp_path, name):
    model.save_pretrained(tmp_path / "m")
    file = tmp_path / "m" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "architectures": [name]}))
    with pytest.raises(CheckpointError, match=f"no model class '{name}'"):
        checkpoint.load(tmp_path / "m")


def test_tensors_that_do_not_fit_the_configuration(model, tmp_path):
    """Without a manifest nobody knows which tensors belong there but the model itself."""
    model.save_pretrained(tmp_path / "m")
    file = tmp_path / "m" / "config.json"
    good = json.loads(file.read_text())
    file.write_text(json.dumps({**good, "num_hidden_layers": 3}))
    with pytest.raises(DamagedCheckpointError, match=r"model\.layers\.2\.self_attn\.q_proj\.threshold: tensor missing"):
        checkpoint.load(tmp_path / "m")
    file.write_text(json.dumps({**good, "num_hidden_layers": 1}))
    with pytest.raises(DamagedCheckpointError, match=r"model\.layers\.1\.\S+: tensor unexpected"):
        checkpoint.load(tmp_path / "m")
    file.write_text(json.dumps({**good, "vocab_size": 101}))
    with pytest.raises(DamagedCheckpointError, match=r"model\.embed_tokens\.weight: tensor misshapen"):
        checkpoint.load(tmp_path / "m")


def test_is_converted(saved, tmp_path):
    standin.dense().save_pretrained(tmp_path / "dense")
    assert checkpoint.is_converted(saved)
    assert not checkpoint.is_converted(tmp_path / "dense")


@pytest.mark.parametrize("action", [checkpoint.verify, checkpoint.load])
def test_dense_model_is_not_a_checkpoint(action, tmp_path):
    standin.dense().save_pretrained(tmp_path / "dense")
    with pytest.raises(ForeignFolderError, match="is not a converted checkpoint: it is a dense model"):
        action(tmp_path / "dense")


@pytest.mark.parametrize("action", [checkpoint.verify, checkpoint.load, checkpoint.is_converted])
def test_paths_that_hold_no_model(action, tmp_path):
    with pytest.raises(ForeignFolderError, match="no such folder"):
        action(tmp_path / "nothing")
    (tmp_path / "file").touch()
    with pytest.raises(ForeignFolderError, match="it is a file"):
        action(tmp_path / "file")
    (tmp_path / "folder").mkdir()
    with pytest.raises(ForeignFolderError, match=r"no config\.json"):
        action(tmp_path / "folder")
