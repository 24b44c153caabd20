"""The leaky integrate-and-fire (LIF) neuron with soft reset: ``v <- leak v + x(t)``, else as :mod:`.if_`.

``leak = exp(-1 / tau)`` for a membrane time constant of tau steps; ``leak = 1`` is IF, by the same step.
"""

from __future__ import annotations

from torch import Tensor

from spikeform.neurons.if_ import Fired, integrate_and_fire


def leaky_integrate_and_fire(
    x: Tensor,
    threshold: float | Tensor,
    leak: float,
    initial: float | Tensor = 0.0,
    *,
    ternary: bool = False,
    surrogate: float | None = None,
    level: float | Tensor = 1.0,
) -> Fired:
    """Run the neuron over an input sequence.

    Args:
        x: Input currents ``[T, ..., C]``, floating, T >= 1.
        threshold: Positive; a scalar or ``[C]``, units of ``x``.
        leak: What stays of the potential from step to step, 0 < leak <= 1.
        initial: ``v(0)``, units of ``x``.
        ternary: Fire -1 at ``v <= -level threshold``.
        surrogate: Half width of the surrogate triangle, units of ``x``; None for int8 spikes without a gradient.
        level: The share of the threshold at which it fires, above 0.

    Returns:
        Spikes ``[T, ..., C]`` and the final potential.

    Raises:
        SpikeformError: As :func:`spikeform.neurons.if_.integrate_and_fire`.
    """
    return integrate_and_fire(x, threshold, initial, leak=leak, ternary=ternary, surrogate=surrogate, level=level)
