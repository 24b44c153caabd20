"""Convert a model in memory, compare it with the dense one, save it, load it again.

python examples/convert_in_memory.py [MODEL] [OUT]
"""

import sys

import torch
from transformers import AutoModelForCausalLM

import spikeform
from spikeform import pretrained
from spikeform.evaluation import sample_ids


def main(model: str = "llama", out: str = "llama-las") -> None:
    folder = pretrained.resolve(model)  # "llama" comes with spikeform; a hub id or a folder works too
    dense = AutoModelForCausalLM.from_pretrained(folder)
    spiking = AutoModelForCausalLM.from_pretrained(folder)  # conversion works in place, so load it twice

    # Thresholds are found on texts or token ids given as calibration=, or on what the model itself writes.
    spikeform.convert(spiking, spikeform.LAS(steps=12, coding="signed_digit"))
    print(spiking.spikeform_report.summary())

    ids = sample_ids(dense, tokens=1024, window=128, seed=1)
    found = spikeform.fidelity(spiking, dense, ids, window=128)
    print(f"perplexity {found.perplexity:.4f}, dense {found.dense_perplexity:.4f}, KL {found.kl:.1e} nats")

    spikeform.save(spiking, out)
    again = spikeform.load(out)
    with torch.no_grad():
        same = torch.equal(spiking(ids[:1]).logits, again(ids[:1]).logits)
    print(f"saved to {out}; reloaded, its logits are {'bit for bit the same' if same else 'DIFFERENT'}")


if __name__ == "__main__":
    main(*sys.argv[1:])
