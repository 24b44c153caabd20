"""The state of a calibration on disk: one file, replaced in one step, so that a kill at any moment leaves one whole.

calibration.json    what run the folder belongs to
state.safetensors   parameters, best parameters, moments of the optimiser; stage, step and history as metadata
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from spikeform.errors import CalibrationError, SpikeformError

_RUN, _STATE, FORMAT = "calibration.json", "state.safetensors", 1


class Interrupted(SpikeformError):
    """Calibration was asked to stop; with a work folder, the same call goes on from there.

    Attributes:
        stage: Its stage.
        step: Steps of that stage that are done.
    """

    def __init__(self, stage: str, step: int, workdir: Path | None) -> None:
        kept = (
            f"the state is in {workdir}: the same call with that work folder goes on" if workdir else "nothing is kept"
        )
        super().__init__(f"stopped after step {step} of the {stage} stage; {kept}")
        self.stage, self.step = stage, step


def mark_of(model: nn.Module, *facts: Any) -> str:
    """A mark of a run: of the model's tensors (not every bit, but every tensor) and whatever else is given."""
    digest = hashlib.sha256(json.dumps([type(model).__name__, *facts], sort_keys=True, default=str).encode())
    for name, parameter in model.named_parameters():
        digest.update(name.encode() + parameter.detach().double().sum().cpu().numpy().tobytes())
    return digest.hexdigest()


def check_workdir(path: Path) -> bool:
    """Refuse a folder that is not a calibration's, before anything heavy begins; says whether it holds a state.

    Raises:
        CalibrationError: It is a file, or holds something else.
    """
    if path.exists() and not path.is_dir():
        raise CalibrationError(f"{path} is a file; give a folder")
    if path.exists() and not (path / _RUN).is_file() and any(not _ours(entry) for entry in path.iterdir()):
        raise CalibrationError(f"{path} is not empty and holds no calibration; give another folder")
    return (path / _STATE).is_file()


class Store:
    """A work folder.

    Args:
        path: Where; made if it is not there.
        run: :func:`mark_of` the run that it must belong to.

    Raises:
        CalibrationError: It belongs to another run, or is no folder of ours.
    """

    def __init__(self, path: Path, run: str) -> None:
        self.path, wanted = path, {"format": FORMAT, "stage": "calibrate", "run": run}
        check_workdir(path)
        if (path / _RUN).is_file():
            try:
                found = json.loads((path / _RUN).read_text(encoding="utf-8"))
            except ValueError:
                found = None
            if found != wanted:
                raise CalibrationError(
                    f"{path} holds the calibration of another run (other model, data or options); give another "
                    "folder, or delete it"
                )
            return
        path.mkdir(parents=True, exist_ok=True)
        partial = path / f"{_RUN}.partial"
        partial.write_text(json.dumps(wanted) + "\n", encoding="utf-8")
        os.replace(partial, path / _RUN)

    def save(self, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
        """Write a state in the place of the last one."""
        partial = self.path / f"{_STATE}.partial"
        save_file({k: t.detach().cpu().contiguous() for k, t in tensors.items()}, partial, {"facts": json.dumps(facts)})
        os.replace(partial, self.path / _STATE)

    def load(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """The state, None where there is none yet.

        Raises:
            CalibrationError: It is damaged.
        """
        file = self.path / _STATE
        if not file.is_file():
            return None
        try:
            with safe_open(file, "pt") as opened:
                facts = json.loads((opened.metadata() or {})["facts"])
                return {name: opened.get_tensor(name) for name in opened.keys()}, facts  # noqa: SIM118
        except (SafetensorError, KeyError, ValueError) as error:
            raise CalibrationError(
                f"{file} is damaged ({error}); delete {self.path}: calibration begins anew"
            ) from None


def _ours(entry: Path) -> bool:
    return entry.suffix == ".partial" or entry.name in (_RUN, _STATE, "tokens")
