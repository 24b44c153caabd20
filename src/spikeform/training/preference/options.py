"""How preference pairs are made, and how a model is tuned on them: frozen dataclasses, checked when they are made."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

from spikeform.conversion.config import switches
from spikeform.conversion.options import Options, real, whole
from spikeform.errors import ConfigError
from spikeform.neurons import SignedInteger
from spikeform.training.options import SCHEDULES, TrainOptions

METHODS = ("dpo", "kto")
CHOSEN = ("sampled", "text")
CORRUPTIONS = ("shuffle", "replace", "repeat", "foreign")


@dataclass(frozen=True)
class PairOptions(Options):
    """Options of :func:`spikeform.training.preference.preference_pairs`.

    The rejected response is the chosen one made worse in one of four ways, drawn by the weights ``shuffle``,
    ``replace``, ``repeat`` and ``foreign`` (0: never).

    Args:
        count: Pairs to make, train and held-out together.
        prompt_tokens: Tokens of a prompt, at most (it is cut back to whole words).
        response_tokens: Tokens of a chosen response, at most.
        chosen: ``sampled`` (the dense model's own continuation) or ``text`` (how the text goes on).
        temperature: Of the sampling.
        shuffle: Weight of: the order of the words is lost in windows of ``shuffle_words``, in each window with
            probability ``shuffle_share``, in at least one.
        replace: Weight of: each word is, with probability ``replace_share``, another one, drawn from the unigram
            distribution of the chosen responses; at least one is.
        repeat: Weight of: a span, ``repeat_share`` of the response, is said twice, in place of what followed it.
        foreign: Weight of: the response to another prompt.
        shuffle_words: Words of a window, at least 2; more is easier to tell.
        shuffle_share: From 0 to 1.
        replace_share: From 0 to 1.
        repeat_share: Above 0, at most 1/2.
        held_out: Share of the prompts whose pairs are only measured on.
        batch_size: Prompts continued at once.
        seed: Of everything drawn.
        version: Of these options' meaning.
    """

    WHAT: ClassVar[str] = "preference pair"
    SHARES: ClassVar[tuple[str, ...]] = ("shuffle_share", "replace_share", "repeat_share", "held_out")
    REALS: ClassVar[tuple[str, ...]] = (*CORRUPTIONS, *SHARES, "temperature")

    count: int = 2000
    prompt_tokens: int = 32
    response_tokens: int = 32
    chosen: str = "sampled"
    temperature: float = 0.9
    shuffle: float = 1.0
    replace: float = 1.0
    repeat: float = 1.0
    foreign: float = 1.0
    shuffle_words: int = 2
    shuffle_share: float = 0.0
    replace_share: float = 0.0
    repeat_share: float = 0.25
    held_out: float = 0.2
    batch_size: int = 64
    seed: int = 0
    version: int = 1

    def check(self) -> None:
        """Every option in its range."""
        if self.chosen not in CHOSEN:
            raise ConfigError(f"chosen must be one of {', '.join(CHOSEN)}, got {self.chosen!r}")
        for name in ("count", "prompt_tokens", "batch_size"):
            whole(name, getattr(self, name))
        whole("response_tokens", self.response_tokens, 4)
        whole("shuffle_words", self.shuffle_words, 2)
        whole("seed", self.seed, 0)
        for name in self.REALS:
            real(name, getattr(self, name), positive=name in ("temperature", "repeat_share"))
        if not any(getattr(self, name) for name in CORRUPTIONS):
            raise ConfigError(f"one of {', '.join(CORRUPTIONS)} must be above 0")
        for name, most in (("shuffle_share", 1), ("replace_share", 1), ("repeat_share", 0.5)):
            if getattr(self, name) > most:
                raise ConfigError(f"{name} must be at most {most}, got {getattr(self, name)}")
        if self.held_out >= 1:
            raise ConfigError(f"held_out is a share of the prompts, from 0 to below 1, got {self.held_out}")


@dataclass(frozen=True)
class PreferOptions(Options):
    """Options of :func:`spikeform.training.preference.prefer`.

    With ``r = log pi(response) - log reference(response)``, summed over the response's tokens,

        dpo   -log sigmoid(beta (r_chosen - r_rejected)) + sft CE(chosen)                     (arXiv 2305.18290)
        kto   w (1 - sigmoid(beta (r - z))) of a chosen, w (1 - sigmoid(beta (z - r))) of a   (arXiv 2402.01306)
              rejected response; z = max(0, mean r of mismatched prompts and responses)

    One optimiser step sees ``batch_size x accumulate x devices`` pairs (dpo) or single responses (kto). The optimiser
    is AdamW (0.9, 0.95), the gradient's norm is clipped at 1. SpikingMamba's own values are not published: these
    are ours.

    Args:
        method: ``dpo`` or ``kto``.
        beta: How much it costs to leave the reference.
        sft: Weight of the cross entropy of the chosen responses' tokens (dpo; arXiv 2404.19733 adds such a term): DPO
            alone may make both responses less likely, and text with them.
        desirable_weight: Of chosen responses (kto).
        undesirable_weight: Of rejected ones (kto).
        learning_rate: Its peak.
        threshold_learning_rate: That of the neurons' thresholds, which are never decayed.
        weight_decay: Of matrices.
        warm_up: Share of the steps in which the rates rise linearly.
        schedule: How they fall afterwards: ``linear`` or ``cosine`` to zero, or ``constant``.
        batch_size: Pairs (kto: responses, at least 2) in a forward pass, on each device.
        accumulate: Forward passes in an optimiser step.
        steps: Optimiser steps; or
        epochs: passes over the pairs (not both; neither means one).
        max_length: Tokens of prompt and response; longer ones are cut at the end.
        compensation: Weight of the signed-integer neurons' smoothed gradient compensation, whose forward pass is that
            of the spikes.
        interpolate: Share of the way from the weights before the stage to the tuned ones at which it ends (arXiv
            2109.01903): below 1 it gives back more of what other text costs than of what was won.
        freeze_embeddings: Whether the embeddings (and a head tied to them) stay as they are.
        window: Tokens of a window of the held-out text.
        bf16: Multiply in bfloat16 (autocast) while training; weights stay fp32, and measuring is in fp32.
        gradient_checkpointing: Keep only the blocks' inputs and compute the rest again: less memory, more time.
        save_every: Steps between two saves of the state that ``resume`` goes on from.
        seed: Of the order of the pairs.
        version: Of these options' meaning.
    """

    WHAT: ClassVar[str] = "preference"
    REALS: ClassVar[tuple[str, ...]] = (
        "beta",
        "sft",
        "desirable_weight",
        "undesirable_weight",
        "learning_rate",
        "threshold_learning_rate",
        "weight_decay",
        "warm_up",
        "epochs",
        "compensation",
        "interpolate",
    )

    method: str = "dpo"
    beta: float = 0.1
    sft: float = 0.0
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0
    learning_rate: float = 5e-6
    threshold_learning_rate: float = 5e-6
    weight_decay: float = 0.0
    warm_up: float = 0.1
    schedule: str = "cosine"
    batch_size: int = 8
    accumulate: int = 1
    steps: int | None = None
    epochs: float | None = None
    max_length: int = 512
    compensation: float = 0.5
    interpolate: float = 1.0
    freeze_embeddings: bool = True
    window: int = 512
    bf16: bool = False
    gradient_checkpointing: bool = False
    save_every: int = 500
    seed: int = 0
    version: int = 1

    def check(self) -> None:
        """Every option in its range."""
        for name, allowed in (("method", METHODS), ("schedule", SCHEDULES)):
            if getattr(self, name) not in allowed:
                raise ConfigError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        whole("batch_size", self.batch_size, 2 if self.method == "kto" else 1)
        for name in ("accumulate", "save_every"):
            whole(name, getattr(self, name))
        for name in ("max_length", "window"):
            whole(name, getattr(self, name), 2)
        whole("seed", self.seed, 0)
        if self.steps is not None:
            whole("steps", self.steps)
        if self.steps is not None and self.epochs is not None:
            raise ConfigError("give steps or epochs, not both")
        for name in self.REALS:
            if getattr(self, name) is not None:
                real(name, getattr(self, name), positive=name in ("beta", "learning_rate", "epochs", "interpolate"))
        if self.sft and self.method != "dpo":
            raise ConfigError(f"sft is for dpo: set it to 0 for {self.method}")
        if self.interpolate > 1:
            raise ConfigError(f"interpolate is a share of the way, above 0 and at most 1, got {self.interpolate}")
        if self.warm_up >= 1:
            raise ConfigError(f"warm_up is a share of the steps, from 0 to below 1, got {self.warm_up}")
        switches(self, "freeze_embeddings", "bf16", "gradient_checkpointing")

    def for_training(self, model: Any) -> TrainOptions:
        """What this stage shares with all training: rates, what learns, the path beside the spikes."""
        embedding = {id(parameter) for parameter in model.get_input_embeddings().parameters()}
        named = [name for name, p in model.named_parameters(remove_duplicate=False) if id(p) in embedding]
        spiking = any(isinstance(module, SignedInteger) for module in model.modules())
        return TrainOptions(
            learning_rate=self.learning_rate,
            threshold_learning_rate=self.threshold_learning_rate,
            weight_decay=self.weight_decay,
            warm_up=self.warm_up,
            schedule=self.schedule,
            freeze=tuple(named) if self.freeze_embeddings else (),
            compensation="grad" if self.compensation and spiking else "none",
            compensation_weight=self.compensation,
            seed=self.seed,
        )

    def total_steps(self, examples: int, devices: int) -> int:
        """Optimiser steps for so many pairs (kto: responses)."""
        if self.steps is not None:
            return self.steps
        return max(1, math.ceil((self.epochs or 1.0) * examples / (self.batch_size * self.accumulate * devices)))
