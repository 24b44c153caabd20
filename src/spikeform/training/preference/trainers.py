"""TRL's trainers, told what a spiking model needs: thresholds, states that hold any model, stopping at any moment.

Two things of TRL's are worked around. It multiplies the last hidden states by the head's weight itself, so a head that
spikes is refused. And it writes into the models it gets (``forward``, configs, dropout, tags): :func:`as_it_was` takes
that back.
"""

from __future__ import annotations

import copy
import importlib.util
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from spikeform.layers import SpikingLinear
from spikeform.training import trainer as training
from spikeform.training.errors import TrainingError
from spikeform.training.neurons import thresholds
from spikeform.training.preference.options import PreferOptions
from spikeform.training.preference.pairs import KEYS, Pair, Pairs
from spikeform.training.signals import StopSignals
from spikeform.training.state import KEPT, mark_complete

LINES = 50  # points of the curve
POLL = 10  # with several devices, steps between two looks at whether any was asked to stop
_CURVE = {
    "loss": "loss",
    "rewards/accuracies": "accuracy",
    "rewards/margins": "margin",
    "rewards/chosen": "chosen",
    "rewards/rejected": "rejected",
    "kl": "kl",
}
Point = dict[str, Any]


def check_trl() -> None:
    """Raise :class:`TrainingError` unless TRL and datasets are installed."""
    if any(importlib.util.find_spec(name) is None for name in ("trl", "datasets", "accelerate")):
        raise TrainingError("preference tuning needs TRL: pip install 'spikeform[prefer]'")


def check_head(model: Any, whose: str) -> None:
    """Raise :class:`TrainingError` for a head that TRL would use without its neuron."""
    head = model.get_output_embeddings()
    if isinstance(head, SpikingLinear) and head.neuron is not None:
        raise TrainingError(
            f"the {whose}'s output head spikes (lm_head), and TRL multiplies by its weight without its neuron: convert "
            "with lm_head false"
        )


class _Tuning:
    """What is added to TRL's DPOTrainer and KTOTrainer."""

    _own: Any
    _stop: StopSignals
    _started: float
    _notify: Callable[[Point], None]

    _save = training.Trainer._save  # a state holds the model that trains, tied weights once
    _load_from_checkpoint = training.Trainer._load_from_checkpoint
    floating_point_ops = training.Trainer.floating_point_ops

    @property
    def _model(self) -> Any:
        return self._own

    @property
    def seconds(self) -> float:
        """Since the run began, pauses between resumes not counted."""
        return time.monotonic() - self._started

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Tell of a point of the curve; the loss must be a number."""
        base: Any = super()
        base.log(logs, start_time)
        if "loss" not in logs:
            return
        own: Any = self
        if not math.isfinite(logs["loss"]):
            raise TrainingError(
                f"the loss is {logs['loss']} at step {own.state.global_step}: lower learning_rate or beta"
            )
        self._notify(point_of({"step": own.state.global_step, **logs}) | {"seconds": round(self.seconds, 1)})


class _Steering(transformers.TrainerCallback):
    """Thresholds stay positive; states are saved; whoever is asked to stop stops."""

    def __init__(self, neurons: list[nn.Parameter], options: PreferOptions, stop: StopSignals, steps: int) -> None:
        self.thresholds, self.options, self.stop, self.steps = neurons, options, stop, steps
        self.trainer: Any = None

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """A threshold must stay positive."""
        if self.thresholds:
            torch._foreach_clamp_min_([t.data for t in self.thresholds], training.LEAST_THRESHOLD)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
        """Decide what follows this step."""
        step = state.global_step
        control.should_save = step % self.options.save_every == 0 or step == self.steps
        if self._asked(args, step):
            control.should_save = control.should_training_stop = True
        return control

    def _asked(self, args: Any, step: int) -> bool:
        asked = self.stop.signal is not None
        if args.world_size == 1 or step % POLL:
            return asked and args.world_size == 1
        found = torch.tensor(float(asked), device=args.device)
        return bool(self.trainer.accelerator.reduce(found, "sum") > 0)

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Declare the state whole, when all devices have written theirs."""
        self.trainer.accelerator.wait_for_everyone()
        if state.is_world_process_zero:
            mark_complete(Path(args.output_dir) / f"checkpoint-{state.global_step}", self.trainer.seconds)


class _WithoutEnd:
    """TRL's collator, for responses that were cut: the end token that TRL wrote after each is taken off again."""

    def __init__(self, collate: Callable[[list[dict[str, Any]]], Any], end: int) -> None:
        self.collate, self.end = collate, end

    def __call__(self, examples: list[dict[str, Any]]) -> Any:
        return self.collate([{name: self._cut(name, value) for name, value in e.items()} for e in examples])

    def _cut(self, name: str, value: Any) -> Any:
        response = name.endswith("_ids") and name != "prompt_ids" and len(value) > 1
        return value[:-1] if response and value[-1] == self.end else value


def make(
    model: Any,
    reference: Any,
    pairs: Pairs,
    tokenizer: Any,
    options: PreferOptions,
    steps: int,
    work: Path,
    stop: StopSignals,
    seconds: float,
    notify: Callable[[Point], None],
) -> Any:
    """The trainer.

    Args:
        model: The policy; weights fp32, in its training form.
        reference: The reference model, always given: without one TRL would load the dense model that a spiking one
            came from, and take that.
        pairs: Of which those of ``train`` are learned from.
        tokenizer: The model's.
        options: How.
        steps: Optimiser steps.
        work: Folder for states.
        stop: Polled at each step.
        seconds: That the run took before it was resumed.
        notify: Called with each point of the curve.

    Raises:
        TrainingError: The trainer holds another reference than the one given, or the tokenizer has no end token.
    """
    import datasets
    import trl

    if tokenizer.eos_token is None:
        raise TrainingError("the tokenizer has no end token (eos_token): set one, TRL ends and pads responses with it")
    kto = options.method == "kto"
    config: Any = (trl.KTOConfig if kto else trl.DPOConfig)(**_arguments(options, steps, work))
    _ = config.device  # finds the devices
    config._n_gpu = min(config.n_gpu, 1)  # one process, one device: no DataParallel
    model.to(config.device)
    reference.to(config.device).eval().requires_grad_(False)
    steering = _Steering(thresholds(model), options, stop, steps)
    kind: Any = type("PreferenceTrainer", (_Tuning, trl.KTOTrainer if kto else trl.DPOTrainer), {})
    kind._own, kind._stop, kind._notify = model, stop, staticmethod(notify)
    kind._started = time.monotonic() - seconds
    with _without_bars(datasets):
        trainer = kind(
            model=model,
            ref_model=reference,
            args=config,
            train_dataset=datasets.Dataset.from_list(unpaired(pairs.train, options) if kto else _plain(pairs.train)),
            processing_class=copy.deepcopy(tokenizer),  # TRL sets its padding token
            optimizers=training.make_optimizer(model, options.for_training(model), steps),
            callbacks=[steering],
        )
    steering.trainer = trainer
    trainer.remove_callback(transformers.trainer_callback.PrinterCallback)
    if not pairs.end_token:
        trainer.data_collator = _WithoutEnd(trainer.data_collator, tokenizer.eos_token_id)
    if trainer.accelerator.unwrap_model(trainer.ref_model) is not reference:
        raise TrainingError("TRL took another reference model than the one given: this release of TRL is not supported")
    return trainer


def _plain(pairs: list[Pair]) -> list[Pair]:
    return [{key: pair[key] for key in KEYS} for pair in pairs]


def unpaired(pairs: list[Pair], options: PreferOptions) -> list[dict[str, Any]]:
    """Single responses with a label, in an order of their own; whole batches, for TRL mismatches within a batch."""
    rows = [
        {"prompt": pair["prompt"], "completion": pair[name], "label": name == "chosen"}
        for pair in pairs
        for name in ("chosen", "rejected")
    ]
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(options.seed)).tolist()
    whole = len(rows) // options.batch_size * options.batch_size
    if not whole:
        raise TrainingError(f"{len(rows)} responses do not fill one batch of {options.batch_size}: lower batch_size")
    return [rows[i] for i in order[:whole]]


def _arguments(options: PreferOptions, steps: int, work: Path) -> dict[str, Any]:
    found: dict[str, Any] = {
        "output_dir": str(work),
        "max_steps": steps,
        "per_device_train_batch_size": options.batch_size,
        "gradient_accumulation_steps": options.accumulate,
        "max_grad_norm": 1.0,
        "seed": options.seed,
        "use_cpu": not torch.accelerator.is_available(),
        "bf16": options.bf16,
        "gradient_checkpointing": False,  # the model's own state, see prefer()
        "eval_strategy": "no",
        "save_strategy": "no",  # _Steering decides
        "logging_steps": math.ceil(steps / LINES),
        "logging_first_step": True,
        "logging_nan_inf_filter": False,
        "save_total_limit": KEPT,
        "report_to": "none",
        "disable_tqdm": True,
        "log_level": "error",
        "dataloader_pin_memory": torch.cuda.is_available(),
        "beta": options.beta,
        "max_length": options.max_length,
    }
    if options.method == "kto":
        found |= {"desirable_weight": options.desirable_weight, "undesirable_weight": options.undesirable_weight}
    elif options.sft:
        found |= {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, options.sft]}
    return found


def point_of(logs: dict[str, Any]) -> Point:
    """A point of the curve, without the trainer's own keys."""
    return {"step": logs["step"]} | {name: float(f"{logs[key]:.6g}") for key, name in _CURVE.items() if key in logs}


@contextmanager
def as_it_was(model: Any) -> Iterator[None]:
    """Take back what TRL writes into a model beside its parameters: ``forward``, tags, configs, dropout, modes."""
    holders = [model, model.config, getattr(model, "generation_config", None)]
    before = [(holder, dict(vars(holder))) for holder in holders if holder is not None]
    dropouts = [(module, module.p) for module in model.modules() if isinstance(module, nn.Dropout)]
    learning = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    training = model.training
    try:
        yield
    finally:
        for holder, attributes in before:
            vars(holder).clear()
            vars(holder).update(attributes)
        for module, p in dropouts:
            module.p = p
        for parameter, needs in learning:
            parameter.requires_grad_(needs)
        model.train(training)


@contextmanager
def _without_bars(datasets: Any) -> Iterator[None]:
    silent = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if not silent:
            datasets.enable_progress_bars()
