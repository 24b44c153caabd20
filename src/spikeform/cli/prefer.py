"""``spikeform prefer``: tune a model on preference pairs with DPO or KTO."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from spikeform.cli.models import dense_source, last_record, load_dense, load_spiking, need_tokenizer, resumable
from spikeform.cli.output import Json, Output
from spikeform.cli.recipe import read_section
from spikeform.errors import ConfigError, ForeignFolderError


def run(
    ctx: typer.Context,
    model: Annotated[str, typer.Argument(help="Converted and trained model, or a dense one as its control.")],
    out: Annotated[Path, typer.Argument(help="Folder to write; an older checkpoint of ours is replaced.")],
    pairs: Annotated[
        str,
        typer.Option(metavar="FILE|DIR|NAME", help="Preference pairs: .jsonl, a folder of ours, or a hub data set."),
    ],
    build: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE", help="Make the pairs from this text first, into the new folder --pairs."),
    ] = None,
    teacher: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Dense model that writes the chosen responses of --build.")
    ] = None,
    pair: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help="Set an option of --build, such as count=2000. Repeatable."),
    ] = None,
    method: Annotated[str | None, typer.Option(help="dpo or kto.")] = None,
    prefer: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUE", help="Set a tuning option, such as beta=0.1. Repeatable.")
    ] = None,
    reference: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Model not to leave; a frozen copy of MODEL unless given.")
    ] = None,
    valid: Annotated[
        list[Path] | None, typer.Option(metavar="FILE", help="Held-out text, for perplexity and spikes; repeatable.")
    ] = None,
    work: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder for the state; OUT.work unless given.")
    ] = None,
    keep_work: Annotated[bool, typer.Option("--keep-work", help="Do not delete it at the end.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the state of a stopped run.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check the input, print the options, stop.")] = False,
    as_json: Json = False,
) -> None:
    """Tune a model to find one response likelier than another, without leaving a reference model.

    Ctrl-C or SIGTERM saves the state; the same command with --resume goes on (without --build). Several GPUs: torchrun
    --nproc-per-node N $(which spikeform) prefer ..., with pairs that are there already.
    """
    from spikeform.checkpoint import is_converted

    main = os.environ.get("RANK", "0") == "0"
    with Output(as_json or not main) as output:
        converted = Path(model).exists() and is_converted(model)
        source = str(Path(model).resolve()) if converted else dense_source(model)
        options, making = _options(method, prefer or (), bool(build), pair or ())
        _refuse(out, converted, source, [*(build or ()), *(valid or ())], Path(pairs) if build else None, work, resume)
        if making is not None and making.chosen == "sampled" and converted and teacher is None:
            raise ConfigError("responses are sampled from a dense model: give --teacher MODEL, or --pair chosen=text")
        plan = {"model": model, "out": str(out), "pairs": pairs, "prefer": options.to_dict()}
        plan |= {"build": making and making.to_dict(), "text": [str(f) for f in build or ()]}
        if dry_run:
            _print_plan(output, plan)
            return
        from spikeform.training.preference import load_pairs
        from spikeform.training.preference import prefer as tune

        tokenizer = need_tokenizer(source)
        data = None if making is not None else load_pairs(pairs, tokenizer, seed=options.seed)
        with output.task(f"loading {model}"):
            network = load_spiking(source) if converted else load_dense(source)
        if making is not None:
            with output.task(f"making {making.count} pairs"):
                _build(Path(pairs), build or [], load_dense(teacher) if teacher else network, tokenizer, making)
        with resumable(main):
            tune(
                network,
                data or load_pairs(pairs, tokenizer),
                tokenizer,
                options,
                reference=_load(reference) if reference else None,
                valid=valid,
                out=out,
                work=work,
                resume=resume,
                keep_work=keep_work,
                command=ctx.obj,
                progress=lambda point: print(_line(point), file=sys.stderr, flush=True),
            )
        record = last_record(network)
        _say(output, record)
        output.say(f"saved to {out.resolve()}")
        if main:
            output.document(plan | {"out": str(out.resolve()), "record": record})


def _options(method: str | None, settings: Any, building: bool, pair: Any) -> tuple[Any, Any]:
    from spikeform.training.preference import PairOptions, PreferOptions

    data = read_section("prefer", None, settings, "--prefer")
    if method is not None:
        data["method"] = method
    if pair and not building:
        raise ConfigError("--pair has options of --build: give --build FILE, or leave it out")
    making = PairOptions.from_dict(read_section("pair", None, pair, "--pair")) if building else None
    return PreferOptions.from_dict(data), making


def _refuse(
    out: Path, converted: bool, source: str, files: list[Path], made: Path | None, work: Path | None, resume: bool
) -> None:
    """All that can be refused is refused before anything heavy begins."""
    from spikeform.checkpoint.saving import assert_may_write
    from spikeform.training.preference.trainers import check_trl
    from spikeform.training.saving import check_dense_target
    from spikeform.training.state import check_work

    check_trl()
    if converted:
        _check_learns(source)
    for file in files:
        if not file.is_file():
            raise ConfigError(f"there is no text file {file}")
    if made is not None and made.exists():
        raise ForeignFolderError(
            f"--build makes the folder {made}, which is there already: choose another, or leave --build out to use it"
        )
    target = out.resolve()
    if converted:
        assert_may_write(target, source=source)
    else:
        check_dense_target(target)
    check_work((work or target.with_name(f"{target.name}.work")).resolve(), resume)


def _check_learns(source: str) -> None:
    import spikeform.methods  # noqa: F401 - registers the methods
    from spikeform.checkpoint.paths import read_json
    from spikeform.conversion import config_from_dict
    from spikeform.training.train import check_trainable

    check_trainable(config_from_dict(read_json(Path(source) / "config.json")["quantization_config"]))


def _load(name: str) -> Any:
    from spikeform.checkpoint import is_converted

    return load_spiking(name) if Path(name).exists() and is_converted(name) else load_dense(name)


def _build(folder: Path, files: list[Path], model: Any, tokenizer: Any, making: Any) -> None:
    from spikeform.evaluation import load_text
    from spikeform.training.devices import processes
    from spikeform.training.preference import preference_pairs

    texts = [document for file in files for document in load_text(file)]
    preference_pairs(model.to(processes().device), tokenizer, texts, making).save(folder)


def _line(point: dict[str, Any]) -> str:
    shown = [f"step {point['step']}", f"loss {point['loss']:.4f}"]
    shown += [f"{name} {point[name]:.3f}" for name in ("accuracy", "margin") if name in point]
    return ", ".join([*shown, f"{point['seconds']:.0f} s"])


def _say(output: Output, record: dict[str, Any]) -> None:
    pace = record["seconds"] / record["steps"]
    output.say(f"{record['steps']} steps in {record['seconds']:.0f} s ({1000 * pace:.0f} ms a step)")
    before, after = record["metrics"]["before"], record["metrics"]["after"]
    for name, words in (("summed", "preferred, log-probabilities summed"), ("per_token", "preferred, per token")):
        if "preference" in before:
            (a, b), test = (m["preference"][name] for m in (before, after)), record["metrics"]["mcnemar"][name]
            low, high = b["interval"]
            output.say(
                f"{words}: {a['accuracy']:.3f} before, {b['accuracy']:.3f} after (95% {low:.3f} to {high:.3f}; McNemar "
                f"p = {test['p']}), of {after['preference']['pairs']} held-out pairs"
            )
    for name in ("perplexity", "spikes_per_neuron", "density"):
        if name in before:
            output.say(f"{name.replace('_', ' ')}: {before[name]:.4g} before, {after[name]:.4g} after")


def _print_plan(output: Output, plan: dict[str, Any]) -> None:
    import yaml

    output.say(f"would tune {plan['model']} into {plan['out']} on {plan['pairs']}, with")
    for name in ("build", "prefer"):
        if plan[name]:
            output.say(yaml.safe_dump({name: plan[name]}, sort_keys=False).rstrip())
    output.document(plan | {"dry_run": True})
