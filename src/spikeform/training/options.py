"""How to train: a frozen dataclass, checked when it is made."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from spikeform.conversion.options import Options, real, whole
from spikeform.errors import ConfigError

TASKS = ("causal", "masked", "classify")
SCHEDULES = ("linear", "cosine", "constant")
UNCHANGING = ("evaluate_every", "save_every")  # options that do not change what is learned


@dataclass(frozen=True)
class TrainOptions(Options):
    """Options of :func:`spikeform.train`.

    One optimiser step sees ``batch_size x accumulate x devices`` sequences. The optimiser is AdamW (0.9, 0.95),
    the gradient's norm is clipped at 1.

    Args:
        task: ``causal`` (next token), ``masked`` (15% of the tokens, as BERT) or ``classify`` (labelled sentences).
        window: Tokens of a sequence; at most the model's context.
        batch_size: Sequences in a forward pass, on each device.
        accumulate: Forward passes in an optimiser step.
        steps: Optimiser steps; or
        epochs: passes over the text (not both; neither means one).
        learning_rate: Its peak. (FAS's authors take 9e-5 for language models, 3e-5 for GLUE.)
        threshold_learning_rate: That of the neurons' thresholds, which are never decayed. (FAS: 1e-3 to 5e-3 for
            language models, 0.05 for GLUE.)
        weight_decay: Of matrices; never of biases, norms or thresholds.
        warm_up: Share of the steps in which the rates rise linearly.
        schedule: How they fall afterwards: ``linear`` or ``cosine`` to zero, or ``constant``.
        distil: Weight of KL(dense || model) on the predicted positions, added to the loss; needs a teacher.
        streams: T of the rows that are trained as the spiking network, T streams with surrogate gradients, so that the
            weights learn to bear spikes; 0 trains the QCFS network alone, as FAS's authors do.
        stream_share: Share of each batch, at least one row and not all, that is so trained.
        bf16: Multiply in bfloat16 (autocast) while training; weights stay fp32, and measuring is in fp32.
        gradient_checkpointing: Keep only the blocks' inputs and compute the rest again: less memory, more time.
        compile: ``torch.compile`` the training pass.
        evaluate_every: Steps between measurements on the held-out text; None: ten in all. The last step is always
            measured.
        save_every: Steps between two saves of the state that ``resume`` goes on from.
        seed: Of the order of the text, masks and dropout.
        version: Of these options' meaning.
    """

    WHAT: ClassVar[str] = "training"
    REALS: ClassVar[tuple[str, ...]] = (
        "epochs",
        "learning_rate",
        "threshold_learning_rate",
        "weight_decay",
        "warm_up",
        "distil",
        "stream_share",
    )

    task: str = "causal"
    window: int = 512
    batch_size: int = 8
    accumulate: int = 1
    steps: int | None = None
    epochs: float | None = None
    learning_rate: float = 9e-5
    threshold_learning_rate: float = 1e-3
    weight_decay: float = 0.01
    warm_up: float = 0.03
    schedule: str = "linear"
    distil: float = 0.0
    streams: int = 0
    stream_share: float = 0.25
    bf16: bool = False
    gradient_checkpointing: bool = False
    compile: bool = False
    evaluate_every: int | None = None
    save_every: int = 500
    seed: int = 0
    version: int = 1

    def check(self) -> None:
        """Every option in its range."""
        for name, allowed in (("task", TASKS), ("schedule", SCHEDULES)):
            if getattr(self, name) not in allowed:
                raise ConfigError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        for name in ("batch_size", "accumulate", "save_every"):
            whole(name, getattr(self, name))
        whole("window", self.window, 2)
        whole("seed", self.seed, 0)
        whole("streams", self.streams, 0)
        for name in ("steps", "evaluate_every"):
            if getattr(self, name) is not None:
                whole(name, getattr(self, name))
        if self.steps is not None and self.epochs is not None:
            raise ConfigError("give steps or epochs, not both")
        for name in self.REALS:
            if getattr(self, name) is not None:
                real(name, getattr(self, name), positive=name in ("learning_rate", "epochs"))
        if not 0 < self.stream_share < 1 or (self.streams and self.batch_size < 2):
            raise ConfigError(
                f"stream_share is above 0 and below 1, and streams need a batch_size of at least 2; got "
                f"{self.stream_share} and {self.batch_size}"
            )
        if self.warm_up >= 1:
            raise ConfigError(f"warm_up is a share of the steps, from 0 to below 1, got {self.warm_up}")
        for name in ("bf16", "gradient_checkpointing", "compile"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name} must be true or false, got {getattr(self, name)!r}")

    def total_steps(self, sequences: int, devices: int) -> int:
        """Optimiser steps for a text of so many sequences."""
        if self.steps is not None:
            return self.steps
        return max(1, math.ceil((self.epochs or 1.0) * sequences / (self.batch_size * self.accumulate * devices)))
