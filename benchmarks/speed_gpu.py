"""The GPU's part of speed_tables.py: whole models of 7B shapes, encoders, attention, products."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fas_costs import read, table
from speed_cpu import number, paragraph, rows_of, source

# Of the dense model's time: what a decoding step, and a compiled prefill, were meant to stay below.
BARS = {
    ("decode", "step"): {"las16": 0.85, "las15-int8": 0.50, "w4a4": 0.32},
    ("prefill", "compiled"): {"las16": 2.2, "w4a4": 0.70},
}
KINDS = {
    "oat": "OAT, T = 16, bf16 weights",
    "single": "OAT, one plane, bf16 weights",
    "oat_int8": "OAT, T = 8, W8",
    "oat_int16": "OAT, T = 16, W8",
    "gif8": "GIF, W8",
    "gif4": "GIF, W4",
    "bf16": "PyTorch, bf16",
    "int8": "PyTorch `_int_mm`, int8",
    "fp8": "PyTorch `_scaled_mm`, FP8",
}
SHAPE = (4096, 11008)
ROWS = (1, 4, 16, 64, 512, 2048)
DECODE_WORDS = """In brackets: over the dense model's time. *step*: one compiled forward pass with a static cache, again
and again; *generate*: what one token of `model.generate(cache_implementation="static")` takes, transformers' own
Python included. *GPU alone*: of the compiled prefill. *moved*: the largest difference of a step's logits, compiled,
from eager ones, over the largest logit. Random weights and tokens, {dtype}, prompt of {prompt} tokens, medians of
{repeat} rounds, a process each; the whole protocol is in the file."""
ENCODER_WORDS = """Microseconds of one call in a CUDA graph, bf16, width 4096, buffers not in a cache; in brackets the
time over that of a copy of as many bytes. *eager call*: what one call of a row costs the host outside a graph. Each
result was compared with the neuron's own operations on the same GPU: {equal}."""
ATTENTION_WORDS = """Microseconds of one call in a CUDA graph; heads of 128, caches not in the processor's cache. *OAT*:
T = 16, HG softmax, free thresholds; *powers*: thresholds that are powers of two; *GIF*: 4 bits, rotated, real softmax.
PyTorch's `scaled_dot_product_attention` reads real keys in bf16. **Attention is slower than PyTorch's**: OAT is faster
in {faster} of {all} cases by more than 5%. With many queries ours take {low:.1f} to {high:.1f} times as long, with one
and a full cache {one:.1f} to {ten:.1f} times."""
CHAINS = {
    "dense": "PyTorch, bf16",
    "bf16": "OAT, T = 16, bf16 weights",
    "int8-t15": "OAT, T = 15, W8",
    "int8-t7": "OAT, T = 7, W8",
    "gif4": "GIF, T = 2 for an eighth, W4",
}
WAYS = ((False, False, False), (False, True, False), (True, False, False), (True, True, False), (True, True, True))
CHAIN_WORDS = """Microseconds of a layer: q, k, v, o, gate, up and down of a LLaMA-7B, one after the other, of {layers}
layers with weights of their own, in one CUDA graph; the best cuts found; in brackets over PyTorch's. *overlapping*:
programmatic dependent launch; *encoded once*: a row is encoded by a kernel of its own, else by each program of the
product; *joined*: q, k and v are one product and gate, up another, their weights in one piece. Ours run as "both". A
copy moved {copied:.2f} TB/s, bytes read and written."""
CONVERTED = {
    "las": "LAS, T = 16",
    "las8": "LAS, T = 8, powers of two",
    "las-int8": "LAS, T = 8, int8 weights",
    "spikellm": "SpikeLLM, round to nearest",
}
CONVERT_WORDS = """{layers} layers of {shape}, {tokens} tokens for calibration in sequences of 512, reading and writing
files not included. The model has {model_GiB:.2f} GiB, a block {block_GiB:.3f}. The aims were 60 seconds, and the model
and one block at the peak."""
PRODUCT_WORDS = """Microseconds of one call in a CUDA graph, {inner} inputs and {outer} outputs, weights not in a cache,
the best cut found. PyTorch's products are given codes; ours encode real input. FP8 is not exact for integers (see
above) and shown for its speed alone."""


def title(variant: str) -> str:
    """A variant as tables show it."""
    if variant.startswith("las"):
        steps, *rest = variant.removeprefix("las").split("-")
        extra = {"int8": "int8 weights", "free": "free thresholds", "head": "spiking head"}
        rest = rest or ["powers of two"]
        return ", ".join([f"LAS, T = {steps}", *(extra.get(word, word) for word in rest)])
    bits, _, steps = variant.partition("-t")
    return f"SpikeLLM {bits.upper()}, T = {steps or '2 for 10%'}" if variant.startswith("w4") else variant


def decode_files(folder: Path) -> list[tuple[str, dict[str, Any]]]:
    """Runs of whole models, those with the most layers first."""
    paths = folder.glob("decode-7b*.json")
    ordered = sorted(paths, key=lambda path: path.stem)
    found = [(path.name, json.loads(path.read_text(encoding="utf-8"))) for path in ordered]
    return sorted(found, key=lambda run: -run[1]["settings"]["layers"])


def beside(row: dict[str, Any], dense: dict[str, Any], part: str) -> dict[str, Any]:
    """The dense model's times of a part; of decoding those of the row's own run, if that is another."""
    return (row.get("beside") if part == "decode" else None) or dense.get(part, {})


def decode_rows(data: dict[str, Any]) -> list[list[str]]:
    """A row for each variant that ran."""
    rows = [row for row in data["rows"] if "error" not in row]
    dense = next((row for row in rows if row["variant"] == "dense"), None)
    found = []
    for row in rows:
        cells = [title(row["variant"])]
        for part, own in (("decode", "step"), ("decode", "generate"), ("prefill", "eager"), ("prefill", "compiled")):
            base, value = beside(row, dense or {}, part).get(own), row.get(part, {}).get(own)
            over = "" if base is None or value is None else f" ({value['ms'] / base['ms']:.2f})"
            cells.append("" if value is None else f"{value['ms']:.3f}{over}")
        alone = row.get("gpu_time_ms", {}).get("prefill_compiled")
        cells += [
            "" if alone is None else f"{alone:.2f}",
            f"{row['weight_bytes'] / 2**30:.2f}",
            number(row["GB_per_s"]),
        ]
        found.append([*cells, f"{row['decode']['difference']:.3f}"])
    return found


def filled(head: list[str], rows: list[list[str]]) -> tuple[list[str], list[list[str]]]:
    """A table without the columns that no row has."""
    kept = [i for i in range(len(head)) if any(row[i] for row in rows)]
    return [head[i] for i in kept], [[row[i] for i in kept] for row in rows]


def bars(data: dict[str, Any]) -> str:
    """What was aimed at, and whether it was reached."""
    rows = {r["variant"]: r for r in data["rows"] if "error" not in r}
    if "dense" not in rows:
        return ""
    told = []
    for (part, own), aims in BARS.items():
        for variant, aim in aims.items():
            row = rows.get(variant, {})
            found, base = (of.get(own) for of in (row.get(part, {}), beside(row, rows["dense"], part)))
            if found and base:
                share, what = found["ms"] / base["ms"], "prefill of " if part == "prefill" else ""
                told.append(
                    f"{what}{title(variant)}: {aim:.2f}, is {share:.2f}, {'met' if share <= aim else '**missed**'}"
                )
    return f"Aims for a step and for compiled prefill, in times the dense model's: {'; '.join(told)}." if told else ""


def models(folder: Path) -> list[str]:
    """Whole models beside the dense ones."""
    lines = []
    for name, data in decode_files(folder):
        settings = data["settings"]
        head = ["model", "step, ms", "generate, ms", f"prefill {settings['prefill']}, eager, ms", "compiled, ms"]
        head += ["GPU alone", "GiB read a token", "GB/s of a step", "moved"]
        lines += [
            f"### {settings['layers']} layers of {settings['shape']}, batch 1",
            "",
            *table(*filled(head, decode_rows(data))),
        ]
        failed = [f"{title(row['variant'])} did not run" for row in data["rows"] if "error" in row]
        for words in (DECODE_WORDS.format(**settings), bars(data), data.get("note", "")):
            lines += paragraph(words) if words else []
        lines += paragraph("; ".join(failed) + "." if failed else "", source(data, name))
    return lines


def encoders(folder: Path) -> list[str]:
    """Neurons beside a copy."""
    name = "gpu-encoders.json"
    data = read(folder, name)
    if data is None:
        return []
    known = {(row["operator"], row["rows"]): row for row in data["rows"] if row["width"] == 4096}
    counts, rows = (1, 64, 2048), []
    for operator in dict.fromkeys(operator for operator, _ in known):
        found = [known.get((operator, count)) for count in counts]
        cells = ["" if row is None else f"{row['us']:.1f} ({row['ratio']:.2f})" for row in found]
        rows.append([operator, *cells, number(found[0]["call_us"]) if found[0] else ""])
    unequal = [row for row in data["rows"] if not row["equal"]]
    equal = "equal, bit for bit"
    if unequal:
        which = ", ".join(dict.fromkeys(f"`{row['operator']}`" for row in unequal))
        share = min(row["share"] for row in unequal)
        codes = max(1, int(2 * max(row["worst_units"] for row in unequal)))  # a unit is one code or two
        equal += f", but for {which}: there {share:.1%} or more are equal, and the others at most {codes} code off"
    lines = ["### Neurons and norms", "", *table(["operator", *(rows_of(c) for c in counts), "eager call"], rows)]
    return [*lines, *paragraph(ENCODER_WORDS.format(equal=equal), source(data, name))]


def attention(folder: Path) -> list[str]:
    """Attention beside PyTorch's."""
    name = "gpu-attention.json"
    data = read(folder, name)
    if data is None:
        return []
    rows = []
    for row in data["times"]:
        cache = f"{row['S']}" + (f" of {row['slots']}" if row["slots"] != row["S"] else "")
        cells = [str(row["L"]), cache, f"{row['H']} / {row['G']}"]
        rows.append(cells + [number(row[f"{kind}_us"]) for kind in ("oat", "oat2", "gif", "sdpa")])
    kinds = ("oat", "oat2", "gif")
    full = [row for row in data["times"] if row["slots"] == row["S"]]
    many = [row[f"{kind}_us"] / row["sdpa_us"] for row in full if row["L"] > 4 for kind in kinds]
    few = [row[f"{kind}_us"] / row["sdpa_us"] for row in full if row["L"] == 1 for kind in kinds]
    faster = sum(row["oat_us"] < 0.95 * row["sdpa_us"] for row in data["times"])
    shares = {"low": min(many), "high": max(many), "one": min(few), "ten": max(few)}
    words = ATTENTION_WORDS.format(faster=faster, all=len(rows), **shares)
    head = ["queries", "keys", "heads / key heads", "OAT", "powers", "GIF", "PyTorch, bf16"]
    return ["### Attention", "", *table(head, rows), *paragraph(words, source(data, name))]


def products(folder: Path) -> list[str]:
    """Products beside PyTorch's."""
    name = "gpu-products.json"
    data = read(folder, name)
    if data is None:
        return []
    outer, inner = SHAPE
    us: dict[tuple[str, int], float] = {}
    for row in [*data["library"], *data["own"]]:
        if (row["n"], row["k"]) == SHAPE:
            key = row["kind"], row["m"]
            us[key] = min(row["us"], us.get(key, row["us"]))
    kinds = [kind for kind in KINDS if any((kind, m) in us for m in ROWS)]
    rows = [[KINDS[kind], *(number(us.get((kind, m))) for m in ROWS)] for kind in kinds]
    lines = ["### Linear layers", "", *table(["operator", *(rows_of(m) for m in ROWS)], rows)]
    words = PRODUCT_WORDS.format(inner=inner, outer=outer)
    lines += paragraph(words, "An empty cell was not measured.", data.get("note", ""), source(data, name))
    return lines


def events(folder: Path) -> list[str]:
    """Event products beside collapsed ones."""
    name = "gpu-events.json"
    data = read(folder, name)
    if data is None:
        return []
    shares = sorted({row["zeros"] for row in data["event"]} - {1.0})  # what is left then are launches
    rows = []
    for kind, n, k in dict.fromkeys((row["kind"], row["n"], row["k"]) for row in data["event"]):
        found = {r["zeros"]: r["faster"] for r in data["event"] if (r["kind"], r["n"], r["k"]) == (kind, n, k)}
        rows.append([f"{k} -> {n}", kind, *(f"{found[share]:.1f}" if share in found else "" for share in shares)])
    lines = ["### Event executor", "", *table(["inputs -> outputs", "weights", *(f"{s:.0%}" for s in shares)], rows)]
    words = "One row, times as fast as the collapsed product of the same weights, by the share of zero integers."
    return [*lines, *paragraph(words, data.get("note", ""), source(data, name))]


def chains(folder: Path) -> list[str]:
    """Products of one token, in their order."""
    name = "gpu-chain.json"
    data = read(folder, name)
    if data is None:
        return []
    found = {(r["way"]["kind"], r["way"]["once"], r["way"]["overlapped"], r["joined"]): r for r in data["chains"]}
    dense, rows = found["dense", False, False, False]["ms_a_layer"], []
    for kind, said in CHAINS.items():
        cells = [said]
        for way in WAYS:
            row = found.get((kind, *way))
            cells.append("" if row is None else f"{row['ms_a_layer'] * 1e3:.1f} ({row['ms_a_layer'] / dense:.2f})")
        rows.append(cells)
    head = ["products", "as before", "overlapping", "encoded once", "both", "both, joined"]
    text = CHAIN_WORDS.format(layers=data["layers"], copied=data["copy_bytes_s"] / 1e12)
    versions = {"hardware": data["hardware"], "versions": {k: data[k] for k in ("torch", "triton")}}
    return ["### Products of one token", "", *table(head, rows), *paragraph(text, source(versions, name))]


def conversions(folder: Path) -> list[str]:
    """How long a 7B shape takes to convert."""
    name = "convert-7b.json"
    data = read(folder, name)
    if data is None:
        return []
    keys = ("seconds", "first_s", "block_s", "above_GiB", "after_GiB")
    rows = [[CONVERTED[row["method"]], *(f"{row[key]:.2f}" for key in keys)] for row in data["rows"]]
    head = [
        "conversion",
        "seconds",
        "until the first block is done",
        "a block",
        "peak above the model, GiB",
        "after, GiB",
    ]
    sizes = {key: data["rows"][0][key] for key in ("model_GiB", "block_GiB", "tokens")}
    text = CONVERT_WORDS.format(**sizes, layers=data["layers"], shape=data["shape"])
    return ["### Conversion", "", *table(head, rows), *paragraph(text, data.get("note", ""), source(data, name))]


def lines(folder: Path) -> list[str]:
    """The whole block."""
    parts = (models, conversions, encoders, attention, chains, products, events)
    return [line for part in parts for line in part(folder)]
