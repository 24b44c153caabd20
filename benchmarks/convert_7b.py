"""How long converting a 7B model takes on one GPU, and what memory it needs beside the model.

    python benchmarks/convert_7b.py --out benchmarks/results/convert-7b.json [--shape opt-6.7b] [--layers 4]
        [--methods las,las-int8,spikellm] [--tokens 8192] [--profile] [--tiny]

Random weights, made on the GPU in bf16; calibration on random ids in sequences of 512. ``seconds`` is the wall time
of ``spikeform.convert``, reading and writing files not included; ``first_s`` is that until the first block is done (the
pass that captures what blocks are called with among it), ``block_s`` the median of the others, ``last_s`` what
follows the last. ``above_GiB`` is the peak of allocated memory over that of the dense model; ``block_GiB`` what the
parameters of one block take.
"""

from __future__ import annotations

import argparse
import cProfile
import gc
import itertools
import json
import pstats
import statistics
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from decode_7b import SHAPES, build, wait

import spikeform
from spikeform.conversion.kinds import blocks

METHODS: dict[str, Any] = {
    "las": lambda: spikeform.LAS(steps=16),
    "las8": lambda: spikeform.LAS(steps=8, units="power_of_two"),
    "las-int8": lambda: spikeform.LAS(steps=8, weight_bits=8),
    "las-per-channel": lambda: spikeform.LAS(steps=8, per_channel=True),
    "spikellm": lambda: spikeform.SpikeLLM(pipeline="rtn"),
    "spikellm-diagonal": lambda: spikeform.SpikeLLM(pipeline="rtn", saliency="diagonal"),
}
DEFAULT = "las,las8,las-int8,spikellm"
LENGTH = 512


def bytes_of(module: torch.nn.Module) -> int:
    """Bytes of all parameters and buffers."""
    return sum(x.numel() * x.element_size() for x in [*module.parameters(), *module.buffers()])


def measure(method: str, args: argparse.Namespace) -> dict[str, Any]:
    """One conversion."""
    cuda = args.device == "cuda"
    model = build(args.shape, args.layers, args.device, torch.bfloat16)
    ids = torch.randint(model.config.vocab_size, (-(-args.tokens // args.length), args.length))
    row: dict[str, Any] = {"method": method, "tokens": ids.numel()}
    row["model_GiB"], row["block_GiB"] = (bytes_of(x) / 2**30 for x in (model, blocks(model)[0][1]))
    wait(args.device)
    before = 0
    if cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    times = [time.perf_counter()]

    def progress(done: int, of: int) -> None:
        wait(args.device)
        times.append(time.perf_counter())

    profile = cProfile.Profile()
    if args.profile:
        profile.enable()
    spikeform.convert(model, METHODS[method](), ids, progress=progress)
    wait(args.device)
    if args.profile:
        profile.disable()
        pstats.Stats(profile).sort_stats("tottime").print_stats(25)
    end = time.perf_counter()
    gaps = [b - a for a, b in itertools.pairwise(times)]
    row |= {"seconds": end - times[0], "first_s": gaps[0], "last_s": end - times[-1]}
    row["block_s"] = statistics.median(gaps[1:] or gaps)
    if cuda:
        row["above_GiB"] = (torch.cuda.max_memory_allocated() - before) / 2**30
        row["after_GiB"] = torch.cuda.memory_allocated() / 2**30
    return {key: round(value, 4) if isinstance(value, float) else value for key, value in row.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="llama-7b")
    parser.add_argument("--methods", default=DEFAULT, help=f"of {', '.join(METHODS)}")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--profile", action="store_true", help="print functions by their own time")
    parser.add_argument("--tiny", action="store_true", help="a dry run on the CPU")
    args = parser.parse_args()
    args.device, args.length = ("cpu", 64) if args.tiny else ("cuda", LENGTH)
    if args.tiny:
        args.shape = "opt-tiny" if "opt" in args.shape else "llama-tiny"
        args.layers, args.tokens = 2, 128
    hardware = torch.cuda.get_device_name() if args.device == "cuda" else "CPU"
    rows: list[dict[str, Any]] = []
    result = {
        "protocol": " ".join(__doc__.split("\n\n", 2)[2].split()),
        "hardware": hardware,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "shape": args.shape,
        "layers": args.layers,
        "rows": rows,
    }
    for method in args.methods.split(","):
        rows.append(measure(method, args))
        print(json.dumps(rows[-1]), flush=True)
        gc.collect()
        if args.device == "cuda":
            torch.cuda.empty_cache()
        if args.out:
            args.out.parent.mkdir(parents=True, exist_ok=True)
            args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
