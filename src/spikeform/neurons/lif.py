"""The leaky integrate-and-fire (LIF) neuron of spiking attention, its membrane empty at the beginning of each token.

For t = 1..T, from ``V(0) = 0``, with a current ``I`` times a gain ``g`` that is learned for each head:

    U(t) = V(t-1) + (g I(t) - V(t-1)) / tau;   S(t) = 1[U(t) >= theta]
    V(t) = U(t) (1 - S(t))     (reset ``hard``)      or      U(t) - theta S(t)     (``soft``)

Signed: also ``S(t) = -1`` where ``U(t) <= -theta``. The reset is left out of the gradient. tau = 1 forgets at once;
tau = 0 stands for no leak, integrate-and-fire: ``U(t) = V(t-1) + g I(t)``.

A current that is the same in each step becomes, with a leak of tau = 2, hardly more than one bit: from 2 theta on it
fires in each of T = 4 steps, below 1.07 theta in none. Without a leak and with the soft reset it fires in
``floor(T g I / theta)`` of them.

Source: Zhou et al. 2023 (arXiv 2209.15425), whose attention has hard resets and tau = 2.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from spikeform.errors import SpikeformError
from spikeform.neurons.fused import lif_gradient, lif_spikes
from spikeform.neurons.neuron import Neuron
from spikeform.neurons.operands import positive_integer
from spikeform.neurons.surrogate import SURROGATES
from spikeform.spikes import SpikeTrain, Thermometer
from spikeform.spikes.trace import Firing, observer

RESETS = ("hard", "soft")


class _Fire(torch.autograd.Function):
    """Floating spikes of T steps as one node of the graph; the currents are all that is kept.

    With the surrogate's slope p(t) at U(t) and G the gradient of V, from ``G(T) = 0``:

        dE/dU(t) = p(t) dE/dS(t) + G(t) (1 - |S(t)|)     (soft: + G(t))
        dE/dI(t) = dE/dU(t) / tau;   G(t-1) = (1 - 1 / tau) dE/dU(t)     (no leak: both dE/dU(t))
    """

    @staticmethod
    def forward(ctx: Any, current: Tensor, steps: int, *rule: Any) -> Tensor:
        ctx.save_for_backward(current)
        ctx.rule = rule
        return lif_spikes(current, steps, *rule[:-1], False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return _backward(ctx, grads[0])


@once_differentiable
def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return lif_gradient(grad, *ctx.saved_tensors, *ctx.rule), *(None for _ in range(6))


class LIF(Neuron):
    """Leaky integrate-and-fire neurons of H heads.

    Args:
        heads: H, each with a gain of its own.
        steps: T.
        threshold: theta.
        tau: Membrane time constant in steps, at least 1; 0: nothing leaks.
        reset: ``hard`` or ``soft``.
        signed: Fire -1 too.
        surrogate: ``triangle``, ``sigmoid`` or ``arctan``.
        site: The qualified name under which its firing is reported.

    Raises:
        SpikeformError: An argument is out of range.

    Attributes:
        gain: g, fp32 ``[H]``, a parameter; 1 to begin with.
    """

    def __init__(
        self,
        heads: int,
        steps: int,
        *,
        threshold: float = 1.0,
        tau: float = 2.0,
        reset: str = "hard",
        signed: bool = False,
        surrogate: str = "sigmoid",
        site: str = "",
    ) -> None:
        super().__init__(site)
        for name, value, known in (("reset", reset, RESETS), ("surrogate", surrogate, SURROGATES)):
            if value not in known:
                raise SpikeformError(f"{name} must be one of {', '.join(known)}, got {value!r}")
        if not threshold > 0 or not (tau >= 1 or tau == 0):
            raise SpikeformError(f"threshold must be above 0 and tau 0 or at least 1, got {threshold} and {tau}")
        self.steps, self.threshold, self.tau = positive_integer("steps", steps), float(threshold), float(tau)
        self.reset, self.signed, self.surrogate = reset, signed, surrogate
        self.gain = nn.Parameter(torch.ones(heads, dtype=torch.float32))

    def current(self, x: Tensor) -> Tensor:
        """``g I`` of ``[..., H, P, E]``, fp32 (fp64 stays fp64)."""
        x = x if x.dtype == torch.float64 else x.float()
        return x * self.gain.to(x.dtype)[:, None, None]

    def _fire(self, current: Tensor) -> Tensor:
        """Spikes of ``g I`` ``[T or 1, ...]``: floating where a gradient is wanted, else int8."""
        rule = self.tau, self.threshold, self.reset == "hard", self.signed
        if torch.is_grad_enabled() and current.requires_grad:
            return _Fire.apply(current, self.steps, *rule, SURROGATES.index(self.surrogate))
        return lif_spikes(current, self.steps, *rule, True)

    def encode(self, x: Tensor, varying: bool = False) -> SpikeTrain:
        """The literal spikes of T steps, side by side on the first axis.

        Args:
            x: ``[B, H, P, E]``, a current that is the same in each step; ``varying``: ``[T, B, H, P, E]``.
            varying: Whether the first axis is time.

        Returns:
            A train ``[T, B, H, P, E]`` whose rows are windows of one step each: codes 0 or 1 (signed: also -1), int8,
            or floating where gradients flow.

        Raises:
            SpikeformError: ``varying``, and the first axis is not T.
        """
        if varying and x.shape[0] != self.steps:
            raise SpikeformError(f"{self.site}: needs {self.steps} steps on the first axis, got {x.shape[0]}")
        current = self.current(x)
        codes = self._fire(current if varying else current[None])
        train = SpikeTrain(codes, codes.new_ones(1, dtype=current.dtype), Thermometer(1))
        listener = observer()
        if listener is not None:
            listener(Firing(self.site, "identity", train, x, torch.zeros((), dtype=torch.int64, device=x.device)))
        return train

    def forward(self, x: Tensor, varying: bool = False) -> SpikeTrain:
        """Alias of :meth:`encode`, so that module hooks work."""
        return self.encode(x, varying)

    def rate(self, current: Tensor) -> Tensor:
        """Mean of ``|S(t)|`` over the steps for a current that is the same in each, ``[...]``, fp32."""
        with torch.no_grad():
            return self._fire(current[None]).abs().float().mean(0)

    def extra_repr(self) -> str:
        """Constants and kind."""
        kind = "signed" if self.signed else "binary"
        return f"T={self.steps}, {kind}, theta={self.threshold}, tau={self.tau}, {self.reset} reset"
