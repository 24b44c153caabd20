"""``spikeform train``: fine-tune or distil a converted model, or train a dense one by the same rules."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from spikeform.cli.models import dense_source, last_record, load_dense, load_spiking, load_tokenizer, resumable
from spikeform.cli.output import Json, Output
from spikeform.cli.recipe import Set, read_config, read_method, read_section
from spikeform.errors import CalibrationError, ConfigError, SpikeformError

DENSE, DEFAULT = "dense", "fas"
THRESHOLD_TOKENS, SENTENCES = 16384, 512  # that thresholds are found on


def run(
    ctx: typer.Context,
    model: Annotated[str, typer.Argument(help="Dense model (hub id, folder, embedded name), or a checkpoint of ours.")],
    out: Annotated[Path, typer.Argument(help="Folder to write; an older checkpoint of ours is replaced.")],
    text: Annotated[
        list[Path],
        typer.Option(metavar="FILE", help="Text to train on (.txt .json .jsonl .tsv, .xz .gz); may be repeated."),
    ],
    valid: Annotated[list[Path] | None, typer.Option(metavar="FILE", help="Held-out text; may be repeated.")] = None,
    method: Annotated[str | None, typer.Option(help="fas, spiking_mamba, or dense: without spikes.")] = None,
    task: Annotated[str | None, typer.Option(help="causal, masked or classify; the model's own unless given.")] = None,
    config: Annotated[
        Path | None, typer.Option("--config", "--recipe", metavar="RECIPE", help="YAML file; training under train:.")
    ] = None,
    set_: Set = None,
    train: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help="Set a training option, such as steps=2000. Repeatable."),
    ] = None,
    teacher: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="Dense model to learn from (distil, hidden); MODEL if that is dense."),
    ] = None,
    work: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder for the state; OUT.work unless given.")
    ] = None,
    keep_work: Annotated[bool, typer.Option("--keep-work", help="Do not delete it at the end.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the state of a stopped run.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check the input, print the options, stop.")] = False,
    revision: Annotated[str | None, typer.Option(help="Revision of a hub model.")] = None,
    as_json: Json = False,
) -> None:
    """Train a model of a method that learns (FAS, SpikingMamba, NeuTransformer), or the dense one as its control.

    A dense MODEL is converted first, with thresholds found on the training text; a checkpoint goes on. Ctrl-C or
    SIGTERM saves the state; the same command with --resume goes on. Several GPUs:
    torchrun --nproc-per-node N $(which spikeform) train ...
    """
    from spikeform.checkpoint import is_converted

    main = os.environ.get("RANK", "0") == "0"
    with Output(as_json or not main) as output:
        # All that can be refused is refused before anything heavy begins.
        converted = Path(model).exists() and is_converted(model)
        source = str(Path(model).resolve()) if converted else dense_source(model)
        chosen = _chosen(method, config, set_ or (), source, converted)
        named = DENSE if chosen is None else chosen.quant_method.removeprefix("spikeform_")
        options = _options(task, config, train or (), source)
        _refuse(out, source, named, [*text, *(valid or ())], work, resume)
        plan = {"model": model, "out": str(out), "method": named, "config": chosen and chosen.to_dict()}
        plan |= {"train": options.to_dict(), "text": [str(f) for f in text], "valid": [str(f) for f in valid or ()]}
        if dry_run:
            _print_plan(output, plan)
            return
        folder = work or out.resolve().with_name(f"{out.resolve().name}.work")
        with output.task(f"loading {model}"):
            network, tokenizer, dense = _load(source, converted, revision, options, text, teacher)
        if chosen is not None and not converted:
            with output.task("finding thresholds on the training text"):
                _convert(network, chosen, text, tokenizer, options, folder)
        from spikeform.training import train as spikeform_train

        with resumable(main):
            spikeform_train(
                network,
                text,
                tokenizer,
                options,
                out=out,
                valid=valid,
                teacher=dense,
                work=folder,
                resume=resume,
                keep_work=keep_work,
                command=ctx.obj,
                progress=lambda point: print(_line(point), file=sys.stderr, flush=True),
            )
        report = getattr(network, "spikeform_report", None)
        record = last_record(network)
        _say(output, record, report)
        output.say(f"saved to {out.resolve()}")
        if main:
            output.document(plan | {"out": str(out.resolve()), "record": record})


def _options(task: str | None, recipe: Path | None, settings: Any, source: str) -> Any:
    """The recipe's section ``train``, then each ``--train``, then ``--task``; else the task of the model's head."""
    from spikeform.training import TrainOptions

    data = read_section("train", recipe, settings, "--train")
    if task is not None:
        data["task"] = task
    return TrainOptions.from_dict({"task": _task_of(source), **data})


def _task_of(source: str) -> str:
    from spikeform.checkpoint.paths import read_json

    file = Path(source) / "config.json"
    architecture = str(((read_json(file) if file.is_file() else {}).get("architectures") or [""])[0])
    heads = {"ForMaskedLM": "masked", "ForSequenceClassification": "classify"}
    return next((task for suffix, task in heads.items() if architecture.endswith(suffix)), "causal")


def _chosen(method: str | None, recipe: Path | None, settings: Any, source: str, converted: bool) -> Any:
    """The method's config in its trainable state: None for dense, the checkpoint's own for a converted model."""
    named = read_method(method, recipe, DEFAULT)
    if converted:
        return _of_checkpoint(method, recipe, settings, source)
    if named == DENSE:
        if settings:
            raise ConfigError("--set has options of a spiking method: with --method dense use --train")
        return None
    import dataclasses

    import spikeform.methods  # noqa: F401 - registers the methods
    from spikeform.conversion import method_of
    from spikeform.training.train import check_trainable

    chosen = read_config(named, recipe, None, settings)
    check_trainable(chosen)
    return dataclasses.replace(chosen, steps=0) if method_of(chosen).streams else chosen


def _of_checkpoint(method: str | None, recipe: Path | None, settings: Any, source: str) -> Any:
    """The config that a converted model was saved with."""
    import spikeform.methods  # noqa: F401 - registers the methods
    from spikeform.checkpoint.paths import read_json
    from spikeform.conversion import config_from_dict
    from spikeform.training.train import check_trainable

    chosen = config_from_dict(read_json(Path(source) / "config.json")["quantization_config"])
    own = chosen.quant_method.removeprefix("spikeform_")
    asked = read_method(method, recipe, own)
    if asked != own:
        raise ConfigError(
            f"a converted model is trained with its own method, {own}, not with {asked}: leave --method out, or give "
            "its dense model"
        )
    if settings:
        raise ConfigError("--set changes a conversion, and the model is converted already: leave it out")
    check_trainable(chosen)
    return chosen


def _refuse(out: Path, source: str, named: str, files: list[Path], work: Path | None, resume: bool) -> None:
    from spikeform.checkpoint.saving import assert_may_write
    from spikeform.training.saving import check_dense_target
    from spikeform.training.state import check_work

    for file in files:
        if not file.is_file():
            raise CalibrationError(f"there is no text file {file}")
    target = out.resolve()
    if named == DENSE:
        check_dense_target(target)
    else:
        assert_may_write(target, source=source)
    check_work((work or target.with_name(f"{target.name}.work")).resolve(), resume)


def _load(
    source: str, converted: bool, revision: str | None, options: Any, text: list[Path], teacher: str | None
) -> tuple[Any, Any, Any]:
    """Model, tokenizer, and the teacher if there is one; all on the device."""
    from spikeform.training.devices import processes

    device = processes().device
    tokenizer = load_tokenizer(source, revision)
    if tokenizer is None:
        raise SpikeformError(f"{source} has no tokenizer: save one into the folder (tokenizer.save_pretrained)")
    network = load_spiking(source) if converted else load_dense(source, revision)
    network = _with_head(network, options, text, tokenizer)
    dense = None
    if options.taught:
        if converted and teacher is None:
            raise ConfigError(f"{options.taught} needs the dense model: give --teacher MODEL")
        dense = load_dense(teacher or source, None if teacher else revision)
    return network.to(device), tokenizer, dense


def _with_head(network: Any, options: Any, text: list[Path], tokenizer: Any) -> Any:
    """The model itself, if it has the task's head; a classifier on the body of a language model otherwise."""
    kinds = {"causal": ("ForCausalLM", "LMHeadModel"), "masked": ("ForMaskedLM",)}
    kinds["classify"] = ("ForSequenceClassification",)
    name = type(network).__name__
    if name.endswith(kinds[options.task]):
        return network
    if options.task != "classify":
        raise ConfigError(f"the model is a {name}, which has no head for the task {options.task}: give another task")
    from spikeform.evaluation.labelled import load_labelled
    from spikeform.training.heads import with_classifier

    found = [load_labelled(file) for file in text]
    classes = max(label for _, labels in found for label in labels) + 1
    return with_classifier(network, classes, tokenizer, found[0][0][:256], options.seed)


def _convert(network: Any, config: Any, text: list[Path], tokenizer: Any, options: Any, work: Path) -> None:
    """Convert in place, thresholds from windows (or sentences) spread evenly over the training text."""
    import numpy as np

    import spikeform
    from spikeform.training.devices import processes

    if options.task == "classify":
        from spikeform.evaluation.labelled import load_labelled

        texts = [sentence for file in text for sentence in load_labelled(file)[0]]
        spikeform.convert(network, config, texts[:: -(-len(texts) // SENTENCES)], tokenizer)
        return
    from spikeform.training.data import read
    from spikeform.training.examples import keys_of

    with processes().main_process_first():
        examples = read(text, options, tokenizer, network, work.resolve()).examples
    count = max(1, min(THRESHOLD_TOKENS // options.window, examples.count))
    numbers = np.linspace(0, examples.count - 1, count).astype(np.int64)
    batch = examples.batch(numbers, np.zeros_like(numbers), keys_of(0, numbers))
    spikeform.convert(network, config, batch["input_ids"])


def _line(point: dict[str, Any]) -> str:
    shown = [f"step {point['step']}"]
    shown += [f"loss {point['loss']:.4f}"] if "loss" in point else []
    if "held_out_loss" in point:
        measure = next((m for m in ("perplexity", "accuracy") if m in point), "")
        shown.append(f"held-out loss {point['held_out_loss']:.4f} ({measure} {point[measure]:.4f})")
    return ", ".join([*shown, f"{point['seconds']:.0f} s"])


def _say(output: Output, record: dict[str, Any], report: Any) -> None:
    if report is not None:
        output.say(report.summary())
    pace = record["seconds"] / record["steps"]
    output.say(f"{record['steps']} steps in {record['seconds']:.0f} s ({1000 * pace:.0f} ms a step)")
    measured = [point for point in record["curve"] if "held_out_loss" in point]
    for name in ("held_out_loss", "perplexity", "accuracy"):
        if measured and name in measured[0]:
            output.say(f"{name.replace('_', ' ')}: {measured[0][name]:.4f} before, {measured[-1][name]:.4f} after")


def _print_plan(output: Output, plan: dict[str, Any]) -> None:
    import yaml

    output.say(f"would train {plan['model']} into {plan['out']}, method {plan['method']}, with")
    for name in ("config", "train"):
        if plan[name]:
            output.say(yaml.safe_dump({name: plan[name]}, sort_keys=False).rstrip())
    output.document(plan | {"dry_run": True})
