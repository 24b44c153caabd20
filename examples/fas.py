"""FAS in small: train with QCFS activations, calibrate the spiking network, beside a control trained the same way.

python examples/fas.py [MODEL] [OUT] [STEPS]

Here the dense model writes the text, and few steps are trained: docs/fas_results.md says what a real run reaches.
"""

import sys

from transformers import AutoModelForCausalLM

import spikeform
from spikeform import CalibrateOptions, TrainOptions, pretrained
from spikeform.evaluation import sample_ids


def main(model: str = "llama", out: str = "llama-fas", steps: str = "10") -> None:
    folder = pretrained.resolve(model)  # "llama" comes with spikeform; a hub id or a folder works too
    teacher, control, network = (AutoModelForCausalLM.from_pretrained(folder) for _ in range(3))
    ids = sample_ids(teacher, tokens=8192, window=64, seed=1)  # [128, 64]; your own text is better
    train, held_out = ids[:112], ids[112:]

    # Stage 1: the network of QCFS activations. Without streams and distil it is the paper's.
    spikeform.convert(network, spikeform.FAS(steps=0, per_channel=True), train)
    options = TrainOptions(window=64, batch_size=4, steps=int(steps), streams=4, distil=1.0)
    spikeform.train(network, train.flatten(), None, options, teacher=teacher)
    plain = TrainOptions.from_dict(options.to_dict() | {"streams": 0})
    spikeform.train(control, train.flatten(), None, plain, teacher=teacher)

    def measure(title, model) -> None:
        print(f"{title}: perplexity {spikeform.perplexity(model, held_out, window=64).perplexity:.2f}")

    measure("control, dense", control)
    measure("QCFS network", network)

    # Stage 2: the spiking network of 8 steps.
    measure("T = 8, uncalibrated", spikeform.set_steps(network, 8))
    spikeform.calibrate(network, train, options=CalibrateOptions(coarse_steps=5, fine_steps=10, batch_size=4))
    measure("T = 8, calibrated", network)
    spikeform.save(network, out)
    print(f"saved to {out}")


if __name__ == "__main__":
    main(*sys.argv[1:])
