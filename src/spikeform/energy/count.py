"""Counting what a spiking network does, from the trains themselves, one event at a time; no train is kept.

One rule for each kind of product, the same for the network that spikes and the one that multiplies:

- ``linear``: a spike adds one weight row, ``fan_out`` additions of a weight. Dense: elements x fan_out.
- ``weights``: real input, spiking weights: a weight's spike adds one activation at one output, for each row.
- ``matmul``, run as events ``O(t) = A(t) S_B(t) + S_A(t-1) B(t)``: a spike of either train adds the *running
  sum* of the other, once for each output that it reaches, and enters its own running sum, one addition more.
- ``hadamard``: the same, elementwise.
- ``attention``, ``recurrence``: both products of spiking self-attention (:mod:`spikeform.energy.self_attention`).

A streaming network of T steps sends its trains in windows of one step, T rows for each input row (time is in the
batch). Here the T rows are one window of T steps again, so that elements, windows and the products' MACs mean the
same as for all other networks.

A binary step weight is a shift, so a shift-add is one addition; a learned one (few-spike neurons) is a
multiplication more. What a causal mask hides is counted nowhere: not in the scores, not in the softmax
between, not in the product with the values, neither spiking nor dense.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from spikeform.energy.codings import additions, comparisons, parts_of
from spikeform.energy.linears import biased, count_linear, count_units, count_weights
from spikeform.energy.mixers import mixer_hooks, unheard
from spikeform.energy.real import RealTally, real_hooks
from spikeform.energy.self_attention import KINDS, SelfAttentions
from spikeform.energy.tallies import DenseTally, FiringTally, Population, ProductTally, total
from spikeform.energy.weights import Weights, weights_of
from spikeform.layers import SpikingLinear
from spikeform.neurons import SignedInteger
from spikeform.neurons.few_spike import FewSpikePattern
from spikeform.neurons.hadamard import block
from spikeform.spikes import SpikeTrain, Thermometer
from spikeform.spikes.trace import Firing, Product, observe


class Counter:
    """An observer (:func:`spikeform.spikes.trace.observe`) that counts.

    Args:
        steps: T of a streaming network, whose one-step windows fill T rows of the batch each; 0 for others.
        real: Count attention, gated products and scans of real numbers too.

    Attributes:
        products: Tally per (site, kind).
        firings: Tally per (site, function).
        dense: Tally per module name, filled by :meth:`watch`.
        converted: Names of the linear layers that a conversion put in, filled by :meth:`watch`.
        real: Tally per module name, filled by :meth:`watch` if asked for.
        attentions: What spiking self-attention does beside, by its site.
    """

    def __init__(self, steps: int = 0, real: bool = False) -> None:
        self.steps, self._wants_real = steps, real
        self.real: dict[str, RealTally] = {}
        self.attentions = SelfAttentions()
        self._rotating: set[str] = set()
        self.products: dict[tuple[str, str], ProductTally] = {}
        self.firings: dict[tuple[str, str], FiringTally] = {}
        self.dense: dict[str, DenseTally] = {}
        self.converted: set[str] = set()
        self._running: list[str] = []  # modules with weights, the innermost last
        self._integers: dict[str, Weights | None] = {}
        # Between the scores of an attention and its context, what has the shape of the scores has their mask.
        self._visible: Tensor | None = None
        self._linears = 0

    def __call__(self, event: Product | Firing) -> None:
        """Count one event."""
        if isinstance(event, Firing):
            self._firing(event)
        elif isinstance(event, Product):
            self._product(event)

    def _mask(self, shape: torch.Size) -> Tensor | None:
        return self._visible if self._visible is not None and self._visible.shape == shape else None

    def _streams(self, train: SpikeTrain) -> bool:
        """Whether the train is of one step, of a network whose steps are rows of the batch."""
        return bool(self.steps) and train.coding == Thermometer(1)

    def _firing(self, event: Firing) -> None:
        if self.attentions.relays(event.site):
            return
        tally = self.firings.setdefault((event.site, event.function), FiringTally(event.site, event.function))
        streams = self._streams(event.train)
        visible = self._mask(event.train.shape)
        rows = self.attentions.steps(event.site)
        spikes = total(tally.sent.add(event.train, visible, rows or (self.steps if streams else 1)))
        parts = parts_of(event.train, visible)
        tally.comparisons += comparisons(event.train, parts, spikes)
        if rows:
            self.attentions.firing(tally, event, spikes)
            return
        # A spike is subtracted from the potential; where the output is a function of it, it is added there. What a
        # streaming neuron receives is no window's sum yet: each step's input is added to the potential.
        tally.additions += spikes if event.function == "identity" else 2 * spikes
        tally.additions += sum(parts) if streams else 0
        tally.saturated += int(event.saturated)
        if event.site in self._rotating:  # by butterflies: log2 of the matrix's size, for each element
            tally.rotations += event.train.codes.numel() * (block(event.train.shape[-1]).bit_length() - 1)

    def _product(self, event: Product) -> None:
        tally = self.products.setdefault((event.site, event.kind), ProductTally(event.site, event.kind))
        if event.kind in KINDS:
            self.attentions.product(tally, event)
            return
        tally.operands = tally.operands or [Population() for _ in event.operands]
        fan_outs, macs = self._reach(event)
        rows = self.steps if all(self._streams(train) for train in event.operands) else 1
        weights = self._weights() if tally.converted else None
        tally.macs += macs // rows
        for position, (train, population) in enumerate(zip(event.operands, tally.operands, strict=True)):
            # Hidden elements of the probabilities, and of the factors of the softmax, do not exist.
            first = event.kind == "matmul" and position == 0
            visible = self._mask(train.shape) if first or event.kind == "hadamard" else None
            count = population.add(train, visible, rows)
            adds = additions(train, count)
            reached = total(count * fan_outs[position])
            tally.accumulations += reached
            tally.level_additions += total(adds * fan_outs[position]) - reached
            # A learned step weight is no shift: it multiplies what the spike adds.
            tally.scalings += reached if isinstance(train.coding, FewSpikePattern) else 0
            if event.kind == "linear":
                count_linear(tally, train, count, event.fan_out[0], macs // rows, rows, weights)
            elif event.kind == "weights":
                count_weights(tally, train, macs, weights)
            else:
                tally.running_sums += total(adds)
            if event.kind != "weights":
                count_units(tally, train, self._outputs(event), weights)
        if event.kind == "matmul":  # a zero is taken off with the other train's sum
            a, b = event.operands
            tally.corrections += b.codes.numel() * biased(a) + a.codes.numel() * biased(b)
        if event.sent is not None:
            tally.sent = (tally.sent or 0) + sum(int(sent) for sent in event.sent)
        if tally.converted:
            self._linears += 1
        elif event.kind == "matmul":
            self._visible = self._wanted(event)

    @staticmethod
    def _wanted(event: Product) -> Tensor | None:
        if event.mask is None:
            return None
        outputs = (*event.operands[0].shape[:-1], event.fan_out[0])
        return event.mask.expand(outputs)

    def _reach(self, event: Product) -> tuple[list[int | Tensor], int]:
        """Additions that one spike of each operand causes (a number, or one for each element), and MACs."""
        wanted = self._wanted(event)
        if event.kind == "matmul" and wanted is not None:
            # wanted [..., M, N]: a spike of A's row m reaches its wanted columns, one of B's column n its
            # rows.
            rows = wanted.sum(-2).unsqueeze(-1 if event.transposed else -2)
            return [wanted.sum(-1, keepdim=True), rows], total(wanted) * event.operands[0].shape[-1]
        if event.kind == "matmul" and (visible := self._mask(event.operands[0].shape)) is not None:
            # Hidden elements of A [..., M, K] are silent for good: a spike of B's row k reaches who sees k.
            seen = visible.sum(-2).unsqueeze(-2 if event.transposed else -1)
            return [event.fan_out[0], seen], total(visible) * event.fan_out[0]
        if event.kind == "hadamard":
            shape = torch.broadcast_shapes(*(train.shape for train in event.operands))
            if (visible := self._mask(shape)) is not None:
                return [visible.long().sum_to_size(train.shape) for train in event.operands], total(visible)
        return list(event.fan_out), event.macs

    def _outputs(self, event: Product) -> int:
        """Sums that leave the synapse, those that a mask hides left out."""
        wanted = self._wanted(event)
        first = event.operands[0]
        if event.kind == "hadamard":
            return event.macs
        return first.codes.numel() // first.shape[-1] * event.fan_out[0] if wanted is None else total(wanted)

    def _weights(self) -> Weights | None:
        """Integers of the layer that runs; None where its weights are real."""
        return self._integers[self._running[-1]] if self._running else None

    @contextmanager
    def watch(self, model: nn.Module) -> Iterator[None]:
        """Count events and, by hooks, what modules do in real numbers.

        That is: linear layers that run without a spike (MACs), biases (additions), norm gains
        (multiplications); what a state-space mixer reads itself (:mod:`spikeform.energy.mixers`); and, if asked for,
        attention, gated products and scans.
        """
        handles = real_hooks(self.real, model) if self._wants_real else []
        handles += mixer_hooks(self.dense, self.real if self._wants_real else None, model)
        self.attentions.know(model)
        self._rotating = {m.site for m in model.modules() if isinstance(m, SignedInteger) and m.rotates}
        elsewhere = unheard(model)
        for name, module in model.named_modules():
            weight, bias = (getattr(module, key, None) for key in ("weight", "bias"))
            if isinstance(weight, Tensor) and not isinstance(module, nn.Embedding) and name not in elsewhere:
                handles += self._hook(name, module, weight, bias)
        try:
            with observe(self):
                yield
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, name: str, module: nn.Module, weight: Tensor, bias: Tensor | None) -> list:
        seen: list[int] = []

        if isinstance(module, SpikingLinear):
            self.converted.add(name)
        self._integers[name] = weights_of(module)

        def before(_module, _args) -> None:
            seen.append(self._linears)
            self._running.append(name)

        def after(_module, _args, output) -> None:
            self._running.pop()
            spiking = self._linears > seen.pop()
            out = output if isinstance(output, Tensor) else output[0]
            tally = self.dense.setdefault(name, DenseTally(name, type(module).__name__))
            if weight.ndim == 1:
                tally.multiplications += out.numel()
            elif not spiking:
                tally.macs += out.numel() * (weight.numel() // out.shape[-1])
                tally.weights += weight.numel()
            if bias is not None:
                tally.additions += out.numel()

        # Before all other hooks: those of a streaming network repeat what was computed once.
        return [module.register_forward_pre_hook(before), module.register_forward_hook(after, prepend=True)]
