"""Integer weights as they lie in a file.

``weight`` is uint8 ``[1, N, bytes]``: of each row, the columns of tier 0 at that tier's bits, then those of tier 1,
and so on, each stored as ``code + zero``, which is not negative. ``zero`` is in the narrowest integer dtype.

N output features, K input channels, R tiers.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from spikeform.spikes.packing import pack_bits, packed_bytes, unpack_bits
from spikeform.synapses.integer import IntegerWeight

ZEROS = (torch.int8, torch.uint8, torch.int16)  # dtypes of a zero-point in a file
NAMES = ("weight", "scale", "zero", "tier")


class Form(NamedTuple):
    """What a layer's config says of its integer weights.

    Attributes:
        bits: Bits of one step of a weight.
        tiers: Steps T of each tier of input channels.
        ternary: Whether a step is -1, 0 or 1, instead of one of ``2^bits`` levels.
    """

    bits: int
    tiers: tuple[int, ...] = (1,)
    ternary: bool = False

    @property
    def levels(self) -> list[int]:
        """The largest stored code of each tier."""
        return [t * (2 if self.ternary else (1 << self.bits) - 1) for t in self.tiers]

    def zeros(self, like: Tensor) -> Tensor:
        """Where ternary codes have their zero: at T. int16, the shape of ``like`` ``[R, N]``."""
        return torch.tensor(self.tiers, dtype=torch.int16, device=like.device)[:, None].expand(like.shape)


def narrow(codes: Tensor) -> Tensor:
    """int8 where they fit, else int16: the same dtype for the same codes, whatever they came in."""
    least, most = (int(x) for x in codes.aminmax())
    return codes.to(torch.int8 if least >= -128 and most <= 127 else torch.int16).contiguous()


def pack(weight: IntegerWeight) -> dict[str, Tensor]:
    """The ``weight`` and, unless ternary, the ``zero`` of a file.

    Raises:
        ValueError: A code lies outside of its grid.
    """
    form = Form(weight.bits, weight.tiers, weight.ternary)
    parts = []
    for r, levels in enumerate(form.levels):
        columns = weight.codes if weight.tier is None else weight.codes[:, weight.tier == r]
        q = columns.to(torch.int32) + weight.zero[r, :, None]
        if q.numel() and (int(q.min()) < 0 or int(q.max()) > levels):
            raise ValueError(f"weight: codes outside of a grid of {levels + 1} levels")
        parts.append(pack_bits(q, levels.bit_length()))
    file = {"weight": torch.cat(parts, -1)[None]}
    if not weight.ternary:
        least, most = (int(x) for x in weight.zero.aminmax())
        fits = [t for t in ZEROS if torch.iinfo(t).min <= least and most <= torch.iinfo(t).max]
        file["zero"] = weight.zero.to(fits[0])
    return file


def problems(read: dict[str, Tensor], form: Form, rows: int, columns: int) -> list[str]:
    """What is wrong with tensors read from a file, each beginning with the tensor's name.

    Args:
        read: ``weight``, ``scale``, and ``zero`` and ``tier`` where the form has them.
        form: What the layer should have.
        rows: N.
        columns: K.
    """
    found, shape = [], [len(form.tiers), rows]
    scale, zero, tier, weight = read["scale"], read.get("zero"), read.get("tier"), read["weight"]
    if list(scale.shape) != shape or not bool((scale.isfinite() & (scale >= 0)).all()):
        found.append("scale is missing, misshapen, negative or not finite")
    if zero is not None and (list(zero.shape) != shape or zero.dtype not in ZEROS):
        found.append(f"zero is {list(zero.shape)} of {zero.dtype}, not {shape} of small integers")
    elif zero is not None:
        tops = torch.tensor(form.levels, device=zero.device)[:, None]
        if bool(((zero < 0) | (zero.to(tops) > tops)).any()):
            found.append(f"zero is not a code of a grid of up to {max(form.levels) + 1} levels")
    if tier is not None and (list(tier.shape) != [columns] or tier.dtype != torch.uint8 or int(tier.max()) >= shape[0]):
        return [*found, f"tier is not one of {shape[0]} tiers for each of {columns} channels"]
    sizes = [len(c) for c in _columns(tier, form, columns, scale.device)]
    size = sum(packed_bytes(n, levels.bit_length()) for n, levels in zip(sizes, form.levels, strict=True))
    if weight.dtype != torch.uint8 or weight.device.type == "meta" or list(weight.shape) != [1, rows, size]:
        by_tier = "" if tier is None else " (as its tiers say)"
        found.append(f"weight is {list(weight.shape)} of {weight.dtype}, not {[1, rows, size]} bytes{by_tier}")
    return found


def unpack(read: dict[str, Tensor], form: Form, columns: int) -> IntegerWeight:
    """The integer weight in tensors read from a file, in which :func:`problems` found nothing.

    Raises:
        ValueError: A code lies outside of its grid.
    """
    packed, scale, tier = read["weight"][0], read["scale"], read.get("tier")
    zero = read["zero"].to(torch.int16) if "zero" in read else form.zeros(scale)
    codes = torch.empty(packed.shape[0], columns, dtype=torch.int32, device=packed.device)
    start = 0
    for r, (places, levels) in enumerate(zip(_columns(tier, form, columns, packed.device), form.levels, strict=True)):
        stop = start + packed_bytes(len(places), levels.bit_length())
        q = unpack_bits(packed[:, start:stop], levels.bit_length(), len(places))
        if q.numel() and int(q.max()) > levels:
            raise ValueError(f"weight holds the code {int(q.max())} on a grid of {levels + 1} levels")
        codes[:, places] = q.to(torch.int32) - zero[r, :, None]
        start = stop
    return IntegerWeight(narrow(codes), scale, zero, tier, form.bits, form.tiers, form.ternary)


def _columns(tier: Tensor | None, form: Form, columns: int, device: torch.device) -> list[Tensor]:
    """The input channels of each tier, rising."""
    if tier is None:
        return [torch.arange(columns, device=device)]
    return [(tier == r).nonzero().squeeze(1) for r in range(len(form.tiers))]
