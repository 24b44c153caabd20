"""What FAS costs: operations, spikes, weights and cache of checkpoints, ESTIMATED energy, and time on this CPU.

    python benchmarks/fas_energy.py --out benchmarks/results/fas-energy.json MODEL:VARIANT:FOLDER:T ... [--times]

MODEL is the embedded model that a FOLDER of fas_train.py or fas_curve.py came from; a FOLDER ``untrained`` converts it
here, and ``untrained,sites=all,gated=product`` with options. Text: books/valid, its first tokens in windows of 256.
``--times`` times them beside their dense model instead, on one thread, and ``--operators`` measures perplexity on more
of that text with few-spike operators of so many steps put in. Rows that the file holds already are kept, unless they
are measured again.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import statistics
import time
from pathlib import Path
from typing import Any

import reference_data as text
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

import spikeform
from spikeform import pretrained
from spikeform.methods.fas import operators

WINDOW, MORE, OTHER = 256, 8192, 2048
RATIOS = ("ratio_vs_dense", "ratio_vs_quantised", "ratio_vs_quantised_steps")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="+", metavar="MODEL:VARIANT:FOLDER:T")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--data", type=Path, help="default: $SPIKEFORM_DATA, else ../shared/data")
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--times", action="store_true", help="time them too; on a quiet machine")
    parser.add_argument("--operators", type=int, nargs="+", help="steps of few-spike operators; 0: none")
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    result: dict[str, Any] = {"rows": [], "times": [], "operators": []}
    if arguments.out.is_file():
        result = json.loads(arguments.out.read_text(encoding="utf-8"))
    result |= {
        "protocol": f"books/valid, first {arguments.tokens} tokens, windows of {WINDOW}, one window a call, no cache; "
        "weights of the checkpoints, computed in fp32",
        "times_protocol": f"fp32, one sequence: prefill of {WINDOW} tokens, and one token after them "
        f"with a cache, dense and spiking by turns; of {arguments.rounds} rounds the fastest, which neighbours disturb "
        "least, and the median",
        "operators_protocol": f"books/valid, first {MORE} tokens, windows of {WINDOW}; their thresholds from "
        f"its last {OTHER} tokens",
        "hardware": f"CPU ({platform.machine()}, one thread)",
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }
    for case in arguments.cases:
        model, variant, folder, steps = case.split(":")
        tokenizer = AutoTokenizer.from_pretrained(pretrained.path(model))
        held, _ = text.encode_held_out(text.data_folder(arguments.data), tokenizer, "books")
        ids = torch.from_numpy(held[: arguments.tokens]).view(-1, WINDOW)
        dense = AutoModelForCausalLM.from_pretrained(pretrained.path(model), dtype=torch.float32).eval()
        key = {"model": model, "variant": variant, "steps": int(steps)}
        for window in arguments.operators or ():
            spiking, more = load(folder, model, ids, int(steps)), torch.from_numpy(held[:MORE])
            if window:
                operators.add(spiking, window, [torch.from_numpy(held[-OTHER:]).view(-1, WINDOW)])
            found = spikeform.perplexity(spiking, more, window=WINDOW).perplexity
            keep(result["operators"], key | {"operators": window, "perplexity": found})
            print(result["operators"][-1])
        if arguments.operators:
            arguments.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
            continue
        spiking = load(folder, model, ids, int(steps))
        if arguments.times:
            keep(result["times"], key | times(spiking, dense, ids, arguments.rounds))
        else:
            keep(result["rows"], key | counts(spiking, dense, ids))
        arguments.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        del spiking, dense
        gc.collect()


def load(folder: str, model: str, ids: torch.Tensor, steps: int) -> Any:
    """The checkpoint with T steps; or a conversion made here, with options."""
    name, *options = folder.split(",")
    if name != "untrained":
        return spikeform.set_steps(spikeform.load(folder, dtype=torch.float32), steps).eval()
    found = AutoModelForCausalLM.from_pretrained(pretrained.path(model), dtype=torch.float32)
    given: Any = dict(option.split("=") for option in options)
    return spikeform.convert(found, spikeform.FAS(steps=steps, **given), ids).eval()


def counts(spiking: Any, dense: Any, ids: torch.Tensor) -> dict[str, Any]:
    """One row: exact counts, and ESTIMATED ratios by cost model."""
    report = spikeform.energy(spiking, ids, dense=dense, window=WINDOW)
    config = spiking.config.quantization_config
    row = {
        "options": {"sites": config.sites, "gated": config.gated, "levels": config.levels},
        "granularity": config.granularity,
        "tokens": report.tokens,
        "spikes_per_element": report.spikes_per_element,
        "spikes_per_token": report.spikes_per_token,
        "spike_rate": report.spike_rate,
        "rate_by_site": {r["site"]: r["spike_rate"] for r in report.per_site if r["kind"] == "neuron"},
        "streaming": report.streaming,
        "estimated": {
            name: {
                "operations": {key: found[key] for key in RATIOS},
                "with_memory": {key: found["with_memory"][key] for key in RATIOS},
            }
            for name, found in report.estimates.items()
        },
        "estimated_by_papers_convention": {
            name: found["ratio_vs_dense"]
            for name, found in report.accountings["papers' convention"]["estimates"].items()
        },
    }
    operations = report.streaming["operations"]
    print(operations, row["spike_rate"], row["estimated"]["45nm-fp32"], row["estimated_by_papers_convention"])
    return row


@torch.no_grad()
def times(spiking: Any, dense: Any, ids: torch.Tensor, rounds: int) -> dict[str, Any]:
    """Seconds of a prefill and of one more token, dense and spiking by turns: the fastest, and the median."""
    found: dict[str, dict[str, list[float]]] = {name: {"prefill": [], "token": []} for name in ("dense", "spiking")}
    prompt, after = ids[:1], ids[1:2, :5]
    for turn in range(rounds + 1):  # the first is a warm-up
        for name, network in (("dense", dense), ("spiking", spiking)):
            begin = time.perf_counter()
            cache = network(prompt, use_cache=True, logits_to_keep=1).past_key_values
            prefill = time.perf_counter() - begin
            tokens = []
            for token in after.split(1, dim=1):
                begin = time.perf_counter()
                cache = network(token, past_key_values=cache, use_cache=True).past_key_values
                tokens.append(time.perf_counter() - begin)
            if turn:
                found[name]["prefill"].append(prefill)
                found[name]["token"] += tokens
    row: dict[str, Any] = {}
    for how, pick in (("fastest", min), ("median", statistics.median)):
        row[how] = {name: {part: pick(values) for part, values in parts.items()} for name, parts in found.items()}
        row[how]["ratio"] = {p: row[how]["spiking"][p] / row[how]["dense"][p] for p in ("prefill", "token")}
    print(row)
    return row


def keep(rows: list[dict[str, Any]], row: dict[str, Any]) -> None:
    """Put a row in the place of the one of the same model, variant and T (and operators)."""
    names = ("model", "variant", "steps", "operators")
    same = [old for old in rows if all(old.get(name) == row.get(name) for name in names)]
    at = rows.index(same[0]) if same else len(rows)
    rows[at : at + 1] = [row]


if __name__ == "__main__":
    main()
