"""LAS against the dense model: the curve over T for every coding and rounding, with spikes and energy.

    python benchmarks/las_curve.py --model llama --out llama.json [--twin] [--tokens 100000] [--options radix2 …]

Text: ``books/valid`` (evaluation) and the head of ``books/train-00`` (calibration) under SPIKEFORM_DATA.
Protocol: non-overlapping windows of 512 tokens; calibration on 16 windows of 512 tokens. Radix-2 and
signed-digit carry the same codes, so they are converted and evaluated once and their spikes counted twice.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import time
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

import spikeform
from spikeform import pretrained
from spikeform.energy import energy
from spikeform.evaluation import data_root, fidelity, load_text, tokenize
from spikeform.pretrained.twin import outlier_twin
from spikeform.spikes import Radix2, SignedDigit

WINDOW, CALIBRATION_WINDOWS = 512, 16


OPTIONS = {
    "radix2": {},
    "radix2-floor": {"rounding": "floor"},
    "per-channel": {"per_channel": True},
    "mt2": {"coding": "multi_threshold", "levels": 2},
    "mt4": {"coding": "multi_threshold", "levels": 4},
    "mt2-floor": {"coding": "multi_threshold", "levels": 2, "rounding": "floor"},
    "mt4-floor": {"coding": "multi_threshold", "levels": 4, "rounding": "floor"},
    "single": {"outlier": False},
}


def plan(names: list[str]) -> list[dict]:
    """Configurations to run: T = 16, 12 and 8 of each option first, then the whole curve."""
    order = [16, 12, 8, *(t for t in range(15, 1, -1) if t not in (12, 8))]
    return [{"steps": t, **OPTIONS[n]} for part in (order[:3], order[3:]) for n in names for t in part]


def spikes_and_energy(model, ids) -> dict:
    """Counts on ``ids`` ``[N, L]`` and ESTIMATED energy ratios."""
    report = energy(model, ids)
    return {
        "spikes_per_element": report.spikes_per_element,
        "spikes_per_token": report.spikes_per_token,
        "spike_rate": report.spike_rate,
        "accumulations_per_mac": report.accumulations_per_mac,
        "estimated": {
            name: {
                "vs_dense": e["ratio_vs_dense"],
                "vs_quantised": e["ratio_vs_quantised"],
                "vs_dense_with_memory": e["with_memory"]["ratio_vs_dense"],
                "vs_quantised_with_memory": e["with_memory"]["ratio_vs_quantised"],
            }
            for name, e in report.estimates.items()
        },
    }


def use_coding(model, config, coding) -> None:
    """The same codes, unrolled otherwise."""
    for module in model.modules():
        if isinstance(getattr(module, "coding", None), Radix2):
            module.coding = coding(config["steps"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama")
    parser.add_argument("--twin", action="store_true")
    parser.add_argument("--tokens", type=int, default=100_000)
    parser.add_argument("--energy-tokens", type=int, default=1024)
    parser.add_argument("--options", nargs="+", choices=OPTIONS, default=["radix2", "per-channel"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--minutes", type=float, default=60.0, help="stop starting configurations after this")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()

    torch.backends.cuda.matmul.allow_tf32 = False
    path = pretrained.resolve(args.model)
    tokenizer = AutoTokenizer.from_pretrained(path)
    dense = AutoModelForCausalLM.from_pretrained(path).to(args.device).eval()
    if args.twin:
        dense = outlier_twin(dense)
    books = data_root() / "books"
    ids = tokenize(tokenizer, load_text(books / "valid.txt.xz"))[: args.tokens].to(args.device)
    text = load_text(books / "train-00.txt.xz")[0][:400_000]
    calibration = torch.tensor(tokenizer(text)["input_ids"])[: CALIBRATION_WINDOWS * WINDOW].view(-1, WINDOW)
    counted = ids[: args.energy_tokens].view(-1, min(WINDOW, args.energy_tokens))
    result = {
        "model": args.model + ("-twin" if args.twin else ""),
        "protocol": f"books/valid, first {len(ids)} tokens, windows of {WINDOW}; thresholds from "
        f"{calibration.numel()} tokens of books/train-00, windows of {WINDOW}; spikes and ESTIMATED energy on the "
        f"first {counted.numel()} tokens, prefill",
        "hardware": torch.cuda.get_device_name() if args.device == "cuda" else f"CPU {platform.machine()}",
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "rows": [],
    }
    start = time.time()
    for config in plan(args.options):
        if time.time() - start > args.minutes * 60:
            result["unfinished"] = True
            break
        model = spikeform.convert(copy.deepcopy(dense), spikeform.LAS(**config), calibration)
        found = fidelity(model, dense, ids, window=WINDOW, batch_size=args.batch_size).to_dict()
        row = {"config": config, **{k: v for k, v in found.items() if k not in ("cosine", "protocol")}}
        row["cosine_final"] = found["cosine"]["final"]
        row["saturated_sites"] = len(model.spikeform_report.saturation)
        row["saturated_share_worst"] = max(model.spikeform_report.saturation.values(), default=0.0)
        row["spikes"] = spikes_and_energy(model, counted)
        if config.get("coding", "radix2") == "radix2":
            use_coding(model, config, SignedDigit)
            row["spikes_signed_digit"] = spikes_and_energy(model, counted)
        result["rows"].append(row)
        args.out.write_text(json.dumps(result, indent=1))
        print(
            f"{result['model']} {config} ratio {found['perplexity_ratio']:.6f} top-1 {found['top1_agreement']:.4f} "
            f"spikes/element {row['spikes']['spikes_per_element']:.2f} ({time.time() - start:.0f} s)",
            flush=True,
        )


if __name__ == "__main__":
    main()
