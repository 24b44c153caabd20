"""The configuration that a recipe file, ``--method``, ``--steps`` and ``--set`` describe together."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from spikeform.errors import ConfigError

# Text, not numbers: the method's own checks then say what is wrong with a value.
Steps = Annotated[str | None, typer.Option(metavar="T", help="Time steps, 1 to 16.")]
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

    data = _read(recipe) if recipe is not None else {}
    named = str(data.pop("quant_method", data.pop("method", None)) or "").removeprefix("spikeform_")
    if method and named and method != named:
        raise ConfigError(f"{recipe} is a recipe for {named}, not for {method}: leave --method out or change it")
    if steps is not None:
        data["steps"] = _value(steps)
    for setting in settings:
        key, sign, value = setting.partition("=")
        if not sign or not key.strip():
            raise ConfigError(f"--set takes key=value, got {setting!r}")
        data[key.strip()] = _value(value)
    return config_from_dict({**data, "method": method or named or "las"})


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
