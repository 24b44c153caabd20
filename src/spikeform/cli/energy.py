"""``spikeform energy``: spikes counted, energies estimated, two rivals beside."""

from __future__ import annotations

from typing import Annotated

import typer

from spikeform.cli.evaluate import measuring_ids
from spikeform.cli.models import (
    Checkpoint,
    Reference,
    Text,
    load_dense,
    load_spiking,
    need_tokenizer,
    positive,
)
from spikeform.cli.output import Json, Output
from spikeform.cli.views import show_energy


def run(
    out: Checkpoint,
    reference: Reference = None,
    text: Text = None,
    tokens: Annotated[int, typer.Option(metavar="N", help="Tokens to run.")] = 1024,
    window: Annotated[int, typer.Option(help="Tokens in a window, read at once from an empty context.")] = 256,
    seed: Annotated[int, typer.Option(help="Of the sampled data.")] = 1,
    as_json: Json = False,
) -> None:
    """Count a converted model's spikes and estimate its energy, beside the dense and the quantised network.

    With --reference, the dense model's operations are counted too, and must agree. Without --text the data
    are sampled from it, or else from the converted model.
    """
    with Output(as_json) as output:
        positive("--tokens", tokens)
        with output.task(f"loading {out}"):
            model = load_spiking(out)
            dense = load_dense(reference) if reference else None
        tokenizer = need_tokenizer(out) if text else None
        ids, data = measuring_ids(output, tokenizer, dense or model, text, tokens, min(window, tokens), seed)
        from spikeform.energy import energy

        rows = ids if ids.ndim == 2 else ids[None]
        with output.task("counting spikes"):
            report = energy(model, rows, dense=dense, window=window)
        output.say(f"counted on {data['what']}, in windows of {report.protocol['window']}")
        output.say()
        kinds = [{"kind": kind, **values} for kind, values in report.per_kind.items()]
        output.table(kinds, title="by kind of operation")
        output.say()
        show_energy(output, report)
        output.say()
        output.say("not counted:")
        for line in report.not_counted:
            output.say(f"  - {line}")
        output.document({"path": out, "reference": reference, "data": data, **report.to_dict()})
