"""How an integer code unrolls in time.

A code is an integer: the sum over steps of step weight x spike. A coding says which spikes carry it. Every
coding is a pure function of the code, so nothing has to be stored but the integer, and the literal spikes can
be had at any moment.

Shapes: ``codes`` has any shape ``[...]``; ``unroll`` returns ``[window, ...]``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

MAX_STEPS, MAX_RATE_STEPS = 16, 64  # of codes that grow with the steps exponentially, and of rates


def popcount(values: Tensor) -> Tensor:
    """Set bits of each non-negative integer below 2**31 (SWAR addition, five passes, no loop over bits)."""
    v = values.to(torch.int64)
    v = v - ((v >> 1) & 0x55555555)
    v = (v & 0x33333333) + ((v >> 2) & 0x33333333)
    v = (v + (v >> 4)) & 0x0F0F0F0F
    return (((v * 0x01010101) & 0xFFFFFFFF) >> 24).to(torch.int32)


@dataclass(frozen=True)
class Coding:
    """Base of all codings.

    Args:
        steps: Time steps T of the window, 1 to 16.

    Raises:
        ValueError: ``steps`` is not an integer from 1 to 16.
    """

    steps: int

    def __post_init__(self) -> None:
        check_steps(self.steps)

    @property
    def window(self) -> int:
        """Time steps in which the spikes are sent."""
        return self.steps

    @property
    def limit(self) -> int:
        """Largest magnitude of a code."""
        raise AttributeError(f"{type(self).__name__} has no limit")

    @property
    def resolution(self) -> int:
        """Code units in one threshold: ``quantum = threshold / resolution``."""
        raise AttributeError(f"{type(self).__name__} has no resolution")

    def weights(self) -> list[int]:
        """Step weights in units of the quantum, first step first."""
        raise AttributeError(f"{type(self).__name__} has no step weights")

    @property
    def dense(self) -> bool:
        """Whether every integer up to the limit has a code."""
        return True

    def nearest_code(self, codes: Tensor) -> Tensor:
        """The representable code next below each magnitude (the identity where every integer has a code)."""
        return codes

    def unroll(self, codes: Tensor) -> Tensor:
        """Spike amplitudes per step: int8 ``[window, ...]`` with ``sum_t weights[t] * out[t] == codes``."""
        raise AttributeError(f"{type(self).__name__} cannot unroll")

    def count(self, codes: Tensor) -> Tensor:
        """Spikes that each element sends in its window: int32, the shape of ``codes``."""
        return (self.unroll(codes) != 0).sum(0, dtype=torch.int32)

    def sent(self, spikes: Tensor) -> Tensor:
        """Spikes in an unrolled train ``[window, ...]``, a 0-d tensor: one a step that is not silent."""
        return (spikes != 0).sum()


def check_steps(steps: object, most: int = MAX_STEPS) -> None:
    """Raise one clear error unless ``steps`` is an integer from 1 to ``most`` (a bool is not an integer here)."""
    if isinstance(steps, bool) or not isinstance(steps, int) or not 1 <= steps <= most:
        raise ValueError(f"steps must be an integer from 1 to {most}, got {steps!r}")


@dataclass(frozen=True)
class Radix2(Coding):
    """Binary weights, one spike per set bit, sign and magnitude (LAS as released: one sub-level a step).

    ``code = sign * sum_t 2^(T-t) z(t)``, ``z(t)`` in {0, 1}, t = 1..T.
    """

    @property
    def limit(self) -> int:
        """Largest magnitude: all T bits set."""
        return (1 << self.steps) - 1

    @property
    def resolution(self) -> int:
        """2^T codes to a threshold: the last step weighs ``threshold * 2^-T``."""
        return 1 << self.steps

    def weights(self) -> list[int]:
        """``2^(T-1) .. 1``: the heaviest spike goes first."""
        return [1 << (self.steps - 1 - t) for t in range(self.steps)]

    def unroll(self, codes: Tensor) -> Tensor:
        """Bits of the magnitude, most significant first, times the sign."""
        magnitude, sign = codes.abs(), codes.sign().to(torch.int8)
        return torch.stack([((magnitude >> (self.steps - 1 - t)) & 1).to(torch.int8) * sign for t in range(self.steps)])

    def count(self, codes: Tensor) -> Tensor:
        """Set bits of the magnitude."""
        return popcount(codes.abs())


@dataclass(frozen=True)
class SignedDigit(Radix2):
    """Radix-2 with ternary spikes in non-adjacent form: the fewest spikes that carry a given code.

    The same codes as :class:`Radix2`. No two neighbouring steps both spike; about T/3 spikes instead of T/2
    (G. W. Reitwiesner, Binary Arithmetic, 1960). The form of a T-bit code can carry into one more digit, so
    the window has T + 1 steps, the first of them of twice the heaviest radix-2 weight.
    """

    @property
    def window(self) -> int:
        """T + 1: one step for the carry."""
        return self.steps + 1

    def weights(self) -> list[int]:
        """``2^T .. 1``."""
        return [1 << (self.steps - t) for t in range(self.steps + 1)]

    def unroll(self, codes: Tensor) -> Tensor:
        """Digits of the non-adjacent form: bits of ``3n`` that ``n`` lacks are +1, the reverse are -1."""
        magnitude, sign = codes.abs().to(torch.int64), codes.sign().to(torch.int8)
        triple = 3 * magnitude
        plus, minus = triple & ~magnitude, magnitude & ~triple
        return torch.stack(
            [
                (((plus >> (shift + 1)) & 1) - ((minus >> (shift + 1)) & 1)).to(torch.int8) * sign
                for shift in range(self.steps, -1, -1)
            ]
        )

    def count(self, codes: Tensor) -> Tensor:
        """Non-zero digits: set bits of ``n xor 3n``."""
        magnitude = codes.abs().to(torch.int64)
        return popcount(magnitude ^ (3 * magnitude))


@dataclass(frozen=True)
class MultiThreshold(Coding):
    """Radix-2 with ``levels`` sub-levels a step (LAS's MT neuron with mt = ``levels``).

    At step t the available spikes are ``theta_t * (1 + j / levels)``, ``j = 0 .. levels-1``,
    ``theta_t = theta * 2^-t``; the largest one not above the membrane potential fires and is subtracted.
    In code units (``quantum = theta * 2^-T / levels``) a spike at step t carries ``k * 2^(T-t)`` with ``k`` in
    ``levels .. 2 * levels - 1``. ``levels = 1`` is :class:`Radix2`.

    Args:
        steps: Time steps T, 1 to 16.
        levels: Sub-levels a step: 1, 2 or 4.
    """

    levels: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.levels, bool) or not isinstance(self.levels, int) or self.levels not in (1, 2, 4):
            raise ValueError(f"levels must be 1, 2 or 4, got {self.levels!r}")

    @property
    def limit(self) -> int:
        """One threshold, less the last unit."""
        return self.levels * (1 << self.steps) - 1

    @property
    def resolution(self) -> int:
        """``levels * 2^T`` code units to a threshold."""
        return self.levels * (1 << self.steps)

    def weights(self) -> list[int]:
        """``2^(T-1) .. 1``; the spike's amplitude is the sub-level."""
        return [1 << (self.steps - 1 - t) for t in range(self.steps)]

    @property
    def dense(self) -> bool:
        """With sub-levels some integers fall between two codes."""
        return self.levels == 1

    def nearest_code(self, codes: Tensor) -> Tensor:
        """Drop what is left in the membrane after the last step (less than ``levels`` units)."""
        residue = codes.clone()
        for weight in self.weights():
            residue = residue - self._fire(residue, weight) * weight
        return codes - residue

    def _fire(self, magnitude: Tensor, weight: int) -> Tensor:
        level = torch.div(magnitude, weight, rounding_mode="floor").clamp(max=2 * self.levels - 1)
        return torch.where(level >= self.levels, level, torch.zeros_like(level))

    def unroll(self, codes: Tensor) -> Tensor:
        """Greedy expansion of the magnitude: at most one spike a step, of amplitude ``levels..2*levels-1``."""
        residue, sign = codes.abs(), codes.sign().to(torch.int8)
        steps = []
        for weight in self.weights():
            level = self._fire(residue, weight)
            residue = residue - level * weight
            steps.append(level.to(torch.int8) * sign)
        return torch.stack(steps)


@dataclass(frozen=True)
class Thermometer(Coding):
    """Rate code: equal weights, the code is the number of spikes (FAS, SpikingMamba).

    A code ``n`` spreads evenly over the window: a spike at step t where ``floor(t |n| / T)`` moves on. Or it fires at
    once: ``s(t) = sgn(n) 1[t <= |n|]``, as a neuron does that is charged in the first step alone.

    Args:
        steps: Time steps T of the window, 1 to 64.
        early: All spikes in the first ``|n|`` steps.
    """

    early: bool = False

    def __post_init__(self) -> None:
        check_steps(self.steps, MAX_RATE_STEPS)

    @property
    def limit(self) -> int:
        """One spike every step."""
        return self.steps

    @property
    def resolution(self) -> int:
        """T code units to a threshold: ``quantum = threshold / T``."""
        return self.steps

    def weights(self) -> list[int]:
        """All one."""
        return [1] * self.steps

    def unroll(self, codes: Tensor) -> Tensor:
        """Unit spikes, signed as the code."""
        magnitude, sign = codes.abs().to(torch.int32), codes.sign().to(torch.int8)
        if self.early:
            return torch.stack([(magnitude > t).to(torch.int8) * sign for t in range(self.steps)])
        passed = [torch.div(t * magnitude, self.steps, rounding_mode="floor") for t in range(self.steps + 1)]
        return torch.stack([(passed[t + 1] - passed[t]).to(torch.int8) * sign for t in range(self.steps)])

    def count(self, codes: Tensor) -> Tensor:
        """The magnitude itself."""
        return codes.abs().to(torch.int32)


@dataclass(frozen=True)
class Burst(Coding):
    """Up to ``levels`` unit spikes in a step (SpikeLLM's generalised integrate-and-fire neuron).

    A step sends ``min(levels, what is left)`` spikes at once: ``levels`` integrate-and-fire steps, merged. The count
    is the number of unit spikes. Sub-neurons may take different numbers of steps of the same window: one of T steps
    has codes up to ``T * levels`` and is silent afterwards.

    Args:
        steps: Time steps of the longest sub-neuron, 1 to 16.
        levels: Most spikes of one step L, 1 to 255.
        tiers: Steps T of each sub-neuron, powers of two, the largest of them ``steps``; empty: one sub-neuron.
        residual: Codes go to ``T (L + 1) - 1`` (2^n - 1 levels, as released): a sub-neuron's last step also sends what
            L spikes a step would leave behind.
        common: The units are multiples of one: ``quantum[r] = multiples[r] * quantum_common``.

    Raises:
        ValueError: Steps, levels or tiers are none of these.
    """

    levels: int = 15
    tiers: tuple[int, ...] = ()
    residual: bool = False
    common: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.levels, bool) or not isinstance(self.levels, int) or not 1 <= self.levels <= 255:
            raise ValueError(f"levels must be an integer from 1 to 255, got {self.levels!r}")
        fits = all(type(t) is int and t > 0 and t & (t - 1) == 0 for t in self.tiers)
        if not isinstance(self.tiers, tuple) or not fits or (self.tiers and max(self.tiers) != self.steps):
            raise ValueError(f"tiers must be powers of two, the largest of them steps={self.steps}, got {self.tiers!r}")

    def capacity(self, steps: int) -> int:
        """Largest magnitude of a sub-neuron of ``steps`` steps: ``T L``, or ``T (L + 1) - 1`` with the residual."""
        return steps * (self.levels + 1) - 1 if self.residual else steps * self.levels

    @property
    def limit(self) -> int:
        """Every step full."""
        return self.capacity(self.steps)

    @property
    def resolution(self) -> int:
        """As many code units to a threshold as the limit."""
        return self.limit

    @property
    def multiples(self) -> tuple[int, ...] | None:
        """What each sub-neuron's unit is in common units, ``steps / T``; None where there is no common unit."""
        if not self.tiers:
            return (1,)
        return tuple(self.steps // t for t in self.tiers) if self.common else None

    def weights(self) -> list[int]:
        """All one; the spike's amplitude is its number of unit spikes."""
        return [1] * self.steps

    def unroll(self, codes: Tensor) -> Tensor:
        """Fill the steps in order, ``levels`` at a time: int8 where the amplitudes fit, else int16."""
        most = self.levels + (self.steps - 1 if self.residual else 0)
        dtype = torch.int8 if most <= 127 else torch.int16
        # At least int16: the magnitude of int8's -128 is no int8.
        magnitude = codes.to(torch.int16 if codes.dtype in (torch.int8, torch.uint8) else codes.dtype).abs()
        residue, sign = magnitude, codes.sign().to(dtype)
        closing = (self.tiers or (self.steps,)) if self.residual else ()
        steps = []
        for t in range(1, self.steps + 1):
            fired = residue.clamp(max=self.levels)
            if t in closing:
                fired = torch.where(magnitude <= self.capacity(t), residue, fired)
            residue = residue - fired
            steps.append(fired.to(dtype) * sign)
        return torch.stack(steps)

    def count(self, codes: Tensor) -> Tensor:
        """The magnitude: each unit is a spike of its own."""
        return codes.to(torch.int32).abs()

    def sent(self, spikes: Tensor) -> Tensor:
        """Unit spikes: the sum of the magnitudes."""
        return spikes.abs().sum(dtype=torch.int64)


CODINGS: dict[str, type[Coding]] = {
    "radix2": Radix2,
    "signed_digit": SignedDigit,
    "multi_threshold": MultiThreshold,
    "thermometer": Thermometer,
    "burst": Burst,
}
