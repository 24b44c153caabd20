"""Writes the section on mamba2 of the reference models' card from benchmarks/results/reference-mamba2.json.

python benchmarks/spiking_mamba_card.py
"""

from __future__ import annotations

from pathlib import Path

import readme_block
from bert_card import kept_point, machine, read

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- mamba2: begin (benchmarks/spiking_mamba_card.py) -->", "<!-- mamba2: end -->"


def section(report: dict, config: dict, size: int) -> str:
    """The section, with every figure from the report and the configuration; ``size`` of the folder in bytes."""
    stages = []
    for number, stage in enumerate(report["stages"]):
        curve, kept = stage["curve"], kept_point(stage)
        named = "Training" if not number else "Cool-down from the kept one"
        epochs = f"{curve[-1]['epoch']:.1f} epochs (kept: {kept['epoch']:.1f}) in {stage['seconds']:.0f} seconds"
        stages.append(
            f"{named}: the text above, {stage['unique_tokens'] / 1e6:.1f} million tokens; {epochs}, peak rate "
            f"{stage['lr']:g}, dropout {stage['dropout']:g}; on {machine(stage['hardware'])}; the rest as above."
        )
    lines = [
        f"| {name} | {found['nats_per_token']:.4f} | {found['perplexity']:.2f} | {found['bits_per_byte']:.4f} "
        f"| {found['predicted_tokens']:,} |"
        for name, found in (
            ("books", report["held_out"]["books"]),
            ("WikiText-103 validation, as above", report["held_out"]["wikitext"]),
        )
    ]
    first = report["stages"][0]
    return f"""## mamba2

A model without attention, for methods that spike through state-space layers: Mamba2ForCausalLM, \
{report["parameters"]:,} parameters, {size / 2**20:.1f} MiB;
{config["num_hidden_layers"]} layers × {config["hidden_size"]}, expanded {config["expand"]} times, \
{config["num_heads"]} heads × {config["head_dim"]}, a state of {config["state_size"]}, one group, convolution over \
{config["conv_kernel"]} tokens, chunks of {config["chunk_size"]};
embedding and head tied; the vocabulary of gpt2; trained on windows of {report["context"]}, no longest context.

| text | nats per token | perplexity | bits per byte | tokens predicted |
|---|---|---|---|---|
{chr(10).join(lines)}

{chr(10).join(stages)}
Its scan was computed by `benchmarks/spiking_mamba_scan.py`, the same sums as transformers' own.

    python benchmarks/train_reference.py --model mamba2 --out DIR --minutes {first["minutes"]:g} \
--epochs {first["epochs"]:g}"""


if __name__ == "__main__":
    folder = ROOT / "src" / "spikeform" / "pretrained" / "mamba2"
    found = read(ROOT / "benchmarks" / "results" / "reference-mamba2.json")
    text = section(found, read(folder / "config.json"), sum(file.stat().st_size for file in folder.iterdir()))
    readme_block.write(BEGIN, END, text, folder.parent / "CARD.md")
