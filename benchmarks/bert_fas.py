"""FAS on the embedded BERT's SST-2 classifier: QCFS network, spiking network before and after calibration, control.

    python benchmarks/bert_fas.py --work DIR [--variants dense streams qcfs] [--steps 4 8] [--out FILE.json]

Stage 1 goes on from the dense classifier, which is also its teacher: ``dense`` (no neurons: the control), ``qcfs`` and
``streams`` (a share of each batch runs as the spiking network, ours) see the same phrases in the same order. The
paper's own order is ``masked-qcfs``: masked words first, then labels, without a teacher; its control is
``masked-dense``. Stage 2 calibrates for each T, first one scale and potential per layer (coarse), then per channel
(fine). The 872 test sentences are only measured; nothing is chosen by them. A variant whose folder is in --work is
not trained again.

Text: ``glue/SST-2`` under --data. Written into --work: the phrases, and one folder a variant.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import time
from pathlib import Path

import bert_data
import torch
import transformers
from reference_data import data_folder
from transformers import AutoModelForMaskedLM, AutoModelForSequenceClassification, AutoTokenizer

import spikeform
from spikeform import pretrained
from spikeform.evaluation import labelled_batches
from spikeform.methods.fas import CalibrateOptions
from spikeform.training import TrainOptions
from spikeform.training.heads import with_classifier

VARIANTS = ("dense", "streams", "qcfs", "masked-dense", "masked-qcfs")
WORDS = range(4, 21)  # of the phrases that train
THRESHOLDS = 512  # phrases on which the first thresholds are found
Labelled = tuple[list[str], list[int]]


def parse_arguments() -> argparse.Namespace:
    """Returns the command line's arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--model", default="pretrained:bert-sst2")
    parser.add_argument("--data", type=Path, help="default: $SPIKEFORM_DATA, else ../shared/data")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "bert-fas.json")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS[:3]))
    parser.add_argument("--steps", type=int, nargs="+", default=[4, 8], help="T")
    parser.add_argument("--phrases", type=int, default=8192, help="that train, one epoch of them")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--threshold-learning-rate", type=float, default=5e-3)
    parser.add_argument("--distil", type=float, default=1.0)
    parser.add_argument("--masked-epochs", type=float, default=2.0, help="of masked words")
    parser.add_argument("--masked-learning-rate", type=float, default=3e-4, help="of masked words, and a new head's")
    parser.add_argument("--head-epochs", type=float, default=2.0, help="with labels, where the head is new")
    parser.add_argument("--streams", type=int, default=4, help="T of the variant of that name")
    parser.add_argument("--calibration", type=int, default=1024, help="phrases to calibrate on")
    parser.add_argument("--coarse", type=int, default=40)
    parser.add_argument("--fine", type=int, default=80)
    parser.add_argument("--sentences", type=int, default=872, help="of the test, to try the script")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def write_tsv(path: Path, labelled: Labelled) -> None:
    """Writes labelled sentences as spikeform.train reads them."""
    lines = [f"{text}\t{label}" for text, label in zip(*labelled, strict=True)]
    path.write_text("\n".join(["sentence\tlabel", *lines]) + "\n", encoding="utf-8")


def phrases(data: Path, count: int, seed: int) -> tuple[Labelled, Labelled, list[str]]:
    """Returns what trains and what is held out.

    Returns:
        Phrases that train; the held-out sentences, none of the phrases is part of one (bert_data.py); and the whole
        sentences among all phrases that may train, for masked words.
    """
    texts, labels = bert_data.sst2(data, "train")
    train, held = bert_data.split_sst2(texts, labels)
    whole = bert_data.whole_sentences(texts[i] for i in train)
    fitting = [i for i in train if len(texts[i].split()) in WORDS]
    chosen = random.Random(seed).sample(fitting, min(count, len(fitting)))
    first, second = (([texts[i] for i in rows], [labels[i] for i in rows]) for rows in (chosen, held))
    return first, second, random.Random(seed).sample(whole, len(whole))


@torch.inference_mode()
def classes(model, tokenizer, texts: list[str]) -> torch.Tensor:
    """Returns the class that a model gives to each sentence; sentences of a batch are alike in length."""
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    found = torch.empty(len(texts), dtype=torch.long)
    batches = labelled_batches(tokenizer, [texts[i] for i in order], batch_size=32, device=model.device)
    found[order] = torch.cat([model(**batch).logits.argmax(-1).cpu() for batch in batches])
    return found


def main() -> None:
    """Trains, calibrates, measures."""
    arguments = parse_arguments()
    cuda = torch.cuda.is_available()
    device = "cuda" if cuda else "cpu"
    torch.backends.cuda.enable_cudnn_sdp(False)  # as in bert_finetune.py
    folder = pretrained.resolve(arguments.model)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    data = data_folder(arguments.data)
    train, held, whole = phrases(data, arguments.phrases, arguments.seed)
    held, test = (tuple(x[: arguments.sentences] for x in part) for part in (held, bert_data.sst2(data, "test")))
    arguments.work.mkdir(parents=True, exist_ok=True)
    files = [arguments.work / name for name in ("train.tsv", "held-out.tsv")]
    for file, part in zip(files, (train, held), strict=True):
        write_tsv(file, part)
    tests = {"held_out": held, "test": test}
    options = TrainOptions(
        task="classify",
        window=64,
        batch_size=arguments.batch_size,
        epochs=1,
        learning_rate=arguments.learning_rate,
        threshold_learning_rate=arguments.threshold_learning_rate,
        distil=arguments.distil,
        bf16=cuda,
        evaluate_every=10**6,  # before and after alone
        seed=arguments.seed,
    )

    def dense():
        return AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).to(device).eval()

    given = {name: classes(dense(), tokenizer, texts) for name, (texts, _) in tests.items()}

    def measure(model) -> dict:
        row = {}
        for name, (texts, labels) in tests.items():
            found = classes(model, tokenizer, texts)
            row[name] = (found == torch.tensor(labels)).double().mean().item()
            row[f"{name}_agreement"] = (found == given[name]).double().mean().item()
        return row

    result = {
        "model": arguments.model,
        "protocol": f"SST-2. Stage 1: one epoch of {len(train[0])} phrases of {WORDS[0]} to {WORDS[-1]} words, from "
        "the dense classifier, which is also the teacher, the same for all variants; masked-...: "
        f"{arguments.masked_epochs:g} epochs of masked words in {len(whole)} whole sentences, then "
        f"{arguments.head_epochs:g} epochs of the phrases with a new head, no teacher; thresholds from {THRESHOLDS} of "
        f"them. Stage 2: {arguments.coarse} coarse steps, then {arguments.fine} fine ones per channel, on "
        f"{min(arguments.calibration, len(train[0]))} of them. test: accuracy on {len(test[0])} sentences of "
        f"the official development set, by which nothing was chosen; held_out: on {len(held[0])} sentences of the "
        "training set of which no phrase of 4 words or more trains; agreement: with the dense classifier. float32",
        "hardware": torch.cuda.get_device_name()
        if cuda
        else f"CPU {platform.machine()}, {torch.get_num_threads()} threads",
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "arguments": {k: v for k, v in vars(arguments).items() if k not in ("work", "data", "out", "variants")},
        "dense": measure(dense()),
        "variants": {},
    }

    def write(note: str, row: dict) -> None:
        arguments.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        print(note, {name: round(value, 4) for name, value in row.items()}, flush=True)

    def convert(model) -> None:
        texts = train[0][:THRESHOLDS]
        spikeform.convert(model, spikeform.FAS(steps=0), calibration=texts, tokenizer=tokenizer)

    def body(variant: str):
        """Returns a classifier, its head untrained, on a body that was trained on masked words."""
        model = AutoModelForMaskedLM.from_pretrained(pretrained.path("bert"), dtype=torch.float32).to(device)
        if variant != "masked-dense":
            convert(model)
        chosen = {"task": "masked", "window": 128, "batch_size": 16, "epochs": arguments.masked_epochs, "distil": 0.0}
        chosen |= {"learning_rate": arguments.masked_learning_rate}
        spikeform.train(model, whole, tokenizer, TrainOptions.from_dict(options.to_dict() | chosen))
        classifier = with_classifier(model, 2, tokenizer, train[0][:THRESHOLDS], arguments.seed)
        if variant == "masked-dense":
            classifier.spikeform_history = model.spikeform_history
        return classifier.to(device)

    def stage_1(variant: str):
        """Returns the variant's model and the records of its training."""
        target = arguments.work / variant
        if not target.is_dir():
            chosen = options.to_dict() | {"streams": arguments.streams if variant == "streams" else 0}
            if variant.startswith("masked"):
                model = body(variant)
                chosen |= {"distil": 0.0, "epochs": arguments.head_epochs}
                chosen |= {"learning_rate": arguments.masked_learning_rate}
            else:
                model = dense()
                if variant != "dense":
                    convert(model)
            teacher = dense() if chosen["distil"] else None
            chosen = TrainOptions.from_dict(chosen)
            spikeform.train(model, files[0], tokenizer, chosen, out=target, valid=files[1], teacher=teacher)
        if variant.endswith("dense"):
            model = AutoModelForSequenceClassification.from_pretrained(target, dtype=torch.float32).to(device).eval()
            return model, json.loads((target / "training.json").read_text(encoding="utf-8"))["history"]
        model = spikeform.load(target, dtype=torch.float32).to(device)
        return model, list(model.spikeform_report.history)

    write("dense", result["dense"])
    for variant in arguments.variants:
        model, record = stage_1(variant)
        rows = result["variants"][variant] = {"stage_1": record}
        if variant.endswith("dense"):
            write(f"{variant} control", rows.setdefault("control", measure(model)))
            continue
        rows["config"] = model.config.quantization_config.to_dict()
        write(f"{variant} QCFS", rows.setdefault("qcfs", measure(spikeform.set_steps(model, 0))))
        batches = list(labelled_batches(tokenizer, train[0][: arguments.calibration]))
        for steps in arguments.steps:
            started = time.monotonic()
            model = spikeform.set_steps(stage_1(variant)[0], steps)
            row = rows[f"T={steps}"] = {}
            write(f"{variant} T={steps} uncalibrated", row.setdefault("uncalibrated", measure(model)))
            for stage, more in (
                ("coarse", {"granularity": "layer", "coarse_steps": arguments.coarse}),
                ("fine", {"coarse_steps": 0, "fine_steps": arguments.fine, "start": "model"}),
            ):
                plan = CalibrateOptions(steps=steps, batch_size=16, seed=arguments.seed, **more)
                spikeform.calibrate(model, batches, options=plan)
                write(f"{variant} T={steps} {stage}", row.setdefault(stage, measure(model)))
            row["calibration"] = [
                {k: entry[k] for k in ("stage", "options", "metrics", "seconds")}
                for entry in model.spikeform_report.history
                if entry["stage"].startswith("calibrate")
            ]
            row["seconds"] = round(time.monotonic() - started, 1)
            arguments.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
