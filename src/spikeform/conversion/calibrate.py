"""Thresholds from data, block by block, resumable.

Each block is calibrated on what the already spiking blocks before it send, so errors are seen, not hidden; only
one block's statistics are held. A finished block is written to the work folder before the next begins.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from spikeform.conversion.blocks import Block, Store, capture
from spikeform.conversion.histogram import Histogram
from spikeform.conversion.kinds import blocks
from spikeform.errors import CalibrationError
from spikeform.neurons import Neuron, ThresholdNeuron, recording

Progress = Callable[[int, int], None]


class Statistics:
    """Collects a histogram per neuron; give it to :func:`spikeform.neurons.recording`."""

    def __init__(self) -> None:
        self.seen: dict[ThresholdNeuron, Histogram] = {}

    def __call__(self, neuron: Neuron, x: Tensor) -> None:
        """Record one input ``x``: ``[..., C]``, or ``[B, G, S, E]`` with channels (G, E)."""
        if not isinstance(neuron, ThresholdNeuron):
            return
        if not neuron.statistics_per_channel:
            shape, channels = (1,), x.reshape(1, -1)
        elif x.ndim == 4:
            shape = (x.shape[1], 1, x.shape[3])
            channels = x.permute(1, 3, 0, 2).reshape(x.shape[1] * x.shape[3], -1)
        else:
            shape = (x.shape[-1],)
            channels = x.reshape(-1, x.shape[-1]).T
        found = Histogram.of(channels, shape)
        if neuron in self.seen:
            self.seen[neuron].add(found)
        else:
            self.seen[neuron] = found


def calibrate(
    model: PreTrainedModel,
    batches: list[Tensor],
    fit: Callable[[Any, Histogram], float],
    workdir: str | Path | None = None,
    fingerprint: Any = None,
    progress: Progress | None = None,
) -> dict[str, float]:
    """Set the threshold of every uncalibrated neuron of ``model``.

    Args:
        model: Prepared (spiking layers in place).
        batches: Token ids ``[N, L]`` each.
        fit: Sets one neuron's threshold from its histogram; returns the share of inputs it saturates.
        workdir: Folder for finished blocks; a later call with the same model, data and config resumes there.
        fingerprint: What, with the data, must be equal for a resume (the config).
        progress: Called with ``(blocks done, blocks)``.

    Returns:
        Saturated share per site, where not zero.

    Raises:
        CalibrationError: A neuron saw no input, or the work folder belongs to another run.
    """
    store = Store(workdir, batches, fingerprint, model) if workdir is not None else None
    saturation: dict[str, float] = {}

    def settle(statistics: Statistics) -> None:
        for neuron, histogram in statistics.seen.items():
            if not neuron.calibrated:
                share = fit(neuron, histogram)
                if share > 0:
                    saturation[neuron.site] = share

    training = model.training
    model.eval()
    with torch.no_grad():
        found = [Block(name, module, []) for name, module in blocks(model)]
        inside = {n for block in found for n in block.module.modules() if isinstance(n, ThresholdNeuron)}
        outside = Statistics()
        # Kept in the host's memory: what a device holds beside the model is one window's activations.
        hidden = capture(model, batches, found, lambda n, x: None if n in inside else outside(n, x), "cpu")
        settle(outside)
        for index, block in enumerate(found):
            kept = store.restore(index) if store is not None else None
            if kept is None:
                statistics = Statistics()
                with recording(statistics):
                    for x, call in zip(hidden, block.calls, strict=True):
                        block.run(x, call)
                before = dict(saturation)
                settle(statistics)
                if store is not None:
                    store.save(index, _thresholds(block), {k: v for k, v in saturation.items() if k not in before})
            else:
                _put_back(block, kept[0])
                saturation.update(kept[1])
            for i, call in enumerate(block.calls):
                hidden[i] = block.run(hidden[i], call)
            if progress is not None:
                progress(index + 1, len(found))
    model.train(training)
    silent = [n.site for n in model.modules() if isinstance(n, ThresholdNeuron) and not n.calibrated]
    if silent:
        raise CalibrationError(
            f"{len(silent)} sites saw no calibration input, e.g. {silent[0]}; leave them dense (skip) or give their "
            "thresholds"
        )
    return saturation


def _thresholds(block: Block) -> dict[str, Tensor]:
    """Everything that the block's neurons hold."""
    return {
        f"{name}.{key}": tensor
        for name, neuron in block.module.named_modules()
        if isinstance(neuron, ThresholdNeuron)
        for key, tensor in neuron.state_dict().items()
    }


def _put_back(block: Block, tensors: dict[str, Tensor]) -> None:
    for name, neuron in block.module.named_modules():
        if isinstance(neuron, ThresholdNeuron):
            neuron.load_state_dict({key: tensors[f"{name}.{key}"] for key in neuron.state_dict()})
