"""What calibration sees in one block: Gram matrices and peaks of every linear layer's input, and of queries and keys.

Channels are counted by the layer that reads them. Layers that are called with the same tensor share its Gram.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from spikeform.conversion.blocks import Block
from spikeform.errors import CalibrationError
from spikeform.layers import SpikingAttention, SpikingLinear
from spikeform.methods.spikellm import saliency
from spikeform.neurons import Neuron, recording


@dataclass
class Inputs:
    """One input, and the layers that read it.

    Attributes:
        readers: Their names, in the order in which they run.
        gram: ``X^T X`` summed over all positions, fp64 ``[K, K]``.
        peaks: Largest magnitude of each channel, ``[K]``.
        drive: Magnitude over the range of its token, summed over all positions, ``[K]``.
        tokens: Positions in ``gram``.
    """

    readers: list[str]
    gram: Tensor
    peaks: Tensor
    drive: Tensor
    tokens: int = 0

    def add(self, x: Tensor) -> None:
        """Count one batch ``[..., K]``."""
        flat = x.reshape(-1, x.shape[-1])
        wide = flat.double()
        self.gram += wide.T @ wide
        self.peaks = torch.maximum(self.peaks, flat.abs().amax(0).float())
        low, high = wide.aminmax(dim=-1, keepdim=True)
        span = high.clamp(min=0) - low.clamp(max=0)
        self.drive += (wide.abs() / span.clamp(min=1e-30)).sum(0)
        self.tokens += len(flat)


@dataclass
class Heads:
    """Of one attention layer: score sums and ranges of keys and values per channel.

    Attributes:
        key: Saliency of each key channel times positions, ``[G, E]``, and without interaction of channels.
        peaks: Largest magnitude of each channel, ``key`` and ``value``, ``[G, E]``.
        low: Least key of each channel, ``[G, E]``; ``high`` the largest.
        tokens: Key positions.
        squares: Squared output summed over positions, of each query head, ``[H, E]``.
        outputs: Positions in ``squares``.
    """

    key: Tensor | None = None
    key_diagonal: Tensor | None = None
    peaks: dict[str, Tensor] = field(default_factory=dict)
    low: Tensor | None = None
    high: Tensor | None = None
    tokens: int = 0
    squares: Tensor | None = None
    outputs: int = 0
    query: Tensor | None = None  # Q^T Q of the batch under way

    def see(self, role: str, x: Tensor) -> None:
        """Count what the neuron of ``role`` received, ``[B, G, S, E]``."""
        if role == "query":  # encoded before the keys
            self.query = _grams(x)
            return
        peak = x.abs().amax((0, 2)).float()
        self.peaks[role] = torch.maximum(self.peaks.get(role, peak), peak)
        if role == "value" or self.query is None:
            return
        grams, positions = _grams(x), x.shape[0] * x.shape[2]
        scores = [saliency.key(self.query, grams, positions, interact=i) * positions for i in (True, False)]
        self.key, self.key_diagonal = (
            new if old is None else old + new for old, new in zip((self.key, self.key_diagonal), scores, strict=True)
        )
        low, high = x.amin((0, 2)).float(), x.amax((0, 2)).float()
        self.low = low if self.low is None else torch.minimum(self.low, low)
        self.high = high if self.high is None else torch.maximum(self.high, high)
        self.tokens += positions

    def ends(self) -> tuple[Tensor, Tensor]:
        """Least and largest key of each channel, ``[G, E]``; keys must have been seen."""
        assert self.low is not None
        assert self.high is not None
        return self.low, self.high

    def answer(self, context: Tensor) -> None:
        """Count one output of the attention, ``[B, L, H, E]``."""
        squares = context.double().square().sum((0, 1))
        self.squares = squares if self.squares is None else self.squares + squares
        self.outputs += context.shape[0] * context.shape[1]


def _grams(x: Tensor) -> Tensor:
    wide = x.double()
    return wide.transpose(-1, -2) @ wide


class Statistics:
    """Collects both kinds while :meth:`watch` is open.

    Args:
        block: The block, its neurons not yet calibrated or already so; either way inputs are seen as they come.
        name: Its qualified name.
        only: Names of the linear layers to watch; None: all.
    """

    def __init__(self, block: nn.Module, name: str, only: list[str] | None = None) -> None:
        self.layers = {
            f"{name}.{child}": layer
            for child, layer in block.named_modules()
            if isinstance(layer, SpikingLinear) and (only is None or f"{name}.{child}" in only)
        }
        self.attentions = {f"{name}.{n}": m for n, m in block.named_modules() if isinstance(m, SpikingAttention)}
        self.heads = {child: Heads() for child in self.attentions}
        self._roles: dict[Neuron, tuple[str, str]] = {}
        for child, attention in self.attentions.items():
            for role in ("query", "key", "value"):
                self._roles[getattr(attention, role)] = (child, role)
        self.inputs: dict[str, Inputs] = {}
        self.outputs: list[Tensor] = []  # what the block sent meanwhile
        self._now: tuple[Tensor, Inputs] | None = None

    @classmethod
    def of(cls, block: Block, hidden: list[Tensor], only: list[str] | None = None) -> Statistics:
        """What ``block`` sees when it runs on ``hidden``."""
        statistics = cls(block.module, block.name, only)
        with statistics.watch():
            statistics.outputs = block.run_all(hidden)
        return statistics

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Count what comes in; uncalibrated neurons pass it on unchanged.

        Raises:
            CalibrationError: A layer was given nothing.
        """
        handles = [layer.register_forward_pre_hook(self._hook(name)) for name, layer in self.layers.items()]
        for name, attention in self.attentions.items():
            answer = self.heads[name].answer
            handles.append(attention.register_forward_hook(lambda _m, _args, out, answer=answer: answer(out)))
        try:
            with recording(self._record):
                yield
        finally:
            self._now = None
            for handle in handles:
                handle.remove()
        unseen = [name for name in self.layers if name not in self.inputs]
        if unseen:
            raise CalibrationError(f"{unseen[0]} saw no calibration input; leave it dense (skip)")

    def _hook(self, name: str):
        def hook(_module: nn.Module, args: tuple) -> None:
            x = args[0].detach()
            if self._now is not None and self._now[0] is args[0]:
                found = self._now[1]  # the layer before read the very same tensor
                if name not in found.readers:
                    found.readers.append(name)
                    self.inputs[name] = found
                return
            if name not in self.inputs:
                width = x.shape[-1]
                gram = torch.zeros(width, width, dtype=torch.float64, device=x.device)
                self.inputs[name] = Inputs([name], gram, x.new_zeros(width).float(), gram.new_zeros(width))
            self.inputs[name].add(x)
            self._now = (args[0], self.inputs[name])

        return hook

    def _record(self, neuron: Neuron, x: Tensor) -> None:
        if neuron in self._roles:
            attention, role = self._roles[neuron]
            self.heads[attention].see(role, x)

    def groups(self) -> list[Inputs]:
        """Every input once, in the order in which the block comes to them."""
        found: list[Inputs] = []
        for inputs in self.inputs.values():
            if not any(inputs is f for f in found):
                found.append(inputs)
        return found


def relative_error(out: list[Tensor], target: list[Tensor], before: list[Tensor]) -> float:
    """Squared error of a block's output over the mean square of what it should add to its input ``before``."""
    error = sum(float((o - t).double().square().sum()) for o, t in zip(out, target, strict=True))
    return error / max(sum(float((t - b).double().square().sum()) for t, b in zip(target, before, strict=True)), 1e-30)
