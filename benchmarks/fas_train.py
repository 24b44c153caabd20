"""Stage 1 of FAS on an embedded model: the QCFS network, and the control that is trained the same way without it.

    python benchmarks/fas_train.py --model gpt2 --variant qcfs --out DIR [--data DIR] [--steps N]

Variants: ``dense`` (no neurons: the control), ``qcfs`` (the paper's stage 1), ``streams`` (a quarter of each batch
runs as the spiking network of T streams, ours). All see the same text, that of the model's own training, in the same
order. Written: DIR/MODEL-VARIANT, a checkpoint whose manifest holds the options and the curve.
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
import spikeform.conversion
from spikeform import pretrained
from spikeform.neurons import StreamingNeuron
from spikeform.training import TrainOptions

VARIANTS = ("dense", "qcfs", "streams")
CALIBRATION = 16384  # tokens on which the first thresholds are found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("gpt2", "llama", "opt"), required=True)
    parser.add_argument("--variant", choices=VARIANTS, required=True)
    parser.add_argument("--name", help="of the folder; default: MODEL-VARIANT")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--data", type=Path, help="default: $SPIKEFORM_DATA, else ../shared/data")
    parser.add_argument("--cache", type=Path, help="tokenised text; default: OUT/cache")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=6e-4)
    parser.add_argument("--threshold-learning-rate", type=float, default=3e-3)
    parser.add_argument("--streams", type=int, default=4, help="T of the variant of that name")
    parser.add_argument("--distil", type=float, default=0.0)
    parser.add_argument("--set", dest="options", nargs="*", default=[], help="options of FAS, key=value in JSON")
    parser.add_argument("--held-out", type=int, default=51200, help="tokens of the curve's held-out text")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    cuda = torch.cuda.is_available()
    data, cache = text.data_folder(arguments.data), arguments.cache or arguments.out / "cache"
    folder = pretrained.path(arguments.model)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    path = cache / f"{arguments.model}.npy"
    if not path.is_file():
        text.encode_documents(tokenizer, text.training_documents(data), tokenizer.eos_token_id, path)
    stream = torch.from_numpy(np.load(path).astype("int64"))
    held, _ = text.encode_held_out(data, tokenizer, "books")
    model = AutoModelForCausalLM.from_pretrained(folder).to("cuda" if cuda else "cpu")
    if arguments.variant != "dense":
        options = {key: json.loads(value) for key, value in (item.split("=", 1) for item in arguments.options)}
        spikeform.convert(model, spikeform.FAS(steps=0, **options), stream[None, :CALIBRATION])
    teacher = AutoModelForCausalLM.from_pretrained(folder) if arguments.distil else None
    out = arguments.out / (arguments.name or f"{arguments.model}-{arguments.variant}")
    spikeform.train(
        model,
        stream,
        tokenizer,
        TrainOptions(
            steps=arguments.steps,
            batch_size=arguments.batch_size,
            learning_rate=arguments.learning_rate,
            threshold_learning_rate=arguments.threshold_learning_rate,
            weight_decay=0.1,
            schedule="cosine",
            streams=arguments.streams if arguments.variant == "streams" else 0,
            distil=arguments.distil,
            bf16=cuda,
            evaluate_every=max(1, arguments.steps // 4),
            save_every=max(1, arguments.steps // 2),
            seed=arguments.seed,
        ),
        valid=torch.from_numpy(held[: arguments.held_out]),
        teacher=teacher,
        progress=lambda point: print(arguments.name or out.name, point, flush=True),
    )
    save(model, tokenizer, out)


@torch.no_grad()
def save(model, tokenizer, out: Path) -> None:
    """Writes the model, weights rounded to bfloat16 as those of all embedded models, thresholds in fp32."""
    thresholds = {id(p) for m in model.modules() if isinstance(m, StreamingNeuron) for p in m.parameters()}
    for parameter in model.parameters():
        if id(parameter) not in thresholds:
            parameter.data = parameter.data.to(torch.bfloat16)
    if spikeform.conversion.is_converted(model):
        spikeform.save(model, out, tokenizer)
    else:
        model.save_pretrained(out)
        tokenizer.save_pretrained(out)
        (out / "history.json").write_text(json.dumps(model.spikeform_history, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
