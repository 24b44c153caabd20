"""The kinds of products that ``gpu_chain.py`` times, the ways to run them, and the cuts among which it chooses.

Where a row is encoded once, a thread loads 16 bytes of a row of the weight at a time: a step is 128 words a warp wide,
either of all warps side by side or, with eight warps, of one (then each has its own output features, and no sum goes
through shared memory). ``stages`` tiles are asked for before a program waits: with 256 threads and 16 rows of one
warp's width a tile is 8 KB, eight of them 64 KB. 4096 output features are 1024, 512, 256 or 128 programs: a bit less
than 8, 4, 2 or 1 for each of 132 multiprocessors.
"""

from __future__ import annotations

from typing import NamedTuple

from spikeform.synapses.triton.launch import Strip


class Kind(NamedTuple):
    """A kind of product.

    Attributes:
        table: The function of ``shapes`` that cuts it where each program encodes.
        inputs: Input channels of a word of four bytes of its weights.
    """

    table: str
    inputs: int


class Way(NamedTuple):
    """How a kind of product is run.

    Attributes:
        kind: One of :data:`KINDS`, or ``dense``: PyTorch's bf16 product.
        once: Whether a kernel of its own encodes the row.
        overlapped: Programmatic dependent launch.
    """

    kind: str
    once: bool
    overlapped: bool

    def __str__(self) -> str:
        return f"{self.kind}{' once' if self.once else ''}{' overlapped' if self.overlapped else ''}"


KINDS = {
    "int8-t7": Kind("oat_int_strip", 4),
    "int8-t15": Kind("oat_int_strip", 4),
    "gif4": Kind("gif_strip", 8),
    "bf16": Kind("oat_strip", 2),
}
AHEAD = 4096  # bytes of each row that are asked for besides
EACH = {  # each program encodes
    "bf16": [Strip(8, 512, 4, 4), Strip(16, 512, 4, 4), Strip(32, 256, 8, 4)],
    "int8-t7": [Strip(16, 256, 8, 1), Strip(16, 128, 4, 4), Strip(8, 256, 4, 4)],
    "int8-t15": [Strip(8, 128, 4, 6), Strip(16, 128, 4, 4), Strip(16, 256, 8, 1)],
    "gif4": [Strip(16, 256, 8, 1), Strip(16, 128, 4, 1), Strip(32, 256, 8, 1)],
}
WIDE = [Strip(16, 128, 8, 8), Strip(16, 128, 8, 4), Strip(4, 512, 4, 4), Strip(8, 512, 4, 2), Strip(4, 1024, 8, 3)]
ONCE = {
    "bf16": [Strip(8, 128, 8, 8), *WIDE],
    "int8-t7": [Strip(8, 128, 8, 8), *WIDE, Strip(32, 128, 8, 4)],
    "int8-t15": [*WIDE, Strip(8, 128, 8, 8), Strip(32, 128, 8, 4)],
    "gif4": [Strip(8, 128, 8, 4), *WIDE[:4], Strip(8, 512, 4, 1), Strip(32, 128, 8, 4)],
}


def ways(kind: str) -> list[Way]:
    """Each program encodes or one kernel does; one kernel after the other or overlapped."""
    if kind == "dense":
        return [Way(kind, False, False)]
    return [Way(kind, once, early) for once in (False, True) for early in (False, True)]


def cuts_of(way: Way) -> list[Strip]:
    """At most eight; kernels that begin early may ask for weights before they wait."""
    cuts = (ONCE if way.once else EACH)[way.kind]
    more = cuts[1 if way.once else 0]
    return [*cuts, more._replace(stages=min(more.stages, 4), ahead=AHEAD)] if way.overlapped else cuts
