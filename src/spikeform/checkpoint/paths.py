"""What a path is: no model, a dense model, or a converted one; and which file names a checkpoint may use."""

import json
from pathlib import Path
from typing import Any

from spikeform.checkpoint.atomic import recover
from spikeform.errors import DamagedCheckpointError, ForeignFolderError

METHOD_PREFIX = "spikeform_"  # every method's quant_method starts with it


def assert_model_path(path: str | Path) -> Path:
    """The absolute path of a model's folder.

    A checkpoint that a killed save left aside is put back first.

    Raises:
        ForeignFolderError: nothing is there, or a file, or a folder without a config.json.
    """
    folder = Path(path).resolve()
    recover(folder)
    if not folder.exists():
        raise ForeignFolderError(f"no model at {path}: there is no such folder")
    if not folder.is_dir():
        raise ForeignFolderError(f"no model at {path}: it is a file. Give the folder that holds config.json")
    if not (folder / "config.json").is_file():
        raise ForeignFolderError(f"no model at {path}: the folder has no config.json")
    return folder


def is_converted(path: str | Path) -> bool:
    """Whether a model's folder holds a model that spikeform converted.

    Raises:
        ForeignFolderError: the path holds no model.
        DamagedCheckpointError: its config.json cannot be read.
    """
    return method_name(read_json(assert_model_path(path) / "config.json")) is not None


def method_name(config: dict[str, Any]) -> str | None:
    """The method that a config.json names, such as "spikeform_las"; None if it is not one of spikeform's."""
    quantization = config.get("quantization_config")
    method = quantization.get("quant_method") if isinstance(quantization, dict) else None
    return method if isinstance(method, str) and method.startswith(METHOD_PREFIX) else None


def read_json(file: Path) -> dict[str, Any]:
    """A JSON file that holds an object.

    Raises:
        DamagedCheckpointError: it is missing, unreadable, not JSON, or not an object.
    """
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DamagedCheckpointError(f"cannot read {file}: {error}") from error
    if not isinstance(value, dict):
        raise DamagedCheckpointError(f"{file} holds no JSON object")
    return value


def name_problem(folder: Path, name: object) -> str | None:
    """What is wrong with a file name found in a manifest or a shard index; None if nothing.

    A name must stay inside the folder, and the file must be a plain one. The one link allowed is the Hugging
    Face cache's own, from ``snapshots/REVISION/`` to ``blobs/`` of the same model.
    """
    if not isinstance(name, str) or not name or "\\" in name or "\0" in name:
        return f"file name {name!r} is not a plain relative name"
    if name.startswith("/") or any(part in ("", ".", "..") for part in name.split("/")):
        return f"file name {name!r} leads out of the folder"
    file = folder / name
    for part in [file, *file.parents]:
        if part == folder:
            break
        if part.is_symlink() and not _is_cache_link(folder, part):
            return f"{name} is a symbolic link; a checkpoint holds plain files"
    return None


def _is_cache_link(folder: Path, link: Path) -> bool:
    return folder.parent.name == "snapshots" and link.resolve().parent == folder.parent.parent / "blobs"
