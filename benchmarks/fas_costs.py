"""Tables of what FAS costs, from benchmarks/results/fas-energy.json and if-scan-*.json. Called by fas_tables.py."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

FP32 = "45nm-fp32"
UNTRAINED = "untrained"
# Part of a file's name -> its title, in the order of the tables.
VARIANTS = {
    "qcfs": "QCFS alone (the paper's)",
    "qcfs-distilled": "QCFS, distilled",
    "streams": "streams",
    "streams-distilled": "streams, distilled",
    "streams-distilled-lr": "streams, distilled, twice the rate",
}
ENERGY_NOTE = """- **rows**: MACs of linear layers that ran, a row of spikes counted as a row of MACs, over the dense
  network's. **events**: the same with additions where a linear layer receives spikes. **rate**: spikes over neurons and
  steps. All exact.
- **est.**: ESTIMATED energy over that of one dense pass, 45 nm fp32; *runs* is what really runs, *memory* adds memory
  traffic, *papers* is the papers' convention, which takes every MAC for additions at the mean rate and does not say
  what runs. *quantised*: against one pass with activations of as many levels as T spikes have. Below 1 the spiking
  network would cost less ([energy.md](energy.md)).
- **weights, cache**: bytes that one decoded token moves, and bytes of the cache, over the dense network's."""
UNTRAINED_NOTE = """Rows marked *untrained* are conversions without training, thresholds from the same tokens: their
counts say what the option costs, and their rates are those of a network that is no use yet. The calibrated weights of
llama were not kept; its rows are of the network before stage 2."""
ROWS_BAR, WEIGHTS_BAR = 5.6, 1.5  # at T = 8


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> list[str]:
    """Markdown lines."""
    head = list(head)
    return [f"| {' | '.join(head)} |", "|" + "---|" * len(head), *(f"| {' | '.join(row)} |" for row in rows), ""]


def read(folder: Path, name: str) -> dict[str, Any] | None:
    """One file of results, or None."""
    path = folder / name
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def energy_lines(folder: Path) -> list[str]:
    """The section on operations, spikes and estimated energy."""
    data = read(folder, "fas-energy.json")
    if data is None:
        return []
    rows = []
    for r in data["rows"]:
        streaming, fp32 = r["streaming"], r["estimated"][FP32]
        rows.append(
            [
                r["model"],
                _title(r),
                str(r["steps"]),
                f"{streaming['operations']['rows_ratio']:.3f}",
                f"{streaming['operations']['events_ratio']:.2f}",
                f"{r['spike_rate']:.1%}",
                f"{fp32['operations']['ratio_vs_dense']:.2f}",
                f"{fp32['operations']['ratio_vs_quantised_steps']:.2f}",
                f"{fp32['with_memory']['ratio_vs_dense']:.2f}",
                f"{fp32['with_memory']['ratio_vs_quantised_steps']:.2f}",
                f"{r['estimated_by_papers_convention'][FP32]:.2f}",
                f"{streaming['decoding']['weight_ratio']:.3f}",
                f"{streaming['decoding']['cache_ratio']:.2f}",
            ]
        )
    head = ["model", "network", "T", "rows", "events", "rate", "est. runs", "quantised", "est. memory"]
    head += ["quantised, memory", "est. papers", "weights", "cache"]
    lines = ["## What it costs", "", f"Protocol: {data['protocol']}; torch {data['versions']['torch']}.", ""]
    return [
        *lines,
        ENERGY_NOTE,
        "",
        *table(head, rows),
        UNTRAINED_NOTE,
        "",
        *_bars(data["rows"]),
        *_gated(data["rows"]),
    ]


def _bars(rows: list[dict[str, Any]]) -> list[str]:
    """What was aimed at for networks with neurons in the feed-forward blocks, at T = 8."""
    found = {}
    for r in (r for r in rows if r["steps"] == 8 and not r["variant"].startswith(UNTRAINED)):
        share, weights = r["streaming"]["operations"]["rows_ratio"], r["streaming"]["decoding"]["weight_ratio"]
        rest = f"weights {weights:.2f}, {'met' if weights <= WEIGHTS_BAR else '**missed**'}"
        found[r["model"]] = f"{r['model']}: rows {share:.3f}, {'met' if share <= ROWS_BAR else '**missed**'}; {rest}"
    aims = f"Aimed at for T = 8: rows at most {ROWS_BAR}, weights at most {WEIGHTS_BAR}."
    return [f"{aims} {'. '.join(found.values())}.", ""]


def _title(row: dict[str, Any]) -> str:
    if row["variant"].startswith(UNTRAINED):
        return f"*{UNTRAINED}*{row['variant'].removeprefix(UNTRAINED)}"
    return f"{VARIANTS[row['variant']]}; {'calibrated' if row['granularity'] != 'layer' else 'uncalibrated'}"


def _gated(rows: list[dict[str, Any]]) -> list[str]:
    found = [r for r in rows if r["streaming"]["gated"]["elements"]]
    if not found:
        return []
    shares = {r["steps"]: r["streaming"]["gated"]["zeros"] / r["streaming"]["gated"]["elements"] for r in found}
    said = ", ".join(f"{share:.1%} at T = {steps}" for steps, share in shares.items())
    return [
        "With `gated=activation` no linear layer of llama receives spikes: its down projections receive real values "
        f"that spikes let pass or not, and of those {said} are zero. Their products are counted in full.",
        "",
    ]


def operator_lines(folder: Path) -> list[str]:
    """Perplexity with few-spike operators."""
    data = read(folder, "fas-energy.json")
    if data is None or not data.get("operators"):
        return []
    rows = [
        [
            r["model"],
            VARIANTS[r["variant"]],
            str(r["steps"]),
            str(r["operators"] or "none"),
            f"{r['perplexity']:.2f}",
        ]
        for r in data["operators"]
    ]
    lines = ["## Softmax, norms and attention in spikes", ""]
    lines += [
        f"Few-spike operators put into calibrated networks, no training after. {data['operators_protocol']}; CPU.",
        "",
    ]
    return [*lines, *table(["model", "stage 1", "T", "steps of the operators", "perplexity"], rows)]


def full_lines(folder: Path) -> list[str]:
    """The fully spiking network: trained briefly, so what it costs rather than how good it is."""
    data = read(folder, "fas-full-gpt2-cpu.json")
    if data is None:
        return []
    config, options, found, short = (data[k] for k in ("config", "stage_1", "perplexity", "perplexity_short"))
    options = options["options"]
    rows = [[name, f"{value:.2f}", f"{short[name]:.2f}" if name in short else ""] for name, value in found.items()]
    rows.append([f"with operators of {config['operators']} steps", "", f"{short['with operators']:.2f}"])
    fp32 = {row["ESTIMATED"]: row for row in data["summary"]}
    runs, memory = fp32[f"{FP32}, operations"], fp32[f"{FP32}, with memory"]
    papers = fp32[f"{FP32}, papers' convention (not what runs)"]["vs dense"]
    done = data["streaming"]["operations"]
    return [
        f"## Everything in spikes: {data['model'].removesuffix('-all')}",
        "",
        f"`sites=all` and few-spike operators, T = {config['steps']}: all linear layers of the blocks, softmax, norms "
        f"and both products of attention. Trained on a CPU for {options['steps']} steps of {options['batch_size']} "
        f"windows of {options['window']} tokens (distilled, streams) and calibrated for "
        f"{data['calibration']['coarse_steps']} and {data['calibration']['fine_steps']} steps: far "
        "too little, so this says what such a network costs, not "
        f"how good it can be. {data['protocol']}. {data['hardware']}.",
        "",
        *table(["network", "perplexity", "on fewer tokens"], rows),
        f"ESTIMATED energy, 45 nm fp32, operators counted: operations {runs['vs dense']:.2f} times dense and "
        f"{runs['vs quantised to T']:.2f} times the network quantised to as many levels as T spikes have; with memory "
        f"{memory['vs dense']:.2f} and {memory['vs quantised to T']:.2f}; by the papers' convention {papers:.2f} times "
        f"dense. Rows {done['rows_ratio']:.2f}, events {done['events_ratio']:.2f}, {data['spike_rate']:.0%} of all "
        "slots spike, those of the operators included.",
        "",
    ]


def time_lines(folder: Path) -> list[str]:
    """Times on a CPU."""
    data = read(folder, "fas-energy.json")
    if data is None or not data["times"]:
        return []
    rows = []
    for r in data["times"]:
        for part, name in (("prefill", "prefill, 256 tokens"), ("token", "one token more")):
            fast, usual = r["fastest"], r["median"]
            seconds = [f"{1000 * fast[network][part]:.1f}" for network in ("dense", "spiking")]
            ratios = [f"{fast['ratio'][part]:.2f}", f"{usual['ratio'][part]:.2f}"]
            rows.append([r["model"], str(r["steps"]), name, *seconds, *ratios])
    lines = [
        "## Time",
        "",
        f"{data['hardware']}, {data['times_protocol']}. A simulation: no spike is skipped. "
        "Another process ran on the second of two cores.",
        "",
    ]
    head = ["model", "T", "", "dense, ms", "spiking, ms", "ratio", "ratio of the medians"]
    return [*lines, *table(head, rows)]


def scan_lines(folder: Path) -> list[str]:
    """The neuron's kernel, and how far its rate is from QCFS."""
    data = read(folder, "if-scan-h200.json")
    if data is None:
        return []
    rows = []
    for r in data["timings"]:
        us = r["us"]
        shape = f"{r['B']}·{r['T']} × {r['L']} × {r['C']}"
        times = [us[k] for k in ("copy", "forward", "loop_forward", "forward_backward", "graph_forward_backward")]
        gain = [f"{us['loop_forward'] / us['forward']:.1f}"]
        gain += [f"{us['graph_forward_backward'] / us['forward_backward']:.1f}"]
        rows.append([shape, r["dtype"], *(f"{t:.0f}" for t in times), *gain])
    head = ["B·T × L × C", "", "copy, µs", "forward", "loop", "with backward", "graph", "loop / forward"]
    lines = ["## The neuron's kernel", ""]
    lines.append(
        f"{data['hardware']}, torch {data['versions']['torch']}, triton {data['versions']['triton']}; the best of 20 "
        "rounds. *copy* reads and writes x once; *loop* is the same in PyTorch, one step at a time; *graph* the same "
        "recursion as a graph of single operations, with backward. Small inputs are bound by the call."
    )
    lines += ["", *table([*head, "graph / with backward"], rows)]
    return [*lines, *_differ(data["temporal_error"])]


def _differ(found: list[dict[str, Any]]) -> list[str]:
    sigmas = sorted({r["sigma"] for r in found})
    kinds = sorted({(r["signed"], r["T"], r["levels"]) for r in found})
    lines = [
        "Share of neurons whose rate over T steps is not QCFS of their mean input, for inputs whose steps scatter by σ "
        "(inputs uniform on [-1, 3], θ = 2). At σ = 0 it is exact.",
        "",
    ]
    share = {(r["signed"], r["T"], r["levels"], r["sigma"]): r["differ"] for r in found}
    rows = [
        ["signed" if signed else "unsigned", str(t), str(n), *(f"{share[signed, t, n, s]:.1%}" for s in sigmas)]
        for signed, t, n in kinds
    ]
    return [*lines, *table(["neuron", "T", "L", *(f"σ = {s:g}" for s in sigmas)], rows)]
