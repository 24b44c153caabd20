"""What the neurons begin with: thresholds of feed-forward blocks, then gains of attention, on the dense stream."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from spikeform.conversion.blocks import Block, capture
from spikeform.conversion.calibrate import Progress
from spikeform.conversion.calibrate import calibrate as find_thresholds
from spikeform.conversion.histogram import Histogram
from spikeform.conversion.kinds import blocks
from spikeform.errors import CalibrationError
from spikeform.layers.self_attention import SpikingSelfAttention
from spikeform.methods.neutransformer.config import NeuTransformer
from spikeform.neurons import SignedInteger, unseen
from spikeform.neurons.lif import LIF

SAMPLE = 1 << 16  # inputs of a head that its gain is found on
OCTAVES, PER_OCTAVE = 24, 8  # gains that are tried


def calibrate(
    model: PreTrainedModel,
    batches: list[Tensor],
    config: NeuTransformer,
    workdir: str | Path | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Thresholds of the feed-forward neurons block by block, then the gains of every attention layer.

    Attention stays dense meanwhile: before it is fine-tuned, what spiking attention passes on is no stream to fit
    anything to.

    Returns:
        Facts for the report: the mean firing rate that each kind of neuron begins with.
    """
    layers = {m for m in model.modules() if isinstance(m, SpikingSelfAttention)}
    with _paused(layers):
        saturation: dict[str, float] = {}
        if any(isinstance(m, SignedInteger) and not m.calibrated for m in model.modules()):
            saturation = find_thresholds(
                model, batches, lambda n, h: fit(n, h, config), workdir, config.to_dict(), progress
            )
        rates = _gains(model, batches, config.rate)
    return {"saturation": saturation, "rates": rates}


def fit(neuron: SignedInteger, histogram: Histogram, config: NeuTransformer) -> float:
    """Set a feed-forward neuron's threshold; returns the share of inputs beyond its largest code.

    Raises:
        CalibrationError: The inputs are not finite.
    """
    if not bool(histogram.peak.isfinite().all()):
        raise CalibrationError(f"{neuron.site}: the dense model's activations are not finite on the calibration data")
    merged = histogram.merged()
    if config.balance == "mse":
        top = float(merged.least_error(neuron.steps, per_octave=16))
    else:
        reached = merged.counts[0].cumsum(0) >= config.percentile * merged.counts.sum()
        top = float(Histogram.edges()[int(reached.nonzero()[0])]) if float(merged.counts.sum()) else 1.0
    neuron.set_threshold(top / neuron.steps)
    counts = merged.counts[0]
    total = float(counts.sum())
    return float(counts[Histogram.magnitudes() > top].sum()) / total if total else 0.0


@contextmanager
def _paused(layers: set[SpikingSelfAttention]) -> Iterator[None]:
    for layer in layers:
        layer.paused = True
    try:
        yield
    finally:
        for layer in layers:
            layer.paused = False


@torch.no_grad()
def _gains(model: PreTrainedModel, batches: list[Tensor], rate: float) -> dict[str, float]:
    """Gains of the neurons of attention, from what they receive where all before them is dense."""
    found = [Block(name, module, []) for name, module in blocks(model)]
    training = model.training
    model.eval()
    hidden = capture(model, batches, found, unseen)
    rates: dict[str, list[float]] = {}
    for block in found:
        layers = [m for m in block.module.modules() if isinstance(m, SpikingSelfAttention)]
        after = block.run_all(hidden)
        for layer in layers:
            layer.paused = False
            for part in (("query", "key", "value"), ("output",)):  # the output's current depends on the others
                with _heard([getattr(layer, name) for name in part]) as currents:
                    block.run_all(hidden)
                for name in part:
                    neuron = getattr(layer, name)
                    rates.setdefault(name, []).append(set_gain(neuron, torch.cat(currents[neuron], 1), rate))
            layer.paused = True
        hidden = after
    model.train(training)
    return {name: sum(values) / len(values) for name, values in rates.items()}


@contextmanager
def _heard(neurons: list[LIF]) -> Iterator[dict[LIF, list[Tensor]]]:
    """What the neurons receive: some of it, ``[H, N]``, by head."""
    currents: dict[LIF, list[Tensor]] = {neuron: [] for neuron in neurons}

    def hook(neuron: nn.Module, args: tuple) -> None:
        by_head = args[0].detach().float().transpose(0, -3).flatten(1)
        stride = max(by_head.shape[1] // (SAMPLE // 16), 1)
        currents[neuron].append(by_head[:, ::stride])  # type: ignore[index]

    handles = [neuron.register_forward_pre_hook(hook) for neuron in neurons]
    try:
        yield currents
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def set_gain(neuron: LIF, current_HN: Tensor, rate: float) -> float:
    """Give each head the least gain at which its mean rate on these currents reaches ``rate``.

    Currents count as constant in time. Where no gain reaches the rate (few currents are positive), the one whose rate
    is nearest is taken.

    Returns:
        The mean rate over the heads that this gives.
    """
    least = neuron.threshold / current_HN.abs().amax(1).clamp(min=2.0**-20)  # hardly any neuron fires
    tried = 2.0 ** (torch.arange(OCTAVES * PER_OCTAVE, device=current_HN.device) / PER_OCTAVE)
    rates = torch.stack([neuron.rate(current_HN * (least * t)[:, None]).mean(1) for t in tried.tolist()], 1)
    reached = (rates >= rate).int()
    first = torch.where(reached.any(1), reached.argmax(1), (rates - rate).abs().argmin(1))
    neuron.gain.copy_(least * tried[first])
    return float(rates.gather(1, first[:, None]).mean())
