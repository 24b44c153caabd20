"""``spikeform inspect``: which neuron sits where, and where the model came from."""

from __future__ import annotations

from typing import Any

from spikeform.cli.models import Checkpoint, load_spiking
from spikeform.cli.output import Json, Output
from spikeform.cli.views import size_line

COLUMNS = ("site", "layer", "neuron", "function", "steps", "coding", "thresholds")
GIF_COLUMNS = ("site", "layer", "neuron", "steps", "levels", "signed", "channels by T", "salient")
INTEGER_COLUMNS = ("site", "layer", "neuron", "spikes", "steps", "thresholds", "per_channel")
LEAKY_COLUMNS = ("site", "neuron", "steps", "thresholds", "tau", "reset", "signed", "gain")
WEIGHT_COLUMNS = ("site", "weights", "bits", "channels by T", "bytes", "over bf16")
BLOCKS_TITLE = "blocks on the calibration data: mean steps of a channel, squared error over what the dense block adds"
STREAMING_COLUMNS = ("site", "layer", "neuron", "steps", "levels", "signed", "thresholds", "scale", "initial")


def run(out: Checkpoint, as_json: Json = False) -> None:
    """Show which neuron sits where, what stayed dense and why, and where the model came from."""
    import spikeform
    from spikeform.checkpoint import read_manifest
    from spikeform.report.weights import coded_size

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
        blocks = (about["calibration"] or {}).get("blocks")
        told = about | {"calibration": {k: v for k, v in (about["calibration"] or {}).items() if k != "blocks"}}
        output.table([{"": key, "value": _flat(value)} for key, value in told.items() if value], title=str(out))
        output.say()
        streaming = [row for row in spiking if "initial" in row]
        bursts = [row for row in spiking if "salient" in row]
        integers = [row for row in spiking if "weight_bits" in row]
        integral = [row for row in spiking if "spikes" in row]
        leaky = [row for row in spiking if "tau" in row]
        others = [row for row in spiking if not any(row in group for group in (streaming, bursts, integral, leaky))]
        windowed = [row for row in others if row["neuron"] != "weights"]
        if streaming:
            title = f"{len(streaming)} streaming neuron populations (scale, initial: least and largest)"
            output.table(streaming, STREAMING_COLUMNS, title=title)
        if leaky:
            output.table(leaky, LEAKY_COLUMNS, title=f"{len(leaky)} LIF neuron populations (gain: least and largest)")
        if windowed:
            output.table(windowed, COLUMNS, title=f"{len(windowed)} neuron populations")
        if integral:
            title = f"{len(integral)} signed-integer neuron populations (per channel: least and largest threshold)"
            output.table(integral, INTEGER_COLUMNS, title=title)
        if bursts:
            if windowed or streaming:
                output.say()
            title = f"{len(bursts)} GIF neuron populations (salient: channels of more than one step)"
            output.table([_bursts(row) for row in bursts], GIF_COLUMNS, title=title)
        if size := coded_size(model):
            output.say()
            title = f"integer weights of {len(integers)} linear layers"
            output.table([_integers(row) for row in integers], WEIGHT_COLUMNS, title=title)
            output.say(size_line(size))
        output.say()
        output.table(dense, ("site", "layer", "reason"), title=f"{len(dense)} modules that stay real")
        if blocks:
            output.say()
            output.table([{"block": i, **facts} for i, facts in enumerate(blocks)], title=BLOCKS_TITLE)
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
        found: dict[str, Any] = {"weights": size} if size else {}
        found |= {"neurons": spiking, "dense": dense, "saturation": saturation or {}, "history": history or []}
        output.document(about | found)


def _bursts(row: dict[str, Any]) -> dict[str, Any]:
    return {**row, "channels by T": _shares(row["channels"]), "salient": f"{row['salient']:.1%}"}


def _integers(row: dict[str, Any]) -> dict[str, Any]:
    return {
        "site": row["site"],
        "weights": row["weight_form"],
        "bits": row["weight_bits"],
        "channels by T": _shares(row["weight_steps"]),
        "bytes": row["bytes"],
        "over bf16": round(row["bytes"] / row["bf16_bytes"], 3),
    }


def _shares(shares: dict[int, float]) -> str:
    return ", ".join(f"T={steps} {share:.1%}" for steps, share in shares.items() if share)


def _stage(entry: dict[str, Any]) -> dict[str, Any]:
    row = {key: entry.get(key) for key in ("stage", "steps", "seconds")}
    return row | {"metrics": _flat(entry.get("metrics") or {})}


def _flat(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{k}={_flat(v)}" for k, v in value.items() if v is not None)
    if isinstance(value, list | tuple):
        return " ".join(map(_flat, value))
    return str(value)
