"""Writes the section on bert and bert-sst2 of the reference models' card from benchmarks/results.

python benchmarks/bert_card.py [RESULTS] [CARD]
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

BEGIN = "<!-- bert: written by benchmarks/bert_card.py -->"
END = "<!-- end of bert -->"
BEFORE = "## What to expect of them"


def read(path: Path) -> dict:
    """Returns a result."""
    return json.loads(path.read_text(encoding="utf-8"))


def kept_point(stage: dict) -> dict:
    """Returns the point of a stage's curve whose weights were kept."""
    return min(stage["curve"], key=lambda point: point["valid_loss"])


def machine(hardware: dict) -> str:
    """Returns what ran a stage, in words."""
    threads = f" ({hardware['threads']} thread{'s' * (hardware['threads'] > 1)})" if "threads" in hardware else ""
    device = f"a CPU{threads}, float32" if threads else f"one {hardware['device']}, bfloat16 autocast"
    return f"{device}, torch {hardware['torch'].split('+')[0]}, transformers {hardware['transformers']}"


def section(results: Path, folder: Path) -> str:
    """Returns the section, with every figure from the results and the configuration."""
    masked, classifier = read(results / "reference-bert.json"), read(results / "reference-bert-sst2.json")
    config = read(folder / "config.json")
    stage = masked["stages"][-1]
    books, wikitext = masked["held_out"]["books"], masked["held_out"]["wikitext"]
    test, held, settings = classifier["test"], classifier["held_out"], classifier["settings"]
    kept = next(r for r in classifier["runs"] if {k: r[k] for k in ("rate", "seed")} == classifier["kept"])
    last = max(kept["curve"], key=lambda point: (point["held_out_accuracy"], -point["held_out_loss"]))
    rates = sorted({run["rate"] for run in classifier["runs"]})
    epochs, kept_epoch = stage["curve"][-1]["epoch"], kept_point(stage)["epoch"]
    seeds = {run["seed"] for run in classifier["runs"]}
    chosen = "Learning rate, seed and step were" if len(classifier["runs"]) > 1 else "The step was"
    penalty = f"score penalty {stage['score_penalty']:g}" if stage["score_penalty"] else "no score penalty"
    runs = len(classifier["runs"])
    searched = f" (of {runs} runs over {', '.join(f'{rate:g}' for rate in rates)})" if runs > 1 else ""

    def size(name: str) -> str:
        files = (folder.parent / name).iterdir()
        return f"{sum(file.stat().st_size for file in files) / 2**20:.1f} MiB"

    return f"""## bert and bert-sst2

| | bert | bert-sst2 |
|---|---|---|
| class | BertForMaskedLM, decoder tied | BertForSequenceClassification, negative / positive |
| parameters | {masked["parameters"]:,} | {classifier["parameters"]:,} |
| folder | {size("bert")} | {size("bert-sst2")} |

Both: {config["num_hidden_layers"]} layers × {config["hidden_size"]}, {config["num_attention_heads"]} heads, \
feed-forward {config["intermediate_size"]} ({config["hidden_act"]}), LayerNorm after each block, \
{config["max_position_embeddings"]}
learned positions, a lower-casing WordPiece vocabulary of \
{config["vocab_size"]} that reads "it 's" and "do n't" as "it's" and "don't".

bert, held-out text, in rows of [CLS], 126 tokens, [SEP], of which 19 are predicted (80% masked, 10% replaced, 10% kept;
one draw from a fixed seed); saved weights in float32. The checkpoint was chosen by its loss on books.

| text | nats per predicted token | predicted rightly | tokens predicted |
|---|---|---|---|
| books | {books["nats_per_token"]:.4f} | {books["accuracy"]:.1%} | {books["predicted_tokens"]:,} |
| WikiText-103 validation, as above | {wikitext["nats_per_token"]:.4f} | {wikitext["accuracy"]:.1%} \
| {wikitext["predicted_tokens"]:,} |

bert-sst2: **{test["accuracy"]:.1%}** of the {test["sentences"]} sentences of SST-2's official development set, on \
which no choice depended.
{chosen} chosen on {held["sentences"]} sentences of the training set ({held["accuracy"]:.1%} \
right there); no phrase of
4 words or more of theirs was trained on with its label.

Training of bert: the text above and, four times, the sentences of SST-2's training set without labels, in all
{stage["unique_tokens"] / 1e6:.1f} million tokens; {epochs:.1f} epochs (kept: {kept_epoch:.1f}) in \
{stage["seconds"]:.0f} seconds, peak rate {stage["lr"]:g}, {penalty}, masks
drawn anew in each step; on {machine(stage["hardware"])}; the rest as above.
Fine-tuning: rate {kept["rate"]:g}, seed {kept["seed"]}{searched}, kept at step {last["step"]} of {kept["steps"]}; \
{settings["epochs"]:g} epochs of batches of
{settings["batch_size"]}, dropout {settings["dropout"]:g}, {settings["hide"]:.0%} of the words hidden, in \
{kept["seconds"]:.0f} seconds of a machine that did other work too;
on {machine(classifier["hardware"])}.
SST-2 (GLUE; Socher et al. 2013) is film reviews' sentences; the project holds none of them.

    python benchmarks/train_reference.py --model bert --out DIR --minutes {stage["minutes"]:g} --patience \
{stage["patience"]}
    python benchmarks/bert_finetune.py --init DIR/bert --out DIR --epochs {settings["epochs"]:g} \
--batch-size {settings["batch_size"]} --seeds {len(seeds)} --rates {" ".join(f"{rate:g}" for rate in rates)}
"""


def write(results: Path, card: Path) -> None:
    """Puts the section into the card, in place of an earlier one."""
    text = card.read_text(encoding="utf-8")
    if BEGIN in text:
        head, rest = text.split(BEGIN)
        text = head + rest.split(END)[1].lstrip("\n")
    head, rest = text.split(BEFORE)
    new = section(results, card.parent / "bert")
    card.write_text(f"{head}{BEGIN}\n{new}{END}\n\n{BEFORE}{rest}", encoding="utf-8")


if __name__ == "__main__":
    here = Path(__file__).resolve().parent
    arguments = [Path(argument) for argument in sys.argv[1:]]
    write(
        arguments[0] if arguments else here / "results",
        arguments[1] if len(arguments) > 1 else here.parent / "src" / "spikeform" / "pretrained" / "CARD.md",
    )
