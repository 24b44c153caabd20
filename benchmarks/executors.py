"""Collapsed against event products in plain PyTorch on a CPU: from how many zeros on does skipping pay?

    python benchmarks/executors.py --out benchmarks/results/executors-cpu.json

Weights rotate among copies larger than the caches, so that they come from memory as in a real model. The best of
several rounds is kept, one thread: on a shared machine the minimum is the figure that neighbours disturb least.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from pathlib import Path

import torch

from spikeform.spikes import Radix2, SpikeTrain
from spikeform.synapses import executor, linear

COPIES_MIB = 256


def best(train_sets, weights, name: str, rounds: int) -> float:
    """Seconds per product, the best round."""
    seconds = []
    with executor(name):
        for _ in range(rounds):
            start = time.perf_counter()
            for train, weight in zip(train_sets, weights, strict=True):
                linear(train, weight)
            seconds.append((time.perf_counter() - start) / len(weights))
    return min(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows = []
    for size in (256, 1024, 4096):
        copies = max(COPIES_MIB * 2**20 // (4 * size * size), 4)
        weights = [torch.randn(size, size) for _ in range(min(copies, 256))]
        for m in (1, 4):
            for zeros in (0.0, 0.5, 0.7, 0.9, 0.95, 0.97, 0.99):
                trains = []
                for _ in weights:
                    codes = torch.randint(1, 256, (m, size)) * (torch.rand(m, size) >= zeros)
                    trains.append(SpikeTrain(codes, torch.tensor([0.01]), Radix2(8)))
                collapsed, event = (best(trains, weights, n, args.rounds) for n in ("collapsed", "event"))
                row = {"size": size, "rows": m, "zeros": zeros}
                row |= {"collapsed_us": collapsed * 1e6, "event_us": event * 1e6}
                rows.append(row)
                print(row)
    args.out.write_text(
        json.dumps(
            {
                "protocol": f"fp32, one thread, weights rotating over {COPIES_MIB} MiB, best of {args.rounds}",
                "hardware": f"CPU {platform.machine()}",
                "versions": {"torch": torch.__version__},
                "rows": rows,
            },
            indent=1,
        )
    )


if __name__ == "__main__":
    main()
