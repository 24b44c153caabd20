"""LAS on the embedded BERT's SST-2 classifier: accuracy of the dense and of the spiking model, and agreement.

    python benchmarks/bert_sst2.py [--steps 16 8] [--sentences 872] [--out benchmarks/results/bert-las.json]

Text: ``glue/SST-2`` under SPIKEFORM_DATA. Protocol: the 872 sentences of the official development set, in batches of
32 padded to their longest sentence; thresholds from 256 training sentences.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import platform
import time
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import spikeform
from spikeform import pretrained
from spikeform.evaluation import classification_agreement, data_root, labelled_batches, load_labelled

CALIBRATION = 256


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="pretrained:bert-sst2")
    parser.add_argument("--steps", type=int, nargs="+", default=[16, 8])
    parser.add_argument("--sentences", type=int, default=872)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "bert-las.json")
    args = parser.parse_args()

    torch.backends.cuda.matmul.allow_tf32 = False
    path = pretrained.resolve(args.model)
    tokenizer = AutoTokenizer.from_pretrained(path)
    dense = AutoModelForSequenceClassification.from_pretrained(path).to(args.device).eval()
    folder = data_root() / "glue" / "SST-2"
    texts, labels = (part[: args.sentences] for part in load_labelled(folder / "test.tsv"))
    sentences, _ = load_labelled(folder / "train.tsv.xz")
    calibration = [sentence for sentence in sentences if len(sentence.split()) >= 8][:CALIBRATION]
    result = {
        "model": args.model,
        "protocol": f"SST-2, {len(texts)} sentences of the official development set, batches of {args.batch_size} "
        f"padded to their longest; thresholds from the first {len(calibration)} training sentences of at least 8 "
        "words; float32",
        "hardware": torch.cuda.get_device_name()
        if args.device == "cuda"
        else f"CPU {platform.machine()}, {torch.get_num_threads()} threads",
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "rows": [],
    }
    for steps in args.steps:
        started = time.time()
        spiking = spikeform.convert(copy.deepcopy(dense), spikeform.LAS(steps=steps), calibration, tokenizer=tokenizer)
        batches = labelled_batches(tokenizer, texts, labels, args.batch_size)
        found = classification_agreement(spiking, dense, batches).to_dict()
        # Of the difference of two accuracies on the same sentences, whatever the direction of each change.
        changed = 1 - found["agreement"]
        found["accuracy_difference"] = found["accuracy"] - found["dense_accuracy"]
        found["difference_stderr"] = math.sqrt(max(0.0, changed - found["accuracy_difference"] ** 2) / len(texts))
        result["rows"].append({"config": {"method": "las", "steps": steps}, **found})
        args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        print(
            f"T={steps}: dense {found['dense_accuracy']:.4f} spiking {found['accuracy']:.4f} "
            f"agreement {found['agreement']:.4f} KL {found['kl']:.2e} ({time.time() - started:.0f} s)",
            flush=True,
        )


if __name__ == "__main__":
    main()
