"""A neuron and its synapse as one operator: what the collapsed executor runs where there is a kernel.

The real input ``x`` ``[..., K]`` (fp32 or bf16) is encoded on the way into the product; the output ``[..., N]`` has its
dtype. Parameters of neurons are those of :mod:`spikeform.neurons.fused`. Codes, and sums of integers, are those of the
temporal executor, bit for bit; real sums are in fp32, in another order.
"""

from __future__ import annotations

import torch
from torch import Tensor

from spikeform.native import define


def _define(schema: str, fake):
    name = schema.partition("(")[0]
    return define(schema, fake, f"spikeform.synapses.cpu.products:{name}", f"spikeform.synapses.triton.products:{name}")


def _out(x: Tensor, weight: Tensor, *_) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _sums(values: Tensor, rows: Tensor, scale: Tensor | None, width: int) -> Tensor:
    return values.new_empty((*values.shape[:-1], width), dtype=torch.float32)


# OAT(x) W^T + b; weight [N, K] bf16 or fp32 (the dtype of x, or ``single``), bias [N]. ``single``: every value that the
# neuron sends is exact in the weight's dtype (units are powers of two, and codes or inputs have no more bits), so one
# plane carries it.
oat_linear = _define(
    "oat_linear(Tensor x, Tensor weight, Tensor? bias, Tensor threshold, Tensor? shift, int limit, int resolution,"
    " int rounding, bool single) -> Tensor",
    _out,
)
# The same with int8 weights [N, K], whose row n is worth scale[n] (fp32) a unit: exact integer sums of each
# sub-neuron, then y = scale (unit_0 S_0 + unit_1 S_1) + b.
oat_linear_int = _define(
    "oat_linear_int(Tensor x, Tensor weight, Tensor scale, Tensor? bias, Tensor threshold, int limit, int resolution,"
    " int rounding) -> Tensor",
    _out,
)
# GIF(x) W^T + b with int8 weights [N, K] of one tier, scale fp32 [N]: y = unit_row scale_n sum + b.
# ``packed`` uint8 [N, K / 2] (or None): weight + zero in 4 bits, see :func:`pack_nibbles`; zero int16 [N].
gif_linear = _define(
    "gif_linear(Tensor x, Tensor weight, Tensor scale, Tensor? packed, Tensor? zero, Tensor? bias, Tensor top,"
    " Tensor multiple, int levels, int steps) -> Tensor",
    _out,
)
# The event executor: values [..., K] (fp32, or int8 codes) times input-major rows, skipping rows whose value is zero;
# fp32 [..., width]. rows [K, N]: fp32, bf16 or int8, or packed uint8 [K, N / 2] (pack_nibbles of weight^T, whose zero
# is 8); scale fp32 [N] or None: multiplies the sums. int8 values times integer rows are summed in int32.
event_product = _define("event_product(Tensor values, Tensor rows, Tensor? scale, int width) -> Tensor", _sums)

EVENT_ROWS = 4  # of the union of more rows little is zero
GROUP = 64  # nibbles of a group share 32 bytes: the first half of them low, the second half high


def pack_nibbles(values: Tensor) -> Tensor:
    """Integers 0..15 ``[N, K]`` (K a multiple of 64) as uint8 ``[N, K / 2]``.

    Byte j of group g holds element ``64 g + j`` in its low half and ``64 g + 32 + j`` in its high one.

    Raises:
        ValueError: K is no multiple of 64.
    """
    if values.shape[-1] % GROUP:
        raise ValueError(f"nibbles are packed in groups of {GROUP}, got {values.shape[-1]} columns")
    groups = values.to(torch.uint8).unflatten(-1, (-1, 2, GROUP // 2))
    return (groups[..., 0, :] | (groups[..., 1, :] << 4)).flatten(-2)


def unpack_nibbles(packed: Tensor) -> Tensor:
    """What :func:`pack_nibbles` packed: uint8 ``[N, K]``."""
    bytes_ = packed.unflatten(-1, (-1, GROUP // 2))
    return torch.stack([bytes_ & 15, bytes_ >> 4], -2).flatten(-3)
