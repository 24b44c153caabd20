"""How to train: a frozen dataclass, checked when it is made."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

from spikeform.conversion.config import switches
from spikeform.conversion.options import Options, real, whole
from spikeform.errors import ConfigError
from spikeform.neurons.signed_integer import SMOOTH

TASKS = ("causal", "masked", "classify")
SCHEDULES = ("linear", "cosine", "constant")
DISTANCES = ("relative", "cosine")
COMPENSATIONS = ("none", "grad", "mix", "add")
UNCHANGING = ("evaluate_every", "save_every")  # options that do not change what is learned


@dataclass(frozen=True)
class TrainOptions(Options):
    """Options of :func:`spikeform.train`.

    One optimiser step sees ``batch_size x accumulate x devices`` sequences. The optimiser is AdamW (0.9, 0.95). What is
    minimised is

        ce CE + distil tau^2 [(1 - r) KL(T || S) + r KL(S || T)] + hidden (1/L) sum_l ||h_S - h_T||^2 / ||h_T||^2

    with S the model, T the teacher (the dense model), ``tau`` the temperature, ``r`` reverse, and ``h`` what the
    residual stream holds of a token after block l of L.

    Args:
        task: ``causal`` (next token), ``masked`` (15% of the tokens, as BERT) or ``classify`` (labelled sentences).
        window: Tokens of a sequence; at most the model's context.
        batch_size: Sequences in a forward pass, on each device.
        accumulate: Forward passes in an optimiser step.
        steps: Optimiser steps; or
        epochs: passes over the text (not both; neither means one).
        learning_rate: Its peak. (FAS's authors take 9e-5 for language models, 3e-5 for GLUE.)
        threshold_learning_rate: That of the neurons' thresholds, which are never decayed. (FAS: 1e-3 to 5e-3 for
            language models, 0.05 for GLUE.) 0 leaves them as they are.
        thresholds_first: Share of the steps, at the beginning, in which only thresholds and norms learn; the others'
            rates rise afterwards.
        weight_decay: Of matrices; never of biases, norms, thresholds, or a state-space layer's A, D and dt bias.
        clip: The gradient's norm is clipped at this; 0 leaves it as it is.
        freeze: Name patterns of parameters that do not learn (``*embed*``; a tied head is the same parameter).
        warm_up: Share of the steps in which the rates rise linearly.
        schedule: How they fall afterwards: ``linear`` or ``cosine`` to zero, or ``constant``.
        ce: Weight of the cross entropy with the text (or the labels).
        distil: Weight of the divergence from the teacher's prediction, on the predicted positions.
        temperature: tau, by which logits are divided for it.
        reverse: r, the share of the reverse divergence, 0 to 1.
        hidden: Weight of the distance between residual streams, on every token that is no padding.
        hidden_distance: ``relative`` (as above) or ``cosine``: ``(1/L) sum_l (1 - cos(h_S, h_T))``.
        layer_by_layer: Share of the steps in which layers of spiking self-attention take their places one after the
            other, from the first on; 0: all at once.
        compensation: A second, continuous path of signed-integer neurons while they train (smoothed gradient
            compensation): ``grad`` in the gradient alone, ``mix`` instead of a share of the spikes, ``add`` a real
            matrix P beside each layer, ``y = W (n V_th) + lambda P x``, which learns too and is deleted at the end.
        compensation_weight: lambda. With mix and add that is where it begins.
        compensation_smooth: g(u) of grad and mix: ``tanh`` (D tanh(u / D)), ``clip`` or ``identity``.
        compensation_share: Share of the steps in which lambda falls to 0, with mix and add.
        compensation_rank: Rank of P; 0: any.
        streams: T of the rows that are trained as the spiking network, T streams with surrogate gradients, so that the
            weights learn to bear spikes; 0 trains the QCFS network alone, as FAS's authors do.
        stream_share: Share of each batch, at least one row and not all, that is so trained.
        bf16: Multiply in bfloat16 (autocast) while training; weights stay fp32, and measuring is in fp32.
        gradient_checkpointing: Keep only the blocks' inputs and compute the rest again: less memory, more time.
        compile: ``torch.compile`` model, teacher and losses as one graph. With a compensation whose weight moves (mix,
            add) there are three, one after the other.
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
        "thresholds_first",
        "warm_up",
        "clip",
        "ce",
        "distil",
        "temperature",
        "reverse",
        "hidden",
        "layer_by_layer",
        "compensation_weight",
        "compensation_share",
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
    thresholds_first: float = 0.0
    weight_decay: float = 0.01
    clip: float = 1.0
    freeze: tuple[str, ...] = ()
    warm_up: float = 0.03
    schedule: str = "linear"
    ce: float = 1.0
    distil: float = 0.0
    temperature: float = 1.0
    reverse: float = 0.0
    hidden: float = 0.0
    hidden_distance: str = "relative"
    layer_by_layer: float = 0.0
    compensation: str = "none"
    compensation_weight: float = 0.5
    compensation_smooth: str = "tanh"
    compensation_share: float = 0.8
    compensation_rank: int = 0
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
        """Every option in its range; lists become tuples."""
        choices = {"task": TASKS, "schedule": SCHEDULES, "hidden_distance": DISTANCES}
        choices |= {"compensation": COMPENSATIONS, "compensation_smooth": SMOOTH}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ConfigError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        for name in ("batch_size", "accumulate", "save_every"):
            whole(name, getattr(self, name))
        whole("window", self.window, 2)
        for name in ("seed", "streams", "compensation_rank"):
            whole(name, getattr(self, name), 0)
        for name in ("steps", "evaluate_every"):
            if getattr(self, name) is not None:
                whole(name, getattr(self, name))
        if self.steps is not None and self.epochs is not None:
            raise ConfigError("give steps or epochs, not both")
        above = ("learning_rate", "epochs", "temperature", "compensation_share")
        for name in self.REALS:
            if getattr(self, name) is not None:
                real(name, getattr(self, name), positive=name in above)
        if not 0 < self.stream_share < 1 or (self.streams and self.batch_size < 2):
            raise ConfigError(
                f"stream_share is above 0 and below 1, and streams need a batch_size of at least 2; got "
                f"{self.stream_share} and {self.batch_size}"
            )
        if self.warm_up >= 1:
            raise ConfigError(f"warm_up is a share of the steps, from 0 to below 1, got {self.warm_up}")
        self._check_terms()
        switches(self, "bf16", "gradient_checkpointing", "compile")

    def _check_terms(self) -> None:
        """What is minimised, and by which parameters."""
        if not (self.ce or self.distil or self.hidden):
            raise ConfigError("nothing is minimised: give ce, distil or hidden a weight above 0")
        for name in ("reverse", "thresholds_first", "compensation_share", "layer_by_layer"):
            if getattr(self, name) > 1:
                raise ConfigError(f"{name} is a share, at most 1, got {getattr(self, name)}")
        if self.compensation == "mix" and self.compensation_weight > 1:
            raise ConfigError(f"compensation_weight is at most 1 with mix, got {self.compensation_weight}")
        if not isinstance(self.freeze, list | tuple) or not all(isinstance(pattern, str) for pattern in self.freeze):
            raise ConfigError(f"freeze must be a list of parameter name patterns, got {self.freeze!r}")
        object.__setattr__(self, "freeze", tuple(self.freeze))

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return super().to_dict() | {"freeze": list(self.freeze)}

    @property
    def taught(self) -> str | None:
        """The first term that needs a teacher, None where none does."""
        return next((name for name in ("distil", "hidden") if getattr(self, name)), None)

    def total_steps(self, sequences: int, devices: int) -> int:
        """Optimiser steps for a text of so many sequences."""
        if self.steps is not None:
            return self.steps
        return max(1, math.ceil((self.epochs or 1.0) * sequences / (self.batch_size * self.accumulate * devices)))
