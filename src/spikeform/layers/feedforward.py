"""Activations and the gated feed-forward block."""

from __future__ import annotations

from torch import Tensor, nn

from spikeform.neurons import MT, FewSpikeHG, FixedPointHG, Neuron
from spikeform.neurons.fused import few_spike_values, hg_gated, hg_values
from spikeform.neurons.neuron import entry
from spikeform.synapses import fusible, hadamard


class SpikingActivation(nn.Module):
    """An activation function computed by an HG neuron: ``y = sum_t`` of its spikes.

    Args:
        neuron: The HG neuron of the function.
    """

    def __init__(self, neuron: Neuron) -> None:
        super().__init__()
        self.neuron = neuron

    def forward(self, input: Tensor) -> Tensor:
        """Real ``[...]`` in, real ``[...]`` out."""
        neuron = entry(self, self._modules, "neuron")
        if isinstance(neuron, FixedPointHG) and fusible(input):
            return hg_values(input, neuron.function, *neuron.closed_form())
        if isinstance(neuron, FewSpikeHG) and fusible(input):
            return few_spike_values(input, neuron.gates, neuron.theta, neuron.h, neuron.d)
        return neuron(input).decode().to(input.dtype)


class SpikingGatedMLP(nn.Module):
    """``down(act(gate(x)) * up(x))`` where both factors of the product are spike trains.

    Args:
        gate_proj: Linear layer, as in the block it replaces.
        up_proj: Linear layer.
        down_proj: Linear layer.
        act_fn: The activation; a :class:`SpikingActivation` sends its HG train into the product.
        up: OAT of the up projection's output.
        act: OAT of the activation's output, used only where ``act_fn`` was left dense.
    """

    def __init__(
        self, gate_proj: nn.Module, up_proj: nn.Module, down_proj: nn.Module, act_fn: nn.Module, up: MT, act: MT | None
    ) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj, self.act_fn = gate_proj, up_proj, down_proj, act_fn
        self.up, self.act = up, act

    def forward(self, x: Tensor) -> Tensor:
        """Real ``[..., D]`` in, real ``[..., D]`` out."""
        gate = entry(self, self._modules, "gate_proj")(x)
        product = self._fused(gate, x)
        if product is not None:
            return entry(self, self._modules, "down_proj")(product)
        if self.act is None:
            assert isinstance(self.act_fn, SpikingActivation)
            gate_train = self.act_fn.neuron(gate)
        else:
            gate_train = self.act(self.act_fn(gate))
        product = hadamard(gate_train, self.up(self.up_proj(x)), site=self.up.site)
        return self.down_proj(product.to(x.dtype))

    def _fused(self, gate: Tensor, x: Tensor) -> Tensor | None:
        """Both trains and their product as one operator, or None where there is none."""
        own = self._modules
        act_fn, act, up = (entry(self, own, name) for name in ("act_fn", "act", "up"))
        spikes = act is None and isinstance(act_fn, SpikingActivation)
        bank = entry(act_fn, act_fn._modules, "neuron") if spikes else None
        form = up.closed_form()
        if not isinstance(bank, FixedPointHG) or form is None or form.shift is not None or not fusible(gate):
            return None
        other = entry(self, own, "up_proj")(x)
        return hg_gated(gate, other, bank.function, *bank.closed_form(), form.threshold, *form[2:])
