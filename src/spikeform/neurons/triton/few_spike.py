"""Few-spike banks in one pass: gates by bisection, the window in registers, the tables from the nearest cache."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from spikeform.neurons.triton.codes import rounded
from spikeform.neurons.triton.tiles import LARGE, flat, launch, run, tile

ELEMENTS = 512  # of a tile: gathers wait for one another, so many warps a processor, each of few elements


@triton.jit
def _values(
    x,
    gates,
    theta,
    h,
    d,
    out,
    regions,
    step_region,
    step_time,
    groups,
    inner,
    width,
    stride_b,
    stride_g,
    stride_s,
    STEPS: tl.constexpr,
    DEPTH: tl.constexpr,
    FLAT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    at, to, live, _ = tile(groups, inner, width, stride_b, stride_g, stride_s, FLAT, ROWS, BLOCK)
    v = tl.load(x + at, live, other=0.0).to(tl.float32)
    v = tl.minimum(tl.maximum(v, tl.load(gates)), tl.load(gates + regions))
    branch = tl.zeros(v.shape, tl.int32)  # of the inner gates, as many are not above v
    for i in tl.static_range(DEPTH):
        further = branch + (1 << (DEPTH - 1 - i))
        inside = further < regions
        gate = tl.load(gates + tl.where(inside, further, 0))
        branch = tl.where(inside & (v >= gate), further, branch)
    place = branch * step_region
    y = tl.zeros(v.shape, tl.float32)
    for _ in tl.static_range(STEPS):
        fires = v > tl.load(theta + place)
        v = tl.where(fires, v - tl.load(h + place), v)
        y = tl.where(fires, y + tl.load(d + place), y)
        place += step_time
    tl.store(out + to, rounded(y, out.dtype.element_ty), live)


def few_spike_values(x: Tensor, gates: Tensor, theta: Tensor, h: Tensor, d: Tensor) -> Tensor:
    """Values of :class:`~spikeform.neurons.FewSpikeHG`; see :mod:`spikeform.neurons.fused`."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.numel() == 0:
        return out
    rows = flat(x)
    grid, shape = launch(rows, ELEMENTS)
    regions, steps = theta.shape
    theta, h, d = theta.contiguous(), h.contiguous(), d.contiguous()
    order = steps, 1
    if x.numel() >= LARGE:
        # Regions next to each other: what the lanes of a warp want at one step is then in different banks.
        theta, h, d = torch.stack((theta.t(), h.t(), d.t()))
        order = 1, regions
    depth = (regions - 1).bit_length()
    run(_values, grid, rows.x, gates, theta, h, d, out, regions, *order, *rows[1:], STEPS=steps, DEPTH=depth, **shape)
    return out
