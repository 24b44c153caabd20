"""Writes what the result files about speed hold as tables. Nothing is measured here.

    python benchmarks/speed_tables.py

Output: the blocks of docs/performance.md and of README.md between their markers, from llamacpp-cpu.json,
spikingjelly-cpu.json, cpu-products.json, cpu-neurons.json, decode-7b*.json, convert-7b.json, gpu-encoders.json,
gpu-attention.json, gpu-chain.json, gpu-products.json and gpu-events.json in benchmarks/results. What no file holds is
left out, and said to be missing where whole models are compared.
"""

from __future__ import annotations

from pathlib import Path

import readme_block
import speed_cpu
import speed_gpu
from fas_costs import read, table
from speed_cpu import number, paragraph, source

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "performance.md"
WHOLE = {
    "llamacpp-cpu.json": "a 1.1B model beside llama.cpp (`benchmarks/llamacpp.py`)",
    "spikingjelly-cpu.json": "a small model beside SpikingJelly (`benchmarks/spikingjelly_qwen2.py`)",
}


def markers(name: str) -> tuple[str, str]:
    """Where a block begins and ends."""
    return f"<!-- {name}: begin (benchmarks/speed_tables.py) -->", f"<!-- {name}: end -->"


def missing() -> str:
    """Which whole models no file compares."""
    absent = [what for name, what in WHOLE.items() if not (RESULTS / name).is_file()]
    return f"Not measured yet: {'; '.join(absent)}." if absent else ""


def cpu_models() -> list[str]:
    """The README's short table of whole models on a CPU."""
    name = "llamacpp-cpu.json"
    data = read(RESULTS, name)
    if data is None:
        return []
    kinds = [key.removeprefix("decode_vs_") for key in data["rows"][0] if key.startswith("decode_vs_")]
    rows = []
    for row in data["rows"]:
        cells = [row["model"]]
        for what in ("decode", "prefill"):
            over = ", ".join(f"{row[f'{what}_vs_{kind}']:.2f}" for kind in kinds)
            cells.append(f"{number(row[f'{what}_tokens_per_s'])} ({over})")
        rows.append(cells)
    over = " and ".join(kinds)
    lines = table(["1.1B, CPU", "decode, tokens/s", f"prefill {data['settings']['prompt']}, tokens/s"], rows)
    return [*lines, *paragraph(f"In brackets: over llama.cpp's {over}. Random weights.", source(data, name))]


def gpu_models() -> list[str]:
    """The README's short table of whole models on a GPU: of each shape the run with the most layers."""
    lines, shapes = [], set()
    for name, data in speed_gpu.decode_files(RESULTS):
        settings = data["settings"]
        if settings["shape"] in shapes:
            continue
        shapes.add(settings["shape"])
        head = [
            f"{settings['layers']} layers of {settings['shape']}",
            "decode: a step, ms",
            "a token of `generate`, ms",
        ]
        rows = [row[: len(head)] for row in speed_gpu.decode_rows(data)]
        lines += table(*speed_gpu.filled(head, rows))
        words = "Compiled forward passes, static cache, batch 1, random weights; in brackets: over the dense model's."
        lines += paragraph(words, speed_gpu.bars(data), data.get("note", ""), source(data, name))
    return lines


def main() -> None:
    """Reads the files and writes the blocks."""
    cpu = paragraph(missing()) if missing() else []
    blocks = {
        "speed-cpu": (cpu + speed_cpu.lines(RESULTS), PAGE),
        "speed-gpu": (speed_gpu.lines(RESULTS), PAGE),
        "speed": (cpu_models() + gpu_models() + cpu, readme_block.README),
    }
    for name, (lines, page) in blocks.items():
        readme_block.write(*markers(name), "\n".join(lines).rstrip(), page)


if __name__ == "__main__":
    main()
