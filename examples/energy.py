"""Count spikes and estimate energy for three ways to spend them.

python examples/energy.py [MODEL]
"""

import sys

from transformers import AutoModelForCausalLM

import spikeform
from spikeform import pretrained
from spikeform.evaluation import sample_ids
from spikeform.report import show


def main(model: str = "llama") -> None:
    folder = pretrained.resolve(model)  # "llama" comes with spikeform; a hub id or a folder works too
    dense = AutoModelForCausalLM.from_pretrained(folder)
    ids = sample_ids(dense, tokens=256, window=128, seed=1)
    rows = []
    for steps, coding in ((16, "radix2"), (8, "radix2"), (8, "signed_digit")):
        spiking = AutoModelForCausalLM.from_pretrained(folder)
        spikeform.convert(spiking, spikeform.LAS(steps=steps, coding=coding))
        report = spikeform.energy(spiking, ids, dense=dense)
        estimate = report.estimates["45nm-fp32"]
        rows.append(
            {
                "steps": steps,
                "coding": coding,
                "spikes an element": report.spikes_per_element,
                "KL to dense": spikeform.fidelity(spiking, dense, ids, window=128).kl,
                "ESTIMATED energy vs dense": estimate["ratio_vs_dense"],
                "vs quantised": estimate["ratio_vs_quantised"],
                "with memory, vs quantised": estimate["with_memory"]["ratio_vs_quantised"],
            }
        )
    show(rows)
    print("Counts are exact; energies are ESTIMATED (45 nm, fp32). Below 1 the spiking network costs less.")


if __name__ == "__main__":
    main(*sys.argv[1:])
