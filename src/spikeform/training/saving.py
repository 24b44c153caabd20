"""Writing the trained model: a checkpoint of ours, or for a dense model a plain Hugging Face folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from spikeform import checkpoint
from spikeform.checkpoint.atomic import staged
from spikeform.checkpoint.saving import assert_may_write
from spikeform.conversion import record
from spikeform.conversion.record import HISTORY
from spikeform.errors import ForeignFolderError, SpikeformError
from spikeform.training.devices import processes
from spikeform.training.state import write_json

RECORD = "training.json"  # beside a dense model: its history


def check_target(model: Any, target: Path) -> None:
    """Refuse what :func:`write` would refuse, before anything heavy begins.

    Raises:
        ForeignFolderError: The folder may not be written.
    """
    if hasattr(model, "spikeform_report"):
        assert_may_write(target, source=getattr(model.config, "_name_or_path", None))
    else:
        check_dense_target(target)


def check_dense_target(target: Path) -> None:
    """Only a new or an empty folder: a dense one has no manifest that says which files are its own."""
    if target.exists() and not target.is_dir():
        raise ForeignFolderError(f"cannot save to {target}: it is a file. Give the name of a folder")
    if target.exists() and any(target.iterdir()):
        raise ForeignFolderError(f"cannot save to {target}: it is not empty. Choose another folder, or empty this one")


def conclude(model: Any, done: dict[str, Any], target: Path | None, tokenizer: Any, command: list[str] | None) -> None:
    """The end of a stage: its record into the model's history, and the model, if it is to be, to ``target``.

    Every process calls it; the main one writes.

    Raises:
        CheckpointError: Writing failed; what was there is untouched.
    """
    record.keep(model, done)
    if target is not None:
        devices = processes()
        if devices.is_main_process:
            write(model, target, tokenizer, command)
        devices.wait_for_everyone()


def write(model: Any, target: Path, tokenizer: Any, command: list[str] | None) -> None:
    """Write model and tokenizer, whole or not at all.

    Raises:
        CheckpointError: It failed; what was there is untouched.
    """
    if hasattr(model, "spikeform_report"):
        checkpoint.save(model, target, tokenizer, command=command)
        return
    check_dense_target(target)
    try:
        with staged(target) as folder:
            model.save_pretrained(folder)
            if tokenizer is not None:
                tokenizer.save_pretrained(folder)
            write_json(folder / RECORD, {"command": command, "history": getattr(model, HISTORY, [])})
    except OSError as error:
        raise SpikeformError(f"cannot save to {target}: {error}. What was there is untouched") from error
