"""Codes of neurons, element by element: device functions that every fused kernel shares.

Arithmetic is fp32, and codes are those of the neurons in PyTorch, bit for bit: quotients are rounded correctly before
they are rounded to an integer, ties go to even, and no product that a code hangs on is left to be fused into a sum.
Inputs are not NaN, and those of GIF neurons are finite.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra import libdevice

# The interpreter has no fused multiply-add and no device library.
INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))
NEAREST, FLOOR, STRICT = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)  # as oat.ROUNDINGS
# Sums of this and a number below 2^22 have no fraction: adding and subtracting it rounds to an integer, ties to even,
# in two instructions at full rate. Beyond 2^22 the result stays beyond every limit of a code.
WHOLE, WHOLE_BITS = tl.constexpr(12582912.0), tl.constexpr(0x4B400000)
LEAST_UNIT, LARGEST_UNIT = tl.constexpr(1e-5), tl.constexpr(1e4)  # as gif
ONE, YES = tl.constexpr(1), tl.constexpr(True)
HALF_ROOT = tl.constexpr(0.7071067811865476)
GELU_BETA, GELU_KAPPA = tl.constexpr(0.7978845608028654), tl.constexpr(0.044715)


@triton.jit
def round_even(v):
    """The nearest integer, ties to even, of ``|v| < 2^22``."""
    return (v + WHOLE) - WHOLE


@triton.jit
def inverse(unit):
    """``1 / unit``, correctly rounded: what :func:`quotient` wants, computed once a unit."""
    if INTERPRETED:
        return tl.div_rn(1.0, unit)
    else:
        return libdevice.rcp_rn(unit)  # half the instructions of a quotient


@triton.jit
def times(a, b):
    """``a b``, rounded: it is not fused into a sum."""
    if INTERPRETED:
        return a * b
    else:
        return libdevice.mul_rn(a, b)


@triton.jit
def widened(x):
    """``x`` as fp32: of bf16 two pairs of bytes at once, an instruction for each number."""
    if INTERPRETED or x.dtype != tl.bfloat16:
        return x.to(tl.float32)
    else:
        bits = tl.inline_asm_elementwise(
            "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;", "=r,=r,r", [x], tl.int32, True, 2
        )
        return bits.to(tl.float32, bitcast=True)


@triton.jit
def lesser(a, b):
    """The lesser of each two, of any real dtype: of bf16 two pairs at once."""
    if INTERPRETED or a.dtype != tl.bfloat16:
        return tl.minimum(a.to(tl.float32), b.to(tl.float32)).to(a.dtype)
    else:
        return tl.inline_asm_elementwise("min.bf16x2 $0, $1, $2;", "=r,r,r", [a, b], tl.bfloat16, True, 2)


@triton.jit
def greater(a, b):
    """The greater of each two, likewise."""
    if INTERPRETED or a.dtype != tl.bfloat16:
        return tl.maximum(a.to(tl.float32), b.to(tl.float32)).to(a.dtype)
    else:
        return tl.inline_asm_elementwise("max.bf16x2 $0, $1, $2;", "=r,r,r", [a, b], tl.bfloat16, True, 2)


@triton.jit
def quotient(v, unit, inverse_unit):
    """``v / unit``, correctly rounded (Markstein: a product, its exact remainder, one correction).

    NaN where it overflows, which :func:`oat_code` takes for more than its limit; one too small to be a normal number
    is right to within rounding.
    """
    if INTERPRETED:
        return tl.div_rn(v, unit)
    else:
        q = v * inverse_unit
        # Times -1, not a minus: that would be a subtraction, and cost an instruction.
        return tl.fma(tl.fma(q * -1.0, unit, v), inverse_unit, q)


@triton.jit
def oat_code(
    v,
    threshold0,
    threshold1,
    unit0,
    unit1,
    limit,
    TWO: tl.constexpr,
    ROUNDING: tl.constexpr,
    SIGNED: tl.constexpr = YES,
):
    """Code of an MT or OAT population.

    Args:
        v: Membrane potential, fp32 ``[...]``.
        threshold0: Of the normal sub-neuron, a scalar.
        threshold1: Of the outlier sub-neuron; no code depends on it but through its unit.
        unit0: ``threshold0 / resolution``, correctly rounded.
        unit1: Likewise; ignored where there is one sub-neuron.
        limit: Largest magnitude of a code.
        TWO: Whether there are two sub-neurons.
        ROUNDING: Index of its name in :data:`spikeform.neurons.oat.ROUNDINGS`.
        SIGNED: Whether v may be negative.

    Returns:
        Codes, integer-valued fp32 ``[...]``, and where the outlier sub-neuron fires; the value is code x its unit.
    """
    inverse0 = inverse(unit0)
    inverse1 = inverse(unit1) if TWO else inverse0
    magnitude = tl.abs(v) if SIGNED else v
    outlier = magnitude >= threshold0
    unit, inverse_unit = unit0, inverse0
    if TWO:
        unit, inverse_unit = tl.where(outlier, unit1, unit0), tl.where(outlier, inverse1, inverse0)
    scaled = quotient(magnitude, unit, inverse_unit)
    if ROUNDING == NEAREST:
        code = round_even(scaled)
    elif ROUNDING == FLOOR:
        code = tl.floor(scaled)
    else:
        code = tl.maximum(tl.minimum(tl.ceil(scaled), limit + 1.0) - 1.0, 0.0)
    code = tl.minimum(code, limit * 1.0)  # the smaller of NaN and a number is the number
    if SIGNED:
        sign = v.to(tl.int32, bitcast=True) & -0x80000000
        code = (code.to(tl.int32, bitcast=True) | sign).to(tl.float32, bitcast=True)
    return code, outlier


@triton.jit
def oat_value(code, outlier, unit0, unit1, TWO: tl.constexpr):
    """What a code of :func:`oat_code` is worth."""
    return code * (tl.where(outlier, unit1, unit0) if TWO else unit0)


@triton.jit
def round_mantissa(y, BITS: tl.constexpr, NEAREST: tl.constexpr, top, floor, SIGNED: tl.constexpr = YES):
    """What an HG bank sends for ``y``: its mantissa cut or rounded to so many bits, saturated, silent below the bank.

    Args:
        y: fp32 ``[...]``.
        BITS: T, 1 to 23.
        NEAREST: Round to nearest, halves away from zero; else cut.
        top: ``(1 - 2^-T) 2^high``, the largest value.
        floor: ``2^low``, the least magnitude that is sent.
        SIGNED: Whether y may be negative.
    """
    step = ONE << (24 - BITS)  # a unit of the code, of a mantissa of 24 bits
    if SIGNED:
        y = tl.maximum(y, top * -1.0)
    bits = tl.minimum(y, top).to(tl.int32, bitcast=True)
    if NEAREST:
        bits += step // 2
    value = (bits & -step).to(tl.float32, bitcast=True)
    return tl.where(tl.abs(value) < floor, 0.0, value)


@triton.jit
def rounded(v, dtype: tl.constexpr):
    """fp32 as another real dtype, ties to even: the interpreter would cut it."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = v.to(tl.int32, bitcast=True)
        v = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000).to(tl.float32, bitcast=True)
    return v.to(dtype)


@triton.jit
def exp(x):
    """``e^x``, to a unit in the last place: the bare hardware instruction is too coarse for 16-bit codes."""
    if INTERPRETED:
        return tl.exp(x)
    else:
        return libdevice.exp(x)


@triton.jit
def tanh(x):
    """Hyperbolic tangent."""
    if INTERPRETED:
        e = tl.exp(tl.minimum(tl.maximum(x, -20.0), 20.0).to(tl.float64) * 2.0)
        return ((e - 1.0) / (e + 1.0)).to(tl.float32)
    else:
        return libdevice.tanh(x)


@triton.jit
def erf(x):
    """Error function."""
    if INTERPRETED:
        return tl.erf(x)
    else:
        return libdevice.erf(x)


@triton.jit
def inverse_sqrt(x):
    """``1 / sqrt(x)``, both steps correctly rounded, as on a CPU."""
    return inverse(tl.sqrt_rn(x))


@triton.jit
def _gated(x, exponent):
    """``x / (1 + e^exponent)``, the quotient to two units in the last place, and zero where the divisor is huge."""
    divisor = 1.0 + exp(exponent)
    if INTERPRETED:
        return x / divisor
    else:
        return libdevice.fast_dividef(x, divisor)


@triton.jit
def function(x, NAME: tl.constexpr):
    """The function of an HG neuron, by its name in :data:`spikeform.neurons.functions.FUNCTIONS`, of fp32 ``x``."""
    if NAME == "exp":
        return exp(x)
    elif NAME == "reciprocal":
        return inverse(x)
    elif NAME == "square":
        return x * x
    elif NAME == "inverse_sqrt":
        return inverse_sqrt(x)
    elif NAME == "gelu":
        return x * 0.5 * (1.0 + erf(x * HALF_ROOT))
    elif NAME == "gelu_tanh":
        return 0.5 * x * (1.0 + tanh(GELU_BETA * (x + GELU_KAPPA * (x * x * x))))
    elif NAME == "gelu_quick":
        return _gated(x, -1.702 * x)
    elif NAME == "silu":
        return _gated(x, x * -1.0)
    elif NAME == "relu":
        return tl.maximum(x, 0.0)
    else:
        tl.static_assert(NAME == "tanh", "no function of that name")
        return tanh(x)


@triton.jit
def gif_unit(low, high, levels, steps):
    """Common unit of a row of GIF neurons: signed, unified, one range of the token for all its channels.

    Args:
        low: Smallest element of the row, and at most 0; fp32.
        high: Largest element of the row, and at least 0.
        levels: L.
        steps: T of the longest sub-neuron, a power of two.
    """
    span = tl.minimum(high - low, levels * (LARGEST_UNIT * 2.0))  # finite, and the unit is the largest all the same
    unit = quotient(span, levels * 1.0, tl.div_rn(1.0, levels * 1.0))
    unit = tl.minimum(tl.maximum(unit, LEAST_UNIT), LARGEST_UNIT)
    return unit * inverse_power(unit * 0.0 + steps)


@triton.jit
def gif_sent(v, low, unit, multiple, levels, steps, CUT: tl.constexpr = YES):
    """:func:`gif_integer` plus ``multiple WHOLE``: in its last bits is the channel's own code, byte by byte.

    Args:
        v: As there, and so on.
        low: As there.
        unit: As there.
        multiple: As there.
        levels: As there.
        steps: As there.
        CUT: Whether some codes of the row may be beyond those there are: see :func:`gif_saturates`.
    """
    inverse_unit = inverse(unit)
    # A channel of T steps has codes up to T L, each worth ``multiple``: ``peak`` in common units, whatever T is. And
    # rounding to a multiple of a power of two is :func:`round_even` with as many times the constant, which is taken
    # off last: so far all numbers but quotients are whole, and what is least, minus the zero-point, needs no look.
    code = quotient(v, unit, inverse_unit)
    if CUT:
        whole, peak = multiple * WHOLE, levels * steps * 1.0
        least = tl.maximum(quotient(low, unit, inverse_unit), peak * -1.0)
        return tl.minimum(tl.maximum(code, peak * -1.0) + whole, (least + whole) + peak)
    else:
        return _wholes(multiple, code)


@triton.jit
def gif_saturates(low, high, unit, levels, steps):
    """Whether any code of a row is beyond those there are, before it is cut: int32, in the shape of ``unit``.

    Few rows are so. Their range is the unit's ``levels steps`` times, and its ends have the same fraction: it takes one
    that is half of a channel's own unit, or a unit at its limit.

    Args:
        low: As :func:`gif_unit` takes it.
        high: Likewise.
        unit: The common unit.
        levels: L.
        steps: T of the longest sub-neuron, a power of two; a channel's may be any that divides it.
    """
    inverse_unit, peak = inverse(unit), levels * steps * 1.0
    first, last = quotient(low, unit, inverse_unit), quotient(high, unit, inverse_unit)
    least = tl.maximum(first, peak * -1.0)
    whole, found = unit * 0.0 + WHOLE, unit < 0.0
    power = unit * 0.0 + steps
    for _ in range(tl.max(power.to(tl.int32, bitcast=True) >> 23) - 126):
        found |= ((last + whole) > (least + whole) + peak) | ((first + whole) < whole - peak)
        whole += whole
    return found.to(tl.int32)


@triton.jit
def gif_integer(v, low, unit, multiple, levels, steps):
    """Integers of GIF neurons in the common unit of their row: integer-valued fp32.

    Args:
        v: fp32 ``[..., K]``, none of it below ``low``.
        low: As :func:`gif_unit` takes it; it and ``unit`` broadcast to ``v``.
        unit: The common unit.
        multiple: What a channel's unit is in common units, fp32, a power of two: ``steps / T``. Broadcasts to ``v``.
        levels: L.
        steps: As above.
    """
    return gif_sent(v, low, unit, multiple, levels, steps) - multiple * WHOLE


@triton.jit
def gif_byte(sent, multiple):
    """The integer of :func:`gif_integer` as int8, from what :func:`gif_sent` gives."""
    return last_byte(_wholes(1.0 - multiple, sent))


@triton.jit
def _wholes(times, x):
    """``times WHOLE + x``: so many are exact, whether or not they are fused into the sum."""
    if INTERPRETED:
        return times * WHOLE + x
    else:
        return tl.fma(times, WHOLE, x)


@triton.jit
def last_byte(x):
    """The last byte of fp32 ``x``: of an integer plus ``WHOLE`` times a power of two, how often it has that; int8."""
    return x.to(tl.int32, bitcast=True).to(tl.int8)


@triton.jit
def inverse_power(multiple):
    """``1 / multiple`` of a power of two, fp32: its exponent with the sign turned. Own codes are integers times it."""
    return (0x7F000000 - multiple.to(tl.int32, bitcast=True)).to(tl.float32, bitcast=True)


@triton.jit
def to_integer(code, dtype: tl.constexpr):
    """Integer-valued fp32 below 2^22 in magnitude as int8, int16 or int32: an addition, not a slow conversion."""
    return ((code + WHOLE).to(tl.int32, bitcast=True) - WHOLE_BITS).to(dtype)
