"""Config type to method: the one place where a method is known to the rest of the house."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from spikeform.conversion.histogram import Histogram
from spikeform.conversion.report import ConversionReport
from spikeform.errors import ConfigError


@dataclass(frozen=True)
class Method:
    """What a conversion method supplies.

    Args:
        name: ``las`` …; its quant_method in config.json is ``spikeform_<name>``.
        config_type: Its frozen config dataclass.
        prepare: ``(model, config) -> report``: replace modules, thresholds not yet set. Must work on the meta
            device, from the config alone, and give the same skeleton each time.
        given: ``(neuron, config) -> bool``: set a neuron's threshold from the config, if it names one.
        fit: ``(neuron, histogram, config) -> saturated share``: set a neuron's threshold from its inputs.
        core: Kinds of modules of which it must replace at least one.
        trainable: Whether gradients pass its neurons, so that a converted model can be trained.
        streams: Whether its models run all their time steps side by side, through hooks.
        skeleton: ``(model, config) -> report``: the modules of a checkpoint of this method, where conversion ends with
            others than ``prepare`` begins with. On the meta device too. None: ``prepare``.
        reshape: ``(model, config, batches)``: an equivalent dense model, in place, before anything is replaced.
        calibrate: ``(model, batches, config, workdir, progress) -> facts``: finds what the model needs from token ids,
            in place of the histograms, ``given`` and ``fit``. The facts, JSON-able, go into the report beside the
            data's. None: histograms.
        finish: ``(model, config, report)``: what is left to do once thresholds are set and channel shifts folded.
    """

    name: str
    config_type: type
    prepare: Callable[[PreTrainedModel, Any], ConversionReport]
    given: Callable[[Any, Any], bool] = lambda _neuron, _config: False
    fit: Callable[[Any, Histogram, Any], float] | None = None
    core: tuple[str, ...] = ("linear",)
    trainable: bool = False
    streams: bool = False
    skeleton: Callable[[PreTrainedModel, Any], ConversionReport] | None = None
    reshape: Callable[[PreTrainedModel, Any, list], None] | None = None
    calibrate: Callable[..., dict[str, Any]] | None = None
    finish: Callable[[PreTrainedModel, Any, ConversionReport], None] | None = None


_METHODS: dict[type, Method] = {}


def add(method: Method) -> None:
    """Make a method known.

    Raises:
        ValueError: Its config type is taken.
    """
    if method.config_type in _METHODS:
        raise ValueError(f"method {method.name!r} is registered already")
    _METHODS[method.config_type] = method


def method_of(config: Any) -> Method:
    """The method of a config object.

    Raises:
        ConfigError: It is not a spikeform config.
    """
    method = _METHODS.get(type(config))
    if method is None:
        known = ", ".join(f"spikeform.{t.__name__}" for t in _METHODS)
        raise ConfigError(f"{type(config).__name__} is not a spikeform config; use one of: {known}")
    return method


def config_from_dict(data: dict[str, Any]) -> Any:
    """The config that ``data`` (a recipe, or config.json's quantization_config) describes.

    Raises:
        ConfigError: Its ``quant_method`` or ``method`` names no known method.
    """
    named = str(data.get("quant_method") or data.get("method") or "")
    for method in _METHODS.values():
        if named.removeprefix("spikeform_") == method.name:
            return method.config_type.from_dict({k: v for k, v in data.items() if k not in ("method", "quant_method")})
    known = ", ".join(m.name for m in _METHODS.values())
    raise ConfigError(f"unknown method {named!r}; known: {known}")
