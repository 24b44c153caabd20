"""``spikeform evaluate``: how close to the dense model, and how good by itself."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from spikeform.cli.models import (
    Checkpoint,
    Reference,
    Text,
    load_dense,
    load_spiking,
    load_tokenizer,
    need_tokenizer,
    positive,
    read_ids,
)
from spikeform.cli.output import Json, Output
from spikeform.cli.views import show_fidelity
from spikeform.errors import SpikeformError

SAMPLED = 8192


def run(
    out: Checkpoint,
    reference: Reference = None,
    text: Text = None,
    window: Annotated[int, typer.Option(help="Tokens in a window; it is part of the number.")] = 512,
    max_tokens: Annotated[
        int | None,
        typer.Option(metavar="N", help="Read at most N tokens: all of the text, or 8192 sampled ones."),
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(metavar="A,B", help="Zero-shot tasks, such as blimp,piqa (needs SPIKEFORM_DATA)."),
    ] = None,
    limit: Annotated[int | None, typer.Option(metavar="N", help="Questions of each task.")] = None,
    seed: Annotated[int, typer.Option(help="Of the sampled data.")] = 1,
    max_ratio: Annotated[
        float | None, typer.Option(metavar="R", help="Exit with 1 if the perplexity ratio is above this.")
    ] = None,
    min_agreement: Annotated[
        float | None,
        typer.Option(metavar="A", help="Exit with 1 if the top-1 agreement (0 to 1) is below this."),
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Revision of a hub reference.")] = None,
    as_json: Json = False,
) -> None:
    """Measure a converted model: fidelity to its dense reference, perplexity, zero-shot tasks.

    Without --text the data are sampled from the dense reference model.
    """
    with Output(as_json) as output:
        positive("--max-tokens", max_tokens)
        positive("--limit", limit)
        if reference is None and not text and not tasks:
            raise SpikeformError("nothing to measure: give --reference MODEL, --text FILE or --tasks NAMES")
        if reference is None and (max_ratio is not None or min_agreement is not None):
            raise SpikeformError("--max-ratio and --min-agreement compare with the dense model: give --reference")
        with output.task(f"loading {out}"):
            model = load_spiking(out)
            dense = load_dense(reference, revision) if reference else None
        document: dict[str, Any] = {"path": out, "reference": reference}
        missed: list[str] = []
        if dense is not None or text:
            tokenizer = need_tokenizer(out) if text else None
            ids, data = measuring_ids(
                output, tokenizer, dense, text, max_tokens or (None if text else SAMPLED), window, seed
            )
            document["data"] = data
            if dense is not None:
                missed = _fidelity(output, document, model, dense, ids, window, max_ratio, min_agreement)
            else:
                _perplexity(output, document, model, ids, window)
        if tasks:
            names = [name.strip() for name in tasks.split(",") if name.strip()]
            _zeroshot(output, document, model, dense, load_tokenizer(out), names, limit)
        document["missed"] = missed
        output.document(document)
        if missed:
            for line in missed:
                output.say(f"MISSED: {line}", "bold red")
            raise typer.Exit(1)


def measuring_ids(
    output: Output, tokenizer: Any, source: Any, text: Any, tokens: int | None, window: int, seed: int
) -> tuple[Any, dict[str, Any]]:
    """Token ids to measure on, and what they are: ``[N]`` of the text, or ``[S, window]`` by ``source``."""
    from spikeform.evaluation import sample_ids

    if text:
        ids = read_ids(tokenizer, text, tokens)
        names = ", ".join(file.name for file in text)
        return ids, {"what": f"{ids.numel():,} tokens of {names}", "files": [str(f) for f in text]}
    with output.task("sampling text from the model"):
        ids = sample_ids(source, tokens or SAMPLED, seed=seed, window=window)
    spiking = hasattr(source, "spikeform_report")
    writer = "the spiking model itself" if spiking else "the dense model"
    what = f"{ids.numel():,} tokens sampled from {writer} (no --text given), seed {seed}"
    return ids, {"what": what, "sampled_from": "spiking" if spiking else "dense", "seed": seed}


def _fidelity(
    output: Output,
    document: dict[str, Any],
    model: Any,
    dense: Any,
    ids: Any,
    window: int,
    max_ratio: float | None,
    min_agreement: float | None,
) -> list[str]:
    from spikeform.evaluation import fidelity

    with output.task("comparing with the dense model"):
        found = fidelity(model, dense, ids, window=window)
    document["fidelity"] = found.to_dict()
    output.say(f"measured on {document['data']['what']}")
    show_fidelity(output, found)
    missed = []
    if max_ratio is not None and not found.perplexity_ratio <= max_ratio:
        missed.append(f"perplexity ratio {found.perplexity_ratio:.6f}, wanted at most {max_ratio}")
    if min_agreement is not None and not found.top1_agreement >= min_agreement:
        missed.append(f"top-1 agreement {found.top1_agreement:.4f}, wanted at least {min_agreement}")
    return missed


def _perplexity(output: Output, document: dict[str, Any], model: Any, ids: Any, window: int) -> None:
    from spikeform.evaluation import perplexity

    with output.task("reading the text"):
        found = perplexity(model, ids, window=window)
    document["perplexity"] = found.to_dict()
    output.say(f"measured on {document['data']['what']}")
    output.say(f"perplexity {found.perplexity:.4f} ({found.protocol})")
    output.say("No --reference given: fidelity to the dense model was not measured.")


def _zeroshot(
    output: Output,
    document: dict[str, Any],
    model: Any,
    dense: Any,
    tokenizer: Any,
    names: list[str],
    limit: int | None,
) -> None:
    from spikeform.evaluation import zeroshot

    networks = {"spiking": model} | ({"dense": dense} if dense is not None else {})
    results = {}
    for label, network in networks.items():
        with output.task(f"zero-shot tasks, {label}"):
            results[label] = zeroshot(network, tokenizer, names, limit=limit)
    document["zeroshot"] = results
    rows = []
    for name in results["spiking"]["tasks"]:
        found = {label: result["tasks"][name] for label, result in results.items()}
        row: dict[str, Any] = {"task": name} | {label: f"{task['acc']:.4f}" for label, task in found.items()}
        error = found["spiking"]["acc_stderr"]
        rows.append(row | {"±": "" if error is None else f"{error:.4f}", "chance": found["spiking"]["chance"]})
        rows[-1]["questions"] = found["spiking"]["n"]
    output.table(rows, title="zero-shot accuracy")
    output.say(results["spiking"]["protocol"], "dim")
