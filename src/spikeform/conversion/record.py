"""The record of what was done to a converted model, a stage an entry, as it stands in its history."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

_PACKAGES = ("spikeform", "torch", "transformers", "accelerate")


def entry(
    stage: str,
    options: dict[str, Any],
    data: dict[str, Any],
    steps: int,
    seconds: float,
    metrics: dict[str, Any],
    **more: Any,
) -> dict[str, Any]:
    """One entry of ``model.spikeform_report.history``: JSON-able.

    Args:
        stage: ``train`` …
        options: Of the stage.
        data: What it saw: file names, sha256, tokens.
        steps: Optimiser steps.
        seconds: That they took.
        metrics: What was measured at the end.
        more: Other facts, such as the curve.
    """
    return {
        "stage": stage,
        "options": options,
        "data": data,
        "steps": steps,
        "seconds": round(seconds, 1),
        "metrics": metrics,
        **more,
        "versions": {"python": platform.python_version()}
        | {name: found for name in _PACKAGES if (found := _version(name))},
        "hardware": hardware(),
    }


def hardware() -> str:
    """The accelerator's name, else the processor's kind."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"CPU ({platform.machine()}, {torch.get_num_threads()} threads)"


def keep(model: Any, record: dict[str, Any]) -> None:
    """Append a record to the model's history: its conversion report's, or for a dense model its own."""
    holder, name = (model.spikeform_report, "history") if hasattr(model, "spikeform_report") else (model, HISTORY)
    setattr(holder, name, [*getattr(holder, name, []), record])


HISTORY = "spikeform_history"


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
