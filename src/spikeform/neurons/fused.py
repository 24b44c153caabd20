"""Neurons as one pass over memory: operators whose kernels are in ``cpu/`` and ``triton/``.

Each has the meaning of the neuron that its docstring names, in its closed form; a test compares them code by code.
Real input is fp32 or bf16; arithmetic is in fp32.

The parameters of a multi-threshold population (:class:`~spikeform.neurons.MT`, :class:`~spikeform.neurons.OAT`) are
``threshold`` fp32 ``[R]`` (R = 1, or 2: normal, outlier), ``limit`` and ``resolution`` of its coding, and ``rounding``,
the index of its name in :data:`~spikeform.neurons.oat.ROUNDINGS`. Those of an HG neuron
(:class:`~spikeform.neurons.FixedPointHG`) are ``function``, ``bits`` T, ``nearest``, ``low`` and ``high``. Those of a
GIF neuron with a range of each token, signed and unified: ``top`` and ``multiple`` fp32 ``[*channels]``, as
:class:`~spikeform.neurons.burst.Tables` has them, ``levels`` L and ``steps`` T.
"""

from __future__ import annotations

from importlib.util import find_spec

import torch
from torch import Tensor

from spikeform.native import define


def _define(schema: str, fake, home: str):
    name = schema.partition("(")[0]
    return define(schema, fake, f"spikeform.neurons.cpu.{home}:{name}", f"spikeform.neurons.triton.{home}:{name}")


def _like(x: Tensor, *_) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _values(x: Tensor, threshold: Tensor, shift: Tensor | None, limit, resolution, rounding, narrow: bool) -> Tensor:
    return x.new_empty(x.shape, dtype=x.dtype if narrow else torch.float32)


def _packed(x: Tensor, threshold: Tensor, limit: int, resolution: int, rounding: int) -> Tensor:
    return x.new_empty(x.shape, dtype=torch.int16 if limit < 2**14 else torch.int32)


def _integers(x: Tensor, top: Tensor, multiple: Tensor, levels: int, steps: int) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=torch.int8), x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)


def _gif_packed(x: Tensor, top: Tensor, multiple: Tensor, levels: int, steps: int) -> Tensor:
    return x.new_empty((*x.shape[:-1], x.shape[-1] + 4), dtype=torch.int8)


def _spikes(current: Tensor, steps: int, tau, threshold, hard, signed, narrow: bool) -> Tensor:
    return current.new_empty((steps, *current.shape[1:]), dtype=torch.int8 if narrow else current.dtype)


def _currents(grad: Tensor, current: Tensor, *_) -> Tensor:
    return torch.empty_like(current, memory_format=torch.contiguous_format)


# decode(encode(x)): [..., K] in the dtype of x where ``narrow`` (exact if units are powers of two and limits fit),
# else fp32. ``shift`` int8 [K], or None: thresholds of channel k are 2^shift[k] times as large, and the shift is
# folded into the next weights, so values are of x 2^-shift.
oat_values = _define(
    "oat_values(Tensor x, Tensor threshold, Tensor? shift, int limit, int resolution, int rounding, bool narrow)"
    " -> Tensor",
    _values,
    "oat",
)
# What a cache holds: 2 code + branch, int16 where limit < 2^14, else int32; as MT.pack.
oat_pack = _define(
    "oat_pack(Tensor x, Tensor threshold, int limit, int resolution, int rounding) -> Tensor", _packed, "oat"
)
# FixedPointHG.encode(x).decode(), in the dtype of x.
hg_values = _define(
    "hg_values(Tensor x, str function, int bits, bool nearest, int low, int high) -> Tensor", _like, "hg"
)
# FewSpikeHG.encode(x).decode(), in the dtype of x; gates [R + 1], theta, h, d [R, T].
few_spike_values = _define(
    "few_spike_values(Tensor x, Tensor gates, Tensor theta, Tensor h, Tensor d) -> Tensor", _like, "few_spike"
)
# SpikingNorm.forward with fixed-point HGs of equal ``bits``, in the dtype of x; weight, bias [D].
hg_norm = _define(
    "hg_norm(Tensor x, Tensor? weight, Tensor? bias, float eps, bool centred, float gain_offset, Tensor threshold,"
    " int limit, int resolution, int rounding, int bits, bool nearest, int low, int high) -> Tensor",
    _like,
    "norm",
)
# HG_function(gate) * OAT(up), as SpikingGatedMLP has it, in the dtype of gate.
hg_gated = _define(
    "hg_gated(Tensor gate, Tensor up, str function, int bits, bool nearest, int low, int high, Tensor threshold,"
    " int limit, int resolution, int rounding) -> Tensor",
    _like,
    "hg",
)
# GIF: the integers of each row in its common unit, int8 [..., K] (the caller knows that they fit), and that unit,
# fp32 [..., 1]: SpikeTrain.integers().
gif_integers = _define(
    "gif_integers(Tensor x, Tensor top, Tensor multiple, int levels, int steps) -> (Tensor, Tensor)", _integers, "gif"
)
# GIF.pack(GIF.encode(x)), int8 [..., E + 4]; tables broadcast to x.
gif_pack = _define(
    "gif_pack(Tensor x, Tensor top, Tensor multiple, int levels, int steps) -> Tensor", _gif_packed, "gif"
)
# LIF: spikes [T, ...] of currents [T, ...], or [1, ...] where they are the same in each step; int8 where ``narrow``,
# else in the dtype of the currents. And the gradient of the currents from that of the spikes; ``kind`` is the index of
# the surrogate's name in SURROGATES. Called wherever the neuron is; without triton a GPU takes the CPU's operations.
_LIF = "spikeform.neurons.cpu.lif", f"spikeform.neurons.{'triton' if find_spec('triton') else 'cpu'}.lif"
lif_spikes = define(
    "lif_spikes(Tensor current, int steps, float tau, float threshold, bool hard, bool signed, bool narrow) -> Tensor",
    _spikes,
    *(f"{home}:lif_spikes" for home in _LIF),
)
lif_gradient = define(
    "lif_gradient(Tensor grad, Tensor current, float tau, float threshold, bool hard, bool signed, int kind) -> Tensor",
    _currents,
    *(f"{home}:lif_gradient" for home in _LIF),
)
