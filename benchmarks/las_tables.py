"""Writes what benchmarks/results/las-*.json hold as tables and a figure. Nothing is measured here.

    python benchmarks/las_tables.py

Output: docs/las_curves.md, docs/figures/las-curve.png, and the block of README.md between its two markers. A
cell that no file holds is "—". Files of another protocol get tables of their own, never a shared one.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import readme_block
from las_figure import draw

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- results: begin (benchmarks/las_tables.py) -->", "<!-- results: end -->"
STEPS = range(16, 1, -1)
FP32 = "45nm-fp32"
# The main protocol again with later code; fewer tokens, for configurations that the main run did not reach.
SECONDARY = ("-cpu.json", "-short.json")

# Options of one curve -> its title, in the order of the tables.
OPTIONS: dict[tuple, str] = {
    (): "radix-2, nearest",
    (("rounding", "floor"),): "radix-2, floor",
    (("per_channel", True),): "radix-2, nearest, thresholds per channel",
    (("outlier", False),): "radix-2, nearest, one threshold (MT)",
    (("coding", "multi_threshold"), ("levels", 2)): "multi-threshold 2, nearest",
    (("coding", "multi_threshold"), ("levels", 2), ("rounding", "floor")): "multi-threshold 2, floor",
    (("coding", "multi_threshold"), ("levels", 4)): "multi-threshold 4, nearest",
    (("coding", "multi_threshold"), ("levels", 4), ("rounding", "floor")): "multi-threshold 4, floor",
}
NEAREST, FLOOR, PER_CHANNEL, SINGLE, MT2, MT2_FLOOR, MT4, MT4_FLOOR = OPTIONS
ENERGY = ("vs_dense", "vs_quantised", "vs_dense_with_memory", "vs_quantised_with_memory")


@dataclass
class Result:
    """One file of measurements: its protocol, and its rows by option and steps."""

    file: str
    data: dict[str, Any]
    rows: dict[tuple, dict[int, dict]] = field(default_factory=dict)

    @property
    def model(self) -> str:
        """Name of the model, a twin's with its suffix."""
        return self.data["model"].removeprefix("pretrained:")

    def row(self, option: tuple, steps: int) -> dict | None:
        """A measured row, or None."""
        return self.rows.get(option, {}).get(steps)

    def title(self) -> str:
        """Model and hardware."""
        return f"{self.model}, {self.data['hardware']}"


def read(folder: Path) -> list[Result]:
    """All files, models before their twins, the longer measurement first.

    Raises:
        KeyError: A row has options that no table here shows.
    """
    found = []
    for path in folder.glob("las-*.json"):
        result = Result(path.name, json.loads(path.read_text(encoding="utf-8")))
        for row in result.data["rows"]:
            options = tuple(sorted((k, v) for k, v in row["config"].items() if k != "steps"))
            if options not in OPTIONS:
                raise KeyError(f"{path.name}: no table for {dict(options)}")
            result.rows.setdefault(options, {})[row["config"]["steps"]] = row
        if result.rows:
            found.append(result)
    order = ("llama", "gpt2", "opt")

    def key(result: Result) -> tuple:
        base = result.model.removesuffix("-twin")
        rank = order.index(base) if base in order else len(order)
        return result.file.endswith(SECONDARY), result.model != base, rank, base, result.file

    return sorted(found, key=key)


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> list[str]:
    """Markdown lines."""
    head = list(head)
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    return [*lines, *(f"| {' | '.join(row)} |" for row in rows), ""]


def ratio(row: dict) -> str:
    """The perplexity ratio, with as many digits as its standard error allows."""
    value, error = row["perplexity_ratio"], row["ratio_stderr"]
    return f"{value:.6f}" if error < 5e-6 else f"{value:.5f}" if error < 5e-5 else f"{value:.4f}"


def cell(row: dict | None, show: Callable[[dict], str]) -> str:
    """One value, or a dash."""
    return "—" if row is None else show(row)


def energies(counts: dict, model: str = FP32) -> list[str]:
    """The four ESTIMATED ratios of one row."""
    return [f"{counts['estimated'][model][name]:.2f}" for name in ENERGY]


FIDELITY_HEAD = ["T", "perplexity ratio", "± s.e.", "KL, nats", "top-1", "spikes/element"]
ENERGY_HEAD = ["est. vs dense", "est. vs quantised", "est. vs dense, memory", "est. vs quantised, memory"]


def option_tables(result: Result, option: tuple) -> list[str]:
    """The curve of one option with spikes and energy; for radix-2, its signed-digit unrolling too."""
    rows = []
    for steps in STEPS:
        r = result.row(option, steps)
        if r is None:
            rows.append([str(steps), *["—"] * 9])
            continue
        found = [ratio(r), f"{r['ratio_stderr']:.0e}", f"{r['kl']:.1e}", f"{r['top1_agreement']:.4f}"]
        rows.append([str(steps), *found, f"{r['spikes']['spikes_per_element']:.2f}", *energies(r["spikes"])])
    lines = [f"### {result.model}: {OPTIONS[option]}", "", *table([*FIDELITY_HEAD, *ENERGY_HEAD], rows)]
    signed = [(t, r) for t in STEPS if (r := result.row(option, t)) is not None and "spikes_signed_digit" in r]
    if signed:
        rows = []
        for steps, r in signed:
            few, many = r["spikes_signed_digit"], r["spikes"]
            saved = 1 - few["spikes_per_element"] / many["spikes_per_element"]
            rows.append([str(steps), f"{few['spikes_per_element']:.2f}", f"{saved:.1%}", *energies(few)])
        lines += ["The same codes as signed digits (same perplexity, KL and top-1; one step more):", ""]
        lines += table(["T", "spikes/element", "fewer spikes", *ENERGY_HEAD], rows)
    return lines


def overview(result: Result) -> list[str]:
    """Perplexity ratio over T, one column an option."""
    options = [o for o in OPTIONS if o in result.rows]
    rows = [[str(t), *(cell(result.row(o, t), ratio) for o in options)] for t in STEPS]
    return table(["T", *(OPTIONS[o] for o in options)], rows)


def protocol(result: Result) -> list[str]:
    """What the numbers of one file were measured on."""
    first, versions = result.data["rows"][0], result.data["versions"]
    lines = [
        f"Protocol: {result.data['protocol']}.",
        f"Hardware: {result.data['hardware']}, float32 without TF32, torch {versions['torch']}, "
        f"transformers {versions['transformers']}.",
        f"Dense perplexity {first['dense_perplexity']:.3f} over {first['tokens']:,} scored tokens "
        f"({first['windows']} windows of {first['window']}).",
        f"Source: `benchmarks/results/{result.file}`, {sum(map(len, result.rows.values()))} configurations.",
    ]
    if "code" in result.data:
        lines.append(f"{result.data['code']}.")
    if result.data.get("unfinished"):
        lines.append("The run ended at its time limit; missing cells are —.")
    return [*[line + "\\" for line in lines[:-1]], lines[-1], ""]


def counted(results: list[Result]) -> list[tuple[Result, tuple, int, str, dict]]:
    """Every configuration whose spikes were counted: file, option, steps, coding of the spikes, counts."""
    return [
        (result, option, steps, name, row[key])
        for result in results
        for option, curve in result.rows.items()
        for steps, row in curve.items()
        for key, name in (("spikes", "as coded"), ("spikes_signed_digit", "signed digits"))
        if key in row
    ]


def standing(results: list[Result]) -> list[str]:
    """How often the spiking network is estimated cheaper than its rivals, by cost model; and its best."""
    found, rows = counted(results), []
    for cost in (FP32, "45nm-fp16", "45nm-int8"):
        cells = []
        for key in ENERGY:
            values = [counts["estimated"][cost][key] for *_, counts in found]
            cells.append(f"{sum(v < 1 for v in values)} of {len(values)}, best {min(values):.2f}")
        rows.append([cost, *cells])
    head = ["ESTIMATED cheaper than", "dense", "quantised", "dense, memory counted", "quantised, memory counted"]
    return table(head, rows)


def remarks(results: list[Result]) -> list[str]:
    """What stands out, computed from the rows."""
    lines = ["## What stands out", "", "Over all rows below, most of which no one would run (few steps):", ""]
    lines += standing(results)
    wins = [
        (result.row(option, t)["perplexity_ratio"], result, option, t, name, counts["estimated"][FP32]["vs_quantised"])
        for result, option, t, name, counts in counted(results)
        if counts["estimated"][FP32]["vs_quantised"] < 1
    ]
    if wins:
        best, result, option, t, name, value = min(wins, key=lambda win: abs(win[0] - 1))
        lines.append(
            f"- fp32, operations alone, below the quantised network: the one closest to its dense model has a "
            f"perplexity ratio of {best:.4f} ({result.model}, {OPTIONS[option]}, T={t}, {name}: {value:.2f}). The more "
            "faithful ones all cost more than the quantised network."
        )
    for part in (_floor, _turns, _twin, _levels, _signed):
        for result in results:
            lines += part(result)
    return [*lines, ""]


def _floor(result: Result) -> list[str]:
    """Where floor's ratio lies below 1: no gain."""
    low, worse = [], True
    for floor, nearest in ((FLOOR, NEAREST), (MT2_FLOOR, MT2), (MT4_FLOOR, MT4)):
        for t in STEPS:
            r, other = result.row(floor, t), result.row(nearest, t)
            if r and other and r["perplexity_ratio"] + 2 * r["ratio_stderr"] < 1 and t <= 10:
                low.append(f"{OPTIONS[floor]} T={t} ({r['perplexity_ratio']:.4f})")
                worse &= r["kl"] > other["kl"] and r["top1_agreement"] < other["top1_agreement"]
    if not low:
        return []
    end = (
        "In each of them KL and top-1 are worse than nearest's at the same T"
        if worse
        else "KL and top-1 say how far each is from the dense model"
    )
    return [
        f"- **{result.model}: a ratio below 1 is no gain**: {', '.join(low)}. {end}: a biased error happens to suit "
        "this text. The aim is to equal the dense model."
    ]


def _turns(result: Result) -> list[str]:
    """Where one step more made it worse."""
    found = []
    for option, curve in result.rows.items():
        for t in sorted(curve):
            before = curve.get(t - 1)
            if before is not None and curve[t]["kl"] > before["kl"]:
                change = f"{before['kl']:.2g} to {curve[t]['kl']:.2g}"
                found.append(f"{OPTIONS[option]}, T={t - 1} to {t}: KL {change}")
    return [f"- {result.model}: one step more is worse at {'; '.join(found)}."] if found else []


def _twin(result: Result) -> list[str]:
    """What thresholds per channel are worth on an outlier twin."""
    plain, folded = result.row(NEAREST, 8), result.row(PER_CHANNEL, 8)
    if not result.model.endswith("-twin") or plain is None or folded is None:
        return []
    return [
        f"- {result.model}, T=8: {ratio(plain)} with one threshold pair a site, {ratio(folded)} with thresholds per "
        f"channel. Spikes/element {plain['spikes']['spikes_per_element']:.2f} and "
        f"{folded['spikes']['spikes_per_element']:.2f}."
    ]


def _levels(result: Result) -> list[str]:
    """Multi-threshold coding beside radix-2, at one T."""
    for t in (8, 12, 16):
        plain, levels = result.row(NEAREST, t), result.row(MT2, t)
        if plain and levels:
            costs = [x["spikes"]["estimated"][FP32]["vs_dense"] for x in (levels, plain)]
            dearer = costs[0] >= costs[1]
            why = ": fewer spikes, yet not cheaper, as a spike of amplitude 3 is two additions" if dearer else ""
            return [
                f"- {result.title()}, T={t}: two sub-levels a step send {levels['spikes']['spikes_per_element']:.2f} "
                f"spikes/element, radix-2 {plain['spikes']['spikes_per_element']:.2f}; KL {levels['kl']:.1e} and "
                f"{plain['kl']:.1e}; estimated fp32 operations over dense {costs[0]:.2f} and {costs[1]:.2f}{why}."
            ]
    return []


def _signed(result: Result) -> list[str]:
    """What signed digits save, at T = 16 and 8."""
    parts = []
    for t in (16, 8):
        r = result.row(NEAREST, t)
        if r and "spikes_signed_digit" in r and not result.model.endswith("-twin"):
            few, many = r["spikes_signed_digit"], r["spikes"]
            saved = 1 - few["spikes_per_element"] / many["spikes_per_element"]
            parts.append(f"{saved:.1%} fewer spikes at T={t}")
    return [f"- {result.title()}: signed digits send {', '.join(parts)} (equal codes)."] if parts else []


INTRO = """# LAS: the whole curve

Generated by `python benchmarks/las_tables.py` from `benchmarks/results/las-*.json`; do not edit. Measured by
`benchmarks/las_curve.py`.

Everything spikes in each row: linear layers, both products of attention, softmax, norms, activations and gated products
(output head and embedding stay real). HG neurons are the fixed-point ones. Thresholds: least error, margin 2.

- **perplexity ratio**: spiking over dense on the same windows; ± is its standard error from the windows' paired
  differences. **KL**: mean KL(dense ‖ spiking), nats a token. **top-1**: share of tokens with the same likeliest next
  token. Read all three ([evaluation.md](evaluation.md)).
- **spikes/element**: mean over all neurons that fired, HG neurons included. Counted, exact.
- **est.**: ESTIMATED energy over that of the rival; below 1 the spiking network is cheaper. 45 nm, fp32
  ([energy.md](energy.md)). *vs dense*: the dense fp32 network. *vs quantised*: the network with activations of as many
  levels. *memory*: operations and memory traffic. Without that word: operations alone.
- **—**: not measured.
"""


def curves(results: list[Result]) -> str:
    """The text of docs/las_curves.md."""
    lines = [INTRO, "![perplexity ratio and KL over T](figures/las-curve.png)", ""]
    lines += remarks(results)
    for result in results:
        lines += [f"## {result.title()}", "", *protocol(result), "Perplexity ratio:", "", *overview(result)]
        for option in OPTIONS:
            if option in result.rows:
                lines += option_tables(result, option)
    return "\n".join(lines).rstrip() + "\n"


def readme(results: list[Result]) -> str:
    """The two tables of README.md: fidelity, and estimated energy."""
    full = [r for r in results if not r.file.endswith(SECONDARY)]
    again = {r.model: r for r in results if r.file.endswith(SECONDARY[0])}
    rows = []
    for result in full:
        twin = result.model.endswith("-twin")
        for steps in (16, 12, 8):
            for option in (NEAREST, PER_CHANNEL) if twin and steps == 8 else (NEAREST,):
                r = result.row(option, steps)
                if r is None:
                    rows.append([result.model, str(steps), *["—"] * 8])
                    continue
                second = again[result.model].row(option, steps) if result.model in again else None
                signed = r["spikes_signed_digit"]["spikes_per_element"]
                rows.append(
                    [
                        result.model.replace("-twin", ", outlier twin"),
                        str(steps),
                        "per channel" if option else "per site",
                        f"{ratio(r)} ± {r['ratio_stderr']:.0e}",
                        f"{r['top1_agreement']:.2%}",
                        f"{r['kl']:.1e}",
                        f"{r['spikes']['spikes_per_element']:.2f}",
                        f"{signed:.2f}",
                        cell(second, ratio),
                        cell(second, lambda row: f"{row['top1_agreement']:.2%}"),
                    ]
                )
    head = ["model", "T", "thresholds", "perplexity ratio", "top-1", "KL, nats/token"]
    lines = table([*head, "spikes/element, radix-2", "signed-digit", "CPU: ratio", "CPU: top-1"], rows)
    lines += [result_line(full), ""]
    codes = {r.data["code"] for r in full if "code" in r.data} | {r.data["code"] for r in again.values()}
    lines += [*(f"- {code}" for code in sorted(codes)), ""]
    rows = []
    for result in full:
        if result.model.endswith("-twin"):
            continue
        for steps in (16, 8):
            r = result.row(NEAREST, steps)
            for coding, key in (("radix-2", "spikes"), ("signed-digit", "spikes_signed_digit")):
                rows.append([result.model, str(steps), coding, *(energies(r[key]) if r else ["—"] * 4)])
    head = ["model", "T", "coding", "operations vs dense", "vs quantised", "with memory vs dense", "vs quantised"]
    return "\n".join(
        [
            *lines,
            "ESTIMATED energy over the rival's, 45 nm fp32; below 1 the spiking network costs less:",
            "",
            *table(head, rows),
            "All measured configurations (T = 2 to 16, every coding and model), every cost model:",
            "",
            *standing(full),
        ]
    ).rstrip()


def result_line(results: list[Result]) -> str:
    """Protocol and hardware of the README's table, which must be one and the same for all rows."""
    protocols = {(r.data["protocol"], r.data["hardware"]) for r in results}
    if len(protocols) != 1:
        raise ValueError(f"the README's table mixes protocols: {protocols}")
    text, hardware = protocols.pop()
    first = results[0].data["rows"][0]
    return (
        f"Protocol: {text}. {first['tokens']:,} tokens are scored. Hardware: {hardware}, float32 without TF32. "
        "± is the standard error of the ratio."
    )


def main() -> None:
    """Reads every file and writes the three outputs."""
    results = read(ROOT / "benchmarks" / "results")
    (ROOT / "docs" / "las_curves.md").write_text(curves(results), encoding="utf-8")
    draw(results, OPTIONS, ROOT / "docs" / "figures" / "las-curve.png")
    readme_block.write(BEGIN, END, readme(results))


if __name__ == "__main__":
    main()
