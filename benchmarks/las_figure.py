"""Draws the LAS curves: perplexity ratio and KL over T, one column a model. Called by las_tables.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

STYLE = {  # option title -> colour, line
    "radix-2, nearest": ("#1f5fa8", "-"),
    "radix-2, floor": ("#1f5fa8", ":"),
    "radix-2, nearest, thresholds per channel": ("#2f8f5b", "-"),
    "radix-2, nearest, one threshold (MT)": ("#8a8a8a", "-"),
    "multi-threshold 2, nearest": ("#d9822b", "-"),
    "multi-threshold 2, floor": ("#d9822b", ":"),
    "multi-threshold 4, nearest": ("#a03c78", "-"),
    "multi-threshold 4, floor": ("#a03c78", ":"),
}
MODELS = ("llama", "gpt2", "opt")


def draw(results: list[Any], options: dict[tuple, str], target: Path) -> None:
    """Draws every measured point. Twins are panels of their own; runs of another protocol have hollow marks."""
    panels = [m for base in MODELS for m in (base, f"{base}-twin") if any(r.model == m for r in results)]
    figure, axes = plt.subplots(2, len(panels), figsize=(2.75 * len(panels), 7.2), sharex=True, sharey="row")
    for column, model in zip(axes.T if len(panels) > 1 else [axes], panels, strict=True):
        ours = [r for r in results if r.model == model]
        for result in ours:
            main = result.data["protocol"] == ours[0].data["protocol"]
            for option, title in options.items():
                _curve(column, result.rows.get(option, {}), title, main)
        column[0].set_title(model.replace("-twin", ", outlier twin"), fontsize=10)
        column[1].set_xlabel("steps T")
    for row, label in zip(axes, ("perplexity ratio", "KL(dense ‖ spiking), nats/token"), strict=True):
        first = row[0] if len(panels) > 1 else row
        first.set_ylabel(label)
    for axis in axes.flat:
        axis.grid(color="#e4e4e4", linewidth=0.6)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_xticks(range(2, 17, 2))
    for axis in axes[0].flat if len(panels) > 1 else [axes[0]]:
        axis.set_yscale("log")
        axis.set_yticks([1, 2, 5, 20, 100], ["1", "2", "5", "20", "100"])
        axis.minorticks_off()
    for axis in axes[1].flat if len(panels) > 1 else [axes[1]]:
        axis.set_yscale("log")
    handles = [plt.Line2D([], [], color=c, linestyle=s, marker="o", markersize=3) for c, s in STYLE.values()]
    labels = list(STYLE)
    if any(r.data["protocol"] != results[0].data["protocol"] for r in results):
        handles.append(plt.Line2D([], [], color="#555555", linestyle="none", marker="o", markerfacecolor="white"))
        labels.append("hollow: another protocol")
    figure.legend(handles, labels, loc="lower center", ncols=3, fontsize=8, frameon=False)
    figure.tight_layout(rect=(0, 0.1, 1, 1))
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=110)
    plt.close(figure)


def _curve(column: Any, rows: dict[int, dict], title: str, main: bool) -> None:
    colour, line = STYLE[title]
    steps = sorted(rows)
    fill = {} if main else {"markerfacecolor": "white"}
    for axis, key in zip(column, ("perplexity_ratio", "kl"), strict=True):
        values = [rows[t][key] for t in steps]
        axis.plot(steps, values, line, color=colour, marker="o", markersize=2.6, linewidth=1.1, **fill)
