"""What methods that replace one module after the other share: the walk, and the report that is written on the way."""

from __future__ import annotations

from fnmatch import fnmatch
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from spikeform.conversion.kinds import walk
from spikeform.conversion.report import ConversionReport, Row
from spikeform.errors import ConfigError


def walked(model: PreTrainedModel, skip: tuple[str, ...]) -> list[tuple[str, nn.Module, str]]:
    """Everything that computes something, as :func:`spikeform.conversion.kinds.walk` finds it.

    Raises:
        ConfigError: A pattern of ``skip`` names none of it.
    """
    found = list(walk(model))
    for pattern in skip:
        if not any(fnmatch(name, pattern) for name, _, _ in found):
            raise ConfigError(f"skip: {pattern!r} names no module of {type(model).__name__} that computes something")
    return found


class Builder:
    """Builds each spiking layer, and writes the report as it goes.

    A subclass says what stays real (:meth:`stays_real`), and has a method ``_<kind>(name, module)`` for each kind that
    does not, which returns the layer and what the report says of it.

    Args:
        model: The dense model, changed in place.
        config: The method's.
        method: The method's name.
    """

    def __init__(self, model: PreTrainedModel, config: Any, method: str) -> None:
        self.model, self.config, self.report = model, config, ConversionReport(method)
        self.skeleton = any(p.device.type == "meta" for p in model.parameters())

    def stays_real(self, name: str, module: nn.Module, kind: str) -> str | None:
        """Why a module stays as it is, or None."""
        raise AttributeError(f"{type(self).__name__} does not say what stays real")

    def visit(self, name: str, module: nn.Module, kind: str) -> None:
        """Replace one module, or say why not."""
        reason = self.stays_real(name, module, kind)
        if reason is not None:
            self.report.rows.append(Row(name, kind, None, reason))
            return
        layer, reason = getattr(self, f"_{kind}")(name, module)
        if not self.skeleton:  # the neurons go where the layer is
            layer.to(next((p.device for p in module.parameters()), self.model.device))
        if layer is not module:
            self.model.set_submodule(name, layer)
        spiking = layer if layer is not module else module.spiking  # attention keeps its module, and gains a child
        self.report.rows.append(Row(name, kind, type(spiking).__name__, reason))
