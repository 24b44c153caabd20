"""How each product is cut, by its shape: small tables, no search at run time.

The figures come from ``benchmarks/gpu_products.py``, which searches and prints the best.
"""

from __future__ import annotations

from spikeform.synapses.triton.event import Share
from spikeform.synapses.triton.gemm import Tile
from spikeform.synapses.triton.launch import Strip, cdiv, next_power
from spikeform.synapses.triton.skinny import Shape

MULTIPROCESSORS = 132  # of the card that the tables were made on


# Whether one row is encoded by a kernel of its own (:mod:`.stream`), or by each program of the product (:mod:`.gemv`).
encode_once = {"oat": True, "oat_int": True, "gif": True}

LARGE = 2**25  # elements of a weight from which on a product has programs enough in any cut


def oat_strip(columns: int, inner: int) -> Strip:
    """Real weights, one row."""
    if columns * inner < LARGE:
        return Strip(8, 512, 4, 4)
    if columns >= 2**14:
        return Strip(4, 1024, 4, 3) if columns >= 2**15 - 2**10 else Strip(16, 512, 4, 4)
    return Strip(32, 256, 8, 4) if columns > inner else Strip(16, 512, 4, 4)


def oat_int_strip(columns: int, inner: int) -> Strip:
    """int8 weights, one row of limbs."""
    if columns * inner < LARGE:
        return Strip(16, 256, 8, 1)
    return Strip(16, 128, 4, 4) if columns > inner else Strip(8, 256, 4, 4)


def gif_strip(columns: int, inner: int, packed: bool) -> Strip:
    """int8 or packed weights, one row of integers."""
    if not packed:
        return Strip(16 if columns > inner else 8, 256, 8, 1)
    if columns * inner < LARGE:
        return Strip(16, 256, 8, 1)
    return Strip(16, 128, 4, 1) if columns > inner else Strip(32, 256, 8, 1)


def stream_strip(element: str, columns: int, width: int, planes: int) -> Strip:
    """A row that another kernel encoded, as so many planes of codes; ``width``: words of a row of the weight.

    Args:
        element: ``real``, ``int8`` or ``int4``.
        columns: Output features, of all matrices that meet the row.
        width: As said.
        planes: As said.
    """
    if element != "int8":  # long rows in whole steps: all warps side by side
        if width % 512 or (element == "int4" and columns >= 2**14):
            return Strip(16, 128, 8, 8)
        return Strip(8, 512, 4, 2) if element == "real" else Strip(4, 512, 4, 4)
    if columns * width < LARGE // 4:  # short programs, all of them there at once
        return Strip(8, 128, 8, 8) if planes <= 2 else Strip(32, 128, 8, 4)
    return Strip(16, 128, 8, 4 if columns > 4 * width else 8)


def skinny_shape(rows: int, columns: int, inner: int, element: str) -> Shape:
    """Up to 128 rows; ``element``: ``bf16``, ``int8`` or ``int4``."""
    wide, splits = columns >= 2**14, 2 if columns <= inner else 1
    if element == "int4":
        shape = Shape(128 if columns > 2**13 else 64, 256, 1 if wide else 4, 4, 3)
    elif element == "int8":
        shape = Shape(64, 128 if wide else 256, splits, 4, 4)
    elif wide:
        shape = Shape(128, 64, 1, 4, 4)
    else:
        shape = Shape(64, 128, splits, 4, 5 if rows <= 16 else 3)  # more stages of more rows: too much shared memory
    return shape._replace(splits=max(1, min(shape.splits, inner // 512)))


def real_tile(rows: int) -> Tile:
    """Two bf16 planes, many rows."""
    if rows <= 64:
        return Tile(64, 128, 64, 4, 4)
    return Tile(128, 128, 64, 8, 3) if rows <= 1024 else Tile(128, 256, 64, 8, 3)


def int_tile(rows: int) -> Tile:
    """int8, many rows."""
    return Tile(128, 128, 128, 4, 3) if rows > 64 else Tile(64, 128, 128, 4, 4)


def hopper_tile(rows: int) -> Tile:
    """int8, many rows, where steps overlap: what the L2 cache delivers decides."""
    return Tile(128, 256, 128, 8, 3, 16) if rows >= 1024 else Tile(64, 256, 128, 4, 4)


def event_share(element: str, size: int, inner: int, rows: int) -> Share:
    """Up to four rows of values.

    Args:
        element: ``real``, ``int8`` or ``int4``.
        size: Bytes of a row of the weight.
        inner: Input features.
        rows: Rows of values; sums of each want registers.
    """
    piece = max(16, next_power(size // (3 * MULTIPROCESSORS // 4) + 1) // 2)  # programs: all there at once, few idle
    threads = 256 if rows > 1 and element == "int4" else 512
    slots = min(threads * 16 // piece, next_power(cdiv(inner, 8)))  # a run of channels at least for each
    return Share(piece, max(1, slots), max(2, (4 if element == "int4" else 8) // rows))
