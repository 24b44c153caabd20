"""``spikeform demo``: a real language model becomes spiking, speaks, and is measured. No network, no data."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from spikeform.cli.evaluate import measuring_ids
from spikeform.cli.generate import write
from spikeform.cli.models import Text, load_dense, load_tokenizer
from spikeform.cli.output import Json, Output
from spikeform.cli.recipe import Set, read_config
from spikeform.cli.views import show_energy, show_fidelity, verdict
from spikeform.errors import ForeignFolderError, SpikeformError

WINDOW, MEASURED, COUNTED, WRITTEN = 256, 4096, 512, 80
TEMPERATURE, TOP_K = 0.7, 40


def run(
    ctx: typer.Context,
    model: Annotated[str, typer.Option(help="Embedded model (llama, gpt2, opt), or a folder.")] = "llama",
    steps: Annotated[str, typer.Option(metavar="T", help="Time steps, 1 to 16.")] = "16",
    set_: Set = None,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for what the demo makes.")] = Path("demo-out"),
    text: Text = None,
    prompt: Annotated[str, typer.Option(help="What the two models go on from.")] = "The old man looked at the sea",
    seed: Annotated[int, typer.Option(help="Of the texts that are written.")] = 0,
    as_json: Json = False,
) -> None:
    """Convert a pretrained model with LAS, let it write, measure it, and draw its spikes.

    Needs no network and no data: what it measures on is sampled from the dense model, or your --text.
    """
    os.environ["HF_HUB_OFFLINE"] = "1"
    started = time.perf_counter()
    with Output(as_json) as output:
        config = read_config("las", None, steps, set_ or ())
        _check_folder(out)
        from spikeform import pretrained

        name = pretrained.PREFIX + model if model in pretrained.CAUSAL else model
        with output.task(f"loading {model}"):
            dense, spiking = load_dense(name), load_dense(name)
            tokenizer = load_tokenizer(name)
        if tokenizer is None:
            raise SpikeformError(f"{model} has no tokenizer: the demo writes text with one")
        import spikeform

        size = sum(p.numel() for p in dense.parameters()) / 1e6
        output.say(f"{model}: a dense {type(dense).__name__} of {size:.1f} million parameters", "bold")
        with output.task(f"converting with LAS, {config.steps} steps") as progress:
            spikeform.convert(spiking, config, progress=progress)
        output.say(spiking.spikeform_report.summary())

        output.heading("What the two of them write")
        texts = _texts(output, dense, spiking, tokenizer, prompt, seed)

        output.heading("How close the spiking model is to the dense one")
        ids, data = measuring_ids(output, tokenizer, dense, text, MEASURED, WINDOW, 1)
        with output.task("comparing with the dense model"):
            fidelity = spikeform.fidelity(spiking, dense, ids, window=WINDOW)
        output.say(f"measured on {data['what']}")
        show_fidelity(output, fidelity)

        output.heading("What it costs")
        counted = ids.reshape(-1)[: min(COUNTED, fidelity.windows * WINDOW)].reshape(-1, WINDOW)
        with output.task("counting spikes"):
            energy = spikeform.energy(spiking, counted, dense=dense)
        output.say(f"counted on the first {counted.numel()} of these tokens, in windows of {WINDOW}")
        show_energy(output, energy)
        if config.steps > 8:
            output.say("Fewer spikes cost less: try spikeform demo --steps 8 --set coding=signed_digit", "dim")

        out.mkdir(parents=True, exist_ok=True)
        with output.task("drawing spikes, saving"):
            raster = _raster(spiking, tokenizer, counted, out / "raster.png")
            checkpoint = spikeform.save(spiking, out / "checkpoint", tokenizer, command=ctx.obj)
        files = {
            "checkpoint": str(checkpoint),
            "raster": str((out / "raster.png").resolve()),
            "report": str((out / "report.json").resolve()),
        }
        document = {
            "model": model,
            "config": config.to_dict(),
            "conversion": spiking.spikeform_report.to_dict(),
            "text": texts,
            "data": data,
            "fidelity": fidelity.to_dict(),
            "energy": {**energy.to_dict(), "verdict": verdict(energy)},
            "raster": raster.to_dict(),
            "files": files,
            "seconds": time.perf_counter() - started,
        }
        (out / "report.json").write_text(spikeform.report.to_json(document) + "\n", encoding="utf-8")
        output.heading("Files")
        output.table(
            [
                {"file": files["checkpoint"], "holds": "the spiking model: a Hugging Face folder"},
                {"file": files["raster"], "holds": f"{raster.spikes:,} literal spikes of {raster.site}"},
                {"file": files["report"], "holds": "all numbers above, and many more"},
            ]
        )
        output.say(f"Go on: spikeform generate {out}/checkpoint --prompt 'It was'")
        output.say(f"({document['seconds']:.0f} s in all)", "dim")
        output.document(document)


def _check_folder(out: Path) -> None:
    """Refuse to overwrite files that no demo made."""
    from spikeform.checkpoint import MANIFEST_NAME
    from spikeform.checkpoint.saving import assert_may_write

    if out.exists() and not out.is_dir():
        raise ForeignFolderError(f"cannot write to {out}: it is a file. Give the name of a folder")
    assert_may_write((out / "checkpoint").resolve())
    if (out / "checkpoint" / MANIFEST_NAME).is_file():
        return
    for name in ("raster.png", "report.json"):
        if (out / name).exists():
            raise ForeignFolderError(f"cannot write to {out}: its {name} is not the demo's. Choose another --out")


def _texts(output: Output, dense: Any, spiking: Any, tokenizer: Any, prompt: str, seed: int) -> dict[str, Any]:
    """Both models go on from the prompt with the same random numbers."""
    found = {}
    for label, network in (("dense", dense), ("spiking", spiking)):
        with output.task(f"writing, {label}"):
            ids, length = write(network, tokenizer, prompt, WRITTEN, TEMPERATURE, TOP_K, seed)
        found[label] = ids[length:]
    words = {k: prompt + tokenizer.decode(v, skip_special_tokens=True) for k, v in found.items()}
    output.beside(("dense", words["dense"]), ("spiking", words["spiking"]))
    a, b = found["dense"], found["spiking"]
    most = max(len(a), len(b))
    first = next((i for i in range(most) if a[i : i + 1] != b[i : i + 1]), most)
    same = sum(x == y for x, y in zip(a, b, strict=False))
    end = "" if first == most else f"; they part at token {first + 1}, and from there each goes its own way"
    output.say(f"{same} of {most} tokens are the same (temperature {TEMPERATURE}, top {TOP_K}, one seed){end}")
    return words | {"prompt": prompt, "seed": seed, "tokens": most, "same": same, "first_difference": first}


def _raster(model: Any, tokenizer: Any, ids: Any, path: Path) -> Any:
    """Literal spikes into the last linear layer of the middle block."""
    from spikeform.conversion.kinds import blocks
    from spikeform.report import raster

    found = blocks(model)
    middle = found[len(found) // 2][0]
    linears = [r.name for r in model.spikeform_report.replaced if r.kind == "linear"]
    inside = [name for name in linears if name.startswith(f"{middle}.")] or linears
    labels = [tokenizer.decode([i]) for i in ids[0].tolist()]
    return raster(model, ids[:1], site=inside[-1], path=path, labels=labels)
