"""The fully spiking variant of FAS: neurons at every linear layer of the blocks, few-spike operators for the rest.

    python benchmarks/fas_full.py --model CHECKPOINT --dense gpt2 --ids IDS.npy --out FILE.json

CHECKPOINT is one of fas_train.py with --set 'sites="all"'. It is calibrated for T, gets the operators, and what runs is
counted. A model trained for minutes on a CPU shows what such a network costs, not how good it can be.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import reference_data as text
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import spikeform
from spikeform import pretrained
from spikeform.conversion.record import hardware
from spikeform.methods.fas import operators

WINDOW, MEASURED, WITH_OPERATORS, COUNTED = 512, 20480, 6144, 512


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--dense", required=True, help="embedded model that it came from")
    parser.add_argument("--ids", type=Path, required=True, help="tokenised training text of fas_train.py")
    parser.add_argument("--data", type=Path, help="default: $SPIKEFORM_DATA, else ../shared/data")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--operators", type=int, default=12)
    arguments = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    held = torch.from_numpy(text.encode_held_out(text.data_folder(arguments.data), tokenizer, "books")[0][:MEASURED])
    ids = torch.from_numpy(np.load(arguments.ids).astype("int64"))[:65536].view(-1, 256)
    dense = AutoModelForCausalLM.from_pretrained(pretrained.path(arguments.dense), dtype=torch.float32)
    model = spikeform.load(arguments.model, dtype=torch.float32)
    stage_1 = model.spikeform_report.history[-1]

    def measure(network, tokens: int = MEASURED) -> float:
        return spikeform.perplexity(network, held[:tokens], window=WINDOW, batch_size=1).perplexity

    found = {"dense": measure(dense), "qcfs": measure(model)}
    found["uncalibrated"] = measure(spikeform.set_steps(model, arguments.steps))
    options = {"steps": arguments.steps, "coarse_steps": 10, "fine_steps": 15, "batch_size": 4, "window": 256}
    spikeform.calibrate(model, ids, options=spikeform.CalibrateOptions(**options))
    found["calibrated"] = measure(model)
    short = {"dense": measure(dense, WITH_OPERATORS), "calibrated": measure(model, WITH_OPERATORS)}
    operators.add(model, arguments.operators, [row[None] for row in ids[:16]])
    short["with operators"] = measure(model, WITH_OPERATORS)
    energy = spikeform.energy(model, held[None, :COUNTED], dense=dense, window=256)
    result = {
        "model": arguments.model.name,
        "protocol": f"books/valid, first {MEASURED} tokens (perplexity), the first {WITH_OPERATORS} of them "
        f"(perplexity_short), the first {COUNTED} (energy, windows of 256), windows of {WINDOW}",
        "hardware": hardware(),
        "config": model.config.quantization_config.to_dict(),
        "stage_1": {key: stage_1[key] for key in ("options", "steps", "seconds", "metrics", "hardware", "versions")},
        "calibration": options,
        "perplexity": found,
        "perplexity_short": short,
        "spikes_per_element": energy.spikes_per_element,
        "spike_rate": energy.spike_rate,
        "streaming": energy.streaming,
        "summary": energy.summary(),
    }
    arguments.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps({"perplexity": found, "perplexity_short": short}))


if __name__ == "__main__":
    main()
