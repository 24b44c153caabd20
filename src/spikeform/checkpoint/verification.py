"""Is this folder the checkpoint that was saved? Every file, tensor and setting, or an error."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from spikeform.checkpoint.configuration import check_configuration
from spikeform.checkpoint.manifest import Manifest, fingerprint, list_files, read_manifest
from spikeform.checkpoint.paths import assert_model_path, name_problem
from spikeform.checkpoint.tensors import TensorScan, scan_tensors
from spikeform.errors import DamagedCheckpointError

# Files that change what is loaded or run. Others (a README, a licence) may be added to a checkpoint.
_LOADABLE = {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".msgpack", ".h5", ".gguf"}
_LOADABLE |= {".json", ".py", ".jinja", ".model"}


@dataclass(frozen=True)
class VerifyReport:
    """What was verified.

    Attributes:
        path: the folder.
        method: the method's name in the file, such as "spikeform_las".
        manifest: whether there is a ``spikeform.json``. Without one (the folder was written by plain
            ``save_pretrained``) only this was checked: the configuration, that all tensors can be read, are
            finite, and lie where the index says, and that thresholds are positive. A lost or altered file
            cannot be noticed then.
        hashes: whether every file's sha256 was compared.
        values: whether the tensors' values were read (finite, thresholds positive).
        format_version: the manifest's, None without one.
        files: number of files compared with the manifest.
        bytes: their size.
        tensors: number of tensors.
        spiking_tensors: how many belong to spikeform's modules, None without a manifest.
        unlisted: files that the manifest does not know and that change nothing, such as a README.
    """

    path: str
    method: str
    manifest: bool
    hashes: bool
    values: bool
    format_version: int | None
    files: int
    bytes: int
    tensors: int
    spiking_tensors: int | None
    unlisted: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """The report as plain values, for JSON."""
        return {**asdict(self), "unlisted": list(self.unlisted)}


def verify(path: str | Path, *, hashes: bool = True, values: bool = True) -> VerifyReport:
    """Check a checkpoint against its manifest, without building the model and without unpickling anything.

    Args:
        path: a folder written by ``spikeform.save`` or by a converted model's ``save_pretrained``.
        hashes: compare every file's sha256 (reads every byte); without it, sizes are still compared.
        values: read every tensor: finite, thresholds positive.

    Returns:
        What was checked; see ``VerifyReport.manifest`` for folders without a manifest.

    Raises:
        ForeignFolderError: no model, a dense model, or one quantized by other software.
        NewerFormatError: a later spikeform wrote it.
        DamagedCheckpointError: files or tensors are missing, extra or altered; ``problems`` has one line
            each.
        CheckpointError: its configuration has an unknown key or a value out of range.
    """
    folder = assert_model_path(path)
    return verify_folder(folder, hashes=hashes, values=values)


def verify_folder(folder: Path, *, hashes: bool, values: bool) -> VerifyReport:
    """``verify`` for a folder known to hold a config.json, wherever it lies."""
    manifest = read_manifest(folder)
    method = check_configuration(folder, manifest)
    problems = _file_problems(folder, manifest, hashes) if manifest else []
    present = list_files(folder)
    known = {} if manifest is None else manifest.files
    unlisted = [] if manifest is None else [name for name in present if name not in known]
    problems += [f"{n}: not in the manifest" for n in unlisted if Path(n).suffix.lower() in _LOADABLE]
    scan = scan_tensors(folder, values=values)
    problems += scan.problems
    if manifest is not None:
        problems += _tensor_problems(manifest, scan)
    if problems:
        raise _damaged(folder, tuple(dict.fromkeys(problems)))
    names = present if manifest is None else list(known)
    return VerifyReport(
        path=str(folder),
        method=method,
        manifest=manifest is not None,
        hashes=hashes and manifest is not None,
        values=values,
        format_version=manifest.format_version if manifest else None,
        files=len(known),
        bytes=sum((folder / name).stat().st_size for name in names),
        tensors=len(scan.tensors),
        spiking_tensors=len(manifest.spiking_tensors) if manifest else None,
        unlisted=tuple(unlisted),
    )


def _file_problems(folder: Path, manifest: Manifest, hashes: bool) -> list[str]:
    problems = []
    for name, expected in manifest.files.items():
        file = folder / name
        if problem := name_problem(folder, name):
            problems.append(problem)
        elif not file.is_file():
            problems.append(f"{name}: missing")
        elif (size := file.stat().st_size) != expected.get("bytes"):
            state = "truncated" if size < (expected.get("bytes") or 0) else "altered"
            problems.append(f"{name}: {state}, has {size} bytes and must have {expected.get('bytes')}")
        elif hashes and fingerprint(file)["sha256"] != expected.get("sha256"):
            problems.append(f"{name}: altered, its sha256 is not the one in the manifest")
    return problems


def _tensor_problems(manifest: Manifest, scan: TensorScan) -> list[str]:
    found, wanted = scan.tensors, manifest.tensors
    problems = [f"{name}: tensor missing" for name in wanted if name not in found]
    problems += [f"{name}: extra tensor, in {found[name]['file']}" for name in found if name not in wanted]
    for name in wanted.keys() & found.keys():
        for what in ("shape", "dtype"):
            if found[name][what] != wanted[name].get(what):
                problems.append(f"{name}: {what} is {found[name][what]} and must be {wanted[name].get(what)}")
    return sorted(problems)


def _damaged(folder: Path, problems: tuple[str, ...]) -> DamagedCheckpointError:
    return DamagedCheckpointError(f"{folder} is damaged; fetch or save it again:\n{lines(problems)}", problems)


def lines(problems: tuple[str, ...], shown: int = 10) -> str:
    """Problems as indented lines, the first few of them."""
    more = [f"and {len(problems) - shown} more"] if len(problems) > shown else []
    return "\n".join(f"  {line}" for line in (*problems[:shown], *more))
