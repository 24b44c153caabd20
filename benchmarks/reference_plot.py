"""Draws the loss curves of the reference models from benchmarks/results/reference-*.json.

python benchmarks/reference_plot.py [RESULTS] [PNG]
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from reference_models import NAMES

ABREAST = 3


def draw(results: Path, target: Path) -> None:
    """Draws held-out and training loss of every model over the tokens seen, stage after stage."""
    names = [name for name in NAMES if (results / f"reference-{name}.json").is_file()]
    rows = -(-len(names) // ABREAST)
    figure, grid = plt.subplots(rows, ABREAST, figsize=(3.6 * ABREAST, 3.2 * rows), sharey=True, squeeze=False)
    axes = list(grid.flat)
    for axis in axes[len(names) :]:
        axis.set_visible(False)
    for axis, name in zip(axes, names, strict=False):
        report = json.loads((results / f"reference-{name}.json").read_text(encoding="utf-8"))
        before = 0.0
        for index, stage in enumerate(report["stages"]):
            tokens = [before + point["tokens"] / 1e6 for point in stage["curve"]]
            for key, label, style in (
                ("valid_loss", "held-out (books)", "-"),
                ("train_loss", "training", ":"),
            ):
                pairs = [(t, p[key]) for t, p in zip(tokens, stage["curve"], strict=True) if p[key]]
                color = "tab:blue" if key == "valid_loss" else "tab:gray"
                axis.plot(*zip(*pairs, strict=True), style, color=color, label=None if index else label)
            if index:
                axis.axvline(before, color="tab:orange", linewidth=0.8, label="cool-down from the best")
            before = tokens[-1]
        saved = report["held_out"]["books"]["nats_per_token"]
        axis.axhline(saved, color="tab:green", linewidth=0.8, label=f"saved weights: {saved:.3f}")
        axis.set(title=name, xlabel="million tokens", ylim=(3.0, 5.0))
        axis.legend(fontsize=7)
    for axis in grid[:, 0]:
        axis.set_ylabel("nats per token")
    title = "llama has a vocabulary of its own (8192; the others 3072): compare bits per byte, not nats"
    figure.suptitle(title, fontsize=9)
    figure.tight_layout()
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=110)


if __name__ == "__main__":
    here = Path(__file__).resolve().parent
    arguments = [Path(argument) for argument in sys.argv[1:]]
    draw(
        arguments[0] if arguments else here / "results",
        arguments[1] if len(arguments) > 1 else here.parent / "docs" / "figures" / "reference-loss.png",
    )
