"""GIF neurons with a range of each token: kernels of :mod:`spikeform.neurons.fused`."""

from __future__ import annotations

import torch
from torch import Tensor

from spikeform.native.library import function
from spikeform.neurons.cpu.real import KINDS
from spikeform.neurons.gif import GIF


def burst(multiple: Tensor, levels: int, steps: int) -> GIF:
    """The neuron that the operators' parameters describe: a channel of T steps has multiple ``steps / T``."""
    neuron = GIF(levels.bit_length(), tuple(multiple.shape), steps=steps)
    neuron.set_times((steps / multiple).to(torch.uint8))
    return neuron


def gif_integers(x: Tensor, top: Tensor, multiple: Tensor, levels: int, steps: int) -> tuple[Tensor, Tensor]:
    """Integers of each row in its common unit, int8 ``[..., K]``, and that unit, fp32 ``[..., 1]``."""
    if function("gif_rows", "piiippiiiippi") is None or x.dtype not in KINDS:
        train = burst(multiple, levels, steps)(x)
        found = train.integers()
        assert found is not None  # a range of each token: its units are commensurate
        return found[0].to(torch.int8), found[1].expand(*x.shape[:-1], 1).contiguous()
    codes = torch.empty(x.shape, dtype=torch.int8)
    units = torch.empty((*x.shape[:-1], 1))
    _rows(x, top, multiple, levels, steps, codes, units)
    return codes, units


def gif_pack(x: Tensor, top: Tensor, multiple: Tensor, levels: int, steps: int) -> Tensor:
    """What a cache holds of ``x`` ``[..., E]``: int8 ``[..., E + 4]``, each row's unit behind its codes."""
    if function("gif_rows", "piiippiiiippi") is None or x.dtype not in KINDS:
        neuron = burst(multiple, levels, steps)
        return neuron.pack(neuron(x)).to(torch.int8)
    packed = torch.empty((*x.shape[:-1], x.shape[-1] + 4), dtype=torch.int8)
    _rows(x, top, multiple, levels, steps, packed, None)
    return packed


def _rows(x: Tensor, top: Tensor, multiple: Tensor, levels: int, steps: int, out: Tensor, units: Tensor | None) -> None:
    run = function("gif_rows", "piiippiiiippi")
    assert run is not None
    size = x.shape[-1]
    tables, inner = top.numel() // max(size, 1), 1
    if tables > 1:
        if top.ndim == 3 and x.ndim >= 3 and top.shape == (x.shape[-3], 1, size):
            inner = x.shape[-2]  # [G, 1, E]: a table for all tokens of a head
        else:
            top, multiple = (table.expand(x.shape) for table in (top, multiple))
            tables = x.numel() // max(size, 1)
    x, top, multiple = x.contiguous(), top.contiguous(), multiple.contiguous()
    run(
        x.data_ptr(),
        KINDS[x.dtype],
        x.numel() // max(size, 1),
        size,
        top.data_ptr(),
        multiple.data_ptr(),
        max(tables, 1),
        max(inner, 1),
        levels,
        steps,
        out.data_ptr(),
        None if units is None else units.data_ptr(),
        torch.get_num_threads(),
    )
