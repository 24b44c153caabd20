"""What training raises on purpose."""

from __future__ import annotations

from pathlib import Path

from spikeform.errors import SpikeformError


class TrainingError(SpikeformError):
    """Training cannot begin or go on: data, model and options do not fit, or the loss is no number any more."""


class Interrupted(SpikeformError):
    """Training was asked to stop (SIGTERM, Ctrl-C) and saved what it had; the same call with ``resume`` goes on.

    Attributes:
        step: Optimiser steps done.
        work: Folder that holds the state.
        signal: Number of the signal.
    """

    def __init__(self, step: int, work: Path, signal: int) -> None:
        super().__init__(f"stopped at step {step} by signal {signal}; the state is in {work}: resume to go on")
        self.step, self.work, self.signal = step, work, signal
