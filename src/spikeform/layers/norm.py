"""Normalisation layers whose square, inverse square root and product are spikes.

Per token: ``d = x - mean(x)`` (LayerNorm only; a linear operation, real), ``r = HG_1/sqrt(mean(HG_square(d)) +
eps)``, ``y = OAT(d) * r`` as a spike-equivalent Hadamard product; gain and offset are a real scale, as in
arXiv 2505.09659.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from spikeform.neurons import MT, FixedPointHG, Neuron
from spikeform.neurons.fused import hg_norm
from spikeform.neurons.neuron import entry
from spikeform.synapses import fusible, hadamard


class SpikingNorm(nn.Module):
    """LayerNorm or RMSNorm over the last axis.

    Args:
        weight: Gain ``[D]`` or None.
        bias: Offset ``[D]`` or None.
        eps: Added to the mean square.
        centred: Subtract the mean (LayerNorm).
        gain_offset: Added to the stored gain (Gemma stores gain - 1).
        neuron: OAT of the normalised input.
        square: HG of ``x^2``.
        inverse_sqrt: HG of ``1/sqrt(x)``.
    """

    def __init__(
        self,
        weight: nn.Parameter | None,
        bias: nn.Parameter | None,
        eps: float,
        centred: bool,
        gain_offset: float,
        neuron: MT,
        square: Neuron,
        inverse_sqrt: Neuron,
    ) -> None:
        super().__init__()
        self.weight, self.bias = weight, bias
        self.eps, self.centred, self.gain_offset = eps, centred, gain_offset
        self.neuron, self.square, self.inverse_sqrt = neuron, square, inverse_sqrt

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Real ``[..., D]`` in, real ``[..., D]`` out, in the dtype of the input."""
        out = self._fused(hidden_states)
        if out is not None:
            return out
        d = hidden_states if hidden_states.dtype == torch.float64 else hidden_states.float()
        if self.centred:
            d = d - d.mean(-1, keepdim=True)
        mean_square = self.square(d).decode().mean(-1, keepdim=True)
        scale = self.inverse_sqrt(mean_square + self.eps)
        y = hadamard(self.neuron(d), scale, site=self.neuron.site)
        if self.weight is not None:
            y = y * (self.weight.to(y.dtype) + self.gain_offset)
        if self.bias is not None:
            y = y + self.bias.to(y.dtype)
        return y.to(hidden_states.dtype)

    def _fused(self, x: Tensor) -> Tensor | None:
        """The whole layer as one operator, or None where there is none."""
        neurons, own = self._modules, self._parameters
        square, inverse_sqrt = entry(self, neurons, "square"), entry(self, neurons, "inverse_sqrt")
        if not (isinstance(square, FixedPointHG) and isinstance(inverse_sqrt, FixedPointHG)):
            return None
        form, bank = entry(self, neurons, "neuron").closed_form(), square.closed_form()
        if form is None or form.shift is not None or bank != inverse_sqrt.closed_form():
            return None
        weight, bias = entry(self, own, "weight"), entry(self, own, "bias")
        if not fusible(x, weight, bias):
            return None
        how = self.eps, self.centred, self.gain_offset
        return hg_norm(x, weight, bias, *how, form.threshold, *form[2:], *bank)

    def extra_repr(self) -> str:
        """Kind and eps."""
        return f"{'LayerNorm' if self.centred else 'RMSNorm'}, eps={self.eps}"
