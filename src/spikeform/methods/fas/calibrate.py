"""Stage 2 of FAS: calibrate the spiking network against its own QCFS network, from coarse to fine."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from spikeform.conversion import record
from spikeform.conversion.quantizer import attach
from spikeform.errors import CalibrationError, ConfigError, ConversionError
from spikeform.layers.streaming import clock_of, neurons_of, running
from spikeform.methods.fas import operators
from spikeform.methods.fas.calibration.data import read
from spikeform.methods.fas.calibration.options import GRANULARITIES, CalibrateOptions
from spikeform.methods.fas.calibration.stages import Material, Stages, parameters_of, set_values
from spikeform.methods.fas.calibration.state import Interrupted, Store, mark_of
from spikeform.methods.fas.config import FAS
from spikeform.neurons import StreamingNeuron

OPERATOR_ROWS = 32  # sequences on which the operators' thresholds are found

__all__ = ["CalibrateOptions", "Interrupted", "calibrate"]


def calibrate(
    model: PreTrainedModel,
    data: Any,
    tokenizer: Any = None,
    options: CalibrateOptions | None = None,
    *,
    validation: Any = None,
    workdir: str | Path | None = None,
    progress: Callable[[dict[str, Any]], None] | None = None,
    stop: Callable[[], bool] | None = None,
) -> PreTrainedModel:
    """Find threshold scales and initial potentials of a FAS model, in place, and return it.

    The teacher is the same model without time (``steps=0``), the student the same model with T steps. Only
    ``scale`` and ``initial`` of its neurons learn: first one of each per layer, then per channel (or position and
    channel). The last tenth of the data, of at most 16384 tokens, is not learnt from: the state that is best on it
    by KL(teacher || student) is kept, and if even that is no better than ``model`` as it was given, nothing changes.

    Args:
        model: Converted with :class:`spikeform.FAS`, its thresholds set; usually trained as QCFS network before.
        data: Texts, token ids ``[N, L]`` or ``[N]``, or an iterable of batches (mappings with ``input_ids`` and
            ``attention_mask`` ``[B, S]``; other tensors go to the model too, but for ``labels``). None: sampled from
            the QCFS network. Padding says nothing.
        tokenizer: Needed for texts.
        options: How; see :class:`CalibrateOptions`.
        validation: Data of the same kinds, only measured, before and after each stage.
        workdir: Folder for the state: an interrupted call goes on from there, to the same bits on a CPU.
        progress: Called with each point of the curve: stage, step, loss, held_out_kl ….
        stop: Asked after each step whether to stop; then the state is saved and :class:`Interrupted` raised.

    Returns:
        ``model``, which says its new steps and granularity in ``config.quantization_config``; each stage is an
        entry of ``model.spikeform_report.history``.

    Raises:
        ConversionError: The model is not converted with FAS.
        ConfigError: Options that do not fit the model.
        CalibrationError: The data cannot be used, or the work folder is another run's.
        Interrupted: Asked to stop; the model is as it was.
    """
    options = options or CalibrateOptions()
    config, steps = _checked(model, options)
    neurons = neurons_of(model)
    examples = read(model, data, tokenizer, options.window)
    train, held_out = examples.split()
    checked = None if validation is None else read(model, validation, tokenizer, options.window)
    longest = max(e.longest for e in (examples, checked) if e is not None)
    positions = _positions(options, config, longest)
    store = None
    if workdir is not None:
        what = {k: v for k, v in options.to_dict().items() if k != "save_every"}
        told = [e.source["sha256"] if e is not None else None for e in (examples, checked)]
        store = Store(Path(workdir), mark_of(model, what, config.to_dict(), told))
    material, notify = Material(train, held_out, checked), progress or (lambda point: None)
    with _frozen(model, neurons), running(model, steps):
        stages = Stages(model, neurons, material, options, positions, store, notify, stop or (lambda: False))
        given = [p.detach().clone() for p in parameters_of(neurons)]
        try:
            done = stages.run()
        except BaseException:
            set_values(neurons, given)
            raise
        better = stages.score(done[-1]["after"]) <= stages.score(done[-1]["given"])
        if not better:
            set_values(neurons, given)
    fine = done[-1]["granularity"] if better else config.granularity
    fitted = replace(config, steps=steps, granularity=fine, positions=positions if fine == "position" else None)
    report: Any = model.spikeform_report
    attach(model, fitted, report)
    clock: Any = clock_of(model)
    clock.steps = steps
    sources = {"train": examples.source, "held_out": len(held_out.rows), "validation": checked and checked.source}
    report.history = [*report.history, *(_entry(stage, options, sources, steps, better) for stage in done)]
    if options.operators is not None:
        operators.add(model, options.operators, [row["input_ids"][None] for row in train.rows[:OPERATOR_ROWS]])
    return model


def _checked(model: Any, options: CalibrateOptions) -> tuple[FAS, int]:
    """The model's config and the T to calibrate for, or an error."""
    config = getattr(getattr(model, "config", None), "quantization_config", None)
    if not isinstance(model, PreTrainedModel) or not isinstance(config, FAS) or clock_of(model) is None:
        raise ConversionError("calibrate takes a model converted with spikeform.FAS")
    unset = [neuron.site for neuron in neurons_of(model) if not neuron.calibrated]
    if unset:
        raise CalibrationError(f"{unset[0]} has no threshold yet: convert the model with data first")
    if options.operators is not None and config.operators is not None:
        raise ConfigError(f"the model has operators of {config.operators} steps already: leave operators out")
    steps = config.steps if options.steps is None else options.steps
    if not steps:
        raise ConfigError("the model has steps=0, the QCFS network, which needs no calibration: give steps, e.g. 8")
    if options.start == "model":
        first = options.stages()[0][1]
        if GRANULARITIES.index(first) < GRANULARITIES.index(config.granularity):
            raise ConfigError(
                f"the model is calibrated by {config.granularity}: start=model cannot begin with one parameter per "
                f"{first}; set coarse_steps=0 and granularity={config.granularity}, or start=conversion"
            )
    return config, steps


def _positions(options: CalibrateOptions, config: FAS, longest: int) -> int | None:
    if options.granularity != "position":
        return None
    kept = config.positions if options.start == "model" else None
    positions = options.positions or kept or longest
    if longest > positions:
        raise ConfigError(f"positions is {positions}, but the data hold sequences of {longest} tokens: raise it")
    if kept is not None and positions != kept:
        raise ConfigError(f"the model knows {kept} positions: start=model cannot change that; leave positions out")
    return positions


@contextmanager
def _frozen(model: PreTrainedModel, neurons: list[StreamingNeuron]) -> Iterator[None]:
    """No gradient to any parameter, and evaluation mode, inside the block; as it was afterwards."""
    fitted = {id(p) for p in parameters_of(neurons)}
    wanted = [(p, p.requires_grad) for p in model.parameters() if id(p) not in fitted]
    training = [(module, module.training) for module in model.modules()]
    model.requires_grad_(False).eval()
    try:
        yield
    finally:
        for parameter, needs in wanted:
            parameter.requires_grad_(needs)
        for module, was in training:
            module.training = was


def _entry(
    stage: dict[str, Any], options: CalibrateOptions, sources: dict[str, Any], steps: int, kept: bool
) -> dict[str, Any]:
    """What the history says of a stage: JSON-able."""
    metrics = {"before": stage["before"], "after": stage["after"], "best_step": stage["best_step"], "kept": kept}
    if stage["validation_after"] is not None:
        metrics |= {f"validation_{when}": stage[f"validation_{when}"] for when in ("before", "after")}
    more = {"time_steps": steps, "granularity": stage["granularity"]}
    return record.entry(
        f"calibrate_{stage['name']}", options.to_dict(), sources, stage["steps"], stage["seconds"], metrics, **more
    )
