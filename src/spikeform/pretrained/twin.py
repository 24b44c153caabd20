"""The outlier twin of a model: the same function, with activation outliers built in.

Large language models have a few activation channels that are 10 to 1000 times larger than the others, and
spike codings differ most in how they bear them. Small models lack such channels. `outlier_twin` builds them
in, by rescaling chosen channels between a producer and its consumers:

    norm          gain (and bias) of a norm x s     input columns of all its consumers / s
    value         rows of the value projection x s  matching columns of the output projection / s
    feed_forward  rows of the up projection x s     matching columns of the down projection / s

The last holds where what lies between is linear in the scaled channel: a gated unit (SwiGLU, GeGLU), or a
ReLU, which is positively homogeneous. GELU is neither, so the plain GELU networks (GPT-2, GPT-NeoX, Phi,
BERT) have no feed_forward pair. Where the norm also feeds the residual stream (post-norm: BERT) or the
result of the model, or a head tied to the input embedding, there is no norm pair.

Powers of two only change exponents, so with the default factors every product and every sum of the twin
rounds as the model's own does: its outputs are equal bit by bit where the same kernels run. The exception
is Gemma, whose norm multiplies by 1 + weight: there the stored weight is rounded once.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from spikeform.conversion.pairs import pairs
from spikeform.conversion.parts import FAMILIES, Part, family_name, is_conv1d

KINDS = ("norm", "value", "feed_forward")


@dataclass(frozen=True)
class ScaledPair:
    """What was rescaled between one producer and its consumers.

    Attributes:
        kind: "norm", "value" or "feed_forward".
        producer: Name of the module whose output channels grew.
        consumers: Names of the modules whose input columns shrank.
        factors: Input channel of the consumers -> factor by which it grew.
    """

    kind: str
    producer: str
    consumers: tuple[str, ...]
    factors: dict[int, float]


def outlier_twin(
    model: nn.Module,
    scales: Sequence[float] = (16.0, 128.0, 1024.0),
    channels: int = 3,
    seed: int = 0,
    kinds: Sequence[str] = KINDS,
) -> nn.Module:
    """Returns a copy of a dense model that computes the same and has outlier channels.

    Norm pairs of one width share their channels in all layers, as the outliers of large models do; the other
    pairs draw their own.

    Args:
        model: A dense Hugging Face model of a supported family. It is left as it is.
        scales: The factors, dealt to the channels in turn. Powers of two keep the function bit by bit; any
            other positive number keeps it up to rounding.
        channels: How many channels of each pair are rescaled.
        seed: Of the draw of the channels.
        kinds: Which kinds of pairs to use.

    Returns:
        The twin. Its attribute `outlier_pairs`, a tuple of `ScaledPair`, says which channels got which
        factor.

    Raises:
        ValueError: If the architecture is not supported, or none of `kinds` exists in it.
    """
    if not scales or any(not math.isfinite(s) or s <= 0 for s in scales):
        raise ValueError(f"scales must be finite and positive, not {tuple(scales)}")
    if channels < 1:
        raise ValueError(f"channels must be at least 1, not {channels}")
    if unknown := set(kinds) - set(KINDS):
        raise ValueError(f"unknown kinds {sorted(unknown)}: choose from {', '.join(KINDS)}")
    family = family_name(model)
    if family not in FAMILIES:
        raise ValueError(f"no outlier twin for {family!r}: supported are {', '.join(sorted(FAMILIES))}")
    offset = FAMILIES[family].gain_offset
    if offset and "norm" in kinds and next(model.parameters()).dtype != torch.float32:
        raise ValueError("Gemma's norms multiply by 1 + weight, which rescales in float32 only: use model.float()")

    twin: Part = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    shared: dict[int, list[int]] = {}
    done: list[ScaledPair] = []
    for pair in pairs(twin):
        if pair.kind not in kinds:
            continue
        width = len(pair.rows)
        if pair.kind == "norm" and width in shared:
            drawn = shared[width]
        else:
            drawn = torch.randperm(width, generator=generator)[:channels].tolist()
            if pair.kind == "norm":
                shared[width] = drawn
        factors: dict[int, float] = {}
        for turn, channel in enumerate(drawn):
            factor = float(scales[turn % len(scales)])
            for row in pair.rows[channel]:
                _scale_output(pair.producer, row, factor, offset)
            for consumer in pair.consumers:
                _divide_input(consumer, list(pair.columns[channel]), factor)
            factors |= dict.fromkeys(pair.columns[channel], factor)
        done.append(ScaledPair(pair.kind, pair.producer_name, pair.consumer_names, factors))
    if not done:
        raise ValueError(f"{type(model).__name__} has no pair of the kinds {', '.join(kinds)} to rescale")
    twin.outlier_pairs = tuple(done)
    return twin


@torch.no_grad()
def _scale_output(module: Part, row: int, factor: float, offset: float) -> None:
    """Multiplies one output channel of a norm or of a linear layer."""
    if is_conv1d(module):
        module.weight[:, row] *= factor
    elif module.weight.ndim == 1:
        module.weight[row] = (module.weight[row] + offset) * factor - offset
    else:
        module.weight[row] *= factor
    if getattr(module, "bias", None) is not None:
        module.bias[row] *= factor


@torch.no_grad()
def _divide_input(module: Part, columns: list[int], factor: float) -> None:
    """Divides input columns of a linear layer."""
    if is_conv1d(module):
        module.weight[columns] /= factor
    else:
        module.weight[:, columns] /= factor
