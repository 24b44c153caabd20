"""Rows in two operators, their encoding and their products: what is done once for several matrices.

The operators of :mod:`spikeform.synapses.fused` taken apart, so that matrices that meet the same row (queries, keys,
values) meet one encoding, of one row are one product, and a norm or a gate encodes what it leaves.
:mod:`spikeform.layers.joined` puts them into compiled graphs: of one decoded row, or, of GIF neurons, of many. There
are kernels for GPUs alone (in tests Triton's interpreter runs them); on a CPU those of one row are steps of one
operator before anything runs (:mod:`spikeform.layers.chained`).

Codes of P matrices and M rows are int32 ``[P M, words]``, in a form that :mod:`spikeform.synapses.triton.row` knows.
Each matrix has a neuron of its own, or all have one (P is 1). ``parts``: weights of a word of four bytes, 1 (fp32), 2
(bf16) or 4 (int8).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from spikeform.native import define


def _define(schema: str, fake, home: str):
    place = f"spikeform.synapses.triton.{home}:{schema.partition('(')[0]}"
    return define(schema, fake, place, place)


def words_of_oat(width: int, branches: int, limit: int, parts: int) -> int:
    """Words of the codes of a row of so many channels, ``branches`` sub-neurons."""
    return whole(width if parts < 4 else branches * (limbs_of(limit) * (width // 4) + 1))


def words_of_gif(width: int) -> int:
    """Words of such a row: codes, a unit, and, of one row, sums of SUMMED codes each."""
    return whole(width // 4 + 1 + -(-width // SUMMED))


def limbs_of(limit: int) -> int:
    """Bytes of codes up to ``limit`` in magnitude, the highest of them signed."""
    return 1 if limit < 2**7 else 2 if limit < 2**15 else 3


def whole(words: int) -> int:
    """So many words as pieces of 16 bytes."""
    return -(-words // 4) * 4


def rows_of(x: Tensor) -> int:
    """Rows of the last axis, of a tensor that is not empty."""
    return x.numel() // x.shape[-1]


SKINNY = 64  # rows up to which a product is no product of large tiles
SUMMED = 1024  # channels whose codes are summed together, of GIF neurons

# Of those that encode a row: schemas.
POPULATIONS = "Tensor[] thresholds, Tensor[] shifts, int limit, int resolution, int rounding, int parts"
GROUPS = "Tensor[] multiples, int levels, int steps, bool packed"


def _oat(x: Tensor, thresholds: Sequence[Tensor], shifts, limit: int, resolution, rounding, parts: int) -> Tensor:
    words = words_of_oat(x.shape[-1], thresholds[0].numel(), limit, parts)
    return x.new_empty((len(thresholds), words), dtype=torch.int32)


def _oat_made(x: Tensor, *args) -> Tensor:
    return _oat(x, *args[-6:])  # as many as POPULATIONS has


def _gif(x: Tensor, multiples: Sequence[Tensor], levels: int, steps: int, packed: bool) -> Tensor:
    return x.new_empty((len(multiples) * rows_of(x), words_of_gif(x.shape[-1])), dtype=torch.int32)


def _gif_made(x: Tensor, *args) -> Tensor:
    return _gif(x, *args[-4:])  # as many as GROUPS has


def _products(codes, weights, scales, zeros, biases, residual, dtype, lead, branches, limbs, *_) -> list[Tensor]:
    return [codes.new_empty((*lead, weight.shape[0]), dtype=dtype) for weight in weights]


# Codes of x through P multi-threshold populations: thresholds [R] each, shifts int8 [K] each or none at all.
row_oat = _define(f"row_oat(Tensor x, {POPULATIONS}) -> Tensor", _oat, "row")
# The same of spikeform::hg_norm(x, ...), whose arguments come first.
row_norm = _define(
    "row_norm(Tensor x, Tensor? weight, Tensor? bias, float eps, bool centred, float gain_offset, Tensor threshold,"
    " int own_limit, int own_resolution, int own_rounding, int bits, bool nearest, int low, int high,"
    f" {POPULATIONS}) -> Tensor",
    _oat_made,
    "produced",
)
# The same of spikeform::hg_gated(gate, up, ...).
row_gated = _define(
    "row_gated(Tensor gate, Tensor up, str function, int bits, bool nearest, int low, int high, Tensor threshold,"
    f" int own_limit, int own_resolution, int own_rounding, {POPULATIONS}) -> Tensor",
    _oat_made,
    "produced",
)
# Codes of x through P groups of GIF neurons; ``packed``: for weights in nibbles.
row_gif = _define(f"row_gif(Tensor x, {GROUPS}) -> Tensor", _gif, "row")
# The same of an RMS norm, and of ``function(gate) * up``, which are no spikes: rounded as PyTorch rounds them. A gate
# through its function already has none, "".
row_norm_gif = _define(
    f"row_norm_gif(Tensor x, Tensor weight, float eps, {GROUPS}) -> Tensor", _gif_made, "produced_gif"
)
row_gated_gif = _define(
    f"row_gated_gif(Tensor gate, Tensor up, str function, {GROUPS}) -> Tensor", _gif_made, "produced_gif"
)
# The products of codes, [*lead, N] each: see :func:`spikeform.synapses.triton.stream.row_product`.
row_product = _define(
    "row_product(Tensor codes, Tensor[] weights, Tensor[] scales, Tensor[] zeros, Tensor[] biases, Tensor? residual,"
    " ScalarType dtype, int[] lead, int branches, int limbs, str function='', int activated=0) -> Tensor[]",
    _products,
    "stream",
)
