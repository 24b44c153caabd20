"""SpikeLLM, its baselines and its ablations against the dense model: perplexity, operations, spikes, bytes.

    python benchmarks/spikellm_run.py --out benchmarks/results/spikellm.json [--models llama gpt2-twin] [--sets main]
        [--variants NAME …] [--tokens 100000] [--workers 1]

Text: ``books/valid`` (evaluation) and the head of ``books/train-00`` (calibration) under SPIKEFORM_DATA. Protocol:
non-overlapping windows of 512 tokens; calibration on 16 windows of 512 tokens; one seed. ``-twin`` is the outlier
twin. Rows are appended as they are finished, and what is in the file already is not run again.
"""

from __future__ import annotations

import argparse
import copy
import json
import multiprocessing
import platform
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

import spikeform
from spikeform import pretrained
from spikeform.evaluation import data_root, load_text, perplexity, tokenize
from spikeform.pretrained.twin import outlier_twin
from spikeform.report.weights import coded_size

WINDOW, CALIBRATION_WINDOWS, COUNTED = 512, 16, 1024
MODELS = [f"{name}{twin}" for name in ("llama", "gpt2", "opt") for twin in ("", "-twin")]
UNIFORM = {"steps": 1, "saliency": "none"}
REAL_INPUT = {"bits": 16, "saliency": "none", "steps": 1, "attention": False}
GPTQ = {"pipeline": "gptq", "sweeps": 0}  # as it is known
PARTLY_BINARY = {**GPTQ, "weight_form": "partial_binary", "weight_steps": (1, 8)}
TIERS = {"weight_steps": (1, 2), "weight_salient": (0.1,)}
TERNARY = {"weight_form": "ternary", "weight_bits": 1, "weight_steps": (1, 2), "weight_salient": (0.4,)}  # 1.4 steps

SETS: dict[str, dict[str, dict[str, Any]]] = {
    "main": {
        "rtn-w4a4": {**UNIFORM, "pipeline": "rtn"},
        "omniquant-w4a4": UNIFORM,
        "omniquant-w5a5": {**UNIFORM, "bits": 5, "weight_bits": 5},
        "spikellm-t2": {},
        "spikellm-t4": {"steps": 4, "salient": 0.05},
        "spikellm-t2-separate": {"span": "separate"},
        "rtn-w4a4-rotated": {**UNIFORM, "pipeline": "rtn", "rotate": True},
        "omniquant-w4a4-rotated": {**UNIFORM, "rotate": True},
        "spikellm-t2-rotated": {"rotate": True},
        "spikellm-t4-rotated": {"rotate": True, "steps": 4, "salient": 0.05},
        "omniquant-w4a4-stream": {**UNIFORM, "rotate": True, "rotate_heads": False},
        "spikellm-t2-stream": {"rotate": True, "rotate_heads": False},
        "spikellm-t2-separate-stream": {"span": "separate", "rotate": True, "rotate_heads": False},
        "omniquant-w4a4-channel": {**UNIFORM, "key_axis": "channel"},
        "spikellm-t2-channel": {"key_axis": "channel"},
    },
    "ablation": {
        "t2-random": {"saliency": "random"},
        "t2-magnitude": {"saliency": "magnitude"},
        "t2-diagonal": {"saliency": "diagonal"},
        "t2-magnitude-separate": {"saliency": "magnitude", "span": "separate"},
        "t2-random-separate": {"saliency": "random", "span": "separate"},
        "t2-official": {"form": "official"},
        "t2-shared-masks": {"masks": "shared"},
        "t2-budget": {"allocation": "budget"},
        "t2-sensitivity": {"allocation": "sensitivity"},
        "t2-energy": {"allocation": "energy"},
        "t2-random-rotated": {"saliency": "random", "rotate": True},
        "t2-magnitude-rotated": {"saliency": "magnitude", "rotate": True},
        "t2-diagonal-rotated": {"saliency": "diagonal", "rotate": True},
        "t2-magnitude-separate-rotated": {"saliency": "magnitude", "span": "separate", "rotate": True},
        "t2-separate-rotated": {"span": "separate", "rotate": True},
        "rtn-t2": {"pipeline": "rtn"},
        "rtn-t2-random": {"pipeline": "rtn", "saliency": "random"},
        "rtn-t2-magnitude": {"pipeline": "rtn", "saliency": "magnitude"},
        "rtn-t2-magnitude-separate": {"pipeline": "rtn", "saliency": "magnitude", "span": "separate"},
        "gptq-t2-rotated": {"pipeline": "gptq", "rotate": True},
        "p8": {"probability_bits": 8},
        "rtn-t2-unsigned": {"pipeline": "rtn", "signed": False},
        "rtn-w4a4-let": {**UNIFORM, "pipeline": "rtn", "let": True},
    },
    "weights": {
        "gptq-w2a16": {**REAL_INPUT, **GPTQ, "weight_bits": 2},
        "gptq-w3a16": {**REAL_INPUT, **GPTQ, "weight_bits": 3},
        "gptq-w2a16-random": {**REAL_INPUT, **GPTQ, "weight_bits": 2, **TIERS, "saliency": "random"},
        "spikellm-gptq-w2a16": {**REAL_INPUT, "pipeline": "gptq", "weight_bits": 2, **TIERS},
        "spikellm-gptq-w2a16-plain": {**REAL_INPUT, **GPTQ, "weight_bits": 2, **TIERS},
        "swept-gptq-w2a16": {**REAL_INPUT, "pipeline": "gptq", "weight_bits": 2},
        "omniquant-w2a16": {**REAL_INPUT, "weight_bits": 2},
        "spikellm-w2a16": {**REAL_INPUT, "weight_bits": 2, **TIERS},
        "gptq-ternary": {**REAL_INPUT, **GPTQ, "weight_form": "ternary", "weight_bits": 1},
        "gptq-ternary-random": {**REAL_INPUT, **GPTQ, **TERNARY, "saliency": "random"},
        "spikellm-ternary": {**REAL_INPUT, "pipeline": "gptq", **TERNARY},
        "spikellm-ternary-plain": {**REAL_INPUT, **GPTQ, **TERNARY},
        "swept-ternary-random": {**REAL_INPUT, "pipeline": "gptq", **TERNARY, "saliency": "random"},
        "pb-llm-95": {**REAL_INPUT, **PARTLY_BINARY, "weight_salient": (0.05,)},
        "pb-llm-90": {**REAL_INPUT, **PARTLY_BINARY, "weight_salient": (0.1,)},
        "omniquant-w2a8": {**UNIFORM, "bits": 8, "weight_bits": 2},
        "spikellm-w2a8": {"bits": 8, "weight_bits": 2, "salient": 0.05, **TIERS},
    },
}
VARIANTS = {name: options for chosen in SETS.values() for name, options in chosen.items()}


def texts(name: str, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Evaluation ids ``[N]`` and calibration ids ``[16, 512]`` of a model's tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(pretrained.path(name))
    books = data_root() / "books"
    ids = tokenize(tokenizer, load_text(books / "valid.txt.xz"))[:tokens]
    head = load_text(books / "train-00.txt.xz")[0][:400_000]
    return ids, torch.tensor(tokenizer(head)["input_ids"])[: CALIBRATION_WINDOWS * WINDOW].view(-1, WINDOW)


def dense_model(model: str, device: str) -> Any:
    """The embedded model, or its outlier twin."""
    dense = AutoModelForCausalLM.from_pretrained(pretrained.path(model.removesuffix("-twin"))).to(device).eval()
    return outlier_twin(dense) if model.endswith("-twin") else dense


def counts(model: Any, ids: torch.Tensor) -> dict[str, Any]:
    """Operations, spikes and ESTIMATED energy ratios on ``ids`` ``[N, L]``."""
    report = spikeform.energy(model, ids)
    return {
        "ace": report.ace,
        "spikes_per_element": report.spikes_per_element,
        "spikes_per_token": report.spikes_per_token,
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


def measure(job: tuple[str, str, int, str]) -> dict[str, Any]:
    """One row."""
    model, variant, tokens, device = job
    torch.set_num_threads(1)
    torch.backends.cuda.matmul.allow_tf32 = False
    ids, calibration = texts(model.removesuffix("-twin"), tokens)
    dense = dense_model(model, device)
    start = time.time()
    if variant == "dense":
        converted, seconds, facts = dense, 0.0, {}
    else:
        config = spikeform.SpikeLLM(**VARIANTS[variant])
        converted = spikeform.convert(copy.deepcopy(dense), config, calibration)
        seconds = time.time() - start
        facts = {"calibration": converted.spikeform_report.calibration, "weights": coded_size(converted)}
        if config.spikes or config.codes:  # partly binary weights of a baseline are stored real
            facts |= counts(converted, ids[:COUNTED].view(-1, WINDOW).to(device))
    found = perplexity(converted, ids.to(device), window=WINDOW, batch_size=8)
    row = {"model": model, "variant": variant, "options": VARIANTS.get(variant, {}), "perplexity": found.perplexity}
    row |= {"hardware": torch.cuda.get_device_name() if device == "cuda" else f"CPU {platform.machine()}, one thread"}
    return row | {"nats": found.nats, "stderr": found.stderr, "tokens": found.tokens, "seconds": seconds} | facts


def main() -> None:
    """Run what is missing from the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--sets", nargs="+", choices=SETS, default=list(SETS))
    parser.add_argument("--variants", nargs="+", choices=[*VARIANTS, "dense"], default=None)
    parser.add_argument("--tokens", type=int, default=100_000)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=600.0, help="take up no new row after this")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()

    variants = args.variants or ["dense", *(name for chosen in args.sets for name in SETS[chosen])]
    result: dict[str, Any] = {"rows": []}
    if args.out.exists():
        result = json.loads(args.out.read_text())
    result |= {
        "protocol": f"books/valid, first {args.tokens} tokens, non-overlapping windows of {WINDOW}; calibrated on "
        f"{CALIBRATION_WINDOWS * WINDOW} tokens of books/train-00, windows of {WINDOW}; seed 0; spikes and ESTIMATED "
        f"energy on the first {COUNTED} tokens, prefill; fp32 without TF32",
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }
    have = {(row["model"], row["variant"]) for row in result["rows"]}
    jobs = [(m, v, args.tokens, args.device) for v in variants for m in args.models if (m, v) not in have]
    begin = time.time()

    def keep(row: dict[str, Any]) -> None:
        result["rows"].append(row)
        partial = args.out.with_suffix(".partial")
        partial.write_text(json.dumps(result, indent=1))
        partial.replace(args.out)
        print(
            f"{row['model']:11} {row['variant']:30} perplexity {row['perplexity']:9.3f} "
            f"({row['seconds']:.0f} s; {time.time() - begin:.0f} s in all)",
            flush=True,
        )

    context = multiprocessing.get_context("spawn")
    with context.Pool(args.workers) as pool:
        waiting = [pool.apply_async(measure, (job,), callback=keep) for job in jobs]
        for one, job in zip(waiting, jobs, strict=True):
            left = args.minutes * 60 - (time.time() - begin)
            try:
                one.get(max(left, 1))
            except multiprocessing.TimeoutError:
                pool.terminate()
                break
            except Exception as error:  # one variant's failure must not lose the others
                print(f"FAILED {job[:2]}: {type(error).__name__}: {error}", flush=True)


if __name__ == "__main__":
    main()
