"""How to calibrate: a frozen dataclass, checked when it is made."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from spikeform.conversion.config import choice, switches
from spikeform.conversion.data import MAX_WINDOW
from spikeform.conversion.options import Options, real, whole
from spikeform.errors import ConfigError
from spikeform.methods.fas.config import MAX_STEPS

GRANULARITIES = ("layer", "channel", "position")
STARTS = {"conversion": (1.0, 0.5), "released": (0.6, 0.2), "model": None}


@dataclass(frozen=True)
class CalibrateOptions(Options):
    """Options of :func:`spikeform.calibrate`. The paper gives the losses and the two stages; numbers are ours.

    Args:
        steps: Time steps T to calibrate for; None: the model's.
        granularity: Of the fine stage: ``channel``, or ``position`` (per position and channel, the released code's
            form); ``layer``: there is no fine stage.
        positions: Positions that ``position`` knows; None: the longest sequence of the data.
        coarse_steps: Optimiser steps with one threshold scale and one initial potential per layer; 0: no such stage.
        fine_steps: Those with the finer parameters; 0: no such stage.
        coarse_learning_rate: Of the coarse stage (Adam); it falls linearly to zero.
        fine_learning_rate: Of the fine stage.
        batch_size: Sequences in a step.
        window: Tokens of a sequence at most; longer texts are cut.
        alignment: Weight of the sum over neurons of the squared error of their mean output.
        normalise: Divide each neuron's squared error by the mean square of what it should be; False is the paper's
            plain sum, in which the layer of largest activations says most.
        kl: Weight of KL(QCFS network || spiking network) per token.
        temperature: Of both in it; it is multiplied by its square.
        start: Where the coarse stage begins: ``conversion`` (scale 1, potential 1/2), ``released`` (0.6 and 0.2, as
            the released code for language models), or ``model`` (what the model has).
        operators: After both stages put few-spike operators of so many steps in the place of softmax, norms and the
            products of attention (1 to 16); None: these stay as they are.
        evaluate_every: Steps between two looks at the held-out part of the data; the best state seen is kept.
        save_every: Steps between two saves of the state, where there is a work folder.
        bf16: Multiply in bfloat16 (autocast) in the steps; looks at the held-out part are in the model's own dtype.
        gradient_checkpointing: Keep only the blocks' inputs and compute the rest again: less memory, more time.
        seed: Of the order of the data.
        version: Of these options' meaning.
    """

    WHAT: ClassVar[str] = "calibration"
    REALS: ClassVar[tuple[str, ...]] = (
        "coarse_learning_rate",
        "fine_learning_rate",
        "temperature",
        "alignment",
        "kl",
    )

    steps: int | None = None
    granularity: str = "channel"
    positions: int | None = None
    coarse_steps: int = 100
    fine_steps: int = 200
    coarse_learning_rate: float = 1e-2
    fine_learning_rate: float = 5e-3
    batch_size: int = 8
    window: int = MAX_WINDOW
    alignment: float = 1.0
    normalise: bool = True
    kl: float = 1.0
    temperature: float = 1.0
    start: str = "conversion"
    operators: int | None = None
    evaluate_every: int = 20
    save_every: int = 50
    bf16: bool = False
    gradient_checkpointing: bool = False
    seed: int = 0
    version: int = 1

    def check(self) -> None:
        """Every option in its range."""
        choice("granularity", self.granularity, GRANULARITIES)
        choice("start", self.start, tuple(STARTS))
        if self.steps is not None:
            whole("steps", self.steps, 1, MAX_STEPS)
        if self.positions is not None:
            whole("positions", self.positions, 1, 2**20)
            if self.granularity != "position":
                raise ConfigError("positions has a meaning with granularity position only: leave it out")
        if self.operators is not None:
            whole("operators", self.operators, 1, 16)
        whole("window", self.window, 2, MAX_WINDOW)
        for name in ("batch_size", "evaluate_every", "save_every"):
            whole(name, getattr(self, name), 1)
        for name in ("coarse_steps", "fine_steps", "seed"):
            whole(name, getattr(self, name), 0)
        for name in self.REALS:
            real(name, getattr(self, name), positive=name not in ("alignment", "kl"))
        switches(self, "normalise", "bf16", "gradient_checkpointing")
        if not self.alignment and not self.kl:
            raise ConfigError("alignment and kl are both 0: there is nothing to calibrate by")
        if not self.stages():
            raise ConfigError("there is no stage: give coarse_steps, or a granularity other than layer and fine_steps")

    def stages(self) -> list[tuple[str, str, int, float]]:
        """Name, granularity, steps and learning rate of each stage."""
        coarse = ("coarse", "layer", self.coarse_steps, self.coarse_learning_rate)
        fine = (
            "fine",
            self.granularity,
            0 if self.granularity == "layer" else self.fine_steps,
            self.fine_learning_rate,
        )
        return [stage for stage in (coarse, fine) if stage[2]]
