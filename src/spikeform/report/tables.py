"""Rows to the screen: a rich table on a terminal, aligned plain lines otherwise, JSON for machines."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any, TextIO

Rows = Sequence[Mapping[str, Any]]


def to_json(value: Any) -> str:
    """Indented JSON; what is not finite becomes null, objects with ``to_dict`` their dict."""
    return json.dumps(_plain(value), indent=2, ensure_ascii=False, allow_nan=False)


def _plain(value: Any) -> Any:
    if hasattr(value, "to_dict"):
        value = value.to_dict()
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def cell(value: Any) -> str:
    """One value as text: four significant digits, thousands apart, lists joined, None empty."""
    if value is None:
        return ""
    if isinstance(value, bool | str):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.4g}" if abs(value) < 1e5 else f"{value:.3e}"
    if isinstance(value, list | tuple):
        return " ".join(cell(item) for item in value)
    return str(value)


def columns_of(rows: Rows) -> list[str]:
    """All keys of the rows, in order of first appearance."""
    return list(dict.fromkeys(key for row in rows for key in row))


def lines(rows: Rows, columns: Sequence[str] | None = None) -> list[str]:
    """Aligned plain lines, the header first; numbers to the right."""
    names = list(columns or columns_of(rows))
    table = [names] + [[cell(row.get(name)) for name in names] for row in rows]
    widths = [max(len(line[i]) for line in table) for i in range(len(names))]
    right = [_numeric(rows, name) for name in names]
    return [
        "  ".join(
            text.rjust(w) if r else text.ljust(w) for text, w, r in zip(line, widths, right, strict=True)
        ).rstrip()
        for line in table
    ]


def _numeric(rows: Rows, name: str) -> bool:
    values = [row[name] for row in rows if row.get(name) is not None]
    return bool(values) and all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)


def show(rows: Rows, columns: Sequence[str] | None = None, title: str = "", file: TextIO | None = None) -> None:
    """Print rows as a table.

    Args:
        rows: Mappings from column name to value.
        columns: Which columns, in order; None for all.
        title: Printed above, or nothing.
        file: Where to; None for standard output. Colours and boxes only where it is a terminal.
    """
    file = file or sys.stdout
    if not file.isatty():
        print("\n".join(([title] if title else []) + lines(rows, columns)), file=file)
        return
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    names = list(columns or columns_of(rows))
    table = Table(title=escape(title) or None, title_justify="left", header_style="bold")
    for name in names:
        table.add_column(escape(name), justify="right" if _numeric(rows, name) else "left", overflow="fold")
    for row in rows:
        table.add_row(*(escape(cell(row.get(name))) for name in names))
    Console(file=file).print(table)
