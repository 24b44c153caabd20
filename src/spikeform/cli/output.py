"""Where a verb's words go: tables on a terminal, plain lines otherwise, or one JSON document."""

from __future__ import annotations

import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Annotated, Any

import typer

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document to stdout, and nothing else there.")]
Progress = Callable[[int, int], None]
WIDTH = 100


class Output:
    """Prints for people, or for machines. Use it as a context manager.

    With ``as_json`` only :meth:`document` writes to standard output: for the length of the context all else
    that prints there, libraries included, goes to standard error. Progress always goes to standard error.

    Args:
        as_json: Whether ``--json`` was given.
    """

    def __init__(self, as_json: bool) -> None:
        self.as_json = as_json

    def __enter__(self) -> Output:
        import warnings

        warnings.simplefilter("ignore")  # libraries' warnings mean nothing to who gave a command
        self._stdout = sys.stdout
        if self.as_json:
            sys.stdout = sys.stderr
        return self

    def __exit__(self, *_: object) -> None:
        sys.stdout = self._stdout

    @property
    def terminal(self) -> bool:
        """Whether a person reads along on a terminal."""
        return not self.as_json and self._stdout.isatty()

    def say(self, text: str = "", style: str = "") -> None:
        """Print a paragraph, wrapped where it is long; ``style`` is rich's, for terminals."""
        if self.as_json:
            return
        if not self.terminal:
            print(_wrapped(text), flush=True)
            return
        from rich.console import Console

        Console(file=self._stdout, highlight=False).print(text, style=style, markup=False)

    def heading(self, text: str) -> None:
        """Print a blank line and a heading."""
        self.say()
        self.say(text, "bold cyan")

    def table(self, rows: Sequence[Mapping[str, Any]], columns: Sequence[str] | None = None, title: str = "") -> None:
        """Print rows as :func:`spikeform.report.show` does."""
        if not self.as_json:
            from spikeform.report import show

            show(rows, columns, title, self._stdout)

    def beside(self, left: tuple[str, str], right: tuple[str, str]) -> None:
        """Print two texts ``(title, text)``: side by side on a terminal, one after the other otherwise."""
        if not self.terminal:
            for title, text in (left, right):
                self.say(f"{title}:")
                self.say("\n".join(f"    {line}" for line in text.split("\n")))
            return
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        table = Table(header_style="bold", padding=(0, 1), expand=False)
        for title, _ in (left, right):
            table.add_column(title, ratio=1, max_width=60)
        table.add_row(Text(left[1]), Text(right[1]))
        Console(file=self._stdout, highlight=False).print(table)

    @contextmanager
    def task(self, title: str) -> Iterator[Progress]:
        """Show that something runs, on standard error; yields a callback ``(done, total)``."""
        started = time.perf_counter()
        if not sys.stderr.isatty():
            print(f"{title} ...", file=sys.stderr, flush=True)
            yield lambda done, total: print(f"{title}: {done} of {total}", file=sys.stderr, flush=True)
            print(f"{title}: done in {time.perf_counter() - started:.1f} s", file=sys.stderr, flush=True)
            return
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as Bar

        columns = (
            SpinnerColumn(finished_text="[green]✓"),
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
        )
        with Bar(*columns, console=Console(stderr=True)) as bar:
            task = bar.add_task(title, total=None)
            yield lambda done, total: bar.update(task, completed=done, total=total)
            bar.update(task, total=bar.tasks[0].completed or 1, completed=bar.tasks[0].completed or 1)

    def document(self, value: Any) -> None:
        """Print the verb's result as JSON, if JSON was asked for."""
        if self.as_json:
            from spikeform.report import to_json

            print(to_json(value), file=self._stdout, flush=True)


def _wrapped(text: str) -> str:
    """Lines of at most WIDTH characters, the continued ones as far in as the first; words stay whole."""
    options: dict[str, Any] = {"break_long_words": False, "break_on_hyphens": False}
    indents = ((line, " " * (len(line) - len(line.lstrip()))) for line in text.split("\n"))
    return "\n".join(textwrap.fill(line, WIDTH, subsequent_indent=indent, **options) for line, indent in indents)
