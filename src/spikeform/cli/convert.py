"""``spikeform convert``: a dense model in, a spiking checkpoint out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from spikeform.cli.models import dense_source, load_dense, load_tokenizer, positive, read_ids
from spikeform.cli.output import Json, Output
from spikeform.cli.recipe import Set, Steps, read_config
from spikeform.cli.views import size_line
from spikeform.errors import CalibrationError

DEFAULT_SAMPLED, DEFAULT_TEXT = 2048, 16384


def run(
    ctx: typer.Context,
    model: Annotated[str, typer.Argument(help="Dense model: hub id, folder, or embedded name (llama).")],
    out: Annotated[Path, typer.Argument(help="Folder to write; an older checkpoint of ours is replaced.")],
    method: Annotated[str | None, typer.Option(help="Conversion method: las (the default), fas or spikellm.")] = None,
    steps: Steps = None,
    calibration: Annotated[
        list[Path] | None, typer.Option(metavar="FILE", help="Text to calibrate on; may be repeated.")
    ] = None,
    calibration_tokens: Annotated[
        int | None,
        typer.Option(metavar="N", help="Tokens to calibrate on: 16384 of the text, or 2048 sampled without one."),
    ] = None,
    config: Annotated[
        Path | None, typer.Option("--config", "--recipe", metavar="RECIPE", help="YAML file of options.")
    ] = None,
    set_: Set = None,
    resume: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Keep finished calibration blocks there, and go on from them."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check the input, print the config, stop.")] = False,
    seed: Annotated[int, typer.Option(help="Of the sampled calibration data.")] = 0,
    revision: Annotated[str | None, typer.Option(help="Revision of a hub model.")] = None,
    as_json: Json = False,
) -> None:
    """Convert a dense model into a spiking checkpoint.

    Without --calibration, thresholds (with spikellm: salient channels and integer weights too) are found on sequences
    that the dense model itself writes.
    """
    from spikeform.checkpoint.saving import assert_may_write

    with Output(as_json) as output:
        # All that can be refused is refused before anything heavy begins.
        chosen = read_config(method, config, steps, set_ or ())
        positive("--calibration-tokens", calibration_tokens)
        for file in calibration or ():
            if not file.is_file():
                raise CalibrationError(f"there is no calibration file {file}")
        source = dense_source(model)
        assert_may_write(out.resolve(), source=source)
        plan = {"model": model, "out": str(out), "config": chosen.to_dict()}
        if dry_run:
            _print_plan(output, plan)
            return
        with output.task(f"loading {model}"):
            network, tokenizer = load_dense(model, revision), load_tokenizer(source, revision)
        ids, described = _data(output, network, tokenizer, calibration, calibration_tokens, seed)
        import spikeform
        from spikeform.report.weights import coded_size

        with output.task("calibrating blocks") as progress:
            spikeform.convert(network, chosen, calibration=ids, workdir=resume, progress=progress)
        report = network.spikeform_report
        found = report.calibration
        if found.get("source") == "token ids":  # the ids' origin, which only this command knows
            facts = {key: value for key, value in found.items() if key not in ("source", "sequences", "tokens")}
            report.calibration = described | facts
        with output.task(f"saving {out}"):
            folder = spikeform.save(network, out, tokenizer, command=ctx.obj)
        output.say(report.summary())
        if size := coded_size(network):
            output.say(size_line(size))
        seen = {key: value for key, value in report.calibration.items() if key != "blocks"}
        output.say("calibrated on: " + ", ".join(f"{k} {v}" for k, v in seen.items()))
        if blocks := report.calibration.get("blocks"):
            output.say(_blocks_line(blocks))
        if report.saturation:
            worst = max(report.saturation, key=report.saturation.__getitem__)
            share = report.saturation[worst]
            output.say(f"{len(report.saturation)} sites saturate, most {worst}: {share:.2e} of its inputs")
        output.say(f"saved to {folder}")
        output.document(plan | {"out": str(folder), "report": report} | ({"weights": size} if size else {}))


def _data(
    output: Output, network: Any, tokenizer: Any, files: list[Path] | None, tokens: int | None, seed: int
) -> tuple[Any, dict[str, Any]]:
    """Calibration ids ``[N, L]`` and what they are."""
    from spikeform.conversion.data import SAMPLED_LENGTH, context_length, sample

    if files:
        if tokenizer is None:
            raise CalibrationError("calibration text needs a tokenizer, and the model's folder has none")
        with output.task("reading calibration text"):
            everything = read_ids(tokenizer, files)
        ids = everything[None, : tokens or DEFAULT_TEXT]
        names = [file.name for file in files]
        return ids, {"source": "texts", "files": names, "tokens": ids.numel(), "of": everything.numel()}
    length = min(SAMPLED_LENGTH, context_length(network))
    count = -(-(tokens or DEFAULT_SAMPLED) // length)
    with output.task("sampling calibration data from the dense model"):
        ids = sample(network, count, length, seed)
    source = "sampled from the dense model" if network.can_generate() else "random tokens"
    return ids, {"source": source, "sequences": count, "tokens": ids.numel(), "seed": seed}


def _blocks_line(blocks: list[dict[str, Any]]) -> str:
    """Mean steps of a channel, and how far the blocks are from the dense ones on the calibration data."""
    errors = [block["error"] for block in blocks]
    worst = max(range(len(errors)), key=errors.__getitem__)
    steps = [block["steps"] for block in blocks if "steps" in block]
    line = f"mean steps of an input channel {sum(steps) / len(steps):.3f}; " if steps else ""
    return (
        f"{line}squared error over what the dense block adds: {sum(errors) / len(errors):.2e} in the mean of "
        f"{len(errors)} blocks, {errors[worst]:.2e} in block {worst}, the worst"
    )


def _print_plan(output: Output, plan: dict[str, Any]) -> None:
    import yaml

    output.say(f"would convert {plan['model']} into {plan['out']} with")
    output.say(yaml.safe_dump(plan["config"], sort_keys=False).rstrip())
    output.document(plan | {"dry_run": True})
