"""The operators of :mod:`spikeform.synapses.fused` on the CPU; without the library by :mod:`.plain`.

M rows, K inputs, N outputs. Where weights are integers the library reads each of them once for up to 256 rows; real
weights it takes for a few rows, and more are PyTorch's product of the decoded values.
"""

from __future__ import annotations

import torch
from torch import Tensor

from spikeform.native.library import function
from spikeform.neurons.fused import oat_values
from spikeform.synapses.cpu import plain

KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2, torch.uint8: 3}  # as the library numbers them
WIDEST = 2**17 - 1  # inputs whose int8 products an int32 sum holds
FEW, SOME = 8, 32  # rows up to which the library is the faster one: where PyTorch multiplies in bf16, and in fp32


def oat_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    threshold: Tensor,
    shift: Tensor | None,
    limit: int,
    resolution: int,
    rounding: int,
    single: bool,
) -> Tensor:
    """``OAT(x) W^T + b`` ``[..., N]`` with real weights ``[N, K]``."""
    (N, K), M = weight.shape, _rows(x)
    run, narrow = function("oat_linear", "piiipiipipipiiipi"), single and weight.dtype == torch.bfloat16
    most = FEW if narrow else SOME
    if run is None or x.dtype not in KINDS or weight.dtype not in KINDS or most < M:
        values = oat_values(x, threshold, shift, limit, resolution, rounding, narrow and x.dtype == weight.dtype)
        return plain.real_product(values.to(weight.dtype) if narrow else values, weight, bias).to(x.dtype)
    x, weight, out = x.contiguous(), weight.contiguous(), x.new_empty(*x.shape[:-1], N)
    run(
        *(x.data_ptr(), KINDS[x.dtype], M, K, weight.data_ptr(), KINDS[weight.dtype], N, *_bias(bias)),
        *(threshold.data_ptr(), len(threshold), _pointer(shift), limit, resolution, rounding),
        *(out.data_ptr(), torch.get_num_threads()),
    )
    return out


def oat_linear_int(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    threshold: Tensor,
    limit: int,
    resolution: int,
    rounding: int,
) -> Tensor:
    """``OAT(x) W^T + b`` ``[..., N]`` with int8 weights ``[N, K]``, summed exactly."""
    (N, K), kind = weight.shape, KINDS.get(x.dtype)
    run = function("oat_linear_int", "piiipippipiiiipi")
    if run is None or kind is None or K > WIDEST:
        return plain.oat_linear_int(x, weight, scale, bias, threshold, limit, resolution, rounding)
    x, weight, out = x.contiguous(), weight.contiguous(), x.new_empty(*x.shape[:-1], N)
    run(
        *(x.data_ptr(), kind, x.numel() // max(K, 1), K, weight.data_ptr(), N, scale.data_ptr(), *_bias(bias)),
        *(threshold.data_ptr(), threshold.numel(), limit, resolution, rounding),
        *(out.data_ptr(), torch.get_num_threads()),
    )
    return out


def gif_linear(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    packed: Tensor | None,
    zero: Tensor | None,
    bias: Tensor | None,
    top: Tensor,
    multiple: Tensor,
    levels: int,
    steps: int,
) -> Tensor:
    """``GIF(x) W^T + b`` ``[..., N]`` with int8 weights ``[N, K]``, or the same in 4 bits where the memory decides."""
    (N, K), M = weight.shape, _rows(x)
    run = function("gif_linear", "piiippippippiipi")
    if run is None or x.dtype not in KINDS or K > WIDEST:
        return plain.gif_linear(x, weight, scale, bias, top, multiple, levels, steps)
    if packed is None or zero is None or M > FEW:
        packed, zero = weight, None
    x, packed, out = x.contiguous(), packed.contiguous(), x.new_empty(*x.shape[:-1], N)
    run(
        *(x.data_ptr(), KINDS[x.dtype], M, K, packed.data_ptr(), _pointer(zero), N, scale.data_ptr(), *_bias(bias)),
        *(top.data_ptr(), multiple.data_ptr(), levels, steps, out.data_ptr(), torch.get_num_threads()),
    )
    return out


def event_product(values: Tensor, rows: Tensor, scale: Tensor | None, width: int) -> Tensor:
    """Values ``[..., K]`` times rows ``[K, width]``, of which those of zeros are not read; fp32 ``[..., width]``."""
    run = function("event_product", "piiipiippi")
    known = values.dtype in (torch.float32, torch.int8) and rows.dtype in KINDS
    if run is None or not known or rows.shape[0] > WIDEST:
        return plain.event_product(values, rows, scale, width)
    values, rows = values.contiguous(), rows.contiguous()
    out = values.new_empty((*values.shape[:-1], width), dtype=torch.float32)
    run(
        *(values.data_ptr(), KINDS[values.dtype], _rows(values), rows.shape[0], rows.data_ptr(), KINDS[rows.dtype]),
        *(width, _pointer(scale), out.data_ptr(), torch.get_num_threads()),
    )
    return out


def _rows(x: Tensor) -> int:
    return x.numel() // max(x.shape[-1], 1)


def _pointer(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def _bias(bias: Tensor | None) -> tuple[int | None, int]:
    return (None, 0) if bias is None else (bias.data_ptr(), KINDS[bias.dtype])
