"""Draws what FAS keeps: perplexity over that of the QCFS network, by T. Called by fas_tables.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

COLOURS = {
    "qcfs": "#8a8a8a",
    "qcfs-distilled": "#555555",
    "streams": "#1f5fa8",
    "streams-distilled": "#2f8f5b",
    "streams-distilled-lr": "#d9822b",
}
LINES = {"uncalibrated": (":", "before calibration"), "fine": ("-", "coarse + fine")}


def draw(cases: list[Any], target: Path) -> None:
    """Draws one panel a model."""
    models = list(dict.fromkeys(case.model for case in cases))
    figure, axes = plt.subplots(1, len(models), figsize=(4.2 * len(models), 4.4), sharey=True, squeeze=False)
    for axis, model in zip(axes[0], models, strict=True):
        for case in (case for case in cases if case.model == model):
            steps = sorted(case.streams, key=int)
            for stage, (line, _) in LINES.items():
                values = [case.share(t, stage) for t in steps]
                axis.plot([int(t) for t in steps], values, line, color=COLOURS[case.variant], marker="o", markersize=3)
        axis.set_title(model, fontsize=10)
        axis.set_xlabel("steps T")
        axis.set_xscale("log", base=2)
        axis.set_xticks([4, 8, 16], ["4", "8", "16"])
        axis.grid(color="#e4e4e4", linewidth=0.6)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].set_ylabel("perplexity over the QCFS network's")
    titles = {case.variant: case.title for case in cases}
    shown = [variant for variant in COLOURS if variant in titles]
    handles = [plt.Line2D([], [], color=COLOURS[variant], marker="o", markersize=3) for variant in shown]
    handles += [plt.Line2D([], [], color="black", linestyle=line) for line, _ in LINES.values()]
    labels = [titles[variant] for variant in shown] + [title for _, title in LINES.values()]
    figure.legend(handles, labels, loc="lower center", ncols=3, fontsize=8, frameon=False)
    figure.tight_layout(rect=(0, 0.14, 1, 1))
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=110)
    plt.close(figure)
