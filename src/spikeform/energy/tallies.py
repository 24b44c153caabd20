"""What is summed while a network runs: one tally a product, a neuron population, and a module left real."""

from __future__ import annotations

from collections import Counter as Histogram
from dataclasses import dataclass, field

import torch
from torch import Tensor

from spikeform.energy.codings import activation_bits, parts_of, sending_steps, step_bits, tiers_of, wire_bits
from spikeform.spikes import Burst, Coding, SpikeTrain, Thermometer


@dataclass
class Population:
    """Sums over one train seen at one place: an operand of a product, or what a neuron sent.

    ``rows`` of the batch are one window: T where a streaming network's trains pass, else 1. ``parts`` are the elements
    of each tier. A slot is a step of an element, of a burst each spike that the step has room for.
    """

    coding: Coding | None = None
    rows: int = 1
    signed: bool = False
    elements: int = 0
    slots: int = 0
    spikes: int = 0
    wire_bits: int = 0
    parts: tuple[int, ...] = ()

    @property
    def bits(self) -> int | float:
        """Activation width of the quantised rival."""
        return self.bits_in(self.rows) if self.rows > 1 else self.bits_in(None)

    def bits_in(self, steps: int | None) -> int | float:
        """The same where a rate code has ``steps`` steps instead of its own; other codings keep theirs.

        Where tiers of channels differ in width it is the mean over the elements.
        """
        widths = [self.tier_bits(tier, steps) for tier in range(max(len(self.parts), 1))]
        used = [width for width, n in zip(widths, self.parts, strict=False) if n] or widths[:1]
        if len(set(used)) == 1:
            return used[0]
        return sum(width * n for width, n in zip(widths, self.parts, strict=True)) / sum(self.parts)

    def tier_bits(self, tier: int, steps: int | None) -> int:
        """Width of one tier's elements; the arguments are those of :meth:`bits_in`."""
        if steps and isinstance(self.coding, Thermometer):
            return step_bits(steps, self.signed)
        return activation_bits(self.coding, self.signed, tier) if self.coding is not None else 1

    def add(self, train: SpikeTrain, visible: Tensor | None = None, rows: int = 1) -> Tensor:
        """Count one train and return ``train.count()``; ``visible`` (bool): elements that exist."""
        count = train.count()
        parts, spikes = parts_of(train, visible), total(count)
        self.coding, self.rows = train.coding, rows
        self.signed = self.signed or bool((train.codes < 0).any())
        self.elements += sum(parts) // rows
        self.parts = tuple(a + b for a, b in zip(self.parts or (0,) * len(parts), parts, strict=True))
        room = train.coding.levels if isinstance(train.coding, Burst) else 1
        self.slots += sum(n * steps for n, steps in zip(parts, tiers_of(train.coding), strict=True)) * room
        self.spikes += spikes
        sending = total(sending_steps(train, count)) if isinstance(train.coding, Burst) else None
        self.wire_bits += wire_bits(train, parts, spikes, self.signed, sending)
        return count


@dataclass
class ProductTally:
    """One product's sums over all its calls. A weight row is what a spike of one input channel adds.

    Attributes:
        site: Where.
        kind: ``linear``, ``weights`` (real input, the weights are the spikes), ``matmul``, ``hadamard``, or of spiking
            self-attention, both products in one, ``attention`` (quadratic) or ``recurrence``.
        operands: The trains, in the order of the product.
        macs: Of the same product in a dense network.
        accumulations: Additions that spikes cause at their targets.
        level_additions: Further ones of spikes of several levels.
        scalings: Multiplications by learned step weights.
        running_sums: Additions to the running sums of a product of two trains.
        corrections: Additions of the bias current where real zero is no silence (``train.zero``).
        rescales: Multiplications by units that are known only when a row is: of the row, and of an integer weight's.
        row_size: Weights in a row.
        rows: Weight rows of all calls.
        rows_fetched: Those whose channel spikes in the call.
        rows_read: The same, once in every step in which the channel spikes.
        stored: Whether weights are integers, with bits of their own.
        bits: Bits of the weights, their scales included, of all calls.
        bits_fetched: As ``rows_fetched``.
        bits_read: As ``rows_read``.
        inputs: Real activations that a product of spiking weights reads.
        widths: MACs by (tier of the activations, None where real; bits of the weight, None where real).
        ace: Bits of the weight x bits of the activation, each in all its steps, summed over the MACs.
        one_step: The same, were all of one step.
        sent: Spikes that the executor sent, where it says so.
    """

    site: str
    kind: str
    operands: list[Population] = field(default_factory=list)
    macs: int = 0
    accumulations: int = 0
    level_additions: int = 0
    scalings: int = 0
    running_sums: int = 0
    corrections: int = 0
    rescales: int = 0
    row_size: int = 0
    rows: int = 0
    rows_fetched: int = 0
    rows_read: int = 0
    stored: bool = False
    bits: int = 0
    bits_fetched: int = 0
    bits_read: int = 0
    inputs: int = 0
    widths: Histogram[tuple[int | None, int | None]] = field(default_factory=Histogram)
    ace: int = 0
    one_step: int = 0
    sent: int | None = None

    @property
    def converted(self) -> bool:
        """Whether it is the product of a linear layer."""
        return self.kind in ("linear", "weights")

    @property
    def windowed(self) -> bool:
        """Whether it is one of two trains whose running sums are kept from step to step."""
        return self.kind in ("matmul", "hadamard")


@dataclass
class FiringTally:
    """One neuron population's sums over all its calls; ``rotations``: additions that turn its input beforehand."""

    site: str
    function: str
    sent: Population = field(default_factory=Population)
    comparisons: int = 0
    additions: int = 0
    multiplications: int = 0
    rotations: int = 0
    saturated: int = 0


@dataclass
class DenseTally:
    """What a module does in real numbers, the same in all three networks."""

    site: str
    kind: str
    macs: int = 0
    multiplications: int = 0
    additions: int = 0
    weights: int = 0


def total(values: Tensor) -> int:
    """Sum of integers as a Python integer."""
    return int(values.sum(dtype=torch.int64))
