"""The spike train: integer codes, what one unit of a code is worth, and how a code unrolls in time."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from spikeform.spikes.codings import Coding


def power_of_two(exponents: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """``2^exponents``, exact, the shape of ``exponents`` (any integer dtype)."""
    return torch.ldexp(torch.ones(exponents.shape, dtype=dtype, device=exponents.device), exponents.to(torch.int32))


@dataclass(frozen=True)
class SpikeTrain:
    """What a neuron population sends in one window.

    ``value = codes * quantum[branch]``. A population of several sub-neurons (LAS's OAT: normal and outlier;
    HG: one per input region) gives each element to exactly one of them: ``branch`` says which.

    Args:
        codes: Integer-valued tensor ``[...]``; any integer dtype, or a float dtype holding integers.
        quantum: Real value of one code unit per sub-neuron: ``[R, *b]``, where ``b`` broadcasts to the shape
            of ``codes`` (empty for a scalar each). ``R`` is 1 where ``branch`` is None.
        coding: How a code unrolls.
        branch: Sub-neuron of each element, integer, the shape of ``codes``, or None where there is one.
        known_unit: What :meth:`unit` gives, where the neuron has it at hand already.
    """

    codes: Tensor
    quantum: Tensor
    coding: Coding
    branch: Tensor | None = None
    known_unit: Tensor | None = None

    @property
    def shape(self) -> torch.Size:
        """Shape of the population, without time."""
        return self.codes.shape

    def unit(self) -> Tensor:
        """Value of one code unit of each element; broadcasts to the shape of ``codes``."""
        if self.known_unit is not None:
            return self.known_unit
        if self.branch is None:
            return self.quantum[0]
        if self.quantum.shape[0] == 2:
            return torch.where(self.branch.bool(), self.quantum[1], self.quantum[0])
        if self.quantum.ndim == 1:
            return self.quantum[self.branch.long()]
        table, *inner = self.quantum.shape
        lined_up = self.quantum.view(table, *[1] * (self.codes.ndim - len(inner)), *inner)
        expanded = lined_up.expand(-1, *self.codes.shape)
        return expanded.gather(0, self.branch.long()[None]).squeeze(0)

    def decode(self) -> Tensor:
        """The real value that the window carries, ``[...]``, in the dtype of ``quantum``."""
        return self.codes.to(self.quantum.dtype) * self.unit()

    def unroll(self) -> Tensor:
        """Literal spikes: int8 amplitudes ``[window, ...]``; most are 0, 1 or -1 (see the coding)."""
        return self.coding.unroll(self.integer_codes())

    def step_values(self) -> Tensor:
        """What reaches a synapse at each step: ``[window, ...]`` reals, amplitude x step weight x quantum."""
        weights = torch.tensor(self.coding.weights(), dtype=self.quantum.dtype, device=self.codes.device)
        shape = (-1,) + (1,) * self.codes.ndim
        return self.unroll().to(self.quantum.dtype) * weights.view(shape) * self.unit()

    def count(self) -> Tensor:
        """Spikes that each element sends in the window: int32 ``[...]``."""
        return self.coding.count(self.integer_codes())

    def integer_codes(self) -> Tensor:
        """``codes`` in an integer dtype."""
        return self.codes.to(torch.int32) if self.codes.is_floating_point() else self.codes

    def map(self, function) -> SpikeTrain:
        """The same train with ``function`` applied to codes and branch alike (reshape, transpose, expand).

        The quantum must be scalar per sub-neuron, or ``function`` must leave its broadcasting valid.
        """
        branch = None if self.branch is None else function(self.branch)
        unit = self.known_unit
        unit = function(unit) if unit is not None and unit.ndim else unit
        return replace(self, codes=function(self.codes), branch=branch, known_unit=unit)
