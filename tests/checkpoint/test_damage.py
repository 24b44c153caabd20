"""Every way a checkpoint can be wrong is an error that names the file or the tensor."""

import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file

from spikeform import checkpoint
from spikeform.checkpoint.manifest import fingerprint
from spikeform.errors import CheckpointError, DamagedCheckpointError, ForeignFolderError, NewerFormatError

THRESHOLD = "model.layers.1.self_attn.q_proj.threshold"
WEIGHTS = "model.safetensors"


def edit_json(file, **changes):
    content = json.loads(file.read_text())
    content.update(changes)
    file.write_text(json.dumps({k: v for k, v in content.items() if v is not ...}))


def edit_tensors(path, change, *, manifest=True):
    """Rewrite the weights; with `manifest` the file's own size and hash are made to fit again."""
    tensors = load_file(path / WEIGHTS)
    change(tensors)
    save_file(tensors, path / WEIGHTS, metadata={"format": "pt"})
    if manifest:
        files = json.loads((path / "spikeform.json").read_text())["files"]
        edit_json(path / "spikeform.json", files={**files, WEIGHTS: fingerprint(path / WEIGHTS)})


def problems_of(path):
    with pytest.raises(DamagedCheckpointError) as caught:
        checkpoint.verify(path)
    assert caught.value.problems
    assert all(problem in str(caught.value) for problem in caught.value.problems[:10])
    return caught.value.problems


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda t: t.pop(THRESHOLD), "tensor missing"),
        (lambda t: t.update({THRESHOLD: torch.ones(3)}), "shape is [3] and must be [2]"),
        (lambda t: t.update({THRESHOLD: torch.ones(2).half()}), "dtype is F16 and must be F32"),
        (lambda t: t.update({THRESHOLD: torch.tensor([1.0, float("nan")])}), "holds NaN or infinite values"),
        (lambda t: t.update({THRESHOLD: torch.tensor([1.0, float("inf")])}), "holds NaN or infinite values"),
        (lambda t: t.update({THRESHOLD: torch.tensor([1.0, 0.0])}), "must be positive, the least one is 0"),
        (lambda t: t.update({THRESHOLD: torch.tensor([-2.0, 1.0])}), "must be positive, the least one is -2"),
    ],
)
def test_wrong_tensor_is_named(saved, change, problem):
    edit_tensors(saved, change)
    (found,) = problems_of(saved)
    assert found.startswith(f"{THRESHOLD}: ")
    assert problem in found


def test_extra_tensor_is_named(saved):
    edit_tensors(saved, lambda t: t.update(stray=torch.ones(1)))
    assert problems_of(saved) == (f"stray: extra tensor, in {WEIGHTS}",)


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e5m2])
def test_one_bad_value_in_a_weight(model, tmp_path, value, dtype):
    """In a folder without a manifest too."""
    model.save_pretrained(tmp_path / "m")

    def spoil(tensors):
        weight = tensors["model.norm.weight"].clone()
        weight[7] = value
        tensors["model.norm.weight"] = weight.to(dtype)

    edit_tensors(tmp_path / "m", spoil, manifest=False)
    assert problems_of(tmp_path / "m") == ("model.norm.weight: holds NaN or infinite values",)


def test_flipped_byte(saved):
    with (saved / WEIGHTS).open("r+b") as file:
        file.seek(-5, os.SEEK_END)
        byte = file.read(1)[0]
        file.seek(-5, os.SEEK_END)
        file.write(bytes([byte ^ 1]))
    assert problems_of(saved) == (f"{WEIGHTS}: altered, its sha256 is not the one in the manifest",)


@pytest.mark.parametrize("keep", [0, 4, 300, -1])
def test_truncated_weights(saved, keep):
    size = (saved / WEIGHTS).stat().st_size
    os.truncate(saved / WEIGHTS, keep if keep >= 0 else size + keep)
    problems = problems_of(saved)
    assert any(p.startswith(f"{WEIGHTS}: truncated, has ") for p in problems)
    assert any(p.startswith(f"{WEIGHTS}: truncated or not a safetensors file") for p in problems)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", WEIGHTS])
def test_missing_file(saved, name):
    (saved / name).unlink()
    if name == "config.json":
        with pytest.raises(ForeignFolderError, match=r"no config\.json"):
            checkpoint.verify(saved)
    else:
        assert f"{name}: missing" in problems_of(saved)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "adapter_config.json", "modeling_x.py", "b.safetensors"])
def test_extra_file_that_could_be_loaded(saved, name):
    (saved / name).touch()
    assert problems_of(saved) == (f"{name}: not in the manifest",)


def test_all_problems_are_listed(saved):
    edit_tensors(saved, lambda t: [t.pop(name) for name in list(t)[:15]])
    assert len(problems_of(saved)) == 15
    with pytest.raises(DamagedCheckpointError, match="and 5 more"):
        checkpoint.verify(saved)


class TestConfiguration:
    def test_missing_quantization_config(self, saved):
        edit_json(saved / "config.json", quantization_config=...)
        with pytest.raises(DamagedCheckpointError, match="has lost its quantization_config"):
            checkpoint.verify(saved)

    def test_other_software(self, model, tmp_path):
        model.save_pretrained(tmp_path / "m")
        edit_json(tmp_path / "m" / "config.json", quantization_config={"quant_method": "gptq"})
        with pytest.raises(ForeignFolderError, match="quantized by other software"):
            checkpoint.verify(tmp_path / "m")

    @pytest.mark.parametrize("manifest", [True, False])
    def test_unknown_key(self, saved, manifest):
        changed = {"quant_method": "spikeform_standin", "steps": 16, "version": 1, "stepps": 4}
        edit_json(saved / "config.json", quantization_config=changed)
        if manifest:
            with pytest.raises(DamagedCheckpointError, match="disagree on stepps"):
                checkpoint.verify(saved)
            edit_json(saved / "spikeform.json", config=changed)
        else:
            (saved / "spikeform.json").unlink()
        with pytest.raises(CheckpointError, match="quantization_config: unknown key stepps"):
            checkpoint.verify(saved)

    def test_newer_method_or_version(self, saved):
        (saved / "spikeform.json").unlink()
        for changed in (
            {"quant_method": "spikeform_tomorrow"},
            {"quant_method": "spikeform_standin", "version": 2},
        ):
            edit_json(saved / "config.json", quantization_config=changed)
            with pytest.raises(NewerFormatError, match="upgrade"):
                checkpoint.verify(saved)

    @pytest.mark.parametrize("text", ["", "{", "[]", '"x"', b"\xff\xfe"])
    @pytest.mark.parametrize("name", ["config.json", "spikeform.json"])
    def test_unreadable(self, saved, text, name):
        (saved / name).write_bytes(text if isinstance(text, bytes) else text.encode())
        with pytest.raises(DamagedCheckpointError, match=name):
            checkpoint.verify(saved)


class TestManifest:
    def test_newer_format(self, saved):
        edit_json(saved / "spikeform.json", format_version=2, something_new=1)
        for action in (checkpoint.verify, checkpoint.load):
            with pytest.raises(NewerFormatError, match=r"written by a newer spikeform .*upgrade"):
                action(saved)

    @pytest.mark.parametrize("version", [0, -1, True, "1", 1.5, None])
    def test_bad_format_version(self, saved, version):
        edit_json(saved / "spikeform.json", format_version=version)
        with pytest.raises(DamagedCheckpointError, match="format_version"):
            checkpoint.verify(saved)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"tensors": ...}, "missing key tensors"),
            ({"extra": 1}, "unknown key extra"),
            ({"files": []}, "files is not an object"),
            ({"tensors": {"a": 3}}, "an entry of tensors is not an object"),
        ],
    )
    def test_bad_content(self, saved, change, message):
        edit_json(saved / "spikeform.json", **change)
        with pytest.raises(DamagedCheckpointError, match=message):
            checkpoint.verify(saved)

    @pytest.mark.parametrize("name", ["../outside", "/etc/hostname", "a/../../b", "", "a\\b", "./config.json"])
    def test_path_traversal(self, saved, name):
        files = json.loads((saved / "spikeform.json").read_text())["files"]
        edit_json(saved / "spikeform.json", files={**files, name: {"bytes": 0, "sha256": ""}})
        assert any(repr(name) in problem for problem in problems_of(saved))


class TestShards:
    INDEX = "model.safetensors.index.json"

    def edit_index(self, path, change):
        (path / "spikeform.json").unlink()  # the index must be distrusted where nothing else vouches for it
        weight_map = json.loads((path / self.INDEX).read_text())["weight_map"]
        change(weight_map)
        edit_json(path / self.INDEX, weight_map=weight_map)

    def test_good(self, sharded):
        assert checkpoint.verify(sharded).tensors == 23

    @pytest.mark.parametrize("name", ["../evil.safetensors", "/etc/evil.safetensors", 3, None, ["x"]])
    def test_traversal(self, sharded, name):
        save_file({THRESHOLD: torch.ones(2)}, sharded.parent / "evil.safetensors")
        self.edit_index(sharded, lambda m: m.update({THRESHOLD: name}))
        assert any(repr(name) in problem for problem in problems_of(sharded))

    def test_symbolic_link(self, sharded):
        shard = sorted(sharded.glob("*.safetensors"))[0]
        shard.rename(sharded.parent / "elsewhere")
        shard.symlink_to(sharded.parent / "elsewhere")
        assert f"{shard.name} is a symbolic link; a checkpoint holds plain files" in problems_of(sharded)

    def test_hub_cache_links_are_the_exception(self, sharded, tmp_path):
        snapshot, blobs = tmp_path / "hub" / "snapshots" / "abc", tmp_path / "hub" / "blobs"
        snapshot.mkdir(parents=True)
        blobs.mkdir()
        for file in sharded.iterdir():
            file.rename(blobs / file.name)
            (snapshot / file.name).symlink_to(blobs / file.name)
        assert checkpoint.verify(snapshot).tensors == 23

    def test_missing_shard(self, sharded):
        shard = sorted(sharded.glob("*.safetensors"))[0]
        shard.unlink()
        assert f"{shard.name}: missing" in problems_of(sharded)

    def test_missing_shard_without_manifest_names_its_tensors(self, sharded):
        (sharded / "spikeform.json").unlink()
        weight_map = json.loads((sharded / self.INDEX).read_text())["weight_map"]
        (sharded / weight_map[THRESHOLD]).unlink()
        assert f"{THRESHOLD}: missing from {weight_map[THRESHOLD]}" in problems_of(sharded)

    def test_index_that_lies(self, sharded):
        files = sorted(p.name for p in sharded.glob("*.safetensors"))
        self.edit_index(sharded, lambda m: m.update({THRESHOLD: next(f for f in files if f != m[THRESHOLD])}))
        assert any(p.startswith(f"{THRESHOLD}: lies in") for p in problems_of(sharded))

    def test_index_and_single_file(self, sharded):
        (sharded / "spikeform.json").unlink()
        save_file({"a": torch.ones(1)}, sharded / WEIGHTS)
        assert any(problem.startswith("both ") for problem in problems_of(sharded))

    @pytest.mark.parametrize("content", ["{", "{}", '{"weight_map": []}'])
    def test_broken_index(self, sharded, content):
        (sharded / "spikeform.json").unlink()
        (sharded / self.INDEX).write_text(content)
        assert any(self.INDEX in problem for problem in problems_of(sharded))
