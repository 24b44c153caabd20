"""What `save` refuses to write over, and what it leaves behind when it fails."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import standin
import torch

from spikeform import checkpoint
from spikeform.checkpoint import atomic, saving
from spikeform.errors import CheckpointError, DamagedCheckpointError, ForeignFolderError, NewerFormatError


def content(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture(params=["exchange", "two renames"])
def swap(request, monkeypatch):
    if request.param == "two renames":
        monkeypatch.setattr(atomic, "_exchange", lambda first, second: False)
    return request.param


def test_replaces_a_checkpoint_and_leaves_nothing_beside_it(saved, swap):
    other = standin.converted(seed=1)
    before = content(saved)
    assert checkpoint.save(other, saved) == saved
    assert torch.equal(checkpoint.load(saved).lm_head.weight, other.lm_head.weight)
    assert content(saved)["model.safetensors"] != before["model.safetensors"]
    assert os.listdir(saved.parent) == [saved.name]


def test_fewer_shards_than_before_leave_no_old_shard(model, sharded, swap):
    checkpoint.save(model, sharded)
    assert [p.name for p in sharded.glob("*.safetensors*")] == ["model.safetensors"]


def test_empty_folder_and_link_to_a_folder(model, tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    assert checkpoint.save(model, tmp_path / "link") == tmp_path / "real"
    assert (tmp_path / "link").is_symlink()
    assert checkpoint.verify(tmp_path / "link").manifest


def test_relative_path(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert checkpoint.save(model, "m") == tmp_path / "m"
    assert checkpoint.verify("m").path == str(tmp_path / "m")


def test_foreign_folder(model, tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ForeignFolderError, match=r"not empty and holds no spikeform\.json"):
        checkpoint.save(model, tmp_path)
    assert content(tmp_path) == {"thesis.tex": b"years of work"}


def test_plain_checkpoint_is_not_replaced(model, tmp_path):
    model.save_pretrained(tmp_path / "m")
    with pytest.raises(ForeignFolderError, match="not ours to replace"):
        checkpoint.save(model, tmp_path / "m")


def test_added_files_are_not_deleted(model, saved):
    (saved / "notes").mkdir()
    (saved / "notes" / "a.txt").write_text("mine")
    with pytest.raises(ForeignFolderError, match=r"would delete files .*\(notes/a\.txt\)"):
        checkpoint.save(model, saved)
    assert (saved / "notes" / "a.txt").read_text() == "mine"


def test_file_added_during_the_save(model, saved, monkeypatch):
    monkeypatch.setattr(saving, "_check", lambda folder: (saved / "late.txt").write_text("mine"))
    with pytest.raises(ForeignFolderError, match=r"late\.txt"):
        checkpoint.save(model, saved)
    assert (saved / "late.txt").read_text() == "mine"


def test_a_file(model, tmp_path):
    (tmp_path / "m").write_text("x")
    with pytest.raises(ForeignFolderError, match="it is a file"):
        checkpoint.save(model, tmp_path / "m")
    with pytest.raises(CheckpointError, match="cannot save"):
        checkpoint.save(model, tmp_path / "m" / "inside")
    assert (tmp_path / "m").read_text() == "x"


def test_own_source(saved):
    before = content(saved)
    with pytest.raises(ForeignFolderError, match="was loaded from there"):
        checkpoint.save(checkpoint.load(saved), saved)
    assert content(saved) == before


def test_newer_checkpoint_is_not_replaced(model, saved):
    text = (saved / "spikeform.json").read_text().replace('"format_version": 1', '"format_version": 9')
    (saved / "spikeform.json").write_text(text)
    with pytest.raises(NewerFormatError):
        checkpoint.save(model, saved)


def test_dense_model(tmp_path):
    with pytest.raises(CheckpointError, match="not converted"):
        checkpoint.save(standin.dense(), tmp_path / "m")
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize(("value", "message"), [(float("nan"), "NaN"), (-1.0, "must be positive")])
def test_unsound_model_is_not_saved(saved, value, message):
    before, bad = content(saved), standin.converted()
    bad.model.layers[0].self_attn.q_proj.threshold[1] = value
    with pytest.raises(DamagedCheckpointError, match=message) as caught:
        checkpoint.save(bad, saved)
    assert caught.value.problems[0].startswith("model.layers.0.self_attn.q_proj.threshold: ")
    assert "tmp-" not in str(caught.value)
    assert content(saved) == before
    assert os.listdir(saved.parent) == [saved.name]


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), Exception("os error 28"), KeyboardInterrupt()]
)
@pytest.mark.parametrize("where", ["describe", "write_manifest", "_check"])
def test_error_in_the_middle(model, saved, monkeypatch, error, where):
    def fail(*args, **kwargs):
        raise error

    before = content(saved)
    monkeypatch.setattr(saving, where, fail)
    expected = KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else CheckpointError
    with pytest.raises(expected):
        checkpoint.save(model, saved)
    assert content(saved) == before
    assert os.listdir(saved.parent) == [saved.name]


@pytest.mark.parametrize("call", ["fsync", "rename"])
def test_error_in_a_system_call(model, saved, monkeypatch, call, swap):
    """Every single fsync and rename may fail."""
    real, before = getattr(os, call), content(saved)
    other = standin.converted(seed=1)
    for number in range(20):
        calls = iter(range(1000))

        def fail(*args, calls=calls, number=number):
            if next(calls) == number:
                raise OSError(5, "Input/output error")
            return real(*args)

        with monkeypatch.context() as patch:
            patch.setattr(os, call, fail)
            try:
                checkpoint.save(other, saved)
                break
            except CheckpointError:
                pass
        assert os.listdir(saved.parent) == [saved.name]
        checkpoint.verify(saved)
        assert content(saved) == before
    else:
        pytest.fail("never succeeded")
    assert number > 0
    checkpoint.recover(saved)  # where the old version could not even be renamed, it goes now
    assert os.listdir(saved.parent) == [saved.name]
    assert content(saved)["model.safetensors"] != before["model.safetensors"]


def test_real_full_disk(saved):
    """A file size limit stops the tensor writer itself, below Python."""
    before = content(saved)
    script = """
        import resource, sys, torch
        torch.set_num_threads(1)
        import standin
        from spikeform import checkpoint
        from spikeform.errors import CheckpointError
        model = standin.converted(seed=1)
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
        try:
            checkpoint.save(model, sys.argv[1])
        except CheckpointError as error:
            sys.exit(f"refused: {error}")
    """
    result = run_script(script, saved)
    assert result.returncode == 1, result.stderr
    assert "refused: cannot save to" in result.stderr
    assert content(saved) == before
    assert os.listdir(saved.parent) == [saved.name]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_no_permission(model, saved):
    saved.parent.chmod(0o500)
    try:
        with pytest.raises(CheckpointError, match="Permission denied"):
            checkpoint.save(model, saved)
        checkpoint.verify(saved)
    finally:
        saved.parent.chmod(0o700)


def run_script(script, *arguments):
    here = Path(__file__).parent
    source = here.parent.parent / "src"
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": f"{here}:{source}"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
