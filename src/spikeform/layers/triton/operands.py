"""What the attention kernels are given: where cached codes lie, and the parameters of a softmax."""

from __future__ import annotations

from math import gcd
from typing import Any, NamedTuple

import torch
from torch import Tensor

LEAST = 32  # of a product of bytes; of bf16 it would be 16


def run(kernel: Any, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
    """Run a kernel on the device of its first argument, a tensor."""
    with torch.cuda.device_of(args[0]):
        kernel[grid](*args, **constants)


def pow2(size: int) -> int:
    """The least power of two from ``size`` on."""
    return 1 << max(size - 1, 0).bit_length()


def padded(size: int) -> int:
    """Channels of a matrix for tensor cores that holds ``size``."""
    return max(pow2(size), LEAST)


def cdiv(size: int, part: int) -> int:
    """How many parts cover ``size``."""
    return -(-size // part)


class Train(NamedTuple):
    """Packed codes of one cache, ``[B, G, S, ...]``, the last axis dense.

    Args:
        codes: The tensor that the codes begin.
        word: Divides every stride and is a power of two, at most 16: so many elements can be read at once.
        places: Strides of the codes in words: batch, head, key.
        units: fp32, the unit of key s of head g at ``units + strides``; GIF only, else the codes.
        unit_places: Strides of the units: batch, head, key.
    """

    codes: Tensor
    word: int
    places: tuple[int, int, int]
    units: Tensor
    unit_places: tuple[int, int, int]


def train(packed: Tensor, size: int) -> Train:
    """The codes ``[B, G, S, E]`` or ``[B, G, S, E + 4]``, int8, whose last four bytes are the token's unit."""
    packed = dense(packed)
    strides = packed.stride()[:3]
    word = gcd(16, *strides)
    units = packed
    if packed.shape[-1] != size:
        # Bytes are read as numbers where they lie, unless they do not lie on numbers' places.
        aligned = word % 4 == 0 and size % 4 == 0 and packed.storage_offset() % 4 == 0
        whole = packed if aligned else packed[..., size:].contiguous()
        units = whole.view(torch.float32)[..., -1]
    batch, head, key = strides
    return Train(packed, word, (batch // word, head // word, key // word), units, _three(units))


class Mask(NamedTuple):
    """An additive mask, what it hides (values up to ``least``), and its strides for ``[B, H, L, S]``."""

    values: Tensor | None
    least: float
    places: tuple[int, int, int, int]

    @classmethod
    def of(cls, mask: Tensor | None, batch: int, heads: int, length: int, keys: int) -> Mask:
        """A mask ``[B or 1, 1 or H, L, S or more]``; None: everything is seen."""
        if mask is None:
            return cls(None, 0.0, (0, 0, 0, 0))
        mask = mask[..., :keys].expand(batch, heads, length, keys)
        batch_, head, query, key = mask.stride()
        return cls(mask, torch.finfo(mask.dtype).min / 2, (batch_, head, query, key))


class Populations(NamedTuple):
    """Multi-threshold populations of an attention layer, and its softmax: as the operator has them.

    Thresholds fp32 ``[1]`` or ``[2]`` each. Codes of queries, keys and values reach ``limit``, those of probabilities
    ``peak``. ``bits`` 0: the softmax is real.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    probability: Tensor
    limit: int
    peak: int
    resolution: int
    rounding: int
    bits: int
    nearest: bool
    low: int
    high: int

    @property
    def top(self) -> float:
        """The largest value of the HG bank."""
        return (1 - 2.0**-self.bits) * 2.0**self.high

    @property
    def floor(self) -> float:
        """The least value that the HG bank sends."""
        return 2.0**self.low


class Counts(NamedTuple):
    """GIF populations of an attention layer: what channels' units are in their tokens' common ones.

    Args:
        query: fp32 ``[E]``.
        key: fp32 ``[G, 1, E]``.
        value: Likewise.
        peak: The largest code of a probability.
        levels: L of queries.
        steps: T of their longest sub-neuron.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    peak: int
    levels: int
    steps: int


class Settings(NamedTuple):
    """Either of both as kernels of few queries take them.

    Args:
        tables: Thresholds, or multiples, of queries, keys, values and probabilities (of which GIF has none).
        limit: Largest code of queries, keys and values, or the levels of queries.
        resolution: Code units to a threshold, or the steps of queries.
        peak: Largest code of probabilities.
        top: Largest value of the HG bank.
        floor: The least that it sends.
        how: What kernels are compiled for: OAT, ROUNDING, BITS, NEAREST.
        two: Likewise, whether there are two sub-neurons: TWO_Q, TWO_K, TWO_V, TWO_P.
    """

    tables: tuple[Tensor, Tensor, Tensor, Tensor]
    limit: int
    resolution: float
    peak: int
    top: float
    floor: float
    how: dict[str, Any]
    two: dict[str, bool]


def settings(rule: Populations | Counts) -> Settings:
    """``rule`` as kernels of few queries take it."""
    oat = isinstance(rule, Populations)
    tables = rule.query, rule.key, rule.value, rule.probability if oat else rule.key
    two = {f"TWO_{name}": oat and len(table) == 2 for name, table in zip("QKVP", tables, strict=True)}
    if oat:
        how = {"OAT": True, "ROUNDING": rule.rounding, "BITS": rule.bits, "NEAREST": rule.nearest}
        return Settings(tables, rule.limit, float(rule.resolution), rule.peak, rule.top, rule.floor, how, two)
    how = {"OAT": False, "ROUNDING": 0, "BITS": 0, "NEAREST": True}
    return Settings(tables, rule.levels, float(rule.steps), rule.peak, 0.0, 0.0, how, two)


def _three(x: Tensor) -> tuple[int, int, int]:
    batch, head, key = x.stride()[:3]
    return batch, head, key


def dense(x: Tensor) -> Tensor:
    """``x`` with neighbours of the last axis next to one another."""
    return x if x.stride(-1) == 1 else x.contiguous()
