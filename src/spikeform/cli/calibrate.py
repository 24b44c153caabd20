"""``spikeform calibrate``: fit a FAS model's neurons to its QCFS network (stage 2 of FAS)."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from spikeform.cli.models import load_spiking, need_tokenizer
from spikeform.cli.output import Json, Output
from spikeform.cli.recipe import read_section
from spikeform.errors import CalibrationError, ConfigError, ConversionError

METHOD = "fas"
VALIDATION_TOKENS = 16384


def run(
    ctx: typer.Context,
    model: Annotated[str, typer.Argument(help="FAS checkpoint, as convert or train write it.")],
    out: Annotated[Path, typer.Argument(help="Folder to write; an older checkpoint of ours is replaced.")],
    text: Annotated[
        list[Path],
        typer.Option(metavar="FILE", help="Text (.txt .json .jsonl; a classifier's .tsv; .xz .gz); may be repeated."),
    ],
    valid: Annotated[
        list[Path] | None, typer.Option(metavar="FILE", help="Text that is only measured on; may be repeated.")
    ] = None,
    steps: Annotated[
        str | None, typer.Option(metavar="T", help="Time steps, 1 to 64; the model's unless given.")
    ] = None,
    granularity: Annotated[str | None, typer.Option(help="Of the fine stage: channel, position, or layer.")] = None,
    config: Annotated[
        Path | None, typer.Option("--config", "--recipe", metavar="RECIPE", help="YAML file; options under calibrate:.")
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Set an option, such as fine_steps=400. Repeatable."),
    ] = None,
    resume: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Keep the state there, and go on from it. OUT.work unless given.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda ...; the GPU if there is one unless given.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check the input, print the options, stop.")] = False,
    as_json: Json = False,
) -> None:
    """Calibrate a FAS model from coarse to fine, and save it.

    Only threshold scales and initial potentials of the neurons learn; weights stay as they are, bit for bit. Ctrl-C
    or SIGTERM saves the state; the same command with --resume goes on.
    """
    with Output(as_json) as output:
        # All that can be refused is refused before anything heavy begins.
        options = _options(config, set_ or (), steps, granularity)
        source = _refuse(model, out, [*text, *(valid or ())], options)
        folder = _work(out, resume)
        plan = {"model": model, "out": str(out), "calibrate": options.to_dict(), "text": [str(f) for f in text]}
        plan |= {"valid": [str(f) for f in valid or ()], "work": str(folder)}
        if dry_run:
            _print_plan(output, plan)
            return
        import torch

        import spikeform
        from spikeform.methods.fas.calibrate import Interrupted, calibrate
        from spikeform.methods.fas.calibration.data import HELD_OUT_SHARE
        from spikeform.training.signals import StopSignals

        with output.task(f"loading {model}"):
            tokenizer, network = need_tokenizer(source), load_spiking(source)
            network.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        before = len(network.spikeform_report.history)
        with StopSignals() as stop, _clearing(folder, resume is None):
            with output.task("reading text"):
                seen = sum(stage[2] for stage in options.stages()) * options.batch_size
                data, described = _read(network, tokenizer, text, options, folder, round(seen / (1 - HELD_OUT_SHARE)))
                most = VALIDATION_TOKENS // options.window
                validation = _read(network, tokenizer, valid, options, folder, most) if valid else (None, None)
            try:
                calibrate(
                    network,
                    data,
                    options=options,
                    validation=validation[0],
                    workdir=folder,
                    progress=lambda point: print(_line(point), file=sys.stderr, flush=True),
                    stop=lambda: stop.signal is not None,
                )
            except Interrupted as stopped:
                again = f"the same command with --resume {folder} goes on"
                print(f"{str(stopped).partition(';')[0]}; {again}", file=sys.stderr)
                raise typer.Exit(128 + (stop.signal or 0)) from None
            records = network.spikeform_report.history[before:]
            for record in records:
                record["data"]["train"] |= described
                if validation[1] is not None:
                    record["data"]["validation"] |= validation[1]
            with output.task(f"saving {out}"):
                saved = spikeform.save(network, out, tokenizer, command=ctx.obj)
            if resume is None:
                shutil.rmtree(folder, ignore_errors=True)
        _say(output, records)
        output.say(f"saved to {saved}")
        output.document(plan | {"out": str(saved), "records": records})


def _options(recipe: Path | None, settings: Any, steps: str | None, granularity: str | None) -> Any:
    """The recipe's section ``calibrate``, then each ``--set``, then ``--steps`` and ``--granularity``."""
    from spikeform.methods.fas.calibration.options import CalibrateOptions

    typed = [f"{name}={value}" for name, value in (("steps", steps), ("granularity", granularity)) if value is not None]
    return CalibrateOptions.from_dict(read_section("calibrate", recipe, [*settings, *typed]))


def _refuse(model: str, out: Path, files: list[Path], options: Any) -> str:
    """The model's folder; refuses a model that is not of FAS or has no T, a bad OUT, and missing files."""
    from spikeform.checkpoint import assert_model_path, is_converted
    from spikeform.checkpoint.paths import read_json
    from spikeform.checkpoint.saving import assert_may_write

    source = str(Path(model).resolve())
    assert_model_path(source)
    config = read_json(Path(source) / "config.json").get("quantization_config") or {}
    kind = str(config.get("quant_method", ""))
    if not is_converted(source) or kind.removeprefix("spikeform_") != METHOD:
        found = kind.removeprefix("spikeform_") if kind else "no method: it is dense"
        raise ConversionError(f"{model} is of {found}; calibrate takes a checkpoint converted with --method {METHOD}")
    if options.steps is None and config.get("steps") == 0:
        raise ConfigError(f"{model} has steps 0, the QCFS network, which needs no calibration: give --steps, e.g. 8")
    for file in files:
        if not file.is_file():
            raise CalibrationError(f"there is no text file {file}")
    assert_may_write(out.resolve(), source=source)
    return source


def _work(out: Path, resume: Path | None) -> Path:
    from spikeform.methods.fas.calibration.state import check_workdir

    folder = (resume or out.resolve().with_name(f"{out.resolve().name}.work")).resolve()
    if check_workdir(folder) and resume is None:
        raise CalibrationError(f"{folder} holds a stopped calibration: go on with --resume {folder}, or delete it")
    return folder


@contextmanager
def _clearing(folder: Path, ours: bool) -> Iterator[None]:
    """Leave no work folder behind an error, unless there is a state in it to go on from."""
    from spikeform.methods.fas.calibration.state import check_workdir

    try:
        yield
    except BaseException:
        if ours and not check_workdir(folder):
            shutil.rmtree(folder, ignore_errors=True)
        raise


def _read(
    network: Any, tokenizer: Any, files: list[Path], options: Any, folder: Path, most: int
) -> tuple[Any, dict[str, Any]]:
    """At most so many sequences, in batches, spread evenly over the text; and what the text is."""
    import numpy as np

    from spikeform.conversion.data import context_length
    from spikeform.training import TrainOptions
    from spikeform.training.data import read
    from spikeform.training.examples import keys_of

    window = min(options.window, context_length(network))
    training = TrainOptions(task=_task(network), window=window, seed=options.seed)
    found = read(files, training, tokenizer, network, folder / "tokens")
    count = min(found.examples.count, max(2, most))
    numbers = np.linspace(0, found.examples.count - 1, count).astype(np.int64)
    batches = []
    for begin in range(0, count, options.batch_size):
        part = numbers[begin : begin + options.batch_size]
        batches.append(found.examples.batch(part, np.zeros_like(part), keys_of(options.seed, part)))
    return batches, {"source": "texts", "text": found.source}


def _task(network: Any) -> str:
    head = type(network).__name__
    return "classify" if "SequenceClassification" in head else "masked" if "MaskedLM" in head else "causal"


def _line(point: dict[str, Any]) -> str:
    shown = [f"{point['stage']} {point['step']} of {point['steps']}"]
    shown += [f"loss {point['loss']:.4f}"] if "loss" in point else []
    shown += [f"held-out loss {point['held_out_loss']:.4f}"] if "held_out_loss" in point else []
    shown += [f"KL {point['held_out_kl']:.5f}"] if "held_out_kl" in point else []
    return ", ".join([*shown, f"{point['seconds']:.0f} s"])


def _say(output: Output, records: list[dict[str, Any]]) -> None:
    for record in records:
        name = record["stage"].removeprefix("calibrate_")
        output.say(f"{name} (by {record['granularity']}): {record['steps']} steps in {record['seconds']:.0f} s")
        for label, begin in (("held out", ""), ("validation", "validation_")):
            was, now = (record["metrics"].get(f"{begin}{when}") for when in ("before", "after"))
            if was is None:
                continue
            for key in ("alignment", "kl", "perplexity", "accuracy"):
                if key in was:
                    qcfs = f", QCFS network {was[f'qcfs_{key}']:.4f}" if f"qcfs_{key}" in was else ""
                    output.say(f"  {label}: {key} {was[key]:.5g} before, {now[key]:.5g} after{qcfs}")
    if not records[-1]["metrics"]["kept"]:
        output.say("nothing was better than the model as it was given: its neurons are unchanged")


def _print_plan(output: Output, plan: dict[str, Any]) -> None:
    import yaml

    output.say(f"would calibrate {plan['model']} into {plan['out']} with")
    output.say(yaml.safe_dump({"calibrate": plan["calibrate"]}, sort_keys=False).rstrip())
    output.document(plan | {"dry_run": True})
