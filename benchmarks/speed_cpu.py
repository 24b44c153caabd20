"""The CPU's part of speed_tables.py: whole models, products, events, neurons."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

from fas_costs import read, table

THREADS = "2 threads"
PRODUCTS = {
    "gif int8": "GIF, W8",
    "gif int4": "GIF, W4",
    "oat T=7 int8": "OAT, T = 7, W8",
    "oat T=14 int8": "OAT, T = 14, W8",
    "oat T=16 bf16": "OAT, T = 16, bf16 weights",
    "oat T=16 fp32": "OAT, T = 16, fp32 weights",
    "torch F.linear fp32": "PyTorch `F.linear`, fp32",
    "torch F.linear bf16": "PyTorch `F.linear`, bf16",
    "torch _int_mm": "PyTorch `_int_mm`, the product alone",
    "torch quantize_dynamic": "PyTorch `quantize_dynamic`, int8",
}
PRODUCT_WORDS = """Milliseconds of one call with 4096 inputs and 4096 outputs, encoding and scaling included; least of
four rounds in which all cases take turns. Weights come from memory: they rotate through 320 MB. The last two columns
are sums of such calls over the linear layers of a 1.1B LLaMA, head included: tokens a second if nothing else took time.
Compare rows of equally large weights, within this table: the machine is shared."""
MANY_WORDS = """With {most} rows ours are the slower ones: int8 products take {low:.1f} to {high:.1f} times as long as
`quantize_dynamic`, whose weights are packed beforehand, and OAT of 16 steps on bf16 weights {bf16:.1f} times as long as
PyTorch's bf16 product, because its values need more than bf16 (but not with `units="power_of_two"`)."""
EVENT_WORDS = """One row, times as fast as the collapsed product of the same weights by the share of zero integers
({threads}, 7 random patterns in turn); below 1: slower. The inputs of llama's linear layers at T = 8 have 2% zeros."""
NEURON_WORDS = """Microseconds of a call, Python included: the operator, and the modules that it stands for; one thread,
its own processor time, least of {rounds} rounds. Shapes of a 1.1B LLaMA (width 2048, 5632 hidden units, 32 heads of 64
over 4), {dtype}. The wall times with two threads in that file were taken beside busy neighbours and are not shown."""
THEIR_WORDS = """The same small Qwen2 model in both, matched by perplexity; SpikingJelly 2.0 with the settings that it
documents. *temporal*: literal spikes, step by step; *folded*: the same, the steps of a linear layer in one product."""


def number(value: float | None) -> str:
    """Three digits that count."""
    return (
        "" if value is None else f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"
    )


def paragraph(*words: str) -> list[str]:
    """One paragraph of Markdown, its lines of the usual length, and an empty line."""
    text = " ".join(" ".join(words).split())
    return [textwrap.fill(text, 120, break_long_words=False, break_on_hyphens=False), ""]


def rows_of(count: int | str) -> str:
    """The head of a column."""
    return "1 row" if int(count) == 1 else f"{count} rows"


def source(data: dict[str, Any], name: str) -> str:
    """Where a table is from."""
    versions = data.get("versions") or {"torch": data["torch"]}
    hardware = data.get("hardware") or f"CPU {data.get('machine', 'x86_64')}"
    told = ", ".join(f"{key} {value}" for key, value in versions.items())
    return f"{hardware}, {told}. Data: `benchmarks/results/{name}`."


def llamacpp(folder: Path) -> list[str]:
    """Whole models beside llama.cpp."""
    name = "llamacpp-cpu.json"
    data = read(folder, name)
    if data is None:
        return []
    kinds = [key.removeprefix("decode_vs_") for key in data["rows"][0] if key.startswith("decode_vs_")]
    rows = []
    for row in data["rows"]:
        cells = [row["model"], number(row["decode_tokens_per_s"])]
        cells += [f"{row[f'decode_vs_{kind}']:.2f}" for kind in kinds] + [number(row["prefill_tokens_per_s"])]
        cells += [f"{row[f'prefill_vs_{kind}']:.2f}" for kind in kinds]
        rows.append([*cells, f"{row['bytes'] / 1e9:.2f}", number(row.get("GB_per_s"))])
    head = ["model", "decode, tokens/s", *(f"/ {kind}" for kind in kinds), "prefill, tokens/s"]
    head += [*(f"/ {kind}" for kind in kinds), "GB read a token", "GB/s"]
    lines = ["### A model of 1.1 billion weights, beside llama.cpp", "", *table(head, rows)]
    return [*lines, *paragraph(f"Protocol: {data['protocol']}", source(data, name))]


def spikingjelly(folder: Path) -> list[str]:
    """The same model in SpikingJelly."""
    name = "spikingjelly-cpu.json"
    data = read(folder, name)
    if data is None:
        return []
    rows = []
    for row in data["rows"]:
        cells = [row["model"], number(row["prefill_tokens_per_s"]), number(row["decode_tokens_per_s"])]
        cells += [number(row[f"{what}_vs_spikingjelly"]) for what in ("prefill", "decode")]
        rows.append(cells + [number(row[f"{what}_vs_dense"]) for what in ("prefill", "decode")])
    head = ["model", "prefill, tokens/s", "decode, tokens/s", "prefill / SpikingJelly", "decode / SpikingJelly"]
    known = data["perplexity"]
    quality = ", ".join(f"{key} {known[key]:.3f}" for key in known)
    lines = ["### Beside SpikingJelly", "", *table([*head, "prefill / dense", "decode / dense"], rows)]
    settings = ", ".join(f"{key} {value}" for key, value in data["settings"].items())
    matched = f"Matched: T = {data['matched_steps']}. Perplexity ({data['text']}): {quality}. {settings}."
    return [*lines, *paragraph(THEIR_WORDS, matched, source(data, name))]


def products(folder: Path) -> list[str]:
    """Linear layers, and events."""
    name = "cpu-products.json"
    data = read(folder, name)
    if data is None:
        return []
    part = data[THREADS]
    sizes = list(part["rows"])
    rows = []
    for key, title in PRODUCTS.items():
        cells = [title, *(number(part["rows"][size].get(key)) for size in sizes)]
        whole = part["llama 1.1B"]
        rows.append(cells + [number(whole[tokens].get(key, {}).get("tokens/s")) for tokens in whole])
    head = ["operator", *(rows_of(size.split(" ")[0]) for size in sizes)]
    lines = [
        "### Linear layers",
        "",
        *table([*head, *(f"1.1B, {tokens.replace('1 tokens', '1 token')}" for tokens in part["llama 1.1B"])], rows),
    ]
    many = part["rows"][sizes[-1]]
    ratios = sorted(many[key] / many["torch quantize_dynamic"] for key in ("gif int8", "oat T=7 int8", "oat T=14 int8"))
    bf16 = many["oat T=16 bf16"] / many["torch F.linear bf16"]
    words = MANY_WORDS.format(most=sizes[-1].split(" ")[0], low=ratios[0], high=ratios[-1], bf16=bf16)
    lines += paragraph(PRODUCT_WORDS, words, f"`OMP_WAIT_POLICY=passive`, {THREADS}.", source(data, name))
    lines += ["### Event executor", ""]
    rows, shares = [], [key for key in next(iter(part["events"].values()))["int8"] if key != "dense"]
    for shape, kinds in part["events"].items():
        for kind, found in kinds.items():
            times = [f"{found[share]['times as fast']:.1f}" for share in shares]
            rows.append([shape, kind, *times])
    lines += table(["inputs -> outputs", "weights", *(f"{float(share):.0%}" for share in shares)], rows)
    return [*lines, *paragraph(EVENT_WORDS.format(threads=THREADS), source(data, name))]


def neurons(folder: Path) -> list[str]:
    """Encoders, norms, activations, attention."""
    name, dtype = "cpu-neurons.json", "bfloat16"
    data = read(folder, name)
    if data is None:
        return []
    rows = []
    known = {(row["operator"], row["rows"]): row["us"] for row in data["rows"] if row["dtype"] == dtype}
    for operator in dict.fromkeys(name for name, _ in known):
        cells = [operator]
        for count in (1, 128):
            us = known.get((operator, count), {})
            fused, apart = us.get("fused, 1 threads"), us.get("eager, 1 threads")
            cells += [number(fused), number(apart), number(apart / fused) if fused and apart else ""]
        rows.append(cells)
    head = [f"{what}, {count}" for count in ("1 row", "128 rows") for what in ("fused", "modules", "ratio")]
    lines = ["### Neurons, norms, attention", "", *table(["operator", *head], rows)]
    return [*lines, *paragraph(NEURON_WORDS.format(rounds=data["rounds"], dtype=dtype), source(data, name))]


def lines(folder: Path) -> list[str]:
    """The whole block."""
    return [*llamacpp(folder), *spikingjelly(folder), *products(folder), *neurons(folder)]
