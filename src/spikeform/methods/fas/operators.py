"""Few-spike operators for what streaming neurons leave real: softmax, norms, and the products of attention.

They are LAS's neurons (arXiv 2505.09659), each firing in a window of its own within every step of every stream. No
gradient passes them, so they come last: after training and calibration.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from spikeform.conversion import ConversionReport
from spikeform.conversion.calibrate import calibrate
from spikeform.conversion.histogram import Histogram
from spikeform.conversion.kinds import blocks, walk
from spikeform.conversion.quantizer import attach
from spikeform.errors import ConfigError
from spikeform.layers import SpikingNorm
from spikeform.layers.streaming import clock_of, paused, share
from spikeform.methods import las
from spikeform.methods.fas.config import FAS
from spikeform.neurons import MT

_OPERATED = ("norm", "attention")


def _las(config: FAS, own: list[str]) -> las.LAS:
    return las.LAS(steps=config.operators or 1, activations=False, skip=(*config.skip, *own))


def put_in(model: PreTrainedModel, config: FAS, report: ConversionReport) -> None:
    """Replace norms and the inside of attention, thresholds not yet set; their rows change in the report."""
    own = [name for name, _, kind in walk(model) if kind in ("linear", "activation", "gated_mlp")]
    rows = {row.name: row for row in las.prepare(model, _las(config, own)).rows}
    report.rows = [rows[row.name] if row.kind in _OPERATED else row for row in report.rows]


def fit(neuron: MT, histogram: Histogram, config: FAS) -> float:
    """Set the threshold of one of their neurons; returns the share of its inputs above it."""
    return las.fit(neuron, histogram, _las(config, []))


def add(model: PreTrainedModel, steps: int, batches: list[Tensor]) -> None:
    """Put operators into a model that was converted without them, in place.

    Args:
        model: Converted with FAS.
        steps: Of each operator's window, 1 to 16.
        batches: Token ids ``[N, L]`` each, on which thresholds are found.

    Raises:
        ConfigError: It has operators, or ``steps`` is out of range.
    """
    old: FAS = model.config.quantization_config
    if old.operators is not None:
        raise ConfigError(f"the model has operators of {old.operators} steps: convert the dense model for others")
    config, clock = replace(old, operators=steps), clock_of(model)
    report: Any = model.spikeform_report
    put_in(model, config, report)
    first, _ = blocks(model)[0]
    if old.sites != "all" and clock is not None:
        for module in model.get_submodule(first).modules():
            if isinstance(module, SpikingNorm):
                share(module, clock)
    with paused(model):
        report.saturation |= calibrate(model, batches, lambda n, h: fit(n, h, config))
    attach(model, config, report)
