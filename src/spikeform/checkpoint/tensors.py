"""The tensors of a checkpoint, read with safetensors alone: names, shapes, dtypes, and sound values."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from spikeform.checkpoint.paths import name_problem, read_json
from spikeform.errors import DamagedCheckpointError

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


@dataclass
class TensorScan:
    """What reading a folder's tensors found.

    Attributes:
        tensors: name -> {"shape": list of int, "dtype": safetensors name such as "F32", "file": its file}.
        problems: one line per damage, naming the tensor or the file.
    """

    tensors: dict[str, dict[str, Any]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


def scan_tensors(folder: Path, *, values: bool = True) -> TensorScan:
    """Read every tensor of a folder, one at a time.

    Args:
        folder: a Hugging Face model's folder, its weights in one file or in shards with an index.
        values: also read the values: all finite, and those of thresholds positive.
    """
    scan = TensorScan()
    index = _read_index(folder, scan)
    for file in _weight_files(folder, index, scan):
        try:
            for name, info, problem in _read_file(folder / file, values):
                if name in scan.tensors:
                    scan.problems.append(f"{name}: in two files, {scan.tensors[name]['file']} and {file}")
                scan.tensors[name] = {**info, "file": file}
                if problem:
                    scan.problems.append(f"{name}: {problem}")
                if index and index.get(name) != file:
                    scan.problems.append(f"{name}: lies in {file}, where {INDEX} does not expect it")
        except (SafetensorError, OSError) as error:
            scan.problems.append(f"{file}: truncated or not a safetensors file ({error})")
    scan.problems += [f"{name}: missing from {file}" for name, file in index.items() if name not in scan.tensors]
    return scan


def _read_index(folder: Path, scan: TensorScan) -> dict[str, str]:
    """Tensor name -> shard, from the index of a sharded checkpoint; empty if there is none."""
    if not (folder / INDEX).exists():
        return {}
    if (folder / WEIGHTS).exists():
        scan.problems.append(f"both {WEIGHTS} and {INDEX} are there; one of them is not this checkpoint's")
    try:
        weight_map = read_json(folder / INDEX).get("weight_map")
    except DamagedCheckpointError as error:
        scan.problems.append(str(error))
        return {}
    if not isinstance(weight_map, dict):
        scan.problems.append(f"{INDEX}: has no weight_map")
        return {}
    return weight_map


def _weight_files(folder: Path, index: dict[str, str], scan: TensorScan) -> list[str]:
    """The weight files that may be opened; what is wrong with the others goes to ``scan.problems``."""
    files = []
    # By text, as a damaged index may hold anything for a name.
    for _, file in sorted({repr(file): file for file in index.values()}.items()) or [("", WEIGHTS)]:
        if problem := name_problem(folder, file):
            scan.problems.append(problem)
        elif not (folder / file).is_file():
            scan.problems.append(f"{file}: missing")
        else:
            files.append(file)
    return files


def _read_file(file: Path, values: bool) -> Iterator[tuple[str, dict[str, Any], str | None]]:
    with safe_open(file, framework="pt", device="cpu") as tensors:
        for name in tensors.keys():  # noqa: SIM118 - not a mapping: it has keys() and no iterator
            header = tensors.get_slice(name)
            info = {"shape": list(header.get_shape()), "dtype": header.get_dtype()}
            yield name, info, value_problem(name, tensors.get_tensor(name)) if values else None


def value_problem(name: str, tensor: torch.Tensor) -> str | None:
    """What is wrong with a tensor's values: not finite, or a threshold not positive. None if nothing."""
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return None
    if tensor.element_size() == 1:
        tensor = tensor.float()  # the 8-bit formats know no minimum
    least, greatest = tensor.aminmax()  # NaN passes through; no mask as large as the tensor is made
    if not (least.isfinite() and greatest.isfinite()):
        return "holds NaN or infinite values"
    if name.endswith("threshold") and least <= 0:
        return f"a threshold must be positive, the least one is {least.item():g}"
    return None
