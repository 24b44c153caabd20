"""What the tables of methods that are trained share: rows of several files, questions at equal budget, verdicts."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fas_costs import table

Row = dict[str, Any]
Rows = dict[tuple[str, int], Row]


def read_rows(files: Sequence[Path]) -> tuple[list[dict[str, Any]], Rows]:
    """All files, and their rows by point and seed."""
    data = [json.loads(path.read_text(encoding="utf-8")) for path in files]
    if len({one["protocol"] for one in data}) > 1:
        raise SystemExit(f"{', '.join(path.name for path in files)} are of several protocols: they fit no one table")
    return data, {(row["point"], row["seed"]): row for one in data for row in one["rows"]}


def of(rows: Rows, name: str) -> list[Row]:
    """A point's rows, a seed each."""
    return [row for (point, _), row in sorted(rows.items()) if point == name]


def ratio(row: Row) -> float:
    """Perplexity over the dense model's."""
    return row["text"]["perplexity_ratio"]


def ratio_cell(row: Row) -> str:
    """With the standard error of the windows' paired differences."""
    return f"{ratio(row):.4f} ± {row['text']['ratio_stderr']:.4f}"


def budget(row: Row) -> str:
    """Of its training."""
    return f"{row['training']['steps']:,} × {row['training']['batch_size']}"


def verdict(yes: bool) -> str:
    """Yes or no."""
    return "yes" if yes else "**no**"


def where(data: dict[str, Any]) -> str:
    """Protocol, hardware and versions in one line."""
    versions = ", ".join(f"{name} {value}" for name, value in data["versions"].items())
    return f"Protocol: {data['protocol']}. Hardware: {data['hardware']}. Versions: {versions}."


def question_lines(
    rows: Rows, questions: Sequence[tuple[str, str, str]], what: str = "ratio", of_row: Callable[[Row], float] = ratio
) -> list[str]:
    """Comparisons at equal budget: mean over the seeds that both have.

    Args:
        rows: All rows.
        questions: Title, the point that should be lower, and than what.
        what: Is compared.
        of_row: Reads it.
    """
    found = []
    for title, low, high in questions:
        seeds = [seed for point, seed in rows if point == low and (high, seed) in rows]
        if seeds:
            pairs = [(of_row(rows[low, seed]), of_row(rows[high, seed])) for seed in seeds]
            means = [sum(side) / len(seeds) for side in zip(*pairs, strict=True)]
            always = f"{sum(a < b for a, b in pairs)} of {len(seeds)}"
            found.append([title, verdict(means[0] < means[1]), f"{means[0]:.4f}", f"{means[1]:.4f}", always])
    return table(["asked", "", f"{what}, first named", "second", "seeds that say so"], found)
