"""The spike train: integer codes, what one unit of a code is worth, and how a code unrolls in time."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from spikeform.spikes.codings import Coding


def power_of_two(exponents: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """``2^exponents``, exact, the shape of ``exponents`` (any integer dtype)."""
    return torch.ldexp(torch.ones(exponents.shape, dtype=dtype, device=exponents.device), exponents.to(torch.int32))


def narrowest(limit: int) -> torch.dtype:
    """The integer dtype that holds magnitudes up to ``limit``: int8, int16 or int32."""
    return torch.int8 if limit <= 127 else torch.int16 if limit < 2**15 else torch.int32


@dataclass(frozen=True)
class SpikeTrain:
    """What a neuron population sends in one window.

    ``value = (codes - zero[branch]) * quantum[branch]``. A population of several sub-neurons (LAS's OAT: normal
    and outlier; HG: one per input region) gives each element to exactly one of them: ``branch`` says which.

    Args:
        codes: Integer-valued tensor ``[...]``; any integer dtype, or a float dtype holding integers.
        quantum: Real value of one code unit per sub-neuron: ``[R, *b]``, where ``b`` broadcasts to the shape
            of ``codes`` (empty for a scalar each). ``R`` is 1 where ``branch`` is None.
        coding: How a code unrolls.
        branch: Sub-neuron of each element, integer, broadcasts to the shape of ``codes`` (``[C]``: one a channel), or
            None where there is one.
        known_unit: What :meth:`unit` gives, where the neuron has it at hand already.
        zero: The code that stands for 0, integer-valued ``[R, *b]`` as ``quantum``, or None: it is 0. A zero that is
            the same for all channels lies within the codes' own range, so ``codes - zero`` keeps the coding's limit.
        exact: Whether products of this train are to run on integers.
    """

    codes: Tensor
    quantum: Tensor
    coding: Coding
    branch: Tensor | None = None
    known_unit: Tensor | None = None
    zero: Tensor | None = None
    exact: bool = False

    @property
    def shape(self) -> torch.Size:
        """Shape of the population, without time."""
        return self.codes.shape

    def unit(self) -> Tensor:
        """Value of one code unit of each element; broadcasts to the shape of ``codes``."""
        if self.known_unit is not None:
            return self.known_unit
        return self._of_branch(self.quantum)

    def _of_branch(self, table: Tensor) -> Tensor:
        """The row of ``table`` ``[R, *b]`` that each element's sub-neuron has; broadcasts to the codes."""
        if self.branch is None or table.shape[0] == 1:
            return table[0]
        if table.shape[0] == 2:
            return torch.where(self.branch.bool(), table[1], table[0])
        if table.ndim == 1:
            return table[self.branch.long()]
        found = table[0]
        for r in range(1, table.shape[0]):  # no gather: that would need the codes' whole shape
            found = torch.where(self.branch == r, table[r], found)
        return found

    def zero_of_branch(self) -> Tensor:
        """The code that stands for 0 of each element; broadcasts to the codes (a scalar 0 where there is no zero)."""
        return self.quantum.new_zeros(()) if self.zero is None else self._of_branch(self.zero)

    def centred(self) -> Tensor:
        """``codes - zero``: what the codes stand for in units of the quantum, ``[...]``."""
        if self.zero is None:
            return self.codes
        zero = self._of_branch(self.zero)
        if self.codes.is_floating_point():
            return self.codes - zero.to(self.codes.dtype)
        return self.integer_codes().to(torch.int32) - zero.to(torch.int32)

    def decode(self) -> Tensor:
        """The real value that the window carries, ``[...]``, in the dtype of ``quantum``."""
        return self.centred().to(self.quantum.dtype) * self.unit()

    def integers(self) -> tuple[Tensor, Tensor] | None:
        """The whole train in one unit: its integers, and what one of them is worth.

        Returns:
            Integer-valued ``[..., C]`` (int8 where the limit allows) and a real that broadcasts to ``[..., 1]``; None
            where the train is not exact, or its channels have no common unit.
        """
        unit = self.common_quantum()
        return None if unit is None or not self.exact else (self.common_integers(self.centred()), unit)

    def common_quantum(self) -> Tensor | None:
        """The unit that all elements of a row have in common, or None: a real that broadcasts to ``[..., 1]``."""
        if self.quantum.ndim > 1 and self.quantum.shape[-1] != 1:
            return None
        if self.branch is None:
            return self.quantum[0]
        multiples = getattr(self.coding, "multiples", None)
        if multiples is None or len(multiples) != self.quantum.shape[0]:
            return None
        return self.quantum[multiples.index(1)]

    def common_integers(self, codes: Tensor) -> Tensor:
        """Codes of this train's sub-neurons (or their spikes) as integers in the common unit, in the narrowest dtype.

        Args:
            codes: ``[..., C]``, magnitudes within the coding's limit, or beyond it with a zero of each channel.
        """
        own_zero = self.zero is not None and self.zero.ndim > 1 and self.zero.shape[-1] != 1
        heaviest = max(self.coding.limit, *self.coding.weights())  # a signed digit's first step is beyond the limit
        dtype = torch.int32 if own_zero else narrowest(heaviest)
        multiples = getattr(self.coding, "multiples", (1,))
        if self.branch is None or len(multiples) == 1:
            return codes.to(dtype)
        factor = torch.full_like(self.branch, multiples[0], dtype=dtype)
        for r, multiple in enumerate(multiples[1:], 1):
            factor = torch.where(self.branch == r, multiple, factor)
        return codes.to(dtype) * factor

    def unroll(self) -> Tensor:
        """Literal spikes: int8 amplitudes ``[window, ...]``; most are 0, 1 or -1 (see the coding)."""
        return self.coding.unroll(self.integer_codes())

    def steps(self) -> Tensor:
        """What each step adds to the centred code: integers ``[window, ...]``, amplitude x step weight.

        The zero is a bias current: it flows in the first step.
        """
        spikes = self.unroll().to(torch.int32)
        weights = torch.tensor(self.coding.weights(), dtype=spikes.dtype, device=spikes.device)
        values = spikes * weights.view(-1, *[1] * self.codes.ndim)
        if self.zero is not None:
            values[0] -= self._of_branch(self.zero).to(values.dtype)
        return values

    def step_values(self) -> Tensor:
        """What reaches a synapse at each step: ``[window, ...]`` reals, in the units of :meth:`decode`."""
        return self.steps().to(self.quantum.dtype) * self.unit()

    def count(self) -> Tensor:
        """Spikes that each element sends in the window: int32 ``[...]``."""
        return self.coding.count(self.integer_codes())

    def integer_codes(self) -> Tensor:
        """``codes`` in an integer dtype."""
        return self.codes.to(torch.int32) if self.codes.is_floating_point() else self.codes

    def map(self, function) -> SpikeTrain:
        """The same train with ``function`` applied to codes and branch alike (reshape, transpose, expand).

        The quantum and the zero must be scalar per sub-neuron, or ``function`` must leave its broadcasting valid.
        """
        branch = None if self.branch is None else function(self.branch.expand(self.codes.shape))
        unit = self.known_unit
        unit = function(unit.expand(self.codes.shape)) if unit is not None and unit.ndim else unit
        return replace(self, codes=function(self.codes), branch=branch, known_unit=unit)
