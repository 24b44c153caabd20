"""The configuration that a recipe file, ``--method``, ``--steps`` and ``--set`` describe together."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from spikeform.errors import ConfigError

SECTIONS = ("train", "calibrate")  # of a recipe: the options of other verbs than convert

# Text, not numbers: the method's own checks then say what is wrong with a value.
Steps = Annotated[
    str | None,
    typer.Option(
        metavar="T", help="Time steps: LAS 1 to 16, FAS 0 to 64; of SpikeLLM's salient channels 1, 2, 4 or 8."
    ),
]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Set an option of the method; the value is YAML. Repeatable."),
]


def read_config(
    method: str | None = None,
    recipe: Path | None = None,
    steps: str | None = None,
    settings: Sequence[str] = (),
) -> Any:
    """Build a method's config; later arguments override earlier ones.

    Args:
        method: ``las`` …; None takes the recipe's, or LAS.
        recipe: YAML file: a mapping of the method's options, with ``method``.
        steps: Time steps, as typed.
        settings: ``key=value`` each.

    Raises:
        ConfigError: An unknown method or key, a value out of range, or a recipe of another method.
        FileNotFoundError: There is no such recipe.
    """
    import spikeform.methods  # noqa: F401 - registers the methods
    from spikeform.conversion import config_from_dict

    data = {key: value for key, value in _read(recipe).items() if key not in SECTIONS} if recipe is not None else {}
    named = str(data.pop("quant_method", data.pop("method", None)) or "").removeprefix("spikeform_")
    if method and named and method != named:
        raise ConfigError(f"{recipe} is a recipe for {named}, not for {method}: leave --method out or change it")
    if steps is not None:
        data["steps"] = _value(steps)
    return config_from_dict({**data, **_pairs("--set", settings), "method": method or named or "las"})


def read_method(method: str | None, recipe: Path | None, default: str) -> str:
    """The method that ``--method``, or else the recipe, names."""
    data = _read(recipe) if recipe is not None and method is None else {}
    return method or str(data.get("quant_method") or data.get("method") or default).removeprefix("spikeform_")


def read_section(
    name: str, recipe: Path | None = None, settings: Sequence[str] = (), flag: str = "--set"
) -> dict[str, Any]:
    """The options that a recipe's section ``train`` or ``calibrate``, and ``flag key=value`` arguments, name.

    Raises:
        ConfigError: The section is no mapping, or an argument no ``key=value``.
        FileNotFoundError: There is no such recipe.
    """
    section = (_read(recipe).get(name) if recipe is not None else None) or {}
    if not isinstance(section, dict) or not all(isinstance(key, str) for key in section):
        raise ConfigError(f"{recipe}: {name} must be a mapping of options")
    return section | _pairs(flag, settings)


def _pairs(flag: str, settings: Sequence[str]) -> dict[str, Any]:
    pairs = {}
    for setting in settings:
        key, sign, value = setting.partition("=")
        if not sign or not key.strip():
            raise ConfigError(f"{flag} takes key=value, got {setting!r}")
        pairs[key.strip()] = _value(value)
    return pairs


def _read(recipe: Path) -> dict[str, Any]:
    import yaml

    if not recipe.is_file():
        raise FileNotFoundError(f"there is no recipe {recipe}")
    try:
        data = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{recipe} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(data, dict) or not all(isinstance(key, str) for key in data):
        raise ConfigError(f"{recipe} must be a mapping of options, such as 'steps: 16'")
    return data


def _value(text: str) -> Any:
    import yaml

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        raise ConfigError(f"{text!r} is not a YAML value") from None
