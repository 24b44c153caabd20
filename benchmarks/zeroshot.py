"""Zero-shot accuracy of a reference model, dense and converted, through lm-evaluation-harness on local data.

python benchmarks/zeroshot.py --out benchmarks/results/zeroshot-llama.json [--limit 200]

The tasks' files lie under SPIKEFORM_DATA. Models this small sit near chance on all but BLiMP.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

import spikeform
from spikeform import pretrained
from spikeform.evaluation import zeroshot


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama")
    parser.add_argument("--steps", type=int, nargs="+", default=[16, 8])
    parser.add_argument("--tasks", nargs="+", default=["blimp", "piqa"])
    parser.add_argument("--limit", type=int, default=200, help="examples of each task (of each paradigm of BLiMP)")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    path = pretrained.resolve(args.model)
    tokenizer = AutoTokenizer.from_pretrained(path)
    dense = AutoModelForCausalLM.from_pretrained(path).eval()
    result = {
        "model": args.model,
        "limit": args.limit,
        "calibration": "16 sequences of 128 tokens sampled from the dense model",
        "hardware": f"CPU {platform.machine()}",
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "tasks": {},
    }
    for steps in (None, *args.steps):
        model = dense if steps is None else spikeform.convert(copy.deepcopy(dense), spikeform.LAS(steps=steps))
        found = zeroshot(model, tokenizer, args.tasks, limit=args.limit, batch_size=32)
        name = "dense" if steps is None else f"LAS, {steps} steps"
        result["protocol"] = found["protocol"]
        result["tasks"][name] = {
            task: {key: value for key, value in scores.items() if key != "parts"}
            for task, scores in found["tasks"].items()
        }
        print(name, result["tasks"][name], flush=True)
        args.out.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
