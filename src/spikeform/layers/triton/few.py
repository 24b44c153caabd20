"""Few queries and cached codes: the device functions of which the kernels of decoding are made.

Rows are the queries of one key/value head, so its codes are read once: row ``r L + l`` is query l of its r-th head.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from spikeform.layers.triton import tiles
from spikeform.neurons.triton import codes
from spikeform.neurons.triton.oat import units as units_of
from spikeform.synapses.triton.row import put_by


class Line(NamedTuple):
    """Codes of the only row of a batch, for a product to read: see :mod:`spikeform.synapses.triton.row`.

    Args:
        codes: int32 ``[1, words]``.
        threshold: Of the population that encodes, fp32 ``[R]``.
        limit: Of its codes.
        resolution: Code units to a threshold.
        how: What ``put`` is compiled for.
    """

    codes: Tensor
    threshold: Tensor
    limit: int
    resolution: int
    how: tuple[bool, int, int, int]


def left(out: Tensor, line: Line | None) -> tuple[tuple, dict[str, object]]:
    """What :func:`leave` takes behind ``out``: arguments, and what it is compiled for."""
    given = (out, out, 0, 1) if line is None else line[:4]
    how = (False, 0, 0, 1) if line is None else line.how
    names = "LINE_TWO", "LINE_ROUNDING", "LINE_LIMBS", "LINE_PARTS"
    return given, {"LINE": line is not None, **dict(zip(names, how, strict=True))}


@triton.jit
def rows_of(group, heads, groups, length, ROWS: tl.constexpr, HIGH: tl.constexpr):
    """Head and query of each of a program's rows, HIGH to a tile; where they stand in scratch; which exist."""
    own = tl.arange(0, HIGH)
    row = tl.program_id(2) * ROWS + own
    share = heads // groups
    return group * share + row // length, row % length, row, (own < ROWS) & (row < share * length)


@triton.jit
def bias_of(mask, batch, head, query, exists, key, m_b, m_h, m_l, m_s, least, MASKED: tl.constexpr):
    """What is added to scores ``[ROWS, N]``: -inf where keys are hidden, or ``exists`` says that there are none."""
    if MASKED:
        places = batch * m_b + head[:, None] * m_h + query[:, None] * m_l + key[None, :].to(tl.int64) * m_s
        bias = tl.load(mask + places, exists, other=float("-inf")).to(tl.float32)
        return tl.where(bias > least, bias, float("-inf"))
    else:
        return tl.where(exists, 0.0, float("-inf"))


@triton.jit
def _twice(x):
    """``[M, N]`` as the upper half of ``[2 M, N]``, zero below."""
    return tl.permute(tl.join(x, x * 0.0), 2, 0, 1).reshape(x.shape[0] * 2, x.shape[1])


@triton.jit
def sixteen(x, ROWS: tl.constexpr):
    """``[ROWS, N]`` as the first of 16 rows, the least that tensor cores take; zero below."""
    if ROWS <= 8:
        if ROWS <= 4:
            if ROWS <= 2:
                x = _twice(x)
            x = _twice(x)
        x = _twice(x)
    return x


@triton.jit
def product(a, b, A: tl.constexpr, B: tl.constexpr):
    """``a b`` on tensor cores, A and B planes of either: one holds integers up to 2^8 exactly, two those below 2^16.

    Of two planes a number is within 2^-17 of what it was.
    """
    a_high, a_low = tiles.planes(a)
    b_high, b_low = tiles.planes(b)
    sums = tiles.dot(a_high, b_high, tl.zeros((a.shape[0], b.shape[1]), tl.float32))
    if A == 2:
        sums = tiles.dot(a_low, b_high, sums)
    if B == 2:
        sums = tiles.dot(a_high, b_low, sums)
        if A == 2:
            sums = tiles.dot(a_low, b_low, sums)
    return sums


@triton.jit
def units(table, resolution, OAT: tl.constexpr, TWO: tl.constexpr):
    """Thresholds and units of both sub-neurons of a population, constants; GIF neurons have none that are fixed."""
    if OAT:
        return units_of(table, resolution, TWO)
    else:
        return 0.0, 0.0, 0.0, 0.0


@triton.jit
def encoded(v, known, times, limit, resolution, OAT: tl.constexpr, TWO: tl.constexpr, ROUNDING: tl.constexpr):
    """What neurons send for queries ``v`` fp32 ``[HIGH, E]``, and, of GIF neurons, the unit of each row.

    ``known``: of :func:`units`. Of GIF neurons ``times`` ``[E]``: multiples; ``limit`` and ``resolution``: levels and
    steps.
    """
    of_row = tl.zeros((v.shape[0],), tl.float32)
    if OAT:
        threshold0, threshold1, unit0, unit1 = known
        code, outlier = codes.oat_code(v, threshold0, threshold1, unit0, unit1, limit, TWO, ROUNDING)
        v = codes.oat_value(code, outlier, unit0, unit1, TWO)
    else:
        low, high = tl.minimum(tl.min(v, 1), 0.0), tl.maximum(tl.max(v, 1), 0.0)
        of_row = codes.gif_unit(low, high, limit, resolution)
        v = codes.gif_integer(v, low[:, None], of_row[:, None], times[None, :], limit, resolution)
    return v, of_row


@triton.jit
def value_of(packed, known, multiple, OAT: tl.constexpr, TWO: tl.constexpr):
    """What packed codes stand for: OAT: real values; GIF: integers in the token's common unit (``multiple``)."""
    if OAT:
        _, _, unit0, unit1 = known
        value = (packed >> 1).to(tl.float32)
        value *= tl.where((packed & 1) != 0, unit1, unit0) if TWO else unit0
    else:
        value = packed.to(tl.float32) * multiple
    return value


@triton.jit
def met(v, of_row, value, of_key, OAT: tl.constexpr, HIGH: tl.constexpr):
    """Products of queries ``[HIGH, E]`` and keys ``[N, E]``, ``[HIGH, N]``, in the units of both (GIF)."""
    E: tl.constexpr = value.shape[1]
    if HIGH == 1:
        found = tl.sum(value * tl.reshape(v, (1, E)), 1)[None, :]
    elif OAT:
        found = product(v, tl.trans(value), 2, 2)
    else:
        found = product(v, tl.trans(value), 1, 1)
    if not OAT:
        found *= of_row[:, None]
        found *= of_key[None, :]
    return found


@triton.jit
def exp(score, most, top, floor, BITS: tl.constexpr, NEAREST: tl.constexpr):
    """``exp(score - most)``, through its HG neuron where there is one."""
    e = codes.exp(score - most)
    if BITS > 0:
        e = codes.round_mantissa(e, BITS, NEAREST, top, floor, False)
    return e


@triton.jit
def normal(terms, heights, peak, top, floor, OAT: tl.constexpr, BITS: tl.constexpr, NEAREST: tl.constexpr):
    """Of rows ``[ROWS, N]`` of exponentials the sum, its inverse, and the unit of the codes of probabilities (GIF).

    ``heights``: exponentials in the units of their values, the largest of which has the code ``peak``.
    """
    total = tl.maximum(tl.sum(terms, 1), 0.5)
    inverse = codes.inverse(total)
    if BITS > 0:
        inverse = codes.round_mantissa(inverse, BITS, NEAREST, top, floor, False)
    unit = total
    if not OAT:
        largest = tl.max(heights, 1) * inverse
        unit = tl.maximum(tl.div_rn(largest, largest * 0.0 + peak), 1.1754943508222875e-38)
    return total, inverse, unit


@triton.jit
def probability(
    e,
    of_value,
    whole,
    part,
    step,
    known,
    peak,
    OAT: tl.constexpr,
    TWO: tl.constexpr,
    BITS: tl.constexpr,
    ROUNDING: tl.constexpr,
):
    """What neurons send for probabilities, of exponentials ``e`` and what :func:`normal` gave; GIF: integers.

    ``of_value``: units of the values that they meet, GIF only.
    """
    p = e * part if BITS > 0 else codes.quotient(e, whole, part)
    if OAT:
        threshold0, threshold1, unit0, unit1 = known
        code, outlier = codes.oat_code(p, threshold0, threshold1, unit0, unit1, peak, TWO, ROUNDING)
        p = codes.oat_value(code, outlier, unit0, unit1, TWO)
    else:
        p *= of_value
        p = tl.minimum(codes.round_even(codes.quotient(p, step, codes.inverse(step))), peak)
    return p


@triton.jit
def weighted(p, value, OAT: tl.constexpr, HIGH: tl.constexpr, ROWS: tl.constexpr):
    """Probabilities times values ``[N, channels]``: of each key where there is one row; else their sums."""
    if HIGH == 1:
        return p * value
    else:
        return product(sixteen(p, ROWS), value, 2, 2 if OAT else 1)


@triton.jit
def leave(
    v,
    at,
    live,
    out,
    line,
    known,
    width,
    limit,
    LINE: tl.constexpr,
    LINE_TWO: tl.constexpr,
    LINE_ROUNDING: tl.constexpr,
    LINE_LIMBS: tl.constexpr,
    LINE_PARTS: tl.constexpr,
):
    """Store what attention found; LINE: as codes of the only row (:func:`put_by`): ``out`` tells its dtype alone."""
    v = codes.rounded(v, out.dtype.element_ty)
    if LINE:
        v = v.to(tl.float32)
        put_by(v, at, live, line, known, width, limit, LINE_TWO, LINE_ROUNDING, LINE_LIMBS, LINE_PARTS)
    else:
        tl.store(out + at, v, live)
