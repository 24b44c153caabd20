"""The command line: one file a verb. Nothing heavy is imported until a verb runs.

Exit codes: 0 done; 1 a check failed (``verify`` found damage, ``evaluate`` missed a limit); 2 bad input, with
one line on stderr that says what is wrong; 3 a defect of spikeform's, with its traceback.
"""

from __future__ import annotations

import os
import sys
import traceback
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from spikeform.cli import bench, calibrate, convert, demo, energy, evaluate, generate, inspect, prefer, train, verify


class Commands(TyperGroup):
    """The verbs; turns what they raise into exit codes, and keeps the command line for the manifest."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Keep the whole command line as the context's object before it is taken apart."""
        ctx.obj = ["spikeform", *args]
        return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        """Run the verb."""
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            raise  # the reader of our output left; typer ends quietly
        except Exception as error:
            ours = type(error).__module__.partition(".")[0] not in ("click", "typer")  # theirs: usage, exit
            if ctx.params.get("debug") or not ours:
                raise
            if isinstance(error, ValueError | OSError | ImportError):
                print(f"error: {error}", file=sys.stderr)
                raise typer.Exit(2) from None
            traceback.print_exc()
            print("error: this is a defect of spikeform's; please report the lines above", file=sys.stderr)
            raise typer.Exit(3) from None


app = typer.Typer(
    name="spikeform",
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        from spikeform import __version__

        print(f"spikeform {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", envvar="SPIKEFORM_DEBUG", help="Show the traceback of every error.")
    ] = False,
) -> None:
    """Turn pretrained Hugging Face language models into spiking ones, run them, and say what they cost."""


for verb in (demo, convert, train, prefer, calibrate, generate, evaluate, energy, bench, inspect, verify):
    app.command(verb.__name__.rpartition(".")[2])(verb.run)


def main() -> None:
    """The ``spikeform`` command."""
    # OpenMP's threads spin while they wait, which starves every other process of a busy machine. Read once,
    # when torch is imported, so it has to be set here.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    app()
