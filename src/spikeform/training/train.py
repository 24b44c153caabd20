"""One call trains a model: a converted one of a method that learns, or a dense one by the same rules."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from spikeform.conversion import method_of, record
from spikeform.errors import ConversionError
from spikeform.layers import CodedLinear
from spikeform.neurons import SignedInteger
from spikeform.neurons.signed_integer import Compensation
from spikeform.training import saving
from spikeform.training.data import Data, read
from spikeform.training.devices import processes
from spikeform.training.errors import Interrupted, TrainingError
from spikeform.training.examples import Stream
from spikeform.training.neurons import learning_neurons, trainable
from spikeform.training.options import UNCHANGING, TrainOptions
from spikeform.training.signals import StopSignals
from spikeform.training.state import check_work, open_work, seconds_of, weights_mark

INTEGER_WEIGHTS = (
    "int8 weights cannot be trained: convert the dense model with weight_bits=16, train, and then set weight_bits=8"
)
Source = str | Path | Sequence[str | Path] | Tensor


def train(
    model: PreTrainedModel,
    data: Source,
    tokenizer: Any = None,
    options: TrainOptions | None = None,
    *,
    out: str | Path | None = None,
    valid: Source | None = None,
    teacher: PreTrainedModel | None = None,
    work: str | Path | None = None,
    resume: bool = False,
    keep_work: bool = False,
    command: list[str] | None = None,
    progress: Callable[[dict[str, Any]], None] | None = None,
) -> PreTrainedModel:
    """Train ``model`` in place, and return it.

    A model converted with :class:`spikeform.FAS` is trained as its QCFS network, whatever its steps: each neuron
    answers ``theta / L floor(L clip(x / theta, 0, 1) + 1/2)``, straight through in the backward pass, and weights
    and thresholds learn (stage 1 of arXiv 2502.04405). One converted with :class:`spikeform.SpikingMamba` is trained as
    it is, its signed integers with a rectangular gradient, towards the dense model that it came from
    (:class:`TrainOptions`: ``distil``, ``hidden``). A dense model is trained by the same rules without spikes.

    SIGTERM or Ctrl-C saves the state and raises :class:`Interrupted`; the same call with ``resume=True`` then ends
    with the weights that an undisturbed run would have had (bit for bit on a CPU). Several devices:
    start the program with ``torchrun`` or ``accelerate launch``, one process a device.

    Args:
        model: A dense transformers model, or one converted by a method whose neurons let gradients pass.
        data: Text files (a path or a list of them), texts (a list of strings), or token ids ``[N]``. For ``classify``
            files of labelled sentences, as of :func:`spikeform.evaluation.load_labelled`.
        tokenizer: Needed for anything but ids.
        options: How; see :class:`TrainOptions`.
        out: Folder to write at the end, whole or not at all; None: nothing is written.
        valid: Held-out data, of the same kinds. Without it there is no held-out loss.
        teacher: The dense model, for ``options.distil`` and ``options.hidden``.
        work: Folder for the state and the tokenised text; None: ``OUT.work``, or without ``out`` a temporary one.
        resume: Go on from the newest whole state in ``work``, or begin where there is none.
        keep_work: Do not delete the work folder at the end.
        command: The command line, for the manifest.
        progress: Called with each point of the curve: step, loss, held_out_loss, perplexity or accuracy ….

    Returns:
        ``model``, its thresholds and weights trained, in fp32 and in evaluation mode. What was done is the last entry
        of ``model.spikeform_report.history`` (of a dense model: ``model.spikeform_history``).

    Raises:
        TrainingError: Model, data and options do not fit each other, the work folder is another run's, or the loss is
            no number any more.
        Interrupted: Asked to stop; nothing was written to ``out``.
        CheckpointError: ``out`` may not be written.
    """
    options = options or TrainOptions()
    devices = processes()
    _check(model, options, tokenizer, teacher, data)
    target = None if out is None else Path(out).resolve()
    if target is not None:
        saving.check_target(model, target)
    with work_folder(work, target, keep_work) as (folder, lasts):
        check_work(folder, resume)
        with devices.main_process_first():  # the others find the text tokenised
            text = read(data, options, tokenizer, model, folder)
            held = None if valid is None else read(valid, options, tokenizer, model, folder)
        less_memory = checkpointing(model, options.gradient_checkpointing)
        with StopSignals() as stop, trainable(model, options) as path, less_memory, _without_cudnn_attention():
            done = _run(model, options, text, held, teacher, folder, stop, progress or (lambda point: None), path)
        model.eval()
        saving.conclude(model, done, target, tokenizer, command)
        lasts()
    return model


def _run(
    model: PreTrainedModel,
    options: TrainOptions,
    text: Data,
    held: Data | None,
    teacher: PreTrainedModel | None,
    folder: Path,
    stop: StopSignals,
    notify: Callable[[dict[str, Any]], None],
    path: Compensation | None,
) -> dict[str, Any]:
    from spikeform.training.trainer import Trainer, points_of

    me = processes()
    devices = me.num_processes
    steps = options.total_steps(text.examples.count, devices)
    plain = {name: value for name, value in options.to_dict().items() if name not in UNCHANGING}
    run = {"options": plain, "data": text.source, "weights": weights_mark(model), "devices": devices}
    with me.main_process_first():
        start = open_work(folder, run)
    total = steps * options.batch_size * options.accumulate * devices
    trainer = Trainer(
        model,
        options,
        steps,
        Stream(text.examples, total, options.seed),
        held.examples if held else None,
        teacher,
        folder,
        stop,
        seconds_of(start),
        notify if me.is_main_process else lambda point: None,
        path,
    )
    trainer.train(resume_from_checkpoint=str(start) if start else None)
    done = trainer.state.global_step
    if done < steps:
        raise Interrupted(done, folder, stop.signal or 0)
    curve = points_of(trainer.state.log_history)
    return record.entry(
        "train",
        options.to_dict(),
        {"train": text.source, "held_out": held.source if held else None},
        steps,
        trainer.seconds,
        {k: v for k, v in curve[-1].items() if k not in ("step", "seconds", "learning_rate")},
        neurons=len(learning_neurons(model)),
        devices=devices,
        curve=curve,
    )


def check_trainable(config: Any) -> None:
    """Whether models of a method's configuration can be trained.

    Raises:
        TrainingError: No gradient passes their neurons, or their weights are integers.
    """
    method = method_of(config)
    if not method.trainable:
        raise TrainingError(
            f"a model converted with {method.name} cannot be trained: train the dense model, then convert"
        )
    if getattr(config, "weight_bits", 16) == 8:
        raise TrainingError(INTEGER_WEIGHTS)


def _check(model: Any, options: TrainOptions, tokenizer: Any, teacher: Any, data: Any) -> None:
    if not isinstance(model, PreTrainedModel):
        raise ConversionError(f"train takes a transformers model, got {type(model).__name__}")
    streams = False
    if hasattr(model, "spikeform_report"):
        config: Any = model.config.quantization_config
        check_trainable(config)
        if any(isinstance(module, CodedLinear) for module in model.modules()):
            raise TrainingError(INTEGER_WEIGHTS)
        streams = method_of(config).streams
    if options.taught and teacher is None:
        raise TrainingError(f"{options.taught} needs a teacher: give the dense model, or {options.taught} 0")
    if options.streams and not streams:
        raise TrainingError("streams are for a model converted with FAS: no other has time; set streams to 0")
    if options.compensation != "none" and not any(isinstance(module, SignedInteger) for module in model.modules()):
        raise TrainingError("compensation is for signed-integer neurons (SpikingMamba): set compensation to none")
    if teacher is model:
        raise TrainingError("the teacher is the model itself: load the dense model again, or copy it before")
    if tokenizer is None and not (isinstance(data, Tensor) and options.task == "causal"):
        raise TrainingError("training needs a tokenizer for anything but token ids of a causal language model")


@contextmanager
def work_folder(work: str | Path | None, target: Path | None, keep: bool) -> Iterator[tuple[Path, Callable]]:
    """The work folder, and what to call once it is no longer needed."""
    if work is None and target is None:
        with tempfile.TemporaryDirectory(prefix="spikeform-") as folder:
            yield Path(folder), lambda: None
        return
    folder = Path(work).resolve() if work is not None else target.with_name(f"{target.name}.work")  # type: ignore
    yield folder, (lambda: None) if keep else lambda: shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def checkpointing(model: Any, wanted: bool) -> Iterator[None]:
    """Keep only the blocks' inputs in the forward pass, inside the block."""
    if not wanted:
        yield
        return
    # transformers gave the pair another name in 5.2x; the old one warns there.
    new = hasattr(model, "activation_checkpointing_enable")
    if new:
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    try:
        yield
    finally:
        model.activation_checkpointing_disable() if new else model.gradient_checkpointing_disable()


@contextmanager
def _without_cudnn_attention() -> Iterator[None]:
    """Inside the block, attention by other kernels than cuDNN's.

    On an H200 with torch 2.11 a classifier's loss was NaN within 85 steps in bfloat16 with padded rows; others report
    NaN gradients of cuDNN's attention with a mask there.
    """
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)
