"""The hierarchically gated (HG) neuron, exact fixed-point realisation.

LAS computes exp, 1/x, x^2, 1/sqrt(x), GELU, SiLU … with a bank of sub-neurons, each owning a region of the
input, chosen by gates on the accumulated membrane potential (arXiv 2505.09659). Here the regions are the
binades of the output: where ``2^(e-1) <= |f(x)| < 2^e`` sub-neuron e fires, a radix-2 code of T bits

    code = round(|f(x)| / 2^(e-T)),   value = sign * code * 2^(e-T).

Each threshold of a sub-neuron is the input at which the output crosses one of its levels, so no table is
learned and the error is known beforehand: ``|value - f(x)| <= 2^-T |f(x)|`` (nearest; twice that for floor)
inside the bank, at most ``2^low`` below it (nothing fires), and saturation, counted, above it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from spikeform.neurons.functions import FUNCTIONS
from spikeform.neurons.neuron import Neuron
from spikeform.spikes import Coding, SpikeTrain, power_of_two
from spikeform.spikes.trace import Firing, observer

MANTISSA_BITS = 24  # of fp32, the implicit one included


class FixedPointHG(Neuron):
    """HG neuron of one function with a stated error bound.

    Args:
        function: A name in :data:`spikeform.neurons.functions.FUNCTIONS`.
        coding: A radix-2 or signed-digit coding; its steps T are the bits of the code.
        rounding: ``nearest``; ``floor`` and ``strict`` both cut.
        low: No sub-neuron below output ``2^low``: smaller outputs send nothing.
        high: Outputs of ``2^high`` or more saturate.
        site: The qualified name under which its firing is reported.
    """

    def __init__(
        self,
        function: str,
        coding: Coding,
        rounding: str = "nearest",
        low: int = -32,
        high: int = 32,
        site: str = "",
    ) -> None:
        super().__init__(site)
        if function not in FUNCTIONS:
            raise ValueError(f"no function named {function!r}; known: {', '.join(FUNCTIONS)}")
        self.function, self.coding, self.rounding, self.low, self.high = function, coding, rounding, low, high

    @property
    def error_bound(self) -> float:
        """Largest relative error inside the bank."""
        return 2.0 ** -(self.coding.steps - (self.rounding != "nearest"))

    def encode(self, x: Tensor) -> SpikeTrain:
        """The train of ``f(x)``, ``[...]``; ``branch`` is the binade's sub-neuron, lowest first."""
        y = FUNCTIONS[self.function](x.float())
        steps = self.coding.steps
        dropped = MANTISSA_BITS - steps
        # Rounding the mantissa of an fp32 number to T bits is the code; the carry into the exponent is the
        # step to the next sub-neuron. Integer arithmetic on the bits is exact and takes few passes.
        bits = y.contiguous().view(torch.int32)
        magnitude = bits & 0x7FFFFFFF
        if self.rounding == "nearest":
            magnitude = magnitude + (1 << (dropped - 1))
        exponent = (magnitude >> 23) - 126  # 2^(exponent-1) <= |value| < 2^exponent
        codes = ((magnitude & 0x7FFFFF) | 0x800000) >> dropped
        above, below = exponent > self.high, exponent <= self.low
        codes = torch.where(above, (1 << steps) - 1, codes).masked_fill(below, 0)
        codes = torch.where(bits < 0, -codes, codes)
        branch = (exponent - self.low - 1).clamp_(0, self.high - self.low - 1).to(torch.uint8)
        exponents = torch.arange(self.low + 1, self.high + 1, device=x.device) - steps
        train = SpikeTrain(codes, power_of_two(exponents, _dtype(x)), self.coding, branch)
        listener = observer()
        if listener is not None:
            listener(Firing(self.site, self.function, train, x, above.sum()))
        return train

    def extra_repr(self) -> str:
        """Function, coding, rounding, bank."""
        return f"{self.function}, {self.coding}, {self.rounding}, 2^{self.low}..2^{self.high}"


def _dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32
