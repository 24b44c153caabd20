"""The cuts among which ``gpu_products.py`` searches, and what is cut by which table."""

from __future__ import annotations

import torch

from spikeform.synapses.triton.gemm import Tile
from spikeform.synapses.triton.shapes import Strip
from spikeform.synapses.triton.skinny import Shape

CUDA = torch.cuda.is_available()

STRIPS = {
    "oat": [
        *(Strip(8, 512, 4, s, a) for s in (1, 2, 4) for a in (0, 4096)),
        *(Strip(16, 512, 4, s) for s in (2, 4, 6)),
        *(Strip(16, 512, 8, s) for s in (2, 4)),
        *(Strip(4, 1024, 4, s) for s in (1, 3)),
        *(Strip(8, 1024, 8, s) for s in (2, 4)),
        *(Strip(32, 512, 8, s) for s in (2, 4)),
        *(Strip(16, 1024, 8, s) for s in (1, 3)),
        *(Strip(32, 256, 8, s) for s in (2, 4)),
        *(Strip(8, 256, 4, s) for s in (4, 6)),
        Strip(4, 512, 2, 4),
    ],
    "oat_int": [
        *(Strip(16, 256, 8, s, a) for s in (1, 4) for a in (0, 4096)),
        *(Strip(8, 256, 4, s) for s in (2, 4, 6)),
        *(Strip(8, 256, 8, s) for s in (2, 4)),
        *(Strip(32, 128, 8, s) for s in (2, 4)),
        *(Strip(16, 128, 4, s) for s in (2, 4)),
        *(Strip(32, 256, 8, s) for s in (2, 4)),
        *(Strip(16, 512, 16, s) for s in (2, 4)),
        Strip(8, 128, 4, 6),
    ],
    "gif": [
        *(Strip(n, 256, 8, s, a) for n in (16, 32) for s in (1, 2) for a in (0, 4096)),
        *(Strip(8, 256, 4, 1, a) for a in (0, 4096)),
        *(Strip(8, 256, 8, 1, a) for a in (0, 4096)),
        Strip(16, 512, 8, 1),
        Strip(16, 512, 16, 1),
        Strip(32, 512, 16, 1),
        Strip(32, 128, 8, 1),
        Strip(16, 128, 4, 1),
        Strip(4, 512, 4, 1),
    ],
}
SKINNY = {
    "bf16": [
        Shape(n, k, s, 4, stages)
        for n, k, stages in [(64, 128, 3), (64, 128, 5), (64, 64, 6), (128, 64, 4), (128, 128, 3), (64, 256, 3)]
        for s in (1, 2, 4)
    ],
    "int8": [
        Shape(n, k, s, 4, stages)
        for n, k, stages in [(64, 128, 4), (64, 256, 3), (64, 256, 4), (128, 128, 4), (128, 256, 3)]
        for s in (1, 2, 4)
    ],
    "int4": [
        Shape(n, k, s, 4, stages)
        for n, k, stages in [(64, 128, 4), (64, 256, 3), (64, 512, 3), (128, 256, 3)]
        for s in (1, 2, 4)
    ],
}
TILES = {
    "int8": [
        Tile(128, 256, 128, 8, 3),
        Tile(128, 256, 128, 8, 4),
        Tile(128, 256, 128, 8, 4, 16),
        Tile(128, 256, 128, 8, 3, 8, False),
        Tile(128, 256, 128, 8, 4, 8, False),
        Tile(256, 128, 128, 8, 3),
        Tile(256, 128, 128, 8, 4, 8, False),
        Tile(128, 128, 128, 8, 4),
        Tile(128, 128, 128, 4, 4),
        Tile(128, 128, 128, 4, 3, 8, False),
        Tile(128, 256, 64, 8, 6),
        Tile(64, 256, 128, 8, 4),
        Tile(64, 128, 128, 4, 4),
        Tile(64, 128, 128, 4, 5, 8, False),
        Tile(64, 64, 256, 4, 4),
        *(Tile(128, 256, 128, 4, s, g, True, True) for s in (3, 4) for g in (8, 16)),
        *(Tile(128, 128, 128, 4, s, 8, True, True) for s in (4, 6)),
        Tile(128, 256, 64, 4, 6, 8, True, True),
        Tile(256, 128, 128, 4, 3, 8, True, True),
    ],
    "bf16": [
        Tile(128, 128, 64, 8, 4),
        Tile(128, 128, 64, 8, 3, 8, False),
        Tile(128, 128, 64, 4, 4),
        Tile(128, 128, 64, 4, 3, 8, False),
        Tile(128, 256, 64, 8, 3),
        Tile(128, 256, 64, 8, 3, 8, False),
        Tile(128, 256, 64, 8, 2),
        Tile(256, 128, 64, 8, 2),
        Tile(64, 256, 64, 4, 3),
        Tile(64, 256, 64, 8, 4),
        Tile(64, 128, 64, 4, 4),
        Tile(64, 128, 64, 4, 4, 8, False),
        Tile(64, 64, 128, 4, 3),
        *(Tile(128, 256, 64, 4, s, 8, True, True) for s in (3, 4)),
        *(Tile(128, 128, 64, 4, s, 8, True, True) for s in (4, 6)),
        Tile(256, 128, 64, 4, 3, 8, True, True),
    ],
}
if not CUDA:
    STRIPS, SKINNY, TILES = ({k: v[:1] for k, v in table.items()} for table in (STRIPS, SKINNY, TILES))


# Which table cuts which case at how many rows.
def plans() -> list[tuple[str, str, int, list, str]]:
    """Kind, table, rows, cuts, section."""
    return [
        ("oat", "oat_strip", 1, STRIPS["oat"], "decode"),
        ("oat_int8", "oat_int_strip", 1, STRIPS["oat_int"], "decode"),
        ("oat_int16", "oat_int_strip", 1, STRIPS["oat_int"], "decode"),
        ("gif8", "gif_strip", 1, STRIPS["gif"], "decode"),
        ("gif4", "gif_strip", 1, STRIPS["gif"], "decode"),
        ("oat", "skinny_shape", 16, SKINNY["bf16"], "skinny"),
        ("oat", "skinny_shape", 4, SKINNY["bf16"], "skinny"),
        ("oat_int8", "skinny_shape", 4, SKINNY["int8"], "skinny"),
        ("oat_int8", "skinny_shape", 16, SKINNY["int8"], "skinny"),
        ("gif8", "skinny_shape", 16, SKINNY["int8"], "skinny"),
        ("gif4", "skinny_shape", 16, SKINNY["int4"], "skinny"),
        ("oat", "skinny_shape", 64, SKINNY["bf16"], "skinny"),
        ("gif8", "skinny_shape", 64, SKINNY["int8"], "skinny"),
        ("gif8", "int_tile", 2048, TILES["int8"], "gemm"),
        ("gif8", "int_tile", 512, TILES["int8"], "gemm"),
        ("gif8", "int_tile", 64, TILES["int8"], "gemm"),
        ("oat_int8", "int_tile", 2048, TILES["int8"][:2], "gemm"),
        ("oat", "real_tile", 2048, TILES["bf16"], "gemm"),
        ("oat", "real_tile", 512, TILES["bf16"], "gemm"),
        ("oat", "real_tile", 64, TILES["bf16"], "gemm"),
    ]
