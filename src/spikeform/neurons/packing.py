"""Spike trains as a cache holds them: the codes, then the bits of each token's unit, then its zero-points."""

from __future__ import annotations

import torch
from torch import Tensor


def pack_fields(codes: Tensor, units: Tensor, zero: Tensor | None) -> Tensor:
    """One integer tensor of codes and what goes with each token.

    Args:
        codes: int8 or int16 ``[..., S, E]``.
        units: fp32 or fp64 ``[U, ..., S, 1]``; their bits are kept.
        zero: Integer-valued ``[R, ..., S, 1]``, within the range of the codes, or None.

    Returns:
        The dtype of ``codes``, ``[..., S, E + n]``.
    """
    fields = [codes, _last(units).view(codes.dtype)]
    if zero is not None:
        fields.append(_last(zero).to(codes.dtype))
    return torch.cat(fields, -1)


def unpack_fields(packed: Tensor, size: int, units: int, zeros: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """What :func:`pack_fields` stored.

    Args:
        packed: ``[..., S, E + n]``.
        size: E.
        units: U.
        zeros: R, 0 where there is no zero.

    Returns:
        Codes, units and zero, as they were.
    """
    codes, fields = packed[..., :size], packed[..., size:]
    stored = fields[..., : fields.shape[-1] - zeros]
    wide = stored.shape[-1] * packed.element_size() == 8 * units
    # A copy: a view as another dtype wants its bytes aligned.
    real = stored.clone(memory_format=torch.contiguous_format).view(torch.float64 if wide else torch.float32)
    zero = fields[..., -zeros:].movedim(-1, 0)[..., None] if zeros else None
    return codes, real.movedim(-1, 0)[..., None], zero


def _last(rows: Tensor) -> Tensor:
    """``[U, ..., 1]`` as ``[..., U]``, in memory of its own."""
    return rows.squeeze(-1).movedim(0, -1).clone(memory_format=torch.contiguous_format)
