"""Saving a converted model: all of it, checked, or nothing."""

from pathlib import Path
from typing import Any

from spikeform.checkpoint.atomic import staged
from spikeform.checkpoint.manifest import describe, list_files, read_manifest, write_manifest
from spikeform.checkpoint.paths import method_name
from spikeform.checkpoint.verification import lines, verify_folder
from spikeform.errors import CheckpointError, DamagedCheckpointError, ForeignFolderError, SpikeformError


def save(
    model: Any,
    path: str | Path,
    tokenizer: Any = None,
    *,
    max_shard_size: int | str = "5GB",
    command: str | list[str] | None = None,
) -> Path:
    """Save a converted model: ``path`` holds the old version or the new one, never half of one.

    The new version is written beside ``path``, synced, checked as ``verify`` does, and then put in place in
    one step. If anything fails, ``path`` is as it was and the unfinished folder is gone.

    Args:
        model: a converted Hugging Face model.
        path: folder to write: a new one, an empty one, or a checkpoint saved by this function, which is
            replaced.
        tokenizer: saved beside the model, if given.
        max_shard_size: largest weight file, as in ``save_pretrained``.
        command: the command line to record in the manifest.

    Returns:
        The absolute path of the checkpoint.

    Raises:
        ForeignFolderError: ``path`` is a file, the folder the model was loaded from, or holds files that are
            not ours.
        DamagedCheckpointError: the model holds a tensor that is not finite, or a threshold that is not
            positive.
        CheckpointError: the model is not converted, another process is saving to ``path``, or writing failed.
    """
    if method_name(model.config.to_dict()) is None:
        raise CheckpointError("the model is not converted; save a dense model with model.save_pretrained(path)")
    target = Path(path).resolve()
    assert_may_write(target, source=getattr(model.config, "_name_or_path", None))
    try:
        with staged(target) as folder:
            model.save_pretrained(folder, max_shard_size=max_shard_size)
            if tokenizer is not None:
                tokenizer.save_pretrained(folder)
            write_manifest(folder, describe(folder, model, command))
            _check(folder)
            assert_may_write(target)  # once more: writing a large model takes minutes
    except SpikeformError:
        raise
    except Exception as error:  # the libraries below raise OSError, SafetensorError or a bare Exception on a full disk
        raise CheckpointError(
            f"cannot save to {path}: {error or type(error).__name__}. What was there is untouched"
        ) from error
    return target


def _check(folder: Path) -> None:
    try:
        verify_folder(folder, hashes=False, values=True)  # the hashes were taken from these files just now
    except DamagedCheckpointError as error:
        raise DamagedCheckpointError(f"the model was not saved:\n{lines(error.problems)}", error.problems) from error


def assert_may_write(path: Path, source: str | None = None) -> None:
    """Refuse to write over anything but nothing, an empty folder, or a checkpoint of ours.

    Args:
        path: absolute path of the folder to write.
        source: where the model was loaded from, if known.

    Raises:
        ForeignFolderError: names what is there.
    """
    if path.exists() and not path.is_dir():
        raise ForeignFolderError(f"cannot save to {path}: it is a file. Give the name of a folder")
    if source and Path(source).is_dir() and Path(source).resolve() == path:
        raise ForeignFolderError(f"cannot save to {path}: the model was loaded from there. Choose another folder")
    if not path.exists() or not any(path.iterdir()):
        return
    manifest = read_manifest(path)
    if manifest is None:
        raise ForeignFolderError(
            f"cannot save to {path}: it is not empty and holds no spikeform.json, so it is not ours to "
            "replace. Choose another folder, or empty this one"
        )
    if foreign := [name for name in list_files(path) if name not in manifest.files]:
        names = ", ".join(foreign[:5]) + (" and more" if len(foreign) > 5 else "")
        raise ForeignFolderError(
            f"cannot save to {path}: replacing the checkpoint would delete files that are not part of it "
            f"({names}). Move them, or choose another folder"
        )
