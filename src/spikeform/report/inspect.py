"""Which neuron sits where: one row a neuron, and one for each module that was left as it was."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from spikeform.errors import SpikeformError
from spikeform.layers import CodedLinear
from spikeform.neurons import GIF, Neuron, SignedInteger, StreamingNeuron
from spikeform.neurons.lif import LIF
from spikeform.report.weights import weight_row


def inspect(model: nn.Module) -> list[dict[str, Any]]:
    """Neurons of a converted model, in the order of its modules, then what stayed dense and why.

    Args:
        model: A converted model.

    Returns:
        Rows with keys ``site``, ``layer`` (class of the module that owns the neuron), ``neuron`` (class, None
        where dense), ``steps``, ``coding``, ``window`` (time steps in which spikes travel), ``thresholds``
        (smallest first), ``function`` (``identity`` unless the neuron computes one), ``reason`` (of what is
        dense). A streaming neuron's ``steps`` are the model's (0: the QCFS network), and it has ``levels``,
        ``signed``, and the ranges ``[least, largest]`` of ``scale`` and ``initial``: its firing threshold is
        ``threshold * scale``, its initial potential ``initial`` times that. A GIF neuron's ``steps`` are the most
        of a channel; it has ``levels`` (spikes of a full step), ``signed``, ``channels``: the share of them for each T,
        and ``salient``: the share with more than one step. A signed-integer neuron's ``steps`` are D; it has ``spikes``
        (``signed``, ``unsigned``, ``binary``) and ``folded`` (whether the weights carry its thresholds), and where
        it has one of each channel, ``thresholds`` are the least and the largest. A LIF neuron has ``tau``, ``reset``,
        ``signed`` and ``gain``, the range ``[least, largest]`` over its heads. A layer of integer weights has
        ``weight_bits``, ``weight_form``, ``weight_steps``, ``bytes`` and ``bf16_bytes`` (see
        :func:`spikeform.report.weights.weight_row`); its ``neuron`` is ``weights`` where its input is real.

    Raises:
        SpikeformError: There is no neuron in it.
    """
    modules = dict(model.named_modules())
    rows = []
    for name, module in modules.items():
        if isinstance(module, Neuron):
            rows.append(_row(name, module, modules))
        elif isinstance(module, CodedLinear) and module.neuron is None:
            rows.append(_weights(name, module))
    if not rows:
        raise SpikeformError("no spiking neuron in this model: convert it first")
    report = getattr(model, "spikeform_report", None)
    for row in getattr(report, "rows", []):
        if row.replaced_by is None:
            rows.append({"site": row.name, "layer": _class(modules.get(row.name)) or row.kind, "neuron": None})
            rows[-1]["reason"] = row.reason
    return rows


def _row(name: str, neuron: Neuron, modules: dict[str, nn.Module]) -> dict[str, Any]:
    if isinstance(neuron, StreamingNeuron):
        return _streaming_row(name, neuron, modules)
    if isinstance(neuron, LIF):
        return _leaky_row(name, neuron, modules)
    coding = getattr(neuron, "coding", None)
    threshold = getattr(neuron, "threshold", None)
    values = threshold.flatten().tolist() if isinstance(threshold, Tensor) else None
    by_channel = isinstance(neuron, SignedInteger) and neuron.per_channel
    if by_channel and values:
        values = [min(values), max(values)]
    owner = modules.get(name.rpartition(".")[0])
    return {
        "site": neuron.site or name,
        "layer": _class(owner),
        "neuron": type(neuron).__name__,
        "steps": getattr(coding, "steps", None),
        "coding": type(coding).__name__ if coding is not None else None,
        "window": getattr(coding, "window", None),
        "thresholds": values,
        "per_channel": by_channel or getattr(neuron, "channel_shift", None) is not None,
        "function": getattr(neuron, "function", "identity"),
        **(_times(neuron) if isinstance(neuron, GIF) else {}),
        **({"spikes": neuron.spikes, "folded": neuron.folded} if isinstance(neuron, SignedInteger) else {}),
        **(weight_row(owner) if isinstance(owner, CodedLinear) else {}),
    }


def _times(neuron: GIF) -> dict[str, Any]:
    shares = {steps: float((neuron.times == steps).float().mean()) for steps in neuron.tiers}
    salient = sum(share for steps, share in shares.items() if steps > 1)
    return {"levels": neuron.levels, "signed": neuron.signed, "channels": shares, "salient": salient}


def _weights(name: str, layer: CodedLinear) -> dict[str, Any]:
    whole = layer.integer_weight()
    return {
        "site": layer.site or name,
        "layer": _class(layer),
        "neuron": "weights",
        "steps": max(whole.tiers),
        "coding": "Burst",
        "window": max(whole.tiers),
        "thresholds": None,
        "per_channel": False,
        "function": "identity",
        **weight_row(layer),
    }


def _streaming_row(name: str, neuron: StreamingNeuron, modules: dict[str, nn.Module]) -> dict[str, Any]:
    return {
        "site": neuron.site or name,
        "layer": _class(modules.get(name.rpartition(".")[0])),
        "neuron": type(neuron).__name__,
        "steps": neuron.clock.steps,
        "coding": "Thermometer",
        "window": neuron.clock.steps,
        "thresholds": neuron.threshold.flatten().tolist(),
        "per_channel": neuron.scale.numel() > 1 or neuron.initial.numel() > 1,
        "function": "identity",
        "levels": neuron.levels,
        "signed": neuron.signed,
        "scale": _range(neuron.scale),
        "initial": _range(neuron.initial),
    }


def _leaky_row(name: str, neuron: LIF, modules: dict[str, nn.Module]) -> dict[str, Any]:
    return {
        "site": neuron.site or name,
        "layer": _class(modules.get(name.rpartition(".")[0])),
        "neuron": type(neuron).__name__,
        "steps": neuron.steps,
        "coding": "Thermometer",
        "window": neuron.steps,
        "thresholds": [neuron.threshold],
        "per_channel": False,
        "function": "identity",
        "tau": neuron.tau,
        "reset": neuron.reset,
        "signed": neuron.signed,
        "gain": _range(neuron.gain),
    }


def _range(values: Tensor) -> list[float]:
    return [float(values.detach().min()), float(values.detach().max())]


def _class(module: nn.Module | None) -> str | None:
    return None if module is None else type(module).__name__
