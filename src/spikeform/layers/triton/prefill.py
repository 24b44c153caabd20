"""Attention of many queries on cached codes: bound by tensor cores; scores are found anew in each pass, never kept.

A program has a tile of queries of one head, and meets the keys tile by tile: those that its mask leaves alone in one
loop, those that it changes in another, and those that it hides in none. What a row's codes need to know of all its
scores is found by a kernel of its own: it holds no sums of values, so more of its programs share a processor.
:mod:`~spikeform.layers.triton.prefill_oat` and :mod:`~spikeform.layers.triton.prefill_gif` have the kernels.

Exponentials are the bare hardware instruction's (2^-22), which moves a code only at a rounding edge.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from spikeform.layers.triton import prefill_gif, prefill_oat, tiles
from spikeform.layers.triton.operands import Counts, Mask, Populations, Train, cdiv, padded, pow2, run
from spikeform.layers.triton.query import encode_oat
from spikeform.neurons.oat import ROUNDINGS

TILES = 64  # of a row that are looked at at once; more only where there are more, so that little is compiled anew
REGISTERS = 128  # of a thread of a kernel that sums no values: two programs and more share a processor
BF16 = 256  # integers up to here, and their products with powers of two, are bf16


def attend(
    q: Tensor,
    q_unit: Tensor | None,
    k: Train,
    v: Train,
    mask: Mask,
    scaling: float,
    rule: Populations | Counts,
    size: int,
    out: Tensor,
    form: Form | None = None,
) -> None:
    """Fill ``out`` ``[B, L, H, E]``; as :func:`spikeform.layers.triton.decode.attend`, for many queries.

    Args:
        q: ``[B, H, L, E or more]``, the last axis dense: real, or integers of the unit ``q_unit`` ``[B, H, L]``.
        q_unit: None for real queries.
        k: Cached keys.
        v: Cached values.
        mask: Who sees what.
        scaling: Factor of the scores.
        rule: What encodes: :class:`Populations` of real queries, :class:`Counts` of integers.
        size: E.
        out: Contiguous.
        form: Sizes; None: what suits.
    """
    if isinstance(rule, Counts):
        form = form or form_of(out.shape[1], padded(size), False)
        span = span_of(k.codes.shape[2], form)
        keys = tiles.unpack(k, rule.key, size, span, torch.int8)
        values = tiles.unpack(v, rule.value, size, span, torch.bfloat16)
        attend_integers(q, q_unit, keys, values, k.codes.shape[2], mask, scaling, rule.peak, size, out, form)
        return
    batch, length, heads, _ = out.shape
    groups, keys = k.codes.shape[1:3]
    one, two = variants(rule, q.dtype)
    form = form or form_of(length, padded(size), two)
    span = span_of(keys, form)
    seen = tiles.look(mask, length, keys, form.rows, form.keys, out.device)
    values = q if mask.values is None else mask.values
    tops, shares = torch.empty((2, batch, heads, length), dtype=torch.float32, device=out.device)
    grid, sizes, places = (batch * heads, cdiv(length, form.rows)), (heads, groups, length, keys, span), mask.places
    constants = constants_of(mask, seen, size, form)
    queries = encode_oat(q, rule, two)
    dense_keys, _ = tiles.unpack(k, rule.key, size, span, torch.bfloat16, two)
    dense_values, _ = tiles.unpack(v, rule.value, size, span, torch.bfloat16, two)
    thresholds = rule.query, rule.key, rule.value, rule.probability
    pairs = {f"TWO_{name}": len(t) == 2 for name, t in zip("QKVP", thresholds, strict=True)}
    two_p = pairs.pop("TWO_P")
    bank = {"BITS": rule.bits, "NEAREST": rule.nearest}
    planes, resolution = (queries.stride(0), dense_keys.stride(0)), float(rule.resolution)
    for split in [False] * one + [True] * two:
        which = {"SPLIT": split, "ALONE": one != two}
        run(
            prefill_oat._sums, grid, queries, dense_keys, tops, shares, values, *seen[:2], *thresholds[:3], *planes,
            mask.least, scaling, resolution, rule.top, rule.floor, *sizes, *places, *seen[2:], **pairs, **bank, **which,
            maxnreg=None if split else REGISTERS, **constants,
        )  # fmt: skip
        run(
            prefill_oat._context, grid, queries, dense_keys, dense_values, tops, shares, out, values, *seen[:2],
            *thresholds, *planes, mask.least, scaling, rule.peak, resolution, rule.top, rule.floor, *sizes, *places,
            *seen[2:], **pairs, TWO_P=two_p, ROUNDING=rule.rounding, SPLIT_P=rule.peak > BF16 or two_p, SIZE=size,
            **bank, **which, **constants,
        )  # fmt: skip


def attend_integers(
    q: Tensor,
    q_unit: Tensor,
    k: tuple[Tensor, Tensor],
    v: tuple[Tensor, Tensor],
    keys: int,
    mask: Mask,
    scaling: float,
    peak: int,
    size: int,
    out: Tensor,
    form: Form,
    seen: tiles.Looked | None = None,
) -> None:
    """:func:`attend` of GIF populations, on what :func:`~.tiles.unpack` makes of keys and values, S of them.

    ``seen``: what the mask does to each tile of this form, where that is known.
    """
    batch, length, heads, _ = out.shape
    (dense_keys, key_units), (dense_values, value_units) = k, v
    groups, span = key_units.shape[-2:]
    seen = seen or tiles.look(mask, length, keys, form.rows, form.keys, out.device)
    tops = torch.empty((batch, heads, length), dtype=torch.float32, device=out.device)
    grid = batch * heads, cdiv(length, form.rows)
    known = (
        q if mask.values is None else mask.values, *seen[:2], mask.least, scaling, peak, heads, groups, length, keys,
        span, *q.stride()[:3], *mask.places, *seen[2:],
    )  # fmt: skip
    constants = constants_of(mask, seen, size, form)
    run(
        prefill_gif._tops, grid, q, q_unit, dense_keys, key_units, value_units, tops, *known, value_units.stride(0),
        SIZE=size, maxnreg=REGISTERS, **constants,
    )  # fmt: skip
    run(
        prefill_gif._context, grid, q, q_unit, dense_keys, key_units, dense_values, value_units, tops, out, *known,
        SIZE=size, **constants,
    )  # fmt: skip


def constants_of(mask: Mask, seen: tiles.Looked, size: int, form: Form) -> dict[str, Any]:
    """What kernels are compiled for."""
    return {
        "MASKED": mask.values is not None, "E": padded(size), "M": form.rows, "N": form.keys,
        "TILES": max(pow2(seen.flags.shape[-1]), TILES), "STAGES": form.stages, "num_warps": form.warps,
    }  # fmt: skip


def span_of(keys: int, form: Form) -> int:
    """Keys of matrices that are whole tiles."""
    multiple = max(form.keys, tiles.KEYS)
    return cdiv(keys, multiple) * multiple


def variants(rule: Populations, dtype: torch.dtype) -> tuple[bool, bool]:
    """Whether one bf16 may hold what codes of queries, keys and values stand for, and whether it may take two.

    Where both may be, the thresholds decide, and only the device knows them.

    Args:
        rule: What encodes.
        dtype: Of real queries, and so of the keys and values that were encoded.
    """
    if rule.limit > BF16:
        # A limit of 8 significant bits belongs to thresholds that are powers of two: codes are then as short as inputs.
        low = rule.limit & -rule.limit
        one = rule.limit // low < BF16 and dtype == torch.bfloat16 and ROUNDINGS[rule.rounding] != "strict"
        return one, not one
    return True, any(len(t) == 2 for t in (rule.query, rule.key, rule.value))


class Form(NamedTuple):
    """Sizes of a program.

    Args:
        rows: Queries of a tile.
        keys: Keys of a tile.
        stages: Tiles under way.
        warps: Of a program.
    """

    rows: int
    keys: int
    stages: int
    warps: int


MEMORY = 192 * 2**10  # bytes of a program's shared memory; the rest is for what changes places


def form_of(length: int, size: int, split: bool) -> Form:
    """What suits so many queries of E channels, in one plane or two."""
    rows, keys, stages = min(max(pow2(length), 16), 128), 64, 3

    def bytes_of(rows: int, keys: int, stages: int) -> int:
        return 2 * size * (1 + split) * (rows + 2 * keys * stages)

    while bytes_of(rows, keys, stages) > MEMORY and stages > 2:
        stages -= 1
    while bytes_of(rows, keys, stages) > MEMORY and rows > 64:
        rows //= 2
    while bytes_of(rows, keys, stages) > MEMORY and keys > 16:
        keys //= 2
    return Form(rows, keys, stages, 8 if rows == 128 else 4)
