"""Small integers in as few bits as they need: how integer weights lie in a file.

Value i of a row takes bits ``i b .. (i+1) b - 1`` of that row, counted from the lowest bit of its first byte. Wider
than a byte, the low bytes come first and the rest is packed behind them. Rows end on a whole byte.
"""

from __future__ import annotations

import torch
from torch import Tensor

MAX_BITS = 16
_GROUP = 8  # eight values of b bits are b whole bytes, and fit one 64-bit word


def packed_bytes(count: int, bits: int) -> int:
    """Bytes that a row of ``count`` values of ``bits`` bits takes.

    Raises:
        ValueError: ``bits`` is not an integer from 1 to 16.
    """
    if isinstance(bits, bool) or not isinstance(bits, int) or not 1 <= bits <= MAX_BITS:
        raise ValueError(f"bits must be an integer from 1 to {MAX_BITS}, got {bits!r}")
    return count + packed_bytes(count, bits - 8) if bits > 8 else (count * bits + 7) // 8


def pack_bits(values: Tensor, bits: int) -> Tensor:
    """Integers ``[..., C]`` from 0 to ``2^bits - 1`` as bytes.

    Args:
        values: Any integer dtype.
        bits: Width of each, 1 to 16.

    Returns:
        uint8 ``[..., packed_bytes(C, bits)]``.

    Raises:
        ValueError: A value does not fit, the dtype is not an integer one, or ``bits`` is out of range.
    """
    count = values.shape[-1]
    length = packed_bytes(count, bits)
    if values.is_floating_point() or values.is_complex():
        raise ValueError(f"only integers can be packed, got {values.dtype}")
    if values.numel():
        least, most = (int(x) for x in values.aminmax())
        if least < 0 or most >= 1 << bits:
            raise ValueError(f"values from {least} to {most} do not fit {bits} unsigned bits")
    if bits > 8:
        wide = values.to(torch.int32)
        return torch.cat([(wide & 255).to(torch.uint8), pack_bits(wide >> 8, bits - 8)], -1)
    groups = -(-count // _GROUP)
    padded = torch.nn.functional.pad(values.to(torch.uint8), (0, groups * _GROUP - count))
    slots = padded.unflatten(-1, (groups, _GROUP))
    words = torch.zeros(slots.shape[:-1], dtype=torch.int64, device=values.device)
    for i in range(_GROUP):
        words |= slots[..., i].to(torch.int64) << (i * bits)
    out = torch.empty(*words.shape, bits, dtype=torch.uint8, device=values.device)
    for i in range(bits):
        out[..., i] = (words >> (8 * i)) & 255
    return out.flatten(-2)[..., :length].contiguous()


def unpack_bits(packed: Tensor, bits: int, count: int) -> Tensor:
    """What :func:`pack_bits` packed.

    Args:
        packed: uint8 ``[..., packed_bytes(count, bits)]``.
        bits: Width of each value.
        count: Values in a row, C.

    Returns:
        uint8 ``[..., C]``; int32 where ``bits`` is more than 8.

    Raises:
        ValueError: Not bytes, or not as many as that takes.
    """
    length = packed_bytes(count, bits)
    if packed.dtype != torch.uint8 or packed.shape[-1] != length:
        raise ValueError(
            f"{count} values of {bits} bits are {length} bytes a row, got {packed.shape[-1]} of {packed.dtype}"
        )
    if bits > 8:
        return packed[..., :count].to(torch.int32) | (unpack_bits(packed[..., count:], bits - 8, count).int() << 8)
    groups = -(-count // _GROUP)
    padded = torch.nn.functional.pad(packed, (0, groups * bits - length)).unflatten(-1, (groups, bits))
    words = torch.zeros(padded.shape[:-1], dtype=torch.int64, device=packed.device)
    for i in range(bits):
        words |= padded[..., i].to(torch.int64) << (8 * i)
    out = torch.empty(*words.shape, _GROUP, dtype=torch.uint8, device=packed.device)
    for i in range(_GROUP):
        out[..., i] = (words >> (i * bits)) & ((1 << bits) - 1)
    return out.flatten(-2)[..., :count].contiguous()
