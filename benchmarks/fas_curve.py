"""What FAS keeps: perplexity of the QCFS network, and of the spiking one before and after each stage of calibration.

    python benchmarks/fas_curve.py --model FAS_CHECKPOINT --control DENSE_FOLDER --out FILE.json [--steps 8 4 16]

The control was trained the same way without neurons (benchmarks/fas_train.py --variant dense); the dense model is what
both came from. Held-out text: books/valid, the first 100,000 tokens in windows of 512. Calibration: the training text.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import time
from pathlib import Path

import numpy as np
import reference_data as text
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

import spikeform
from spikeform import pretrained
from spikeform.methods.fas import CalibrateOptions

WINDOW, HELD_OUT = 512, 100_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="after stage 1; without it only the other two are measured")
    parser.add_argument("--control", type=Path, help="trained the same way without neurons")
    parser.add_argument("--dense", help="what both came from, e.g. gpt2 (embedded)")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--save", type=Path, help="folder for the checkpoints calibrated for each T")
    parser.add_argument("--data", type=Path, help="default: $SPIKEFORM_DATA, else ../shared/data")
    parser.add_argument("--ids", type=Path, help="tokenised training text (.npy) of fas_train.py")
    parser.add_argument("--steps", type=int, nargs="+", default=[8, 4, 16])
    parser.add_argument("--tokens", type=int, default=HELD_OUT)
    parser.add_argument("--calibration", type=int, default=524288, help="tokens to calibrate on")
    parser.add_argument("--coarse", type=int, default=60)
    parser.add_argument("--fine", type=int, default=120)
    parser.add_argument("--batch-size", type=int, default=8)
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(arguments.model or arguments.control)
    held, _ = text.encode_held_out(text.data_folder(arguments.data), tokenizer, "books")
    held = torch.from_numpy(held[: arguments.tokens])
    result = {
        "model": (arguments.model or arguments.control).name,
        "protocol": f"books/valid, first {arguments.tokens} tokens, windows of {WINDOW}; weights rounded to bfloat16, "
        f"computed in fp32; calibrated on {arguments.calibration} tokens of the training text",
        "hardware": torch.cuda.get_device_name() if device == "cuda" else f"CPU ({platform.machine()})",
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "perplexity": {},
        "streams": {},
    }

    def write() -> None:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        print(result["model"], json.dumps(result["perplexity"]), json.dumps(result["streams"]), flush=True)

    def measure(model) -> float:
        return spikeform.perplexity(model, held, window=WINDOW, batch_size=4).perplexity

    def load():
        return spikeform.load(arguments.model, dtype=torch.float32).to(device)

    for name, folder in (("control", arguments.control), ("dense", arguments.dense)):
        if folder is not None:
            folder = pretrained.path(folder) if name == "dense" else folder
            dense = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device)
            result["perplexity"][name] = measure(dense)
    write()
    if arguments.model is None:
        return
    ids = torch.from_numpy(np.load(arguments.ids)[: arguments.calibration].astype("int64")).view(-1, WINDOW)
    model = load()
    result["stage_1"] = {key: value for key, value in model.spikeform_report.history[-1].items() if key != "data"}
    result["config"] = model.config.quantization_config.to_dict()
    result["perplexity"]["qcfs"] = measure(spikeform.set_steps(model, 0))
    write()
    for steps in arguments.steps:
        started = time.monotonic()
        model = spikeform.set_steps(load(), steps)
        row = {"uncalibrated": measure(model)}
        options = {"steps": steps, "batch_size": arguments.batch_size, "coarse_steps": arguments.coarse}
        spikeform.calibrate(model, ids, options=CalibrateOptions(**options, granularity="layer", bf16=device == "cuda"))
        row["coarse"] = measure(model)
        options |= {"coarse_steps": 0, "fine_steps": arguments.fine, "start": "model"}
        spikeform.calibrate(model, ids, options=CalibrateOptions(**options, bf16=device == "cuda"))
        row |= {"fine": measure(model), "seconds": time.monotonic() - started}
        row["held_out_kl"] = [entry["metrics"]["after"]["kl"] for entry in model.spikeform_report.history[1:]]
        assert all(math.isfinite(row[key]) for key in ("uncalibrated", "coarse", "fine"))
        result["streams"][steps] = row
        if arguments.save:
            for name, parameter in model.named_parameters():
                if ".neuron." not in name:
                    parameter.data = parameter.data.to(torch.bfloat16)
            spikeform.save(model, arguments.save / f"{arguments.model.name}-t{steps}", tokenizer)
        write()


if __name__ == "__main__":
    main()
