"""SpikeLLM in small: W4A4 with two steps for the salient tenth of channels, beside one step for all and uniform W5A5.

python examples/spikellm.py [MODEL] [OUT] [EPOCHS]

Here the dense model writes the text; weights and channels are fitted to it, so give your own. Measured:
docs/spikellm_results.md.
"""

import copy
import sys

from transformers import AutoModelForCausalLM

import spikeform
from spikeform import pretrained
from spikeform.evaluation import sample_ids
from spikeform.report.weights import coded_size

UNIFORM = {"steps": 1, "saliency": "none"}


def main(model: str = "llama", out: str = "llama-spikellm", epochs: str = "2") -> None:
    folder = pretrained.resolve(model)  # "llama" comes with spikeform; a hub id or a folder works too
    dense = AutoModelForCausalLM.from_pretrained(folder)
    ids = sample_ids(dense, tokens=4096, window=128, seed=1)  # [32, 128]
    calibration, held_out = ids[:24], ids[24:]

    networks = {
        "W4A4, T = 1": spikeform.SpikeLLM(epochs=int(epochs), **UNIFORM),
        "W5A5, T = 1": spikeform.SpikeLLM(epochs=int(epochs), bits=5, weight_bits=5, **UNIFORM),
        "W4A4, T = 2 for 10%": spikeform.SpikeLLM(epochs=int(epochs)),
    }
    for title, config in networks.items():
        network = spikeform.convert(copy.deepcopy(dense), config, calibration)
        found = spikeform.perplexity(network, held_out, window=128).perplexity
        report = spikeform.energy(network, held_out[:2])
        print(
            f"{title}: perplexity {found:.2f}, {report.ace['per_mac']['spiking']:.1f} bit operations a MAC, "
            f"{report.spikes_per_element:.2f} spikes an element, "
            f"ESTIMATED {report.estimates['45nm-int8']['ratio_vs_quantised']:.2f} times the integers' energy"
        )
    spikeform.save(network, out)
    size = coded_size(network)
    print(f"saved to {out}: weights {size['ratio']:.3f} of bf16")


if __name__ == "__main__":
    main(*sys.argv[1:])
