"""transformers' Trainer, told what a spiking model needs.

It brings the loop over devices, accumulation and the state of optimiser and random generators. Here: rates of their
own for thresholds, loss and measures, states that hold any model (spiking, tied), and stopping at any moment.
"""

from __future__ import annotations

import inspect
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import transformers
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import SequentialSampler

from spikeform.layers.streaming import running
from spikeform.neurons.signed_integer import Compensation
from spikeform.training import losses
from spikeform.training.compensation import weight_at
from spikeform.training.errors import TrainingError
from spikeform.training.examples import Examples, Stream, held_out_batches
from spikeform.training.neurons import attend, norm_parameters, thresholds
from spikeform.training.options import TrainOptions
from spikeform.training.signals import StopSignals
from spikeform.training.state import KEPT, mark_complete

LEAST_THRESHOLD = 1e-4
UNDECAYED = ("A_log", "D", "dt_bias")  # of state-space layers: rates and skips, whatever their shape
LINES, MEASURES = 50, 10  # points of the curve, those with held-out text
POLL = 10  # with several devices, steps between two looks at whether any was asked to stop
WEIGHTS = "model.safetensors"
Point = dict[str, Any]


class Trainer(transformers.Trainer):
    """Trains ``model`` in place.

    Args:
        model: On any device; weights fp32.
        options: How.
        steps: Optimiser steps of the whole run.
        stream: All its sequences.
        held_out: What to measure on, or None.
        teacher: The dense model, for ``distil`` and ``hidden``.
        work: Folder for states.
        stop: Polled at each step and each batch of a measurement.
        seconds: That the run took before it was resumed.
        notify: Called with each point of the curve.
        path: The continuous path beside the spikes, whose weight moves with the steps; None: there is none.
    """

    def __init__(
        self,
        model: Any,
        options: TrainOptions,
        steps: int,
        stream: Stream,
        held_out: Examples | None,
        teacher: Any,
        work: Path,
        stop: StopSignals,
        seconds: float,
        notify: Callable[[Point], None],
        path: Compensation | None = None,
    ) -> None:
        self.options, self.steps, self.held_out, self.path = options, steps, held_out, path
        self.stop, self.notify, self._stream, self._model = stop, notify, stream, model
        self._started = time.monotonic() - seconds
        takes_cache = "use_cache" in inspect.signature(model.forward).parameters
        self._extra = {"use_cache": False} if takes_cache else {}
        cache = getattr(model.config, "use_cache", None)
        args = _arguments(options, steps, work)
        model.to(args.device)  # before the optimiser is made
        super().__init__(
            model=model,
            args=args,
            data_collator=_as_it_is,
            train_dataset=stream,
            optimizers=make_optimizer(model, options, steps),
            callbacks=[_Steering(self, thresholds(model))],
        )
        model.config.use_cache = cache  # the trainer turned it off, in the config that will be saved
        self.remove_callback(transformers.trainer_callback.PrinterCallback)
        self.model_accepts_loss_kwargs = self.loss_is_scaled_for_ga = False  # the loss is a mean over its batch
        self.every = options.evaluate_every or math.ceil(steps / MEASURES)
        self.lines = min(self.every, math.ceil(steps / LINES))
        if teacher is not None:
            teacher.to(self.args.device).eval().requires_grad_(False)
        objective = losses.Objective(options, self._extra, model, teacher)
        # Teacher and losses in one graph with the model: of a small one the launches take longer than the arithmetic.
        self.minimised: Callable[..., Tensor] = torch.compile(objective.__call__) if options.compile else objective

    @property
    def seconds(self) -> float:
        """Since the run began, pauses between resumes not counted."""
        return time.monotonic() - self._started

    def measures_at(self, step: int) -> bool:
        """Whether the held-out text is read after this step."""
        return self.held_out is not None and (step % self.every == 0 or step == self.steps)

    def asked_to_stop(self, turn: int = 0) -> bool:
        """Whether any device's process was asked; all of them must call this, with the same ``turn``."""
        if self.args.world_size == 1:
            return self.stop.signal is not None
        if turn % POLL:
            return False
        asked = torch.tensor(float(self.stop.signal is not None), device=self.args.device)
        return bool(self.accelerator.reduce(asked, "sum") > 0)

    def _get_train_sampler(self, train_dataset: Any = None) -> SequentialSampler:
        return SequentialSampler(self._stream)  # it is in its order already

    def compute_loss(  # type: ignore[override]  # what the trainer adds from version to version
        self, model: Any, inputs: Any, return_outputs: bool = False, **_: Any
    ) -> Any:
        """The mean over the batch's rows; see :class:`spikeform.training.losses.Objective`."""
        options = self.options
        rows = len(inputs["labels"])
        cut = min(max(round(rows * (1 - options.stream_share)), 1), rows - 1) if options.streams and rows > 1 else rows
        share = 1 - cut / rows
        still, moving = ({name: x[part] for name, x in inputs.items()} for part in (slice(cut), slice(cut, None)))
        with torch.autocast(self.args.device.type, torch.bfloat16, enabled=options.bf16):
            loss = self.minimised(model, still) * (1 - share)
            if share:
                with running(self._model, options.streams):
                    loss = loss + self.minimised(model, moving) * share
        return (loss, None) if return_outputs else loss

    def floating_point_ops(self, inputs: Any) -> int:
        """Not counted: it would walk over all modules at each step."""
        return 0

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Read the held-out text in fp32; adds what it found to the curve. Empty if asked to stop meanwhile."""
        assert self.held_out is not None
        rank, devices = self.args.process_index, self.args.world_size
        batches = held_out_batches(self.held_out, self.options.batch_size, rank, devices)
        turns = iter(range(1 << 62))
        self._model.eval()
        sums = losses.sums_of(self._model, batches, self._extra, lambda: not self.asked_to_stop(next(turns)))
        self._model.train()
        self.control.should_evaluate = False
        if sums is None:
            self.control.should_save = self.control.should_training_stop = True
            return {}
        if devices > 1:
            sums = self.accelerator.reduce(sums.to(self.args.device), "sum").cpu()
        found = losses.metrics_of(self.options.task, sums)
        self.log(found)
        return found

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add to the point of this step, or begin it.

        Raises:
            TrainingError: The loss is no number any more.
        """
        step, self.control.should_log = self.state.global_step, False
        if "train_runtime" in logs:
            return  # the trainer's own summary
        for name in ("loss", "held_out_loss"):
            if not math.isfinite(logs.get(name, 0.0)):
                raise TrainingError(
                    f"the {name.replace('_', ' ')} is {logs[name]} at step {step}: lower learning_rate or "
                    "threshold_learning_rate, or give a longer warm_up"
                )
        history = self.state.log_history
        if not history or history[-1]["step"] != step:
            history.append({"step": step})
        history[-1] |= {**logs, "seconds": round(self.seconds, 1)}
        if "held_out_loss" in logs or not self.measures_at(step):
            self.notify(history[-1])

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        # Not save_pretrained: what it writes is for users, and a spiking weight has another shape there.
        if self.args.should_save:
            folder = Path(output_dir or str(self.args.output_dir))
            folder.mkdir(parents=True, exist_ok=True)
            safetensors.torch.save_model(self._model, str(folder / WEIGHTS))  # a tied weight once

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        safetensors.torch.load_model(self._model, Path(resume_from_checkpoint) / WEIGHTS, strict=True)


class _Steering(transformers.TrainerCallback):
    """When to measure, save and stop."""

    def __init__(self, trainer: Trainer, thresholds: list[nn.Parameter]) -> None:
        self.trainer, self.thresholds = trainer, thresholds

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Measure before the first step, or after the last one if the stop came while it was measured."""
        last = state.log_history[-1] if state.log_history else {}
        done = last.get("step") == state.global_step and "held_out_loss" in last
        if self.trainer.measures_at(state.global_step) and not done:
            self.trainer.evaluate()

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """The weight of the continuous path follows from the step alone, so that a resumed run goes on with it."""
        trainer = self.trainer
        if trainer.path is not None:
            trainer.path.weight = weight_at(trainer.options, state.global_step, trainer.steps)
        if trainer.options.layer_by_layer:
            attend(trainer._model, state.global_step / (trainer.options.layer_by_layer * trainer.steps))

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """A threshold must stay positive."""
        if self.thresholds:
            torch._foreach_clamp_min_([t.data for t in self.thresholds], LEAST_THRESHOLD)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
        """Decide what follows this step."""
        trainer, step = self.trainer, state.global_step
        control.should_evaluate = trainer.measures_at(step)
        control.should_log = step % trainer.lines == 0 or control.should_evaluate or step == trainer.steps
        control.should_save = step % trainer.options.save_every == 0 or step == trainer.steps
        if trainer.asked_to_stop(step):
            control.should_save, control.should_evaluate = True, False
            control.should_training_stop = True
        return control

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Declare the state whole, when all devices have written theirs."""
        self.trainer.accelerator.wait_for_everyone()
        if state.is_world_process_zero:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            mark_complete(folder, self.trainer.seconds)


def _as_it_is(batch: Any) -> Any:
    return batch  # the stream makes whole batches


def _arguments(options: TrainOptions, steps: int, work: Path) -> transformers.TrainingArguments:
    args = transformers.TrainingArguments(
        output_dir=str(work),
        max_steps=steps,
        per_device_train_batch_size=options.batch_size,
        gradient_accumulation_steps=options.accumulate,
        max_grad_norm=options.clip,
        seed=options.seed,
        use_cpu=not torch.accelerator.is_available(),
        eval_strategy="no",  # _Steering decides
        save_strategy="no",
        logging_strategy="no",
        save_total_limit=KEPT,
        report_to="none",
        disable_tqdm=True,
        log_level="error",
        logging_nan_inf_filter=False,  # it would wait for the device at each step
        remove_unused_columns=False,
        dataloader_pin_memory=torch.cuda.is_available(),
        average_tokens_across_devices=False,
        # P has no gradient any more once lambda is 0.
        ddp_find_unused_parameters=True if options.compensation == "add" else None,
    )
    _ = args.device  # finds the devices
    args._n_gpu = min(args.n_gpu, 1)  # one process, one device: no DataParallel
    return args


def make_optimizer(model: nn.Module, options: TrainOptions, steps: int) -> tuple[torch.optim.Optimizer, LambdaLR]:
    """AdamW with a group for each rate and decay, and the schedule of their rates.

    Raises:
        TrainingError: No parameter is left that learns.
    """
    own, norms = ({id(p) for p in some} for some in (thresholds(model), norm_parameters(model)))
    rest = [
        (name.rpartition(".")[2], p) for name, p in model.named_parameters() if p.requires_grad and id(p) not in own
    ]
    decayed = {id(p) for name, p in rest if p.ndim > 1 and name not in UNDECAYED}
    first = math.ceil(options.thresholds_first * steps)

    def soon(step: int) -> float:
        return rate(step, steps, options.warm_up, options.schedule)

    def later(step: int) -> float:
        return rate(step - first, steps - first, options.warm_up, options.schedule) if step >= first else 0.0

    plain: dict[str, Any] = {"weight_decay": 0.0}
    groups = [
        (later, {"params": [p for _, p in rest if id(p) in decayed], "weight_decay": options.weight_decay}),
        (later, plain | {"params": [p for _, p in rest if id(p) not in decayed | norms]}),
        (soon, plain | {"params": [p for _, p in rest if id(p) in norms - decayed]}),
        (soon, plain | {"params": [t for t in thresholds(model) if t.requires_grad]}),
    ]
    groups[-1][1]["lr"] = options.threshold_learning_rate
    groups = [(share, group) for share, group in groups if group["params"]]
    if not groups:
        raise TrainingError("freeze names every parameter of the model: leave some that learn")
    optimizer = torch.optim.AdamW(
        [group for _, group in groups],
        lr=options.learning_rate,
        betas=(0.9, 0.95),
        fused=torch.cuda.is_available(),
    )
    return optimizer, LambdaLR(optimizer, [share for share, _ in groups])


def rate(step: int, steps: int, warm_up: float, schedule: str) -> float:
    """The share of the peak rate at the step after ``step``: a linear rise, then the schedule."""
    rise = math.ceil(warm_up * steps)
    if step < rise:
        return (step + 1) / (rise + 1)
    left = max(0.0, (steps - step) / max(1, steps - rise))
    return {"constant": 1.0, "linear": left, "cosine": 0.5 - 0.5 * math.cos(math.pi * left)}[schedule]


def points_of(history: list[dict[str, Any]]) -> list[Point]:
    """The curve for the record: rounded, and without the trainer's own keys."""
    names = ("step", "loss", "held_out_loss", "perplexity", "accuracy", "learning_rate", "seconds")
    return [{k: float(f"{p[k]:.6g}") if k != "step" else p[k] for k in names if k in p} for p in history]
