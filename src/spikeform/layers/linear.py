"""A linear layer that receives spikes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from spikeform.neurons import MT, Neuron, SignedInteger
from spikeform.neurons.fused import oat_values
from spikeform.neurons.neuron import entry
from spikeform.neurons.oat import OatForm
from spikeform.synapses import fusible, linear
from spikeform.synapses.fused import EVENT_ROWS, event_product, oat_linear


class SpikingLinear(nn.Linear):
    """``y = sum_t spikes(t) W^T + b``: a neuron, then the synapse, under the names of the layer it replaces.

    A subclass of ``nn.Linear`` (adapters and trainers see a linear layer). GPT-2's ``Conv1D`` becomes one too,
    its weight transposed.

    Args:
        in_features: K.
        out_features: N.
        bias: Whether there is one.
        neuron: Encodes the input. None: the input is real, gated by the spikes of a neuron before it.
        device: Where the parameters live (``meta`` for a skeleton).
        dtype: Of the parameters.

    Attributes:
        event_rows: The weights input-major ``[K, N]``, where the event executor was found faster
            (:func:`spikeform.tune`); None elsewhere. Not saved: it belongs to a machine.
    """

    def __init__(
        self, in_features: int, out_features: int, bias: bool, neuron: Neuron | None, device=None, dtype=None
    ) -> None:
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        self.neuron = neuron
        self.event_rows: Tensor | None = None

    @classmethod
    def from_dense(cls, dense: nn.Linear | Conv1D, neuron: Neuron | None) -> SpikingLinear:
        """Take over the parameters of ``dense``: the same tensors, but for Conv1D's transposed weight."""
        transposed = isinstance(dense, Conv1D)
        weight = dense.weight.T if transposed else dense.weight
        out_features, in_features = weight.shape
        with torch.device("meta"):
            layer = cls(in_features, out_features, dense.bias is not None, neuron)
        layer.weight = nn.Parameter(weight.contiguous(), dense.weight.requires_grad) if transposed else dense.weight
        layer.bias = dense.bias
        layer.neuron = neuron
        layer.train(dense.training)
        return layer

    @torch.no_grad()
    def fold(self) -> None:
        """Multiply the neuron's scales of channels into the weight's columns.

        Those of an MT neuron are powers of two, so no bit of any product changes.
        """
        neuron = self.neuron
        if not isinstance(neuron, MT | SignedInteger) or neuron.folded:
            return
        factor = neuron.fold_factor()
        if factor is not None:
            # A new tensor: the old one may be shared (tied) or memory-mapped.
            self.weight = nn.Parameter(self.weight * factor.to(self.weight.dtype), self.weight.requires_grad)
            neuron.folded = True

    @torch.no_grad()
    def unfold(self) -> None:
        """Take thresholds of channels out of the weights again, so that they can be learned; up to rounding."""
        neuron = self.neuron
        if isinstance(neuron, SignedInteger) and neuron.folded:
            self.weight = nn.Parameter(self.weight / neuron.threshold.to(self.weight.dtype), self.weight.requires_grad)
            neuron.folded = False

    def forward(self, input: Tensor) -> Tensor:
        """Real ``[..., K]`` to real ``[..., N]``, in the dtype of ``input``."""
        out = self._fused(input)
        if out is not None:
            return out
        if self.neuron is None:
            return super().forward(input)
        train = self.neuron(input)
        bias = None if self.bias is None else self.bias.to(train.quantum.dtype)
        return linear(train, self.weight, bias, site=self.neuron.site).to(input.dtype)

    def _fused(self, x: Tensor) -> Tensor | None:
        """Neuron and synapse as one operator, or None where there is none."""
        own, neuron = self._parameters, entry(self, self._modules, "neuron")
        if not isinstance(neuron, MT | SignedInteger):
            return None
        weight, bias = entry(self, own, "weight"), entry(self, own, "bias")
        form = neuron.closed_form()
        learned = entry(neuron, neuron._parameters, "threshold") if isinstance(neuron, SignedInteger) else None
        if form is None or x.dtype != weight.dtype or not fusible(x, weight, bias, learned):
            return None
        if isinstance(neuron, SignedInteger):
            return self._fused_integers(x, neuron, form, weight, bias)
        if self.event_rows is not None and self.visits(x):
            out = event_product(oat_values(x, *form, False), self.event_rows, None, self.out_features)
            return self.finished(out, None, bias, x.dtype)
        return oat_linear(x, weight, bias, *form, neuron.single(x.dtype))

    def _fused_integers(
        self, x: Tensor, neuron: SignedInteger, form: OatForm, weight: Tensor, bias: Tensor | None
    ) -> Tensor:
        """Small integers are numbers of any dtype: one product of them, and the unit comes last."""
        if self.event_rows is not None and self.visits(x):
            out = event_product(neuron.integers(x), self.event_rows, None, self.out_features)
        else:
            out = oat_linear(neuron.potential(x), weight, None, *form, True)
        return self.finished(out, neuron.unit(), bias, x.dtype)

    @staticmethod
    def finished(sums: Tensor, unit: Tensor | None, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        """``sums unit + bias``; no unit is 1."""
        out = sums if unit is None else sums * unit
        return (out if bias is None else out + bias).to(dtype)

    def visits(self, x: Tensor) -> bool:
        """Whether so few rows go to the event executor, which :attr:`event_rows` allows."""
        return x.numel() <= EVENT_ROWS * x.shape[-1]

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: Any, **kwargs: Any) -> None:
        # Files hold [1, N, K] (see spikeform.conversion.quantizer); trainers resume from them by load_state_dict.
        weight = state_dict.get(f"{prefix}weight")
        if weight is not None and tuple(weight.shape) == (1, *self.weight.shape):
            state_dict[f"{prefix}weight"] = weight[0]
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
