"""The work folder: what run it belongs to, and the states that a stopped run goes on from.

It holds

    run.json            options, data, weights and devices: a resumed run must have the same
    tokens-….bin        the text, tokenised
    checkpoint-N/       model, optimiser, schedule and random generators after step N
      complete.json     written last: sizes of the files, seconds so far; a folder without it is not used
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

from torch import nn

from spikeform.neurons import Neuron
from spikeform.training.errors import TrainingError

RUN, COMPLETE, KEPT = "run.json", "complete.json", 2
_NAME = re.compile(r"checkpoint-(\d+)")


def check_work(work: Path, resume: bool) -> None:
    """Refuse a work folder that cannot be this run's, before anything heavy begins.

    Raises:
        TrainingError: It holds something else, or a stopped run's state and ``resume`` is not set.
    """
    if work.exists() and not work.is_dir():
        raise TrainingError(f"the work folder {work} is a file: give another")
    if not work.exists():
        return
    if found := checkpoints(work):
        if not resume:
            raise TrainingError(
                f"{work} holds a stopped run (at step {_step(found[-1])}): resume it, delete the folder, or give "
                "another"
            )
    elif not all(_ours(path) for path in work.iterdir()):
        raise TrainingError(f"{work} holds files that are not of a training run: give another folder")


def open_work(work: Path, run: dict[str, Any]) -> Path | None:
    """Make a work folder this run's.

    Returns:
        The newest whole checkpoint to go on from; None to begin. Those that are not whole are deleted.

    Raises:
        TrainingError: The folder holds the state of another run.
    """
    work.mkdir(parents=True, exist_ok=True)
    found, run = checkpoints(work), json.loads(json.dumps(run))
    if found and (before := _read(work / RUN)) != run:
        other = sorted(k for k in {*run, *before} if run.get(k) != before.get(k))
        raise TrainingError(
            f"{work} holds another run, of other {', '.join(other)}: give the same again, or another folder"
        )
    write_json(work / RUN, run)
    whole = [path for path in found if is_complete(path)]
    for path in found:
        if path not in whole:  # killed while it was written
            shutil.rmtree(path, ignore_errors=True)
    return whole[-1] if whole else None


def checkpoints(work: Path) -> list[Path]:
    """All checkpoint folders, the newest last."""
    found = [path for path in work.iterdir() if path.is_dir() and _NAME.fullmatch(path.name)]
    return sorted(found, key=_step)


def is_complete(checkpoint: Path) -> bool:
    """Whether all files of a checkpoint are there, as long as they were written."""
    files = _read(checkpoint / COMPLETE).get("files")
    if not isinstance(files, dict) or not files:
        return False
    return all((checkpoint / n).is_file() and (checkpoint / n).stat().st_size == size for n, size in files.items())


def mark_complete(checkpoint: Path, seconds: float) -> None:
    """Say that a checkpoint is whole, once the disk holds it."""
    files = sorted(path for path in checkpoint.iterdir() if path.is_file())
    for path in [*files, checkpoint]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    sizes = {path.name: path.stat().st_size for path in files}
    write_json(checkpoint / COMPLETE, {"files": sizes, "seconds": seconds})


def seconds_of(checkpoint: Path | None) -> float:
    """Seconds that training took up to a checkpoint."""
    return 0.0 if checkpoint is None else float(_read(checkpoint / COMPLETE).get("seconds", 0.0))


def weights_mark(model: nn.Module) -> str:
    """A mark of a model's weights: not every bit, but every tensor.

    Neurons are left out: their thresholds are found anew before a run resumes, on other hardware perhaps.
    """
    digest = hashlib.sha256(type(model).__name__.encode())
    neurons = {id(p) for m in model.modules() if isinstance(m, Neuron) for p in m.parameters()}
    for name, parameter in model.named_parameters():
        if id(parameter) not in neurons:
            digest.update(name.encode() + parameter.detach().cpu().double().sum().numpy().tobytes())
    return digest.hexdigest()


def write_json(file: Path, content: Any) -> None:
    """Write a JSON file whole or not at all."""
    partial = file.with_suffix(f".partial-{os.getpid()}")
    partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, file)


def _read(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _ours(path: Path) -> bool:
    return path.name == RUN or path.name.startswith("tokens-") or ".partial-" in path.name


def _step(path: Path) -> int:
    return int(path.name.rpartition("-")[2])
