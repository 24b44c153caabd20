"""``spikeform.json``: what a checkpoint must hold, where it came from, and what the conversion did."""

import dataclasses
import hashlib
import json
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from spikeform.checkpoint.atomic import MANIFEST_NAME, MARKER
from spikeform.checkpoint.paths import read_json
from spikeform.checkpoint.tensors import scan_tensors
from spikeform.errors import DamagedCheckpointError, NewerFormatError

FORMAT_VERSION = 1


@dataclass(frozen=True)
class Manifest:
    """The content of ``spikeform.json``.

    Attributes:
        format_version: of this file and of the folder around it.
        created: when, ISO 8601 in UTC.
        versions: of spikeform, torch and transformers that wrote it.
        config: the method's configuration, as in config.json's ``quantization_config``.
        source: {"name", "revision"} of the dense model, None where not known.
        command: the command line that made it, None if it was no command line.
        report: what the conversion replaced and left, and why; None for a model loaded from a plain folder.
        files: relative name -> {"bytes": int, "sha256": hex}, every file but this one.
        tensors: name -> {"shape": list of int, "dtype": safetensors name such as "F32"}.
        spiking_tensors: names of those tensors that belong to spikeform's modules.
    """

    created: str
    versions: dict[str, str]
    config: dict[str, Any]
    source: dict[str, str | None]
    command: str | list[str] | None
    report: dict[str, Any] | None
    files: dict[str, dict[str, Any]]
    tensors: dict[str, dict[str, Any]]
    spiking_tensors: list[str] = field(default_factory=list)
    format_version: int = FORMAT_VERSION


def describe(folder: Path, model: Any, command: str | list[str] | None = None) -> Manifest:
    """The manifest of a folder just written by ``model.save_pretrained``, read from its files."""
    report = getattr(model, "spikeform_report", None)
    config = model.config
    tensors = scan_tensors(folder, values=False).tensors
    return Manifest(
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        versions={name: _version(name) for name in ("spikeform", "torch", "transformers")},
        config=read_json(folder / "config.json")["quantization_config"],
        source={
            "name": getattr(config, "_name_or_path", None) or None,
            "revision": getattr(config, "_commit_hash", None),
        },
        command=command,
        report=report.to_dict() if report is not None else None,
        files={name: fingerprint(folder / name) for name in list_files(folder)},
        tensors={name: {"shape": t["shape"], "dtype": t["dtype"]} for name, t in sorted(tensors.items())},
        spiking_tensors=sorted(_spiking_names(model) & tensors.keys()),
    )


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write ``spikeform.json`` into a folder."""
    text = json.dumps(dataclasses.asdict(manifest), indent=1, allow_nan=False)
    (folder / MANIFEST_NAME).write_text(text + "\n", encoding="utf-8")


def read_manifest(folder: str | Path) -> Manifest | None:
    """The manifest of a folder; None if it has none, as when ``save_pretrained`` wrote it.

    Raises:
        NewerFormatError: a later spikeform wrote it.
        DamagedCheckpointError: it is not JSON, or a key is missing, unknown or of the wrong type.
    """
    file = Path(folder) / MANIFEST_NAME
    if not file.exists():
        return None
    content = read_json(file)
    found = content.get("format_version")
    if not isinstance(found, int) or isinstance(found, bool) or found < 1:
        raise DamagedCheckpointError(f"{file}: format_version is {found!r}, not a positive whole number")
    if found > FORMAT_VERSION:
        raise NewerFormatError(
            f"{folder} was written by a newer spikeform (format {found}, this one reads up to "
            f"{FORMAT_VERSION}): upgrade with `pip install -U spikeform`"
        )
    names = {f.name for f in dataclasses.fields(Manifest)}
    if missing := names - content.keys():
        raise DamagedCheckpointError(f"{file}: missing key {', '.join(sorted(missing))}")
    if unknown := content.keys() - names:
        raise DamagedCheckpointError(f"{file}: unknown key {', '.join(sorted(unknown))}")
    for name in ("config", "files", "tensors"):
        if not isinstance(content[name], dict):
            raise DamagedCheckpointError(f"{file}: {name} is not an object")
    for name in ("files", "tensors"):
        if not all(isinstance(entry, dict) for entry in content[name].values()):
            raise DamagedCheckpointError(f"{file}: an entry of {name} is not an object")
    return Manifest(**content)


def list_files(folder: Path) -> list[str]:
    """The relative names of all files of a folder but the manifest, sorted."""
    names = (p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_symlink() or not p.is_dir())
    return sorted(name for name in names if name not in (MANIFEST_NAME, MARKER))


def fingerprint(file: Path) -> dict[str, Any]:
    """A file's {"bytes", "sha256"}."""
    with file.open("rb") as stream:
        return {"bytes": file.stat().st_size, "sha256": hashlib.file_digest(stream, "sha256").hexdigest()}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # spikeform run from a source tree
        return "unknown"


def _spiking_names(model: Any) -> set[str]:
    """Names of the parameters and buffers that modules of spikeform own themselves."""
    return {
        f"{prefix}.{name}" if prefix else name
        for prefix, module in model.named_modules()
        if type(module).__module__.partition(".")[0] == "spikeform"
        for name in (*module._parameters, *module._buffers)
    }
