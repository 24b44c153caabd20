"""Spiking self-attention: the kernel of :mod:`spikeform.layers.fused`, whose docstring explains the shapes."""

from __future__ import annotations

from array import array

import torch
from torch import Tensor

from spikeform.layers.self_attention import SpikingSelfAttention
from spikeform.layers.state_cache import StateLayer
from spikeform.native.library import function
from spikeform.neurons.cpu.real import KINDS


def ssa_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seen: Tensor | None,
    state: Tensor | None,
    recent: Tensor | None,
    number: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    steps: int,
    tau: float,
    threshold: float,
    last: float,
    hard: bool,
    signed: bool,
    normalise: bool,
    windows: list[int],
) -> Tensor:
    """Attention ``[B, L, H, E]`` of real ``q`` ``[B, H, L, E]`` and ``k``, ``v`` ``[B, G, L, E]``; a cache moves on."""
    batch, heads, length, size = q.shape
    groups = k.shape[1]
    run = function("ssa_attention", "ppppppppp" + "pppp" + "p" + "fff" + "i")
    if run is None or q.dtype not in KINDS or not q.is_cpu:
        reset = "hard" if hard else "soft"
        layer = SpikingSelfAttention(
            *(heads, groups, steps),
            normalise=normalise,
            windows=windows,
            tau=tau,
            reset=reset,
            signed=signed,
        )
        for neuron, gain in zip(layer.neurons(), (query, key, value, output), strict=True):
            neuron.gain, neuron.threshold = torch.nn.Parameter(gain, False), threshold
        layer.output.threshold = last
        held = None if state is None else StateLayer()
        if held is not None:
            held.keys, held.recent, held.number = state, recent, number
        out = layer.attend(q, k, v, seen, held)
        if state is not None and held is not None and held.keys is not None and held.keys is not state:
            state.copy_(held.keys)  # sums of another dtype; all else moved on in its place
        return out
    q, k, v = (x if x.stride(-1) == 1 or size == 1 else x.contiguous() for x in (q, k, v))
    out = q.new_empty(batch, length, heads, size)
    gains = [gain.float().contiguous() for gain in (query, key, value, output)]
    seen = None if seen is None else seen.contiguous()
    strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3])
    local = sum(window > 0 for window in windows)
    rule = KINDS[q.dtype], hard, signed, normalise, local, max(windows) - 1 if local else 0
    sizes = array("q", (batch, heads, groups, length, size, steps, *strides, *rule))
    each = array("q", windows)
    run(
        sizes.buffer_info()[0],
        q.data_ptr(),
        k.data_ptr(),
        v.data_ptr(),
        None if seen is None else seen.data_ptr(),
        None if state is None else state.data_ptr(),
        None if recent is None else recent.data_ptr(),
        each.buffer_info()[0],
        None if number is None else number.data_ptr(),
        *(gain.data_ptr() for gain in gains),
        out.data_ptr(),
        tau,
        threshold,
        last,
        torch.get_num_threads(),
    )
    return out
