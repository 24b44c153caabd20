"""Attention on codes as one operator; kernels in ``cpu/`` and ``triton/``.

Parameters as in :mod:`spikeform.neurons.fused`. B batch, H query heads, G key/value heads, L queries, S keys, E head
size. q ``[B, H, L, E]`` is real (fp32 or bf16); keys and values ``[B, G, S, ...]`` are what the neurons' ``pack`` puts
into a cache; mask is additive, ``[B or 1, 1 or H, L, S]``, the dtype's minimum or -inf where hidden; the output is
``[B, L, H, E]`` in the dtype of q. A row that sees no key gives zeros.
"""

from __future__ import annotations

import torch
from torch import Tensor

from spikeform.layers.cpu.chain import left_by
from spikeform.native import define
from spikeform.synapses.rows import POPULATIONS, words_of_oat


def _define(schema: str, fake):
    name = schema.partition("(")[0]
    return define(schema, fake, f"spikeform.layers.cpu.attention:{name}", f"spikeform.layers.triton.attention:{name}")


def _context(q: Tensor, *_) -> Tensor:
    batch, heads, length, size = q.shape
    return q.new_empty((batch, length, heads, size))


def _row(q: Tensor, *args) -> Tensor:
    thresholds, _, limit, _, _, parts = args[-6:]
    return q.new_empty((1, words_of_oat(q[0].numel(), thresholds[0].numel(), limit, parts)), dtype=torch.int32)


_OAT = (
    "Tensor q, Tensor{} k, Tensor{} v, Tensor? mask, float scaling, Tensor query, Tensor key, Tensor value,"
    " Tensor probability, int {own}limit, int peak, int {own}resolution, int {own}rounding, int bits, bool nearest,"
    " int low, int high"
)
_GIF = (
    "Tensor q, Tensor{} k, Tensor{} v, Tensor? mask, float scaling, Tensor? signs, Tensor q_top, Tensor q_multiple,"
    " int q_steps, Tensor k_top, Tensor k_multiple, int k_steps, Tensor v_top, Tensor v_multiple, int v_steps,"
    " int levels, int peak"
)
# SpikingAttention with MT or OAT populations without channel shifts. bits = 0: the softmax is real; else by HGs of
# exp and 1/x of so many bits. Thresholds [R] each; codes of queries reach ``limit``, those of probabilities ``peak``.
oat_attention = _define(f"oat_attention({_OAT.format('', '', own='')}) -> Tensor", _context)
# SpikingAttention with GIF populations whose range is the token's (signed, unified), a real softmax, and probabilities
# encoded by Dynamic with codes up to ``peak``. Query tables [E], key and value tables [G, 1, E]; signs int8 [E], or
# None.
gif_attention = _define(f"gif_attention({_GIF.format('', '')}) -> Tensor", _context)


def _prompt(q: Tensor, k: Tensor, v: Tensor, *_) -> tuple[Tensor, Tensor, Tensor]:
    packed = *k.shape[:-1], k.shape[-1] + 4
    return _context(q), k.new_empty(packed, dtype=torch.int8), v.new_empty(packed, dtype=torch.int8)


def _tiles(mask: Tensor, length: int, rows: int, keys: int) -> tuple[Tensor, Tensor]:
    batch, heads = (n if stride else 1 for n, stride in zip(mask.shape[:2], mask.stride()[:2], strict=True))
    down, across = -(-length // rows), -(-length // keys)
    flags = mask.new_empty((batch, heads, down, across), dtype=torch.int8)
    return flags, mask.new_empty((batch, heads, across * -(-keys // 32), down * rows), dtype=torch.int32)


# What a mask of L queries and as many keys does to tiles of so many rows and keys: a flag of each, and a bit of each
# place. All layers that have the mask may have these.
mask_tiles = define(
    "mask_tiles(Tensor mask, int length, int rows, int keys) -> (Tensor, Tensor)",
    _tiles,
    *["spikeform.layers.triton.prompt:mask_tiles"] * 2,
)
# The same of keys and values that are all there are, real [B, G, L, E], queries and keys of which are turned by cos and
# sin [B or 1, 1, L, E] first (rotary embedding by halves); and what the neurons pack of keys and values. flags, bits:
# of mask_tiles, where they are known.
gif_prompt = define(
    "gif_prompt(Tensor q, Tensor k, Tensor v, Tensor cos, Tensor sin, Tensor? mask, float scaling, Tensor q_multiple,"
    " int q_steps, Tensor k_multiple, int k_steps, Tensor v_multiple, int v_steps, int levels, int peak,"
    " Tensor? flags=None, Tensor? bits=None) -> (Tensor, Tensor, Tensor)",
    _prompt,
    *["spikeform.layers.triton.prompt:gif_prompt"] * 2,
)
# SpikingSelfAttention; here k and v are real too, [B, G, L, E]. seen bool [B, L], or None: no padding. state fp32
# [T, B, G, E, E], which moves on, or None: none before, and none is kept; number int64 [B + 1]: first of all the keys
# in it of each row, or None: none. windows: those of the key/value heads, 0 where there is none, which come last; with
# any, state is that of the others, and recent int8 [2, T, B, heads with a window, W, E], the spikes of the last tokens,
# moves on too. Gains of queries, keys, values and output [H], [G], [G], [H]; tau and reset of all neurons, the
# threshold of all but the output, whose own is ``last``.
ssa_attention = define(
    "ssa_attention(Tensor q, Tensor k, Tensor v, Tensor? seen, Tensor(a!)? state, Tensor(b!)? recent, Tensor?"
    " number, Tensor query, Tensor key, Tensor value, Tensor output, int steps, float tau, float threshold, float last,"
    " bool hard, bool signed, bool normalise, int[] windows) -> Tensor",
    _context,
    "spikeform.layers.cpu.ssa:ssa_attention",
    "spikeform.layers.triton.ssa:ssa_attention",
)


def _on_gpu(schema: str, fake):
    """An operator of compiled graphs, whose kernels are a GPU's."""
    place = f"spikeform.layers.triton.attention:{schema.partition('(')[0]}"
    return define(schema, fake, place, place)


# Codes of what oat_attention leaves of one row, for one matrix: see :mod:`spikeform.synapses.rows`, whose arguments
# come last. On a CPU it and the following ones are steps of ``chain``, as those are.
row_attention = _on_gpu(f"row_attention({_OAT.format('', '', own='own_')}, {POPULATIONS}) -> Tensor", _row)
# The same attentions of one query each, after what neurons pack of one token's key and value [B, G, 1, E] has been
# written into the caches k and v [B, G, S, ...] at ``place`` int64 [1] or []. With cos and sin [B or 1, 1, 1, E] the
# key and the query are turned by them first (rotary embedding by halves).
_TOKEN = "Tensor place, Tensor own_key, Tensor own_value, Tensor? cos, Tensor? sin"
_CHANGED = "(a!)", "(b!)"
oat_appended = _on_gpu(f"oat_appended({_OAT.format(*_CHANGED, own='')}, {_TOKEN}) -> Tensor", _context)
gif_appended = _on_gpu(f"gif_appended({_GIF.format(*_CHANGED)}, {_TOKEN}) -> Tensor", _context)
row_appended = _on_gpu(f"row_appended({_OAT.format(*_CHANGED, own='own_')}, {_TOKEN}, {POPULATIONS}) -> Tensor", _row)


def _chained(given, caches, program: str) -> Tensor:
    dtype, sizes = left_by(program)
    return (*given, *caches)[0].new_empty((sum(sizes),), dtype=dtype)


# On a CPU alone, in compiled graphs: what :mod:`spikeform.layers.chained` makes of the operators above and of those of
# :mod:`spikeform.synapses.rows`. It gives what several of them leave, flat, in one piece.
chain = define(
    "chain(Tensor[] given, Tensor(a!)[] caches, str program) -> Tensor",
    _chained,
    *["spikeform.layers.cpu.chain:chain"] * 2,
)
# Adds to integers [], each a tensor of its own.
advance = define(
    "advance(Tensor(a!)[] counters, int by) -> ()",
    lambda *_: None,
    "spikeform.layers.cpu.chain:advance",
    "spikeform.layers.triton.append:advance",
)
