"""Which input interval each few-spike sub-neuron of a function owns.

A sub-neuron is nearly a linear map, so intervals are halved until the best line is within a tolerance
(relative for functions that scale, ``f(2^k m) = g(k) f(m)``; absolute for the others), and until they are
short beside their distance from zero, which keeps the error relative when there are few steps. A function
that scales is fitted on one period only; every other octave is the same neuron moved, exactly.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

from spikeform.neurons.few_spike_fit import Function
from spikeform.neurons.functions import FUNCTIONS

TOLERANCE = 2e-3  # of the best line; what the sub-neurons add to it or learn to take away is theirs
SHORT = 0.25  # longest interval, relative to its outer end; absolute within +-1
NOTHING = 1e-6  # absolute: outputs below it are silence, rises below it a constant
Interval = tuple[float, float]
LN2 = math.log(2.0)
EDGE = 16.0  # activations are constant or the identity outside +-16, to 2e-6
OUTERMOST = 65536.0


@dataclass(frozen=True)
class Region:
    """One sub-neuron: ``gain * f((x - shift) / scale)`` of a fitted one.

    Attributes:
        base: Index of the fitted neuron in :attr:`Plan.bases`, or None for one that never fires.
        interval: The input interval it owns.
        scale: Positive factor of the input.
        shift: Added to the scaled input.
        gain: Factor of the output.
    """

    base: int | None
    interval: Interval
    scale: float = 1.0
    shift: float = 0.0
    gain: float = 1.0


@dataclass(frozen=True)
class Plan:
    """Intervals to fit, and the regions made of them, adjoining, left to right."""

    bases: list[Interval]
    regions: list[Region]


def split(function: Function, left: float, right: float, tolerance: float, relative: bool) -> list[Interval]:
    """Halve [left, right] until each part is short and its best line within ``tolerance``, left to right."""
    x = torch.linspace(left, right, 65, dtype=torch.float64)
    y = function(x)
    off = y - torch.lerp(y[0], y[-1], (x - left) / (right - left))
    error = float(off.max() - off.min()) / 2
    flat = not relative and float(y.max() - y.min()) <= NOTHING
    short = right - left <= SHORT * max(1.0, abs(left), abs(right))
    if flat or (short and error <= tolerance * (float(y.abs().min()) if relative else 1.0)):
        return [(left, right)]
    middle = (left + right) / 2
    halves = ((left, middle), (middle, right))
    return [part for half in halves for part in split(function, *half, tolerance, relative)]


def silent(function: Function, left: float, right: float) -> bool:
    """Whether the function is nothing on [left, right]."""
    return float(function(torch.linspace(left, right, 65, dtype=torch.float64)).abs().max()) <= NOTHING


def _octaves(function: Function, period: Interval, moves: list[tuple[float, float, float]]) -> Plan:
    """Every (scale, shift, gain) copy of one fitted period; the copies adjoin, left to right."""
    bases = split(function, *period, TOLERANCE, relative=True)
    regions = [
        Region(i, (left * scale + shift, right * scale + shift), scale, shift, gain)
        for scale, shift, gain in moves
        for i, (left, right) in enumerate(bases)
    ]
    return Plan(bases, regions)


def _after(second: Plan, count: int) -> list[Region]:
    """The regions of a plan whose bases come after ``count`` other ones."""
    return [replace(region, base=region.base + count) for region in second.regions if region.base is not None]


def _exp() -> Plan:
    """[-29 ln 2, 0], about -20.1: ``exp(x - k ln 2) = 2^-k exp(x)``."""
    return _octaves(torch.exp, (-LN2, 0.0), [(1.0, -k * LN2, 2.0**-k) for k in range(28, -1, -1)])


def _reciprocal() -> Plan:
    """[2^-4, 2^20]: sums of probabilities over a million keys, and margin below one."""
    return _octaves(torch.reciprocal, (1.0, 2.0), [(2.0**k, 0.0, 2.0**-k) for k in range(-4, 20)])


def _inverse_sqrt() -> Plan:
    """[2^-40, 2^24]: variances from the smallest epsilon in use (1e-12) to outliers."""
    return _octaves(torch.rsqrt, (1.0, 4.0), [(4.0**k, 0.0, 2.0**-k) for k in range(-20, 12)])


def _square() -> Plan:
    """+-[2^-20, 2^16], and silence around zero."""
    low, high = -20, 16
    right = _octaves(torch.square, (1.0, 2.0), [(2.0**k, 0.0, 4.0**k) for k in range(low, high)])
    left = _octaves(torch.square, (-2.0, -1.0), [(2.0**k, 0.0, 4.0**k) for k in range(high - 1, low - 1, -1)])
    middle = Region(None, (-(2.0**low), 2.0**low))
    return Plan(left.bases + right.bases, [*left.regions, middle, *_after(right, len(left.bases))])


def _activation(name: str) -> Plan:
    """Silent left of -16, the identity right of 16 (one octave, moved), halved between them."""
    f = FUNCTIONS[name]
    between = split(f, -EDGE, -EDGE / 2, TOLERANCE, False) + split(f, -EDGE / 2, 0.0, TOLERANCE, False)
    between += split(f, 0.0, EDGE, TOLERANCE, False)
    octaves = int(math.log2(OUTERMOST / EDGE))
    identity = _octaves(f, (EDGE, 2 * EDGE), [(2.0**k, 0.0, 2.0**k) for k in range(octaves)])
    bases = between + identity.bases
    middle = [Region(None if silent(f, *part) else i, part) for i, part in enumerate(between)]
    return Plan(bases, [Region(None, (-OUTERMOST, -EDGE)), *middle, *_after(identity, len(between))])


def _relu() -> Plan:
    """Zero left of 2^-16, one octave of the identity moved right of it."""
    low, high = -16, 16
    moves = [(2.0**k, 0.0, 2.0**k) for k in range(low, high)]
    octaves = _octaves(torch.relu, (1.0, 2.0), moves)
    return Plan(octaves.bases, [Region(None, (-OUTERMOST, 2.0**low)), *octaves.regions])


def _tanh() -> Plan:
    """Halved between -8 and 8, constant outside."""
    edge = EDGE / 2  # 1 - tanh(8) < 3e-7
    parts = (-OUTERMOST, -edge), (-edge, 0.0), (0.0, edge), (edge, OUTERMOST)
    bases = [base for part in parts for base in split(torch.tanh, *part, TOLERANCE, False)]
    return Plan(bases, [Region(i, part) for i, part in enumerate(bases)])


_PLANS = {
    "exp": _exp,
    "reciprocal": _reciprocal,
    "inverse_sqrt": _inverse_sqrt,
    "square": _square,
    "relu": _relu,
    "tanh": _tanh,
}


def plan(name: str) -> Plan:
    """The intervals of a function's sub-neurons.

    Args:
        name: A name in :data:`spikeform.neurons.functions.FUNCTIONS`.

    Returns:
        What to fit, and how to move it. It does not depend on the number of steps.

    Raises:
        ValueError: Unknown name.
    """
    if name not in FUNCTIONS:
        raise ValueError(f"no function named {name!r}; known: {', '.join(FUNCTIONS)}")
    return _PLANS[name]() if name in _PLANS else _activation(name)
