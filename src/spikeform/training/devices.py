"""The processes of a run, one a device."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING

import torch

from spikeform.training.errors import TrainingError

if TYPE_CHECKING:
    from accelerate import PartialState


def processes() -> PartialState:
    """This process among those that ``torchrun`` or ``accelerate launch`` started; alone without them.

    Raises:
        TrainingError: accelerate is not installed.
    """
    if importlib.util.find_spec("accelerate") is None:
        raise TrainingError("training needs accelerate: pip install 'spikeform[train]'")
    from accelerate import PartialState

    return PartialState(cpu=not torch.accelerator.is_available())
