"""SpikingMamba against the dense Mamba-2: converted alone, then distilled at equal budget; quality, rates, energy.

    python benchmarks/spiking_mamba_run.py --data DIR --cache DIR --out benchmarks/results/spiking-mamba.json
        [--model FOLDER] [--only converted range …] [--steps 1000] [--long-steps 10000] [--save DIR] [--no-compile]

Protocol: perplexity on the first 100,000 tokens of books/valid in windows of 512; BLiMP pair by pair
(spiking_mamba_blimp.py); thresholds from 128 windows of the training text; distilled on that text with the dense model
as the teacher, cross entropy unused. Rows are appended as they are finished, and what is in the file already is not
run again. Several processes, one file each, may share a GPU; spiking_mamba_tables.py reads all of them.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import spiking_mamba_blimp as blimp
import spiking_mamba_scan
import torch
from method_runs import COUNTED, WINDOW, Bench, Point, folder_of, parser, run_missing

import spikeform
from spikeform.spikes.trace import Firing, Product, observe

RANGES = (1, 2, 4, 8)
DISTILLED: dict[str, Any] = {
    "window": WINDOW,
    "batch_size": 32,
    "learning_rate": 6e-4,
    "threshold_learning_rate": 1e-3,
    "weight_decay": 0.1,
    "schedule": "cosine",
    "freeze": ("*embeddings*",),  # the tied head with them, as the paper's code has it
    "ce": 0.0,
    "distil": 1.0,
    "hidden": 1.0,
    "compensation": "grad",
}
# As many tokens a step as the dense model was trained with; and short trials were better without compensation.
LONG = {"batch_size": 64, "learning_rate": 1e-3, "compensation": "none"}


def points() -> dict[str, Point]:
    """All of them, by name, the most wanted first."""
    rotated = {"steps": 4, "rotate": True}
    found = {
        "dense": Point("dense", None),
        "d4-long": Point("long", {"steps": 4}, LONG, length=1),
        "d4-sampled-long": Point("long", {"steps": 4}, LONG, length=1, sampled=True),
        "d4-rotated-long": Point("long", rotated, LONG, length=1),
    }
    kinds: list[tuple[str, dict[str, Any]]] = [("rotated", {"rotate": True})]
    kinds += [(spikes, {"spikes": spikes}) for spikes in ("signed", "unsigned")]
    each = [(kind, steps, how) for kind, how in kinds for steps in RANGES] + [("binary", 1, {"spikes": "binary"})]
    for per_channel in (False, True):
        for kind, steps, how in each:
            name = f"converted-{kind}-{steps}{'-channel' if per_channel else ''}"
            found[name] = Point("converted", {"steps": steps, "per_channel": per_channel, **how})
    found |= {f"d{steps}": Point("range", {"steps": steps}, {}) for steps in RANGES}
    found["d4-none"] = Point("compensation", {"steps": 4}, {"compensation": "none"})
    for mode in ("mix", "add"):  # their weight moves, and each kind of number would be compiled anew
        found[f"d4-{mode}"] = Point("compensation", {"steps": 4}, {"compensation": mode, "compile": False})
    found |= {
        "d4-unsigned": Point("neurons", {"steps": 4, "spikes": "unsigned"}, {}),
        "d1-binary": Point("neurons", {"steps": 1, "spikes": "binary"}, {}),
        "d4-rotated": Point("rotated", rotated, {}),
        "d2-rotated": Point("rotated", rotated | {"steps": 2}, {}),
        "d1-rotated": Point("rotated", rotated | {"steps": 1}, {}),
        "d4-channel": Point("neurons", {"steps": 4, "per_channel": True}, {}),
        "d4-one": Point("neurons", {"steps": 4, "threshold": 1.0}, {"threshold_learning_rate": 0.0}),
        "d4-logits": Point("losses", {"steps": 4}, {"hidden": 0.0}),
        "d4-reverse": Point("losses", {"steps": 4}, {"reverse": 0.5}),
        "d4-both": Point("losses", {"steps": 4}, {"ce": 0.5}),
        "d4-text": Point("losses", {"steps": 4}, {"ce": 1.0, "distil": 0.0, "hidden": 0.0}),
        "d4-sampled": Point("training", {"steps": 4}, {}, sampled=True),
        "d4-fast": Point("training", {"steps": 4}, {"learning_rate": 2e-3}),
        "d4-free": Point("training", {"steps": 4}, {"freeze": ()}),
    }
    return found


class Rates:
    """An observer: how often each population of neurons fires."""

    def __init__(self) -> None:
        self.sums: dict[str, torch.Tensor] = {}

    def __call__(self, event: Product | Firing) -> None:
        """Add elements, |n|, elements that are not zero, and elements beyond the largest integer."""
        if isinstance(event, Firing):
            n = event.train.codes.abs()
            found = torch.stack([torch.tensor(n.numel(), device=n.device), n.sum(), (n > 0).sum(), event.saturated])
            self.sums[event.site] = self.sums.get(event.site, 0) + found.double()

    def rows(self) -> dict[str, dict[str, float]]:
        """E|n|, the share of neurons that fire at all, and the share beyond the range, by site; "all" for all."""
        named = {site: sums.cpu() for site, sums in self.sums.items()}
        named = {"all": sum(named.values(), torch.zeros(4, dtype=torch.float64)), **named}
        return {
            site: dict(zip(("spikes", "density", "beyond"), (float(s / sums[0]) for s in sums[1:]), strict=True))
            for site, sums in named.items()
        }


class MambaBench(Bench):
    """Perplexity and BLiMP, beside the dense model's."""

    method = spikeform.SpikingMamba

    def __init__(self, arguments: argparse.Namespace, folder: Path) -> None:
        super().__init__(arguments, folder)
        self.pairs = blimp.Pairs(self.data / "blimp.tar.xz", self.tokenizer, arguments.blimp)
        self.dense_answers = blimp.answers(self.dense, self.pairs)

    def options(self, point: Point) -> dict[str, Any]:
        """Distilled."""
        return DISTILLED

    def quality(self, model: Any) -> dict[str, Any]:
        """Perplexity, and for a spiking model its distance from the dense one; BLiMP, and the difference."""
        right = self.dense_answers if model is self.dense else blimp.answers(model, self.pairs)
        found: dict[str, Any] = {"blimp": blimp.accuracy(right, self.pairs)}
        if model is self.dense:
            return found | {"text": spikeform.perplexity(model, self.held, window=WINDOW, batch_size=32).to_dict()}
        near = spikeform.fidelity(model, self.dense, self.held, window=WINDOW, batch_size=32)
        found["blimp"]["less_than_dense"] = blimp.difference(self.dense_answers, right, self.pairs)
        return found | {"text": near.to_dict()}

    def cost(self, model: Any) -> dict[str, Any]:
        """Rates of every site, operations and ESTIMATED energy."""
        ids, rates = self.counted(), Rates()
        with torch.no_grad(), observe(rates):
            for batch in ids.split(4):
                model(input_ids=batch, use_cache=False)
        report = spikeform.energy(model, ids, batch_size=4)
        ratios = {
            name: {"vs_dense": e["ratio_vs_dense"], "vs_dense_with_memory": e["with_memory"]["ratio_vs_dense"]}
            for name, e in report.estimates.items()
        }
        energy = {"estimated": ratios, "accountings": report.accountings}
        energy |= {"spikes_per_token": report.spikes_per_token, "accumulations_per_mac": report.accumulations_per_mac}
        return {"rates": rates.rows(), "energy": energy}


def protocol(arguments: argparse.Namespace) -> str:
    """What the numbers are."""
    each = f"first {arguments.blimp} pairs of each" if arguments.blimp else "all pairs"
    return (
        f"books/valid, first {arguments.tokens} tokens, windows of {WINDOW} side by side; BLiMP, 34 paradigms, {each}; "
        f"calibrated on {arguments.calibration * WINDOW} tokens of the training text, windows of {WINDOW}; rates and "
        f"ESTIMATED energy on the first {COUNTED} tokens, prefill; measured in fp32 without TF32"
    )


def summary(row: dict[str, Any]) -> str:
    """One line."""
    said = f"{row['point']:26} seed {row['seed']} perplexity {row['text']['perplexity']:9.3f}"
    if "perplexity_ratio" in row["text"]:
        said += f" ratio {row['text']['perplexity_ratio']:.4f} E|n| {row['rates']['all']['spikes']:.3f}"
    return f"{said} BLiMP {row['blimp']['acc']:.4f} seconds {row['seconds']}"


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line's arguments."""
    found = parser(__doc__, points(), ["d4", "d4-long", "d4-sampled-long", "d4-rotated-long"])
    found.add_argument("--model", default="mamba2", help="an embedded model, or a folder")
    found.add_argument("--blimp", type=int, help="pairs of each paradigm; default: all")
    return found.parse_args(arguments)


def main(arguments: argparse.Namespace) -> None:
    """Run what is missing from the file."""
    spiking_mamba_scan.install()

    def bench_of(_: str | None) -> MambaBench:
        return MambaBench(arguments, folder_of(arguments.model))

    run_missing(arguments, points(), protocol(arguments), bench_of, summary)


if __name__ == "__main__":
    main(parse())
