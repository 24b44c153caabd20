"""A kill -9 at any moment of a save leaves the old version or the new one."""

import fcntl
import os
import subprocess
import sys
from pathlib import Path

import pytest

from spikeform import checkpoint
from spikeform.checkpoint import atomic
from spikeform.errors import CheckpointError, ForeignFolderError

HERE = Path(__file__).parent


def test_kill_at_every_file_operation(tmp_path):
    """One child a file operation, killed just before it; killed_save.py checks what each one leaves."""
    result = subprocess.run(
        [sys.executable, HERE / "killed_save.py", tmp_path],
        env={**os.environ, "PYTHONPATH": f"{HERE}:{HERE.parent.parent / 'src'}"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    lines = [line.split() for line in result.stdout.splitlines()]
    assert len(lines) == 4
    for line, untouched in zip(lines, ("old", "none", "old", "none"), strict=True):
        assert line.pop() == "finished"
        assert len(line) > 30
        assert line == sorted(line, key=(untouched, "new").index)  # up to one moment the old one, from then the new
        assert {*line} == {untouched, "new"}


def test_old_version_comes_back_by_itself(saved):
    """As after a kill between the two renames."""
    old = saved.with_name(f"{saved.name}.old-123")
    for action in (checkpoint.verify, checkpoint.load, checkpoint.is_converted):
        saved.rename(old)
        action(saved)
        assert not old.exists()


def test_save_puts_the_old_version_back_before_it_looks(model, saved):
    (saved / "mine.txt").touch()
    saved.rename(saved.with_name(f"{saved.name}.old-123"))
    with pytest.raises(ForeignFolderError, match=r"mine\.txt"):
        checkpoint.save(model, saved)
    assert (saved / "mine.txt").exists()


def test_leftovers_of_the_dead_are_deleted_and_nothing_else(saved):
    beside = saved.parent
    for name in ("model.tmp-1", "model.old-1", "model.tmp-2", f"model.tmp-{os.getpid()}"):
        (beside / name).mkdir()
    (beside / "model.tmp-1" / "spikeform.json").touch()
    (beside / "model.old-1" / "spikeform.json").touch()
    (beside / f"model.tmp-{os.getpid()}" / ".spikeform-saving").touch()
    foreign = ["model.tmp-3", "model.old-3", "model.tmp-x", "other.tmp-1", "model.tmp-1.bak"]
    for name in foreign:
        (beside / name).mkdir()
        (beside / name / "precious").touch()
    (beside / "model.tmp-4").touch()
    (beside / "model.tmp-5").symlink_to(saved)
    assert checkpoint.recover(saved) == []
    assert sorted(os.listdir(beside)) == sorted(["model", "model.tmp-4", "model.tmp-5", *foreign])
    checkpoint.verify(saved)


def test_running_save_is_left_alone(model, saved):
    running = saved.with_name(f"{saved.name}.tmp-1")
    running.mkdir()
    (running / ".spikeform-saving").touch()
    descriptor = os.open(running, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    try:
        checkpoint.load(saved)
        with pytest.raises(CheckpointError, match=r"another process is saving to .*model\.tmp-1"):
            checkpoint.save(model, saved)
        assert running.exists()
    finally:
        os.close(descriptor)
    checkpoint.save(model, saved)
    assert not running.exists()


def test_a_save_locks_its_folder(tmp_path):
    with atomic.staged(tmp_path / "m") as folder:
        assert checkpoint.recover(tmp_path / "m") == [folder]
        (folder / "a").touch()
    assert os.listdir(tmp_path / "m") == ["a"]


def test_file_system_without_locks(model, saved, monkeypatch):
    """Saving works there; what another save left is not touched, as nobody can tell whether it still runs."""
    monkeypatch.setattr(atomic, "_lock", lambda folder: None)
    checkpoint.save(model, saved)
    saved.with_name(f"{saved.name}.tmp-1").mkdir()
    with pytest.raises(CheckpointError, match="if none is running, delete that folder"):
        checkpoint.save(model, saved)
