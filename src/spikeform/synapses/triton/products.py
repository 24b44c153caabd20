"""CUDA kernels of :mod:`spikeform.synapses.fused`: which kernel runs a product.

A single row streams the weights through a matrix-vector kernel, encoded once in front of it or by each program
(:mod:`.shapes` says which); up to 64 put planes or limbs of the codes through tensor cores, split along K; more rows
are one product of matrices.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from spikeform.neurons.triton.gif import gif_integers
from spikeform.neurons.triton.oat import oat_values
from spikeform.synapses.fused import EVENT_ROWS
from spikeform.synapses.rows import SKINNY, limbs_of
from spikeform.synapses.triton import shapes
from spikeform.synapses.triton.encode import excess_of, oat_limbs, oat_planes
from spikeform.synapses.triton.event import event
from spikeform.synapses.triton.finish import finish_limbs, finish_real, finish_rows
from spikeform.synapses.triton.gemm import gemm
from spikeform.synapses.triton.gemv import gif_gemv, oat_gemv, oat_int_gemv
from spikeform.synapses.triton.hopper import scaled_products
from spikeform.synapses.triton.launch import ahead, cdiv, meta, next_power
from spikeform.synapses.triton.row import row_gif, row_oat
from spikeform.synapses.triton.skinny import sums
from spikeform.synapses.triton.stream import row_product

BLAS = 17  # least rows whose values, where one plane carries them, go to the library
LIMB_ROWS = 128  # most rows of limbs of a skinny product
LARGEST_ROW = 4096  # channels that the search for a row's range takes in one bite
LARGEST_BATCH = 8192  # rows whose limbs, and integer sums, are in memory at once


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
    """See :mod:`spikeform.synapses.fused`."""
    x, weight = x.contiguous(), weight.contiguous()
    out, rows = _out(x, weight)
    if not rows:
        return out
    with torch.cuda.device_of(x):
        if rows == 1:
            return _oat_strip(x, weight, bias, threshold, shift, limit, resolution, rounding, out)
        if weight.dtype != torch.bfloat16 or (single and rows >= BLAS):
            narrow = weight.dtype == x.dtype and (single or x.dtype == torch.float32)
            values = oat_values(x, threshold, shift, limit, resolution, rounding, narrow)
            bias = None if bias is None else bias.to(weight.dtype)
            return F.linear(values.to(weight.dtype), weight, bias).to(x.dtype)
        _oat_planes(x, weight, bias, threshold, shift, limit, resolution, rounding, single, out)
    return out


def _oat_strip(x, weight, bias, threshold, shift, limit, resolution, rounding, out) -> Tensor:
    columns, inner = weight.shape
    parts = 4 // weight.element_size()
    if shapes.encode_once["oat"] and inner % parts == 0:
        values = row_oat(x, [threshold], _given(shift), limit, resolution, rounding, parts)
        return row_product(values, [weight], (), (), _given(bias), None, x.dtype, x.shape[:-1], 1, 1)[0]
    cut = shapes.oat_strip(columns, inner)
    oat_gemv[(cdiv(columns, cut.n),)](
        x,
        weight,
        weight if bias is None else bias,
        threshold,
        x if shift is None else shift,
        out,
        columns,
        inner,
        limit,
        resolution,
        **meta(
            TWO=threshold.numel() == 2,
            ROUNDING=rounding,
            SHIFTED=shift is not None,
            BIAS=bias is not None,
            EVEN=inner % cut.k == 0,
            BLOCK_N=cut.n,
            BLOCK_K=cut.k,
            STAGES=cut.stages,
            AHEAD=ahead(cut, weight),
            num_warps=cut.warps,
        ),
    )
    return out


def _oat_planes(x, weight, bias, threshold, shift, limit, resolution, rounding, single, out) -> None:
    (columns, inner), rows = weight.shape, x.numel() // x.shape[-1]
    if single:
        values = oat_values(x, threshold, shift, limit, resolution, rounding, True)
        planes = values.to(torch.bfloat16).view(1, rows, inner)
    else:
        planes = oat_planes(x, threshold, shift, limit, resolution, rounding)
    if rows <= SKINNY:
        partial = sums(planes, weight, None, shapes.skinny_shape(rows, columns, inner, "bf16"))
        finish_real(partial, None, bias, out)
    else:
        gemm(planes, weight, None, None, bias, out.view(rows, columns), shapes.real_tile(rows))


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
    """See :mod:`spikeform.synapses.fused`; exact up to 131071 channels, whose limbs' sums int32 holds."""
    x, weight = x.contiguous(), weight.contiguous()
    out, rows = _out(x, weight)
    columns, inner = weight.shape
    if not rows:
        return out
    with torch.cuda.device_of(x):
        if rows == 1 and inner % 4 == 0:
            return _oat_int_strip(x, weight, scale, bias, threshold, limit, resolution, rounding, out)
        flat = out.view(rows, columns)
        for start in range(0, rows, LARGEST_BATCH):
            some = x.view(rows, inner)[start : start + LARGEST_BATCH]
            partial = _int_sums(oat_limbs(some, threshold, limit, resolution, rounding), weight)
            finish_limbs(
                partial, scale, threshold, resolution, excess_of(limit), bias, flat[start : start + LARGEST_BATCH]
            )
    return out


def _oat_int_strip(x, weight, scale, bias, threshold, limit, resolution, rounding, out) -> Tensor:
    (columns, inner), limbs, branches = weight.shape, limbs_of(limit), threshold.numel()
    if shapes.encode_once["oat_int"]:
        codes = row_oat(x, [threshold], (), limit, resolution, rounding, 4)
        lead = x.shape[:-1]
        return row_product(codes, [weight], [scale], (), _given(bias), None, x.dtype, lead, branches, limbs)[0]
    cut = shapes.oat_int_strip(columns, inner)
    oat_int_gemv[(cdiv(columns, cut.n),)](
        x,
        weight.view(torch.int32),
        scale,
        scale if bias is None else bias,
        threshold,
        out,
        columns,
        inner,
        limit,
        resolution,
        **meta(
            TWO=branches == 2,
            ROUNDING=rounding,
            LIMBS=limbs,
            BIAS=bias is not None,
            BLOCK_N=cut.n,
            BLOCK_K=cut.k,
            STAGES=cut.stages,
            AHEAD=ahead(cut, weight),
            num_warps=cut.warps,
            enable_fp_fusion=False,
        ),
    )
    return out


def _int_sums(codes: Tensor, weight: Tensor) -> Tensor:
    """int32 ``[S, M, N]`` of int8 codes ``[M, K]``."""
    columns, inner = weight.shape
    if codes.shape[0] <= LIMB_ROWS:
        return sums(codes, weight, None, shapes.skinny_shape(codes.shape[0], columns, inner, "int8"))
    out = torch.empty((codes.shape[0], columns), dtype=torch.int32, device=codes.device)
    gemm(codes, weight, None, None, None, out, shapes.int_tile(codes.shape[0]))
    return out[None]


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
    """See :mod:`spikeform.synapses.fused`."""
    x = x.contiguous()
    out, rows = _out(x, weight)
    columns, inner = weight.shape
    if not rows:
        return out
    with torch.cuda.device_of(x):
        if rows == 1 and inner % 4 == 0:
            small = weight if packed is None else packed
            return _gif_strip(x, small, scale, zero, bias, multiple, levels, steps, out)
        codes, unit = gif_integers(x, top, multiple, levels, steps)
        codes, unit, flat = codes.view(rows, inner), unit.view(rows), out.view(rows, columns)
        if rows <= SKINNY:
            small = weight.contiguous() if packed is None else packed.contiguous()
            shape = shapes.skinny_shape(rows, columns, inner, "int8" if packed is None else "int4")
            finish_rows(sums(codes, small, zero, shape), scale, unit, bias, flat)
        else:
            scaled_products(codes, [weight.contiguous()], [scale], unit, _given(bias), [flat])
    return out


def _gif_strip(x, weight, scale, zero, bias, multiple, levels, steps, out) -> Tensor:
    columns, inner, packed = weight.shape[0], x.shape[-1], weight.dtype == torch.uint8
    weight = weight.contiguous()
    if shapes.encode_once["gif"]:
        codes = row_gif(x, [multiple], levels, steps, packed)
        zeros = [zero] if packed else ()
        return row_product(codes, [weight], [scale], zeros, _given(bias), None, x.dtype, x.shape[:-1], 1, 1)[0]
    cut = shapes.gif_strip(columns, inner, packed)
    gif_gemv[(cdiv(columns, cut.n),)](
        x,
        weight.view(torch.int32),
        scale,
        scale if zero is None else zero,
        scale if bias is None else bias,
        multiple,
        out,
        columns,
        inner,
        levels,
        steps,
        **meta(
            STEPPED=steps > 1,
            PACKED=packed,
            BIAS=bias is not None,
            CHUNK=min(next_power(inner), LARGEST_ROW),
            BLOCK_N=cut.n,
            BLOCK_K=cut.k,
            STAGES=cut.stages,
            AHEAD=ahead(cut, weight),
            num_warps=cut.warps,
            enable_fp_fusion=False,
        ),
    )
    return out


def event_product(values: Tensor, rows: Tensor, scale: Tensor | None, width: int) -> Tensor:
    """See :mod:`spikeform.synapses.fused`; more than four rows go four by four."""
    values, rows = values.contiguous(), rows.contiguous()
    flat = values.view(-1, values.shape[-1])
    out = torch.empty((flat.shape[0], width), dtype=torch.float32, device=values.device)
    element = {torch.uint8: "int4", torch.int8: "int8"}.get(rows.dtype, "real")
    with torch.cuda.device_of(values):
        for start in range(0, flat.shape[0], EVENT_ROWS):
            some = flat[start : start + EVENT_ROWS]
            cut = shapes.event_share(element, rows.shape[1] * rows.element_size(), rows.shape[0], some.shape[0])
            event(some, rows, scale, out[start : start + EVENT_ROWS], cut)
    return out.view(*values.shape[:-1], width)


def _given(tensor: Tensor | None) -> list[Tensor]:
    return [] if tensor is None else [tensor]


def _out(x: Tensor, weight: Tensor) -> tuple[Tensor, int]:
    """Room for ``[..., N]``, and how many rows that is."""
    return x.new_empty((*x.shape[:-1], weight.shape[0])), x.numel() // max(x.shape[-1], 1)
