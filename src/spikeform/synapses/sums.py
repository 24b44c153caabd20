"""Exact integer products, by the fastest arithmetic that is exact for the operands' bounds.

int8     ``torch._int_mm``, int32 accumulation; an int16 operand is two int8 planes
fp32     where ``K max|c| max|w| < 2^24``: every partial sum is an integer that fp32 holds
fp64     where it is below 2^53

No FP8: on Hopper its sums of integers that e4m3 holds are not always exact, even without fast accumulation.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from spikeform.errors import SpikeformError

FP32, FP64, INT32 = 2**24, 2**53, 2**31
PLANES = 127 * 128 + 63  # the largest magnitude of two int8 planes
TF32 = 2**11  # integers up to here survive TF32's mantissa


def bound_of(values: Tensor) -> int:
    """The largest magnitude that the dtype allows; of floats and wide integers, that there is."""
    if values.dtype in (torch.int8, torch.uint8, torch.int16):
        info = torch.iinfo(values.dtype)
        return max(info.max, -info.min)
    return int(values.abs().max()) if values.numel() else 0


def explain_sums(codes: Tensor, weight: Tensor, limit: int, peak: int) -> tuple[str, str]:
    """The arithmetic that :func:`exact_sums` takes, and why.

    Args:
        codes: ``[..., K]``.
        weight: ``[N, K]``.
        limit: Bound of ``|codes|``.
        peak: Bound of ``|weight|``.

    Returns:
        ``int8``, ``planes``, ``fp32`` or ``fp64``, and the reason.

    Raises:
        SpikeformError: Not even fp64 holds the sums.
    """
    bound = codes.shape[-1] * limit * peak
    narrow = {codes.dtype, weight.dtype}
    if narrow == {torch.int8} and bound < INT32:
        return "int8", "both operands are int8 and int32 holds the sums"
    if narrow <= {torch.int8, torch.int16} and max(limit, peak) <= PLANES and bound < INT32:
        return "planes", "an int16 operand is two int8 planes, and int32 holds the sums"
    tf32 = codes.device.type == "cuda" and torch.backends.cuda.matmul.allow_tf32
    if bound < FP32 and not (tf32 and max(limit, peak) > TF32):
        return "fp32", f"sums stay below {bound} < 2^24"
    if bound < FP64:
        return "fp64", f"sums may reach {bound}, beyond fp32's 2^24" if bound >= FP32 else "TF32 rounds the operands"
    raise SpikeformError(f"sums of {codes.shape[-1]} products of {limit} and {peak} may exceed 2^53; use fewer levels")


def exact_sums(codes: Tensor, weight: Tensor, limit: int | None = None, peak: int | None = None) -> Tensor:
    """``codes @ weight^T`` without rounding.

    Args:
        codes: Integer-valued ``[..., K]``, any dtype.
        weight: Integer-valued ``[N, K]``.
        limit: Bound of ``|codes|``; None: by its dtype, or measured.
        peak: Bound of ``|weight|``; likewise.

    Returns:
        ``[..., N]``: int32, fp32 or fp64, integers in each.

    Raises:
        SpikeformError: Not even fp64 holds the sums.
    """
    limit = bound_of(codes) if limit is None else limit
    peak = bound_of(weight) if peak is None else peak
    name, _ = explain_sums(codes, weight, limit, peak)
    if not codes.numel():
        return torch.zeros(*codes.shape[:-1], weight.shape[0], dtype=torch.int32, device=codes.device)
    flat = codes.reshape(-1, codes.shape[-1])
    if name in ("int8", "planes"):
        pairs = [(f * g, int8_sums(c, w)) for f, c in _planes(flat) for g, w in _planes(weight)]
        out = sum((factor * sums for factor, sums in pairs[1:]), pairs[0][1])
    else:
        dtype = torch.float32 if name == "fp32" else torch.float64
        out = F.linear(flat.to(dtype), weight.to(dtype))
    return out.view(*codes.shape[:-1], weight.shape[0])


def _planes(values: Tensor) -> list[tuple[int, Tensor]]:
    """``values`` as factors and int8 tensors: ``sum factor * plane``, the plane of factor 1 first."""
    if values.dtype == torch.int8:
        return [(1, values)]
    high = (values.to(torch.int32) + 64) >> 7
    return [(1, (values - (high << 7)).to(torch.int8)), (128, high.to(torch.int8))]


def int8_sums(codes: Tensor, weight: Tensor) -> Tensor:
    """int8 ``[M, K] @ [N, K]^T`` as int32; on CUDA padded to what the kernel wants: M > 16, K and N multiples of 8."""
    if not codes.is_cuda:
        # Of a single row any strides count as contiguous, and the library reads beyond it where they are odd.
        codes = codes.contiguous().as_strided(codes.shape, (codes.shape[1], 1))
        return torch._int_mm(codes, weight.t())
    (rows, inner), columns = codes.shape, weight.shape[0]
    more, deeper, wider = max(17 - rows, 0), -inner % 8, -columns % 8
    if more or deeper:
        codes = F.pad(codes, (0, deeper, 0, more))
    if wider or deeper:
        weight = F.pad(weight, (0, deeper, 0, wider))
    out = torch._int_mm(codes.contiguous(), weight.t())
    return out[:rows, :columns].contiguous() if more or wider else out


def exact_product(left: Tensor, right: Tensor, limit: int | None = None, peak: int | None = None) -> Tensor:
    """``left @ right`` of two batches of integer matrices without rounding: fp32 where the bounds allow, else fp64.

    Args:
        left: Integer-valued ``[..., M, K]``.
        right: Integer-valued ``[..., K, N]``.
        limit: Bound of ``|left|``; None: by its dtype, or measured.
        peak: Bound of ``|right|``; likewise.
    """
    limit = bound_of(left) if limit is None else limit
    peak = bound_of(right) if peak is None else peak
    name, _ = explain_sums(left.float(), right, limit, peak)  # no batch of int8 products: in real numbers
    dtype = torch.float32 if name == "fp32" else torch.float64
    return left.to(dtype) @ right.to(dtype)
