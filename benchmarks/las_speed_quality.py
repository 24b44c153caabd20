"""What the options that make LAS fast cost in quality: thresholds that are powers of two, and int8 weights.

    python benchmarks/las_speed_quality.py [--models llama gpt2 opt] [--tokens 100000] [--out FILE]

Text: ``books/valid`` (evaluation) and the head of ``books/train-00`` (calibration) under SPIKEFORM_DATA. Protocol:
non-overlapping windows of 512 tokens; calibration on 16 windows of 512 tokens. Each ratio is to the dense model of the
same dtype, whose weights are not quantised. ``--out`` is continued: what it holds already is not run again.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from itertools import product
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

import spikeform
from spikeform import pretrained
from spikeform.conversion.weights import finish
from spikeform.evaluation import data_root, fidelity, load_text, tokenize

WINDOW, CALIBRATION_WINDOWS = 512, 16
STEPS = {torch.float32: (7, 8, 12, 15, 16), torch.bfloat16: (8, 16)}
KEPT = ("perplexity", "dense_perplexity", "perplexity_ratio", "ratio_stderr", "kl", "top1_agreement", "tokens")


def plan() -> list[tuple[torch.dtype, dict]]:
    """Every calibration; the steps that matter most first."""
    rows = [
        (dtype, {"steps": steps, "units": units})
        for dtype, all_steps in STEPS.items()
        for steps, units in product(all_steps, ("free", "power_of_two"))
    ]
    return sorted(rows, key=lambda row: row[1]["steps"] not in (8, 16))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["llama", "gpt2", "opt"])
    parser.add_argument("--tokens", type=int, default=100_000)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--minutes", type=float, default=60.0, help="stop starting configurations after this")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "las-speed-quality.json")
    args = parser.parse_args()

    torch.backends.cuda.matmul.allow_tf32 = False
    result = {
        "protocol": f"books/valid, first {args.tokens // WINDOW * WINDOW} tokens, windows of {WINDOW}; thresholds from "
        f"{CALIBRATION_WINDOWS * WINDOW} tokens of books/train-00, windows of {WINDOW}; ratios to the dense model of "
        "the same dtype",
        "hardware": torch.cuda.get_device_name()
        if args.device == "cuda"
        else f"CPU {platform.machine()}, {torch.get_num_threads()} threads",
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "rows": [],
    }
    if args.out.exists():
        known = json.loads(args.out.read_text())
        if {**known, "rows": []} != result:
            raise SystemExit(f"{args.out} is of another protocol or machine; give another --out")
        result = known
    done = [[row["model"], row["dtype"], row["config"]] for row in result["rows"]]
    start = time.time()
    for (dtype, config), name in product(plan(), args.models):
        kind = str(dtype).removeprefix("torch.")
        configs = [{**config, "weight_bits": bits} for bits in (16, 8)]
        if all([name, kind, c] in done for c in configs) or time.time() - start > args.minutes * 60:
            continue
        path = pretrained.path(name)
        tokenizer = AutoTokenizer.from_pretrained(path)
        dense, model = (AutoModelForCausalLM.from_pretrained(path, dtype=dtype).to(args.device).eval() for _ in "ab")
        books = data_root() / "books"
        ids = tokenize(tokenizer, load_text(books / "valid.txt.xz"))[: args.tokens].to(args.device)
        text = load_text(books / "train-00.txt.xz")[0][:400_000]
        calibration = torch.tensor(tokenizer(text)["input_ids"])[: CALIBRATION_WINDOWS * WINDOW].view(-1, WINDOW)
        spikeform.convert(model, spikeform.LAS(**configs[0]), calibration)
        for each in configs:
            # Weights are coded after calibration, so one calibration serves both; with 16 bits this does nothing.
            finish(model, spikeform.LAS(**each), model.spikeform_report)
            found = fidelity(model, dense, ids, window=WINDOW, batch_size=args.batch_size).to_dict()
            row = {"model": name, "dtype": kind, "config": each, **{key: found[key] for key in KEPT}}
            result["rows"] = [r for r in result["rows"] if (r["model"], r["dtype"], r["config"]) != (name, kind, each)]
            result["rows"].append(row)
            args.out.write_text(json.dumps(result, indent=1))
            print(
                f"{name} {kind} {each} ratio {row['perplexity_ratio']:.6f} +- {row['ratio_stderr']:.1e} "
                f"top-1 {row['top1_agreement']:.4f} ({time.time() - start:.0f} s)",
                flush=True,
            )


if __name__ == "__main__":
    main()
