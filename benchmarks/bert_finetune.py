"""Fine-tunes the embedded BERT on SST-2, and writes the classifier's folder and its figures.

    python benchmarks/bert_finetune.py --init OUT/bert --out OUT --data DIR [--minutes M]

First each learning rate runs with one seed, then the best rate with further seeds, as far as --minutes goes. Held-out
sentences decide between rates, seeds and steps. They come from the training set and share no phrase with what trains
(bert_data.py). The 872 test sentences are read once, for the weights that are saved. Written into --out:

    bert-sst2/                 the model folder (BertForSequenceClassification), weights rounded to bfloat16
    reference-bert-sst2.json   protocol, hardware, versions, all runs, figures of the saved weights
"""

from __future__ import annotations

import argparse
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path

import bert_data
import reference_models as reference
import torch
import torch.nn.functional as F
from reference_data import data_folder
from train_reference import hardware, learning_rate, make_optimizer

LONGEST = 96  # ids of a sentence
POOL = 64  # batches among which sentences are sorted by length


def parse_arguments() -> argparse.Namespace:
    """Returns the command line's arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--init", type=Path, required=True, help="the folder of the masked language model")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--data", type=Path, help="default: $SPIKEFORM_DATA, else ../shared/data")
    parser.add_argument("--minutes", type=float, default=2.0, help="no new run begins after this")
    parser.add_argument("--epochs", type=float, default=4.0)
    parser.add_argument("--rates", type=float, nargs="+", default=[2e-4, 4e-4, 8e-4], help="peak learning rates")
    parser.add_argument("--seeds", type=int, default=5, help="runs of the best rate, at most")
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--dropout", type=float, default=0.15)
    parser.add_argument("--hide", type=float, default=0.1, help="share of the words of a sentence shown as [MASK]")
    parser.add_argument("--evaluations", type=int, default=10, help="in a run")
    parser.add_argument("--steps", type=int, help="of a run, instead of --epochs (to try the script)")
    return parser.parse_args()


@dataclass
class Sentences:
    """Encoded sentences on the device: ids [N, 96] padded, lengths [N], labels [N]."""

    ids: torch.Tensor
    lengths: torch.Tensor
    labels: torch.Tensor

    @classmethod
    def encode(cls, tokenizer, texts: list[str], labels: list[int], device: str) -> Sentences:
        """Encodes sentences."""
        encoded = tokenizer(texts, truncation=True, max_length=LONGEST, padding="max_length", return_tensors="pt")
        lengths = encoded["attention_mask"].sum(1)
        return cls(encoded["input_ids"].to(device), lengths, torch.tensor(labels, device=device))

    def take(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Returns ids [B, S], mask [B, S] and labels [B] of some rows, S the length of the longest."""
        lengths = self.lengths[rows]
        width = int(lengths.max())
        device = self.ids.device
        rows = rows.to(device)
        mask = torch.arange(width, device=device) < lengths.to(device)[:, None]
        return self.ids[rows, :width], mask.long(), self.labels[rows]

    def epoch(self, size: int, generator: torch.Generator) -> list[torch.Tensor]:
        """Returns the rows of each batch of an epoch, in random order; sentences of a batch are alike in length."""
        whole = torch.randperm(len(self.labels), generator=generator)[: len(self.labels) // size * size]
        pools = [pool[self.lengths[pool].argsort()] for pool in whole.split(POOL * size)]
        batches = [batch for pool in pools for batch in pool.split(size)]
        return [batches[i] for i in torch.randperm(len(batches), generator=generator)]


@torch.no_grad()
def accuracy(model, sentences: Sentences, autocast: bool) -> tuple[float, float]:
    """Returns the share of sentences classified as labelled, and the mean loss."""
    model.eval()
    device = sentences.ids.device.type
    right = loss = 0.0
    for rows in sentences.lengths.argsort().split(256):
        ids, mask, labels = sentences.take(rows)
        with torch.autocast(device, dtype=torch.bfloat16, enabled=autocast):
            logits = model(input_ids=ids, attention_mask=mask).logits.float()
        right += (logits.argmax(-1) == labels).sum().item()
        loss += F.cross_entropy(logits, labels, reduction="sum").item()
    return right / len(sentences.labels), loss / len(sentences.labels)


def run(arguments, tokenizer, parts: dict, rate: float, seed: int, device: str) -> tuple[dict, dict]:
    """Fine-tunes once.

    Returns:
        The record of the run, and its best weights by held-out accuracy (by loss where that is equal).
    """
    from transformers import BertForSequenceClassification

    torch.manual_seed(seed)
    model = BertForSequenceClassification.from_pretrained(
        arguments.init,
        dtype=torch.float32,
        id2label={0: "negative", 1: "positive"},
        label2id={"negative": 0, "positive": 1},
        hidden_dropout_prob=arguments.dropout,
        attention_probs_dropout_prob=arguments.dropout,
    ).to(device)
    arguments.lr = rate
    optimizer = make_optimizer(model, arguments, device)
    train = parts["train"]
    per_epoch = len(train.labels) // arguments.batch_size
    steps = arguments.steps or math.ceil(arguments.epochs * per_epoch)
    due = {steps * (i + 1) // arguments.evaluations for i in range(arguments.evaluations)}
    generator = torch.Generator().manual_seed(seed)
    started, curve, losses = time.monotonic(), [], []
    best, weights = (-1.0, 0.0), {}
    for step in range(steps):
        if step % per_epoch == 0:
            order = train.epoch(arguments.batch_size, generator)
        ids, mask, labels = train.take(order[step % per_epoch])
        hidden = (torch.rand(ids.shape, device=device) < arguments.hide) & (ids >= len(bert_data.SPECIAL))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step / steps, rate, warm_up=0.1)
        model.train()
        with torch.autocast(device, dtype=torch.bfloat16, enabled=device == "cuda"):
            logits = model(input_ids=ids.masked_fill(hidden, tokenizer.mask_token_id), attention_mask=mask).logits
        loss = F.cross_entropy(logits.float(), labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.detach())
        if step + 1 in due:
            share, held_loss = accuracy(model, parts["held_out"], device == "cuda")
            if not math.isfinite(held_loss + losses[-1].item()):
                raise SystemExit(f"the loss is no number any more at step {step + 1}, rate {rate}: nothing is saved")
            point = {"step": step + 1, "held_out_accuracy": round(share, 5), "held_out_loss": round(held_loss, 5)}
            curve.append(point | {"train_loss": round(torch.stack(losses).mean().item(), 5)})
            losses = []
            if (share, -held_loss) > best:
                best = (share, -held_loss)
                weights = {key: value.detach().clone() for key, value in model.state_dict().items()}
    record = {"rate": rate, "seed": seed, "steps": steps, "held_out_accuracy": round(best[0], 5)}
    record |= {"held_out_loss": round(-best[1], 5), "seconds": round(time.monotonic() - started, 1), "curve": curve}
    print(json.dumps({key: value for key, value in record.items() if key != "curve"}), flush=True)
    return record, {"model": model, "weights": weights}


def main() -> None:
    """Searches, saves the best, and measures it."""
    from transformers import AutoTokenizer, logging

    logging.set_verbosity_error()  # each run would report that the pooler and the classifier are new
    logging.disable_progress_bar()
    arguments = parse_arguments()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    # On Hopper the default for masked attention is cuDNN's kernel, whose backward pass can give NaN (pytorch issue
    # 196678, and others).
    torch.backends.cuda.enable_cudnn_sdp(False)
    data = data_folder(arguments.data)
    tokenizer = AutoTokenizer.from_pretrained(arguments.init)
    texts, labels = bert_data.sst2(data, "train")
    parts = {}
    for name, rows in zip(("train", "held_out"), bert_data.split_sst2(texts, labels), strict=True):
        chosen = [texts[i] for i in rows], [labels[i] for i in rows]
        parts[name] = Sentences.encode(tokenizer, *chosen, device)
    parts["test"] = Sentences.encode(tokenizer, *bert_data.sst2(data, "test"), device)
    started = time.monotonic()

    def key(record: dict) -> tuple[float, float]:
        return record["held_out_accuracy"], -record["held_out_loss"]

    records, kept = [], None

    def attempt(rate: float, seed: int) -> None:
        nonlocal kept
        if records and time.monotonic() - started > 60 * arguments.minutes:
            return
        record, result = run(arguments, tokenizer, parts, rate, seed, device)
        if kept is None or key(record) > key(kept[0]):
            kept = record, result
        records.append(record)

    for rate in arguments.rates:
        attempt(rate, 0)
    rate = max(records, key=key)["rate"]
    for seed in range(1, arguments.seeds):
        attempt(rate, seed)
    record, result = kept
    model = result["model"]
    model.load_state_dict(result["weights"])
    reference.round_to_bfloat16(model)
    figures = {}
    for name in ("held_out", "test"):
        share, loss = accuracy(model, parts[name], autocast=False)
        figures[name] = {"accuracy": round(share, 5), "loss": round(loss, 5), "sentences": len(parts[name].labels)}
    left_out = ("init", "out", "data", "lr", "rates", "seeds", "minutes", "steps")
    report = {
        "model": "bert-sst2",
        "parameters": sum(p.numel() for p in model.parameters()),
        "protocol": f"SST-2. {len(parts['train'].labels)} phrases train; {len(parts['held_out'].labels)} whole "
        "sentences of the training set, none of whose phrases of 4 words or more train, chose rate, seed and step; "
        "test: the 872 sentences of the official development set, read once; saved weights (rounded to bfloat16), "
        "computed in float32",
        **figures,
        "settings": {k: v for k, v in vars(arguments).items() if k not in left_out},
        "kept": {k: record[k] for k in ("rate", "seed")},
        "hardware": hardware(device) | ({} if device == "cuda" else {"threads": torch.get_num_threads()}),
        "runs": records,
    }
    tokenizer.backend_tokenizer.no_padding()  # what encoding set would be saved with the tokenizer
    tokenizer.backend_tokenizer.no_truncation()
    reference.save_folder(model, tokenizer, arguments.out / "bert-sst2")
    path = arguments.out / "reference-bert-sst2.json"
    path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(json.dumps({"kept": report["kept"], **figures}), flush=True)


if __name__ == "__main__":
    main()
