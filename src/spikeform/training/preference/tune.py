"""Preference tuning: a model learns to find one response likelier than another, without leaving a reference."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from spikeform.conversion import record
from spikeform.errors import ConversionError
from spikeform.evaluation import load_text, tokenize
from spikeform.evaluation.perplexity import check_context, vocabulary_of
from spikeform.layers import CodedLinear
from spikeform.synapses import executor
from spikeform.training import saving
from spikeform.training.devices import processes
from spikeform.training.errors import Interrupted, TrainingError
from spikeform.training.neurons import trainable
from spikeform.training.preference import trainers
from spikeform.training.preference.measures import mcnemar, measure
from spikeform.training.preference.options import PreferOptions
from spikeform.training.preference.pairs import Pair, Pairs, load_pairs
from spikeform.training.signals import StopSignals
from spikeform.training.state import check_work, open_work, seconds_of, weights_mark
from spikeform.training.train import INTEGER_WEIGHTS, check_trainable, checkpointing, work_folder

Text = str | Path | Sequence[str | Path] | Tensor


def prefer(
    model: PreTrainedModel,
    pairs: Pairs | str | Path | Sequence[Pair],
    tokenizer: Any,
    options: PreferOptions | None = None,
    *,
    reference: PreTrainedModel | None = None,
    held_out: Sequence[Pair] | None = None,
    valid: Text | None = None,
    out: str | Path | None = None,
    work: str | Path | None = None,
    resume: bool = False,
    keep_work: bool = False,
    command: list[str] | None = None,
    progress: Callable[[dict[str, Any]], None] | None = None,
) -> PreTrainedModel:
    """Tune ``model`` in place on preference pairs, by TRL's DPO or KTO, and return it.

    A converted model is tuned in the forward pass that its method trains: SpikingMamba's is that of its spikes,
    gradients pass through surrogates, and smoothed compensation adds to gradients alone. Stopping, resuming and several
    devices are as for :func:`spikeform.train`.

    Args:
        model: A causal language model, converted by a method that can be trained, or dense.
        pairs: To learn from: :class:`Pairs`, what :func:`load_pairs` reads, or a list of mappings with ``prompt``,
            ``chosen`` and ``rejected``.
        tokenizer: The model's.
        options: How; see :class:`PreferOptions`.
        reference: What the policy must not leave; None: a frozen copy of ``model`` as it comes. It is always given to
            TRL, which otherwise would take the dense model that a spiking one came from.
        held_out: Pairs to measure on, instead of those of ``pairs``.
        valid: Held-out text (files, texts or token ids), for perplexity and spikes per neuron.
        out: Folder to write at the end, whole or not at all; None: nothing is written.
        work: Folder for the state; None: ``OUT.work``, or without ``out`` a temporary one.
        resume: Go on from the newest whole state in ``work``, or begin where there is none.
        keep_work: Do not delete the work folder at the end.
        command: The command line, for the manifest.
        progress: Called with each point of the curve: step, loss, accuracy, margin ….

    Returns:
        ``model``, in fp32 and in evaluation mode. The last entry of its history (``model.spikeform_report.history``)
        has, before and after: the share of held-out pairs ranked rightly (log-probabilities summed, and per token) with
        95% intervals, perplexity, spikes per neuron and density; and McNemar's exact test.

    Raises:
        TrainingError: TRL is not installed, or model, pairs and options do not fit each other.
        Interrupted: Asked to stop; nothing was written to ``out``.
        CheckpointError: ``out`` may not be written.
    """
    options = options or PreferOptions()
    trainers.check_trl()
    _check(model, reference)
    data = _pairs(pairs, held_out, tokenizer, options)
    target = None if out is None else Path(out).resolve()
    if target is not None:
        saving.check_target(model, target)
    devices = processes()
    with work_folder(work, target, keep_work) as (folder, lasts):
        check_work(folder, resume)
        model.to(devices.device)  # type: ignore[arg-type]
        ids = _ids(valid, tokenizer, model, options)
        sizes = options.max_length, options.batch_size, options.window
        ranked, before = measure(model, data, tokenizer, ids, *sizes)
        start = weights(model) if options.interpolate < 1 else {}
        done = _run(model, reference, data, tokenizer, options, folder, progress or (lambda point: None))
        model.eval()
        if start:
            interpolate(model, start, weights(model), options.interpolate)
        again, after = measure(model, data, tokenizer, ids, *sizes)
        done["metrics"] = {"before": before, "after": after}
        if ranked is not None and again is not None:
            done["metrics"]["mcnemar"] = {
                name: mcnemar(ranked.wins(per_token), again.wins(per_token))
                for name, per_token in (("summed", False), ("per_token", True))
            }
        saving.conclude(model, done, target, tokenizer, command)
        lasts()
    return model


def weights(model: PreTrainedModel) -> dict[str, Tensor]:
    """Copies of all real parameters and buffers that a checkpoint has, in the host's memory."""
    return {name: x.detach().cpu().clone() for name, x in model.state_dict().items() if x.is_floating_point()}


@torch.no_grad()
def interpolate(model: PreTrainedModel, start: dict[str, Tensor], end: dict[str, Tensor], share: float) -> None:
    """Give ``model`` the weights ``start + share (end - start)`` of two copies that :func:`weights` made."""
    own = model.state_dict()
    for name, x in start.items():
        own[name].copy_(x.lerp(end[name], share))


def _run(
    model: PreTrainedModel,
    reference: PreTrainedModel | None,
    pairs: Pairs,
    tokenizer: Any,
    options: PreferOptions,
    folder: Path,
    notify: Callable[[dict[str, Any]], None],
) -> dict[str, Any]:
    me = processes()
    each = 2 if options.method == "kto" else 1
    steps = options.total_steps(each * len(pairs.train), me.num_processes)
    plain = {name: value for name, value in options.to_dict().items() if name != "save_every"}
    named = "the model before this stage, frozen" if reference is None else _name(reference)
    run = {"options": plain, "pairs": pairs.source(pairs.train), "weights": weights_mark(model)}
    run |= {"devices": me.num_processes, "reference": named}
    with me.main_process_first():
        start = open_work(folder, run)
    shared = options.for_training(model)
    with StopSignals() as stop, trainable(model, shared), checkpointing(model, options.gradient_checkpointing):
        # Copied after the model took its training form, so that policy and reference begin with the same bits.
        given = copy.deepcopy(model) if reference is None else reference
        with trainers.as_it_was(model), trainers.as_it_was(given):
            trainer = trainers.make(
                model,
                given,
                pairs,
                tokenizer,
                options,
                steps,
                folder,
                stop,
                seconds_of(start),
                notify if me.is_main_process else lambda point: None,
            )
            # Products of the policy and of the reference by the same operations: fused ones, which only run without a
            # gradient, round differently in bf16, and a spike more or less would look like a preference.
            with executor("collapsed"):
                trainer.train(resume_from_checkpoint=str(start) if start else None)
    if trainer.state.global_step < steps:
        raise Interrupted(trainer.state.global_step, folder, stop.signal or 0)
    curve = [trainers.point_of(logs) for logs in trainer.state.log_history if "loss" in logs]
    return record.entry(
        "prefer",
        options.to_dict(),
        {"train": run["pairs"], "held_out": pairs.source(pairs.held_out) if pairs.held_out else None},
        steps,
        trainer.seconds,
        {},
        reference=named,
        devices=me.num_processes,
        trl=version("trl"),
        curve=curve,
    )


def _check(model: Any, reference: Any) -> None:
    if not isinstance(model, PreTrainedModel):
        raise ConversionError(f"prefer takes a transformers model, got {type(model).__name__}")
    if hasattr(model, "spikeform_report"):
        check_trainable(model.config.quantization_config)
        if any(isinstance(module, CodedLinear) for module in model.modules()):
            raise TrainingError(INTEGER_WEIGHTS)
    if reference is model:
        raise TrainingError("the reference is the model itself: leave it out for a frozen copy")
    trainers.check_head(model, "model")
    if reference is None:
        return
    trainers.check_head(reference, "reference")
    if vocabulary_of(model) != vocabulary_of(reference):
        raise TrainingError(
            f"the reference knows {vocabulary_of(reference)} tokens and the model {vocabulary_of(model)}: they must "
            "share a tokenizer"
        )


def _pairs(pairs: Any, held_out: Sequence[Pair] | None, tokenizer: Any, options: PreferOptions) -> Pairs:
    if isinstance(pairs, str | Path):
        pairs = load_pairs(pairs, tokenizer, seed=options.seed)
    elif not isinstance(pairs, Pairs):
        pairs = Pairs(list(pairs), card={"source": "given pairs"})
    if held_out is not None:
        pairs = Pairs(pairs.train, list(held_out), pairs.card, pairs.end_token)
    for pair in [*pairs.train, *pairs.held_out]:
        if not isinstance(pair, dict) or not all(
            isinstance(pair.get(k), str) for k in ("prompt", "chosen", "rejected")
        ):
            raise TrainingError(f"a pair has the texts prompt, chosen and rejected; got {str(pair)[:80]}")
    if not pairs.train:
        raise TrainingError("there are no preference pairs to learn from")
    return pairs


def _ids(valid: Text | None, tokenizer: Any, model: Any, options: PreferOptions) -> Tensor | None:
    """Held-out text as token ids ``[N]``."""
    if valid is None:
        return None
    check_context(model, options.window)
    if isinstance(valid, Tensor):
        return valid.flatten()
    items = [Path(valid)] if isinstance(valid, str | Path) else list(valid)
    texts = [text for item in items for text in (load_text(item) if isinstance(item, Path) else [item])]
    return tokenize(tokenizer, texts)


def _name(reference: Any) -> str:
    name = getattr(reference.config, "_name_or_path", "") or type(reference).__name__
    return f"{name} ({'spiking' if hasattr(reference, 'spikeform_report') else 'dense'}), given"
