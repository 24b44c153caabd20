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
import torch.nn.functional as F
from torch import Tensor

from spikeform.neurons.functions import FUNCTIONS
from spikeform.neurons.neuron import Neuron
from spikeform.spikes import Coding, SpikeTrain, power_of_two
from spikeform.spikes.trace import Firing, observer

MANTISSA_BITS = 24  # of fp32, the implicit one included


class BinadeTrain(SpikeTrain):
    """A train of an HG bank, held as its fp32 value: the exponent is the sub-neuron, the mantissa the code.

    Codes and branches are taken from the bits when they are asked for; a collapsed product never asks.

    Args:
        value: Decoded value ``[...]``, a T-bit mantissa each.
        coding: Its steps T are the bits of a code.
        low: Sub-neuron 0 sends values in ``[2^low, 2^(low+1))``.
        high: The last one sends values below ``2^high``.
    """

    def __init__(self, value: Tensor, coding: Coding, low: int, high: int) -> None:
        for name, item in (("value", value), ("coding", coding), ("low", low), ("high", high)):
            object.__setattr__(self, name, item)

    value: Tensor
    low: int
    high: int

    @property
    def shape(self) -> torch.Size:
        """Shape of the population, without time."""
        return self.value.shape

    def _bits(self) -> tuple[Tensor, Tensor]:
        bits = self.value.float().contiguous().view(torch.int32)
        return bits, (bits >> 23) & 0xFF

    @property
    def codes(self) -> Tensor:  # type: ignore[override]
        """Signed T-bit mantissas, int32."""
        bits, exponent = self._bits()
        magnitude = ((bits & 0x7FFFFF) | 0x800000) >> (MANTISSA_BITS - self.coding.steps)
        return torch.where(bits < 0, -magnitude, magnitude).masked_fill(exponent == 0, 0)

    @property
    def branch(self) -> Tensor:  # type: ignore[override]
        """Sub-neuron of each element, uint8 (0 where nothing fires)."""
        return (self._bits()[1] - 127 - self.low).clamp_(0, self.high - self.low - 1).to(torch.uint8)

    @property
    def quantum(self) -> Tensor:  # type: ignore[override]
        """Value of one code unit of each sub-neuron ``[high - low]``."""
        exponents = torch.arange(self.low + 1, self.high + 1, device=self.value.device) - self.coding.steps
        return power_of_two(exponents, self.value.dtype)

    def unit(self) -> Tensor:
        """Value of one code unit of each element."""
        return self.quantum[self.branch.long()]

    def decode(self) -> Tensor:
        """The value itself."""
        return self.value

    def map(self, function) -> BinadeTrain:
        """The same train with ``function`` applied to its values."""
        return BinadeTrain(function(self.value), self.coding, self.low, self.high)


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

    def closed_form(self) -> tuple[int, bool, int, int]:
        """What kernels need beside the function: bits, nearest, low, high."""
        return self.coding.steps, self.rounding == "nearest", self.low, self.high

    def encode(self, x: Tensor) -> SpikeTrain:
        """The train of ``f(x)``, ``[...]``; ``branch`` is the binade's sub-neuron, lowest first."""
        y = FUNCTIONS[self.function](x.float())
        steps = self.coding.steps
        top = (1 - 2.0**-steps) * 2.0**self.high
        dropped = MANTISSA_BITS - steps
        # Rounding the mantissa of an fp32 number to T bits is the code; the carry into the exponent is the step
        # to the next sub-neuron. Integer arithmetic on the bits is exact, for either sign, and takes few passes.
        bits = y.clamp(-top, top).contiguous().view(torch.int32)
        if self.rounding == "nearest":
            bits = bits + (1 << (dropped - 1))
        value = (bits & -(1 << dropped)).view(torch.float32)
        value = F.hardshrink(value, 2.0**self.low * (1 - 2.0**-MANTISSA_BITS))  # below the bank: silence
        train = BinadeTrain(value.to(x.dtype) if x.dtype == torch.float64 else value, self.coding, self.low, self.high)
        listener = observer()
        if listener is not None:
            listener(Firing(self.site, self.function, train, x, (y.abs() > top).sum()))
        return train

    def extra_repr(self) -> str:
        """Function, coding, rounding, bank."""
        return f"{self.function}, {self.coding}, {self.rounding}, 2^{self.low}..2^{self.high}"
