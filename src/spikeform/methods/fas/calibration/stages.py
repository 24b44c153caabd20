"""The loop of calibration: coarse, then fine; each stage ends with the best state that it saw."""

from __future__ import annotations

import inspect
import math
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from spikeform.errors import CalibrationError
from spikeform.methods.fas.calibration.data import Examples
from spikeform.methods.fas.calibration.losses import following, teach
from spikeform.methods.fas.calibration.measures import device_of, measure
from spikeform.methods.fas.calibration.options import STARTS, CalibrateOptions
from spikeform.methods.fas.calibration.recompute import recomputing
from spikeform.methods.fas.calibration.state import Interrupted, Store
from spikeform.neurons import StreamingNeuron

LEAST_SCALE, MOST_INITIAL, LOG_EVERY = 1e-3, 0.98, 10
Values = list[Tensor]
Point = dict[str, Any]


@dataclass
class Material:
    """What is calibrated on, what decides which state is kept, and what is only measured."""

    train: Examples
    held_out: Examples
    validation: Examples | None = None


class Stages:
    """Calibrates ``model`` in place, with its clock at T and all gradients off.

    Args:
        model: In evaluation mode.
        neurons: All its streaming neurons.
        material: The data.
        options: How.
        positions: That granularity ``position`` knows.
        store: Where the state is kept, or None.
        notify: Called with each point of the curve.
        stop: Asked after each step.
    """

    def __init__(
        self,
        model: Any,
        neurons: list[StreamingNeuron],
        material: Material,
        options: CalibrateOptions,
        positions: int | None,
        store: Store | None,
        notify: Callable[[Point], None],
        stop: Callable[[], bool],
    ) -> None:
        self.model, self.neurons, self.material, self.options = model, neurons, material, options
        self.positions, self.store, self.notify, self.stop = positions, store, notify, stop
        self.device = device_of(model)
        takes_cache = "use_cache" in inspect.signature(model.forward).parameters
        self.extra = {"use_cache": False} if takes_cache else {}
        self._since = 0.0

    def run(self) -> list[dict[str, Any]]:
        """Run all stages, from the state in the store if there is one; returns the results of each."""
        tensors: dict[str, Tensor] = {}
        facts: dict[str, Any] = {}
        found = self.store.load() if self.store is not None else None
        if found is not None:
            tensors, facts = found
            set_values(self.neurons, _listed(tensors, "now", self.device))
        else:
            before = self._look(self.material.held_out)
            if not math.isfinite(before["loss"]):
                raise CalibrationError("the model's outputs are not finite on the calibration data")
            validated = self._validate()
            facts = {"stage": 0, "step": 0, "seconds": 0.0, "given": before, "validation": validated, "done": []}
            self._begin()
        for index in range(facts["stage"], len(self.options.stages())):
            facts = self._stage(index, facts, tensors)
            tensors = {}
        return [{"given": facts["given"], **done} for done in facts["done"]]

    def score(self, measured: dict[str, float]) -> float:
        """What decides which of two states is better: KL on the held-out part, or without that term the loss."""
        return measured["kl" if self.options.kl else "loss"]

    def _begin(self) -> None:
        start = STARTS[self.options.start]
        if start is not None:
            values = [torch.full((1,), value, device=self.device) for _ in self.neurons for value in start]
            set_values(self.neurons, values)

    def _stage(self, index: int, facts: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Any]:
        name, granularity, count, rate = self.options.stages()[index]
        self._since = time.monotonic() - facts["seconds"]
        step = facts["step"]
        if not step:
            for neuron in self.neurons:
                neuron.refine(granularity, self.positions)
            start = self._look(self.material.held_out)
            facts = facts | {"start": start, "best": start, "best_step": 0}
            self._tell(name, 0, count, {f"held_out_{k}": v for k, v in start.items()})
        parameters = parameters_of(self.neurons)
        best = _listed(tensors, "best", self.device) if step else [p.detach().clone() for p in parameters]
        optimizer = self._optimizer(parameters, rate, step, tensors)
        seen = sum(stage[2] for stage in self.options.stages()[:index])
        with recomputing(self.model, self.options.gradient_checkpointing):
            while step < count:
                optimizer.param_groups[0]["lr"] = rate * (1 - step / count)
                losses = self._step(optimizer, parameters, seen + step)
                step += 1
                if step % self.options.evaluate_every == 0 or step == count:
                    measured = self._look(self.material.held_out)
                    if self.score(measured) < self.score(facts["best"]):
                        facts = facts | {"best": measured, "best_step": step}
                        best = [p.detach().clone() for p in parameters]
                    found = {f"held_out_{k}": v for k, v in measured.items()}
                    self._tell(name, step, count, self._checked(losses, name, step) | found)
                elif step % LOG_EVERY == 0:
                    self._tell(name, step, count, self._checked(losses, name, step))
                stopped = self.stop()
                if stopped or step % self.options.save_every == 0:
                    now = facts | {"stage": index, "step": step, "seconds": time.monotonic() - self._since}
                    self._save(now, parameters, best, optimizer)
                if stopped:
                    raise Interrupted(name, step, self.store.path if self.store else None)
        set_values(self.neurons, best)
        validated = self._validate()
        seconds = time.monotonic() - self._since
        done = {
            "name": name,
            "granularity": granularity,
            "steps": count,
            "best_step": facts["best_step"],
            "seconds": seconds,
            "before": facts["start"],
            "after": facts["best"],
            "validation_before": facts["validation"],
            "validation_after": validated,
        }
        facts = {
            "stage": index + 1,
            "step": 0,
            "seconds": 0.0,
            "given": facts["given"],
            "validation": validated,
            "done": [*facts["done"], done],
        }
        self._save(facts, parameters_of(self.neurons))
        return facts

    def _step(self, optimizer: torch.optim.Optimizer, parameters: Values, number: int) -> Tensor:
        """One optimiser step; returns loss, alignment and KL, on the device: nothing here waits for it."""
        options = self.options
        batch = self.material.train.shuffled(number, options.batch_size, options.seed, self.device)
        for parameter in parameters:
            parameter.requires_grad_(True)
        optimizer.zero_grad(set_to_none=True)
        with ExitStack() as until_backward:
            with torch.autocast(self.device.type, torch.bfloat16, enabled=options.bf16):
                lesson = teach(self.model, self.neurons, batch, self.extra)
                student = following(self.model, self.neurons, batch, lesson, options, self.extra)
                _, errors = until_backward.enter_context(student)
                loss = errors.total(options)
            loss.backward()
        optimizer.step()
        with torch.no_grad():
            torch._foreach_clamp_min_(parameters[::2], LEAST_SCALE)
            torch._foreach_clamp_min_(parameters[1::2], 0.0)
            # Above 1/2 a signed neuron would fire against a constant input.
            most = [0.5 if neuron.signed else MOST_INITIAL for neuron in self.neurons]
            torch._foreach_clamp_max_(parameters[1::2], most)
        return torch.stack([loss.detach(), errors.alignment.detach(), errors.kl.detach()])

    def _optimizer(
        self, parameters: Values, rate: float, step: int, tensors: dict[str, Tensor]
    ) -> torch.optim.Optimizer:
        optimizer = torch.optim.Adam(parameters, lr=rate)
        if step:
            first, second = (_listed(tensors, name, self.device) for name in ("first", "second"))
            for parameter, m, v in zip(parameters, first, second, strict=True):
                optimizer.state[parameter] = {"step": torch.tensor(float(step)), "exp_avg": m, "exp_avg_sq": v}
        return optimizer

    def _save(
        self,
        facts: dict[str, Any],
        now: Values,
        best: Values | None = None,
        optimizer: torch.optim.Optimizer | None = None,
    ) -> None:
        if self.store is None:
            return
        lists = {"now": now}
        if best is not None and optimizer is not None:
            lists |= {"best": best}
            lists |= {"first": [optimizer.state[p]["exp_avg"] for p in now]}
            lists |= {"second": [optimizer.state[p]["exp_avg_sq"] for p in now]}
        self.store.save({f"{name}.{i:05d}": t for name, values in lists.items() for i, t in enumerate(values)}, facts)

    def _look(self, examples: Examples) -> dict[str, float]:
        batches = examples.in_order(self.options.batch_size, self.device)
        return measure(self.model, self.neurons, batches, self.options, self.extra)

    def _validate(self) -> dict[str, float] | None:
        return None if self.material.validation is None else self._look(self.material.validation)

    def _checked(self, losses: Tensor, name: str, step: int) -> dict[str, float]:
        found = dict(zip(("loss", "alignment", "kl"), losses.tolist(), strict=True))
        if not math.isfinite(found["loss"]):
            raise CalibrationError(
                f"the loss is {found['loss']} at step {step} of the {name} stage: lower {name}_learning_rate"
            )
        return found

    def _tell(self, name: str, step: int, count: int, found: dict[str, float]) -> None:
        seconds = round(time.monotonic() - self._since, 1)
        self.notify({"stage": name, "step": step, "steps": count, **found, "seconds": seconds})


def parameters_of(neurons: list[StreamingNeuron]) -> Values:
    """Threshold scale and initial potential of each neuron in turn."""
    return [parameter for neuron in neurons for parameter in (neuron.scale, neuron.initial)]


def set_values(neurons: list[StreamingNeuron], values: Values) -> None:
    """Give the neurons these, as :func:`parameters_of` lists them, whatever their shapes."""
    for neuron, scale, initial in zip(neurons, values[::2], values[1::2], strict=True):
        neuron.scale = nn.Parameter(scale.detach().clone(), requires_grad=False)
        neuron.initial = nn.Parameter(initial.detach().clone(), requires_grad=False)


def _listed(tensors: dict[str, Tensor], name: str, device: torch.device) -> Values:
    return [tensors[key].to(device) for key in sorted(tensors) if key.startswith(f"{name}.")]
