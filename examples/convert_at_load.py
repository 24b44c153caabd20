"""Convert while transformers loads a model; save and reload it as any other Hugging Face model.

python examples/convert_at_load.py [MODEL] [OUT]
"""

import sys

import torch
from transformers import AutoModelForCausalLM

import spikeform  # importing it makes converted checkpoints loadable
from spikeform import pretrained


def main(model: str = "llama", out: str = "llama-las") -> None:
    folder = pretrained.resolve(model)  # "llama" comes with spikeform; a hub id or a folder works too
    spiking = AutoModelForCausalLM.from_pretrained(folder, quantization_config=spikeform.LAS(steps=16))
    print(spiking.spikeform_report.summary())

    spiking.save_pretrained(out)
    again = AutoModelForCausalLM.from_pretrained(out)
    ids = torch.arange(10).view(1, -1)
    with torch.no_grad():
        same = torch.equal(spiking(ids).logits, again(ids).logits)
        with spikeform.executor("temporal"):  # literal spikes, one step at a time: the definition
            literal = again(ids).logits
        gap = (literal - again(ids).logits).abs().max() / literal.abs().max()
    print(f"reloaded, its logits are {'bit for bit the same' if same else 'DIFFERENT'}")
    print(f"step by step they agree to {gap:.0e} of the largest")


if __name__ == "__main__":
    main(*sys.argv[1:])
