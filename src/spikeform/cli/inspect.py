"""``spikeform inspect``: which neuron sits where, and where the model came from."""

from __future__ import annotations

from typing import Any

from spikeform.cli.models import Checkpoint, load_spiking
from spikeform.cli.output import Json, Output

COLUMNS = ("site", "layer", "neuron", "function", "steps", "coding", "thresholds")
STREAMING_COLUMNS = ("site", "layer", "neuron", "steps", "levels", "signed", "thresholds", "scale", "initial")


def run(out: Checkpoint, as_json: Json = False) -> None:
    """Show which neuron sits where, what stayed dense and why, and where the model came from."""
    import spikeform
    from spikeform.checkpoint import read_manifest

    with Output(as_json) as output:
        with output.task(f"loading {out}"):
            model = load_spiking(out)
        manifest = read_manifest(out)
        rows = spikeform.inspect(model)
        spiking = [row for row in rows if row["neuron"]]
        dense = [row for row in rows if not row["neuron"]]
        # The record made at conversion; a model loaded from files has only what its modules say.
        record = (manifest.report if manifest else None) or model.spikeform_report.to_dict()
        config = model.config.quantization_config.to_dict()
        about = {
            "model": type(model).__name__,
            "source": manifest.source if manifest else None,
            "created": manifest.created if manifest else None,
            "command": manifest.command if manifest else None,
            "calibration": record.get("calibration"),
            "config": config,
        }
        output.table([{"": key, "value": _flat(value)} for key, value in about.items() if value], title=str(out))
        output.say()
        streaming = [row for row in spiking if "initial" in row]
        windowed = [row for row in spiking if "initial" not in row]
        if streaming:
            title = f"{len(streaming)} streaming neuron populations (scale, initial: least and largest)"
            output.table(streaming, STREAMING_COLUMNS, title=title)
        if windowed:
            output.table(windowed, COLUMNS, title=f"{len(windowed)} neuron populations")
        output.say()
        output.table(dense, ("site", "layer", "reason"), title=f"{len(dense)} modules that stay real")
        if saturation := record.get("saturation"):
            output.say()
            worst = sorted(saturation.items(), key=lambda item: -item[1])
            output.table(
                [{"site": site, "saturated": share} for site, share in worst],
                title="inputs above the largest threshold, as a share of the calibration data",
            )
        if history := record.get("history"):
            output.say()
            output.table([_stage(entry) for entry in history], title="what was done since the conversion")
        found = {"neurons": spiking, "dense": dense, "saturation": saturation or {}, "history": history or []}
        output.document(about | found)


def _stage(entry: dict[str, Any]) -> dict[str, Any]:
    row = {key: entry.get(key) for key in ("stage", "steps", "seconds")}
    return row | {"metrics": _flat(entry.get("metrics") or {})}


def _flat(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{k}={_flat(v)}" for k, v in value.items() if v is not None)
    if isinstance(value, list | tuple):
        return " ".join(map(_flat, value))
    return str(value)
