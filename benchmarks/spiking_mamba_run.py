"""SpikingMamba against the dense Mamba-2: converted alone, then distilled at equal budget; quality, rates, energy.

    python benchmarks/spiking_mamba_run.py --data DIR --cache DIR --out benchmarks/results/spiking-mamba.json
        [--model FOLDER] [--only converted range …] [--steps 1000] [--long-steps 4000] [--save DIR]

Protocol: perplexity on the first 100,000 tokens of books/valid in windows of 512; BLiMP pair by pair
(spiking_mamba_blimp.py); thresholds from 128 windows of the training text; distilled on that text with the dense model
as the teacher, cross entropy unused. Rows are appended as they are finished, and what is in the file already is not
run again. Several processes, one file each, may share a GPU; spiking_mamba_tables.py reads all of them.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import reference_data as text
import spiking_mamba_blimp as blimp
import spiking_mamba_scan
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

import spikeform
from spikeform import pretrained
from spikeform.spikes.trace import Firing, Product, observe
from spikeform.training import TrainOptions

WINDOW, CALIBRATION_WINDOWS, COUNTED = 512, 128, 8192
RANGES = (1, 2, 4, 8)
DISTILLED: dict[str, Any] = {
    "window": WINDOW,
    "batch_size": 32,
    "learning_rate": 6e-4,
    "threshold_learning_rate": 1e-3,
    "thresholds_first": 0.05,
    "weight_decay": 0.1,
    "schedule": "cosine",
    "freeze": ("*embeddings*",),  # the tied head with them, as the paper's code has it
    "ce": 0.0,
    "distil": 1.0,
    "hidden": 1.0,
    "compensation": "grad",
}


@dataclass(frozen=True)
class Point:
    """One row.

    Args:
        group: What ``--only`` names.
        config: Options of SpikingMamba; None: the dense model.
        training: Changes to ``DISTILLED``; None: converted alone.
        long: Trained with ``--long-steps``.
    """

    group: str
    config: dict[str, Any] | None
    training: dict[str, Any] | None = field(default=None)
    long: bool = False


def points() -> dict[str, Point]:
    """All of them, by name, the most wanted first."""
    found = {"dense": Point("dense", None), "d4-long": Point("long", {"steps": 4}, {}, long=True)}
    kinds = [(spikes, steps) for spikes in ("signed", "unsigned") for steps in RANGES] + [("binary", 1)]
    for per_channel in (False, True):
        for spikes, steps in kinds:
            name = f"converted-{spikes}-{steps}{'-channel' if per_channel else ''}"
            found[name] = Point("converted", {"steps": steps, "spikes": spikes, "per_channel": per_channel})
    found |= {f"d{steps}": Point("range", {"steps": steps}, {}) for steps in RANGES}
    for mode in ("none", "mix", "add"):
        found[f"d4-{mode}"] = Point("compensation", {"steps": 4}, {"compensation": mode})
    found |= {
        "d4-unsigned": Point("neurons", {"steps": 4, "spikes": "unsigned"}, {}),
        "d1-binary": Point("neurons", {"steps": 1, "spikes": "binary"}, {}),
        "d4-channel": Point("neurons", {"steps": 4, "per_channel": True}, {}),
        "d4-one": Point("neurons", {"steps": 4, "threshold": 1.0}, {"threshold_learning_rate": 0.0}),
        "d4-logits": Point("losses", {"steps": 4}, {"hidden": 0.0}),
        "d4-reverse": Point("losses", {"steps": 4}, {"reverse": 0.5}),
        "d4-text": Point("losses", {"steps": 4}, {"ce": 1.0, "distil": 0.0, "hidden": 0.0}),
    }
    return found


def folder_of(model: str) -> Path:
    """A folder as it is, or that of an embedded model."""
    return Path(model) if Path(model).is_dir() else pretrained.path(model)


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
        named = {"all": sum(self.sums.values(), torch.zeros(4, dtype=torch.float64)), **self.sums}
        return {
            site: dict(zip(("spikes", "density", "beyond"), (float(s / sums[0]) for s in sums[1:]), strict=True))
            for site, sums in ((site, sums.cpu()) for site, sums in named.items())
        }


class Bench:
    """The dense model, the texts, and what every row is held against."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        data = text.data_folder(arguments.data)
        self.arguments, self.folder = arguments, folder_of(arguments.model)
        self.device = arguments.device
        self.tokenizer = AutoTokenizer.from_pretrained(self.folder)
        stream = text.encode_training(data, arguments.cache, len(self.tokenizer))
        self.stream = torch.from_numpy(stream.astype("int64"))
        held, _ = text.encode_held_out(data, self.tokenizer, "books")
        self.held = torch.from_numpy(held[: arguments.tokens])
        self.calibration = self.stream[: arguments.calibration * WINDOW].view(-1, WINDOW)
        self.pairs = blimp.Pairs(data / "blimp.tar.xz", self.tokenizer, arguments.blimp)
        self.dense = self.fresh()
        self.dense_answers = blimp.answers(self.dense, self.pairs)

    def fresh(self) -> Any:
        """The dense model, loaded again."""
        return AutoModelForCausalLM.from_pretrained(self.folder).to(self.device).eval()

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
        ids = self.held[: min(COUNTED, len(self.held) // WINDOW * WINDOW)].view(-1, WINDOW).to(self.device)
        rates = Rates()
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

    def run(self, name: str, point: Point, seed: int) -> dict[str, Any]:
        """One row."""
        started = time.monotonic()
        row: dict[str, Any] = {"point": name, "group": point.group, "seed": seed, "config": point.config}
        model = self.dense
        if point.config is not None:
            model = spikeform.convert(self.fresh(), spikeform.SpikingMamba(**point.config), self.calibration)
        row["seconds"] = {"convert": round(time.monotonic() - started, 1)}
        if point.training is not None:
            steps = self.arguments.long_steps if point.long else self.arguments.steps
            row |= self.distil(model, {**DISTILLED, **point.training, "steps": steps, "seed": seed})
            row["seconds"]["train"] = round(time.monotonic() - started - row["seconds"]["convert"], 1)
        begin = time.monotonic()
        row |= self.quality(model)
        if model is not self.dense:
            row |= self.cost(model)
        row["seconds"]["measure"] = round(time.monotonic() - begin, 1)
        if self.arguments.save is not None and name in self.arguments.saved:
            spikeform.save(model, self.arguments.save / f"{name}{f'-seed{seed}' if seed else ''}", self.tokenizer)
        return row

    def distil(self, model: Any, options: dict[str, Any]) -> dict[str, Any]:
        """Train in place; returns the options and the curve."""
        options |= {"bf16": self.device == "cuda", "save_every": options["steps"]}
        options |= {"batch_size": self.arguments.batch_size or options["batch_size"]}
        chosen = TrainOptions(**options, evaluate_every=max(1, options["steps"] // 4))
        teacher = self.fresh() if chosen.distil or chosen.hidden else None
        spikeform.train(
            model, self.stream, self.tokenizer, chosen, valid=self.held[: 50 * WINDOW], teacher=teacher, progress=told
        )
        done: Any = model.spikeform_report.history[-1]
        return {"training": chosen.to_dict(), "curve": done["curve"]}


def told(point: dict[str, Any]) -> None:
    """Show a point of the curve that has a held-out loss."""
    if "perplexity" in point:
        print("   ", {k: round(v, 4) for k, v in point.items() if isinstance(v, int | float)}, flush=True)


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
    known = points()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", default="mamba2", help="an embedded model, or a folder")
    parser.add_argument("--data", type=Path, help="default: $SPIKEFORM_DATA, else ../shared/data")
    parser.add_argument("--cache", type=Path, required=True, help="encoded training text, as of train_reference.py")
    parser.add_argument("--only", nargs="+", choices=[*dict.fromkeys(p.group for p in known.values()), *known])
    parser.add_argument("--steps", type=int, default=1000, help="of every distillation but the long one")
    parser.add_argument("--long-steps", type=int, default=4000)
    parser.add_argument("--batch-size", type=int, help="sequences a step; default: 32")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of distillations")
    parser.add_argument("--tokens", type=int, default=100_000, help="of the held-out text")
    parser.add_argument("--calibration", type=int, default=CALIBRATION_WINDOWS, help="windows")
    parser.add_argument("--blimp", type=int, help="pairs of each paradigm; default: all")
    parser.add_argument("--save", type=Path, help="folder for checkpoints of --saved")
    parser.add_argument("--saved", nargs="*", default=["d4", "d4-long"])
    parser.add_argument("--minutes", type=float, default=600.0, help="take up no new row after this")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args(arguments)


def main(arguments: argparse.Namespace) -> None:
    """Run what is missing from the file."""
    begin = time.monotonic()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    spiking_mamba_scan.install()
    bench = Bench(arguments)
    result: dict[str, Any] = {"rows": []}
    if arguments.out.exists():
        result = json.loads(arguments.out.read_text(encoding="utf-8"))
        if result["protocol"] != protocol(arguments):
            raise SystemExit(f"{arguments.out} is of another protocol: {result['protocol']}; give another --out")
    hardware = torch.cuda.get_device_name() if bench.device == "cuda" else f"CPU {platform.machine()}"
    result |= {
        "protocol": protocol(arguments),
        "hardware": hardware,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }
    have = {(row["point"], row["seed"]) for row in result["rows"]}
    print(f"texts and dense model after {time.monotonic() - begin:.0f} s", flush=True)
    for seed in arguments.seeds:
        for name, point in points().items():
            wanted = arguments.only is None or {name, point.group} & set(arguments.only)
            drawn = seed == arguments.seeds[0] or point.training is not None  # a conversion draws nothing
            if not wanted or not drawn or (name, seed) in have:
                continue
            if time.monotonic() - begin > 60 * arguments.minutes:
                print(f"time is up: {name} and what follows are missing", flush=True)
                return
            row = bench.run(name, point, seed)
            result["rows"].append(row)
            partial = arguments.out.with_suffix(".partial")
            partial.write_text(json.dumps(result, indent=1), encoding="utf-8")
            partial.replace(arguments.out)
            print(f"{summary(row)}; {time.monotonic() - begin:.0f} s in all", flush=True)


if __name__ == "__main__":
    main(parse())
