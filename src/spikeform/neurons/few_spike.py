"""The hierarchically gated (HG) neuron as LAS defines it: learned few-spike sub-neurons behind gates.

Gates on the accumulated input ``v(1) = x`` give each element to the sub-neuron r that owns its interval
``gates[r] <= x < gates[r+1]``; that one runs on the ungated input (arXiv 2505.09659; Stoeckl and Maass 2021):

    z(t) = 1[v(t) > theta(t)];   v(t+1) = v(t) - h(t) z(t);   y = sum_t d(t) z(t)

An input outside all intervals is clamped to the nearest end, and counted as saturated.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import NoReturn

import torch
from torch import Tensor

from spikeform.neurons.few_spike_fit import NEVER, TEST_POINTS, FewSpikeFit, fit_few_spike_bank
from spikeform.neurons.few_spike_plan import plan
from spikeform.neurons.functions import FUNCTIONS
from spikeform.neurons.neuron import Neuron
from spikeform.spikes import Coding, Radix2, SpikeTrain
from spikeform.spikes.codings import check_steps
from spikeform.spikes.trace import Firing, observer


@dataclass(frozen=True)
class FewSpikePattern(Coding):
    """The code is the spike pattern itself: bit ``T - t`` is ``z(t)``. What a step weighs is in the train."""

    @property
    def limit(self) -> int:
        """Every step spikes."""
        return (1 << self.steps) - 1

    def unroll(self, codes: Tensor) -> Tensor:
        """Bits, first step first: int8 ``[T, ...]``, 0 or 1."""
        return Radix2(self.steps).unroll(codes)

    def count(self, codes: Tensor) -> Tensor:
        """Set bits."""
        return Radix2(self.steps).count(codes)


@dataclass(frozen=True)
class FewSpikeTrain(SpikeTrain):
    """A train whose step weights are real and learned: ``value = sum_t d[branch, t] z(t)``.

    The same interface as :class:`~spikeform.spikes.SpikeTrain`, but there is no code unit: ``codes`` are
    spike patterns (int32), ``quantum`` is ``d``, fp32 ``[R, T]``, and ``branch`` is always given. A synapse
    that uses ``decode``, ``step_values`` and ``count`` works on it unchanged; integer weights do not.
    """

    def unit(self) -> NoReturn:
        """There is none.

        Raises:
            TypeError: Always.
        """
        raise TypeError(
            "a few-spike train has learned step weights and no code unit; use decode() or step_values(), "
            "or pick nonlinear='fixed_point' where integer codes are needed"
        )

    def _branch(self) -> Tensor:
        if self.branch is None:
            raise ValueError("a few-spike train needs the branch of each element")
        return self.branch.long()

    def decode(self) -> Tensor:
        """The real value that the window carries, fp32 ``[...]``; steps added in their order."""
        branch, value = self._branch(), self.quantum.new_zeros(self.shape)
        for t in range(self.coding.steps):
            bit = (self.codes >> (self.coding.steps - 1 - t)) & 1
            value = value + bit * self.quantum[:, t][branch]
        return value

    def step_values(self) -> Tensor:
        """What reaches a synapse at each step: fp32 ``[T, ...]``, spike x learned weight."""
        return self.unroll().to(self.quantum.dtype) * self.quantum.t()[:, self._branch()]


class FewSpikeHG(Neuron):
    """HG neuron of R few-spike sub-neurons of T steps. It always computes in fp32.

    Args:
        function: Name of the function, for reports.
        gates: ``[R + 1]``, strictly increasing: the ends of the intervals.
        theta: Thresholds ``[R, T]``.
        h: Resets ``[R, T]``.
        d: Output weights ``[R, T]``.
        site: The qualified name under which its firing is reported.

    Raises:
        ValueError: Shapes do not fit, a value is not finite, or the gates do not increase strictly.
    """

    gates: Tensor
    theta: Tensor
    h: Tensor
    d: Tensor

    def __init__(self, function: str, gates: Tensor, theta: Tensor, h: Tensor, d: Tensor, site: str = "") -> None:
        super().__init__(site)
        if theta.ndim != 2 or theta.shape != h.shape or theta.shape != d.shape or gates.shape != (len(theta) + 1,):
            raise ValueError(
                "a few-spike bank needs gates [R + 1] and theta, h, d [R, T], got "
                f"{', '.join(str(tuple(p.shape)) for p in (gates, theta, h, d))}"
            )
        check_steps(theta.shape[1])
        for name, values in (("gates", gates), ("theta", theta), ("h", h), ("d", d)):
            if not bool(values.isfinite().all()):
                raise ValueError(f"the {name} of a few-spike bank must be finite")
            self.register_buffer(name, values.detach().to(torch.float32, copy=True).contiguous())
        if not bool((self.gates.diff() > 0).all()):
            raise ValueError("the gates of a few-spike bank must increase strictly")
        self.function = function
        self.coding = FewSpikePattern(theta.shape[1])

    @classmethod
    def from_fits(cls, fits: list[FewSpikeFit], site: str = "") -> FewSpikeHG:
        """A bank of fitted neurons on adjoining intervals, left to right.

        Raises:
            ValueError: No fits, or an interval does not begin where the one before it ends.
        """
        if not fits:
            raise ValueError("a few-spike bank needs at least one fitted neuron")
        for before, after in pairwise(fits):
            (left, end), (begin, right) = before.interval, after.interval
            if abs(end - begin) > 1e-6 * max(end - left, right - begin):
                raise ValueError(f"few-spike intervals must adjoin, got {before.interval}, {after.interval}")
        gates = torch.tensor([fits[0].interval[0], *(fit.interval[1] for fit in fits)], dtype=torch.float64)
        tables = [torch.stack([getattr(fit, name) for fit in fits]) for name in ("theta", "h", "d")]
        return cls(fits[0].function, gates, *tables, site=site)

    @classmethod
    def blank(cls, function: str, steps: int, site: str = "") -> FewSpikeHG:
        """A silent bank of the right shapes, without any fit: for loading a checkpoint into."""
        check_steps(steps)
        regions = len(plan(function).regions)
        zeros = torch.zeros(regions, steps)
        return cls(function, torch.arange(regions + 1.0), torch.full_like(zeros, NEVER), zeros, zeros, site)

    def clamp(self, x: Tensor) -> Tensor:
        """``x`` in fp32, clamped to the outermost gates."""
        return x.float().clamp(self.gates[0], self.gates[-1])

    def branch(self, x: Tensor) -> Tensor:
        """Index of the sub-neuron of each input: int16 ``[...]``; an input on a gate goes right."""
        return torch.bucketize(self.clamp(x).contiguous(), self.gates[1:-1], right=True).to(torch.int16)

    def saturated(self, x: Tensor) -> Tensor:
        """Number of inputs outside all intervals, NaN among them (it sends no spike): a 0-d tensor."""
        return (~((x >= self.gates[0]) & (x <= self.gates[-1]))).sum()

    def encode(self, x: Tensor) -> FewSpikeTrain:
        """The train of ``f(x)``, ``[...]``."""
        branch, v = self.branch(x), self.clamp(x)
        index, codes = branch.long(), torch.zeros(x.shape, dtype=torch.int32, device=x.device)
        for t in range(self.coding.steps):
            z = v > self.theta[:, t][index]
            v = v - self.h[:, t][index] * z
            codes = (codes << 1) | z
        train = FewSpikeTrain(codes, self.d, self.coding, branch)
        listener = observer()
        if listener is not None:
            listener(Firing(self.site, self.function, train, x, self.saturated(x)))
        return train

    def extra_repr(self) -> str:
        """Function, sub-neurons, steps, input range."""
        ends = f"{self.gates[0]:.6g}..{self.gates[-1]:.6g}" if len(self.gates) else ""
        return f"{self.function}, sub_neurons={len(self.theta)}, steps={self.coding.steps}, input {ends}"


@lru_cache(maxsize=128)
def fitted_regions(function: str, steps: int, seed: int = 0) -> tuple[FewSpikeFit, ...]:
    """The fitted sub-neurons of a function, each with the error it reached; fitted once per process.

    Args:
        function: A name in :data:`spikeform.neurons.functions.FUNCTIONS`.
        steps: Time steps T, 1 to 16.
        seed: Of the fit.

    Raises:
        ValueError: Unknown name or bad steps.
    """
    check_steps(steps)
    layout = plan(function)
    fits = fit_few_spike_bank(function, layout.bases, steps, seed=seed)
    silence = torch.full((steps,), NEVER), torch.zeros(steps), torch.zeros(steps)
    regions = []
    for region in layout.regions:
        if region.base is None:
            regions.append(_silent(function, region.interval, *silence))
        else:
            regions.append(fits[region.base].moved(region.scale, region.shift, region.gain))
    return tuple(regions)


def _silent(function: str, interval: tuple[float, float], theta: Tensor, h: Tensor, d: Tensor) -> FewSpikeFit:
    left, right = interval
    error = FUNCTIONS[function](torch.linspace(left, right, TEST_POINTS + 1, dtype=torch.float64)).abs()
    figures = float(error.max()), float(error.mean()), float(error.square().mean().sqrt())
    return FewSpikeFit(function, interval, theta, h, d, *figures)


def few_spike_bank(function: str, steps: int, seed: int = 0, site: str = "") -> FewSpikeHG:
    """A ready HG neuron of a named function. The fit is cached; the module and its buffers are new each time.

    Ranges: exp [-20.1, 0]; reciprocal [2^-4, 2^20]; inverse_sqrt [2^-40, 2^24]; square, activations and tanh
    +-2^16 (square is silent below 2^-20, relu below 2^-16).
    """
    return FewSpikeHG.from_fits(list(fitted_regions(function, steps, seed)), site)
