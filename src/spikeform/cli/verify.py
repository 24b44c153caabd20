"""``spikeform verify``: is this the checkpoint that was saved?"""

from __future__ import annotations

import typer

from spikeform.cli.models import Checkpoint
from spikeform.cli.output import Json, Output
from spikeform.errors import DamagedCheckpointError


def run(out: Checkpoint, as_json: Json = False) -> None:
    """Compare every file and tensor of a checkpoint with its manifest. Exit code 1 if it is damaged."""
    import spikeform

    with Output(as_json) as output:
        try:
            with output.task(f"verifying {out}"):
                report = spikeform.verify(out)
        except DamagedCheckpointError as error:
            output.say(f"DAMAGED: {out}", "bold red")
            for problem in error.problems or (str(error),):
                output.say(f"  {problem}")
            output.document({"ok": False, "path": out, "problems": error.problems or [str(error)]})
            raise typer.Exit(1) from None
        checked = "every file's sha256, " if report.hashes else ""
        output.say(
            f"good: {out} ({report.method}, {report.tensors} tensors, {report.bytes / 2**20:.1f} MiB)",
            "green",
        )
        output.say(f"checked: {checked}every tensor's name, shape and values, and the configuration")
        if not report.manifest:
            output.say("no spikeform.json here: a lost or altered file cannot be noticed (see spikeform.save)")
        if report.unlisted:
            output.say(f"not part of the checkpoint: {', '.join(report.unlisted)}")
        output.document({"ok": True, **report.to_dict()})
