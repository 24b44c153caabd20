"""``spikeform bench``: how fast a spiking model is, beside the dense one it came from."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from spikeform.cli.models import Reference, load_dense, load_spiking, positive
from spikeform.cli.output import Json, Output
from spikeform.cli.recipe import Set, Steps, read_config
from spikeform.errors import ConfigError, SpikeformError

if TYPE_CHECKING:
    from spikeform.report import Bench

DTYPES = ("float32", "bfloat16", "float16")


def run(
    model: Annotated[str, typer.Argument(help="Converted model; or a dense one, which is converted for the occasion.")],
    reference: Reference = None,
    method: Annotated[str | None, typer.Option(help="Of a dense model: las (the default), fas or spikellm.")] = None,
    steps: Steps = None,
    config: Annotated[
        Path | None, typer.Option("--config", "--recipe", metavar="RECIPE", help="YAML file of options.")
    ] = None,
    set_: Set = None,
    prompt: Annotated[int, typer.Option(metavar="N", help="Tokens that are read at once.")] = 128,
    new: Annotated[int, typer.Option(metavar="N", help="Tokens that are written, at least 2.")] = 64,
    batch: Annotated[int, typer.Option(metavar="N", help="Sequences side by side.")] = 1,
    repeat: Annotated[int, typer.Option(metavar="N", help="Rounds, dense and spiking by turns.")] = 5,
    executor: Annotated[
        list[str] | None,
        typer.Option(help="automatic (the default), collapsed, event or temporal. Repeatable: one row each."),
    ] = None,
    compile_: Annotated[
        bool | None,
        typer.Option("--compile/--no-compile", help="Compile the writing of tokens; on CUDA unless told."),
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda ...; the GPU if there is one unless given.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; the model's unless given.")] = None,
    threads: Annotated[int | None, typer.Option(metavar="N", help="CPU threads, if not PyTorch's choice.")] = None,
    seed: Annotated[int, typer.Option(help="Of the tokens.")] = 0,
    as_json: Json = False,
) -> None:
    """Measure speed and memory of a spiking model; with its dense parent beside it, in turns.

    A dense MODEL is converted first, thresholds from sequences that it writes itself, and is its own reference.
    Quality is not measured here: see evaluate.
    """
    from spikeform import pretrained
    from spikeform.checkpoint import is_converted

    with Output(as_json) as output:
        # All that can be refused is refused before anything heavy begins.
        numbers = {"--prompt": prompt, "--batch": batch, "--repeat": repeat, "--threads": threads}
        for name, value in numbers.items():
            positive(name, value)
        if new < 2:
            raise SpikeformError(f"--new must be at least 2, since the time between tokens is measured; got {new}")
        if dtype is not None and dtype not in DTYPES:
            raise SpikeformError(f"--dtype must be one of {', '.join(DTYPES)}, got {dtype}")
        executors = _executors(executor or ["automatic"])
        converted = is_converted(pretrained.resolve(model))
        chosen = None
        if converted:
            if method or steps or config or set_:
                raise ConfigError(
                    f"{model} is converted already: --method, --steps, --config and --set are for dense ones"
                )
        else:
            if reference is not None:
                raise ConfigError(f"{model} is dense, and so its own reference: leave --reference out")
            chosen = read_config(method, config, steps, set_ or ())
        found = _measure(
            output,
            model,
            reference if converted else model,
            chosen,
            (device, dtype, threads),
            prompt=prompt,
            new=new,
            batch=batch,
            repeat=repeat,
            executors=executors,
            compiled=compile_,
            seed=seed,
        )
        _show(output, found)
        described = None if chosen is None else chosen.to_dict()
        output.document({"path": model, "reference": reference, "config": described, **found.to_dict()})


def _executors(names: list[str]) -> list[str]:
    from spikeform.report.bench import AUTOMATIC
    from spikeform.synapses import EXECUTORS

    for name in names:
        if name not in (AUTOMATIC, *EXECUTORS):
            raise SpikeformError(f"--executor must be one of {', '.join((AUTOMATIC, *EXECUTORS))}, got {name}")
    return list(dict.fromkeys(names))


def _measure(
    output: Output,
    model: str,
    reference: str | None,
    config: Any,
    place: tuple[str | None, str | None, int | None],
    **options: Any,
) -> Bench:
    """Load what is to be compared, convert if there is a config, and measure."""
    import torch

    import spikeform
    from spikeform.report import bench

    device, dtype, threads = place
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    kind = None if dtype is None else getattr(torch, dtype)
    before = torch.get_num_threads()
    with output.task(f"loading {model}"):
        dense = None if reference is None else load_dense(reference).to(device=device, dtype=kind)
        spiking = (load_dense(model) if config is not None else load_spiking(model)).to(device=device, dtype=kind)
    if config is not None:
        with output.task("converting") as progress:
            spikeform.convert(spiking, config, progress=progress)
        output.say(spiking.spikeform_report.summary())
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        with output.task("measuring") as progress:
            return bench(spiking, dense, progress=progress, **options)
    finally:
        torch.set_num_threads(before)


def _show(output: Output, found: Bench) -> None:
    rows = []
    for row in found.rows:
        cells: dict[str, Any] = {"model": row.model, "executor": row.executor + (", compiled" if row.compiled else "")}
        cells |= {"prefill tokens/s": round(row.prefill_tokens_per_s, 1), "decode ms/token": row.decode_ms}
        cells |= {"±": row.decode_spread_ms, "decode tokens/s": row.decode_tokens_per_s}
        cells |= {"weights MiB": row.weight_bytes / 2**20}
        cells |= {"peak MiB": None if row.peak_bytes is None else row.peak_bytes / 2**20}
        if any(other.prefill_speedup is not None for other in found.rows):
            cells |= {"prefill vs dense": _times(row.prefill_speedup), "decode vs dense": _times(row.decode_speedup)}
        rows.append(cells)
    output.table(rows)
    said = found.protocol
    where = f"{said['device']}, {said['threads']} threads" if said["threads"] else said["device"]
    what = f"{said['prompt']} tokens read, {said['new']} written, batch {said['batch']}, {said['dtype']}, {where}"
    how = f"medians of {said['rounds']} rounds by turns, ± the distance of quartiles"
    output.say(f"{what}; {how}; peak: weights and all that was needed beside them", "dim")


def _times(ratio: float | None) -> str | None:
    return None if ratio is None else f"{ratio:.2f} x"
