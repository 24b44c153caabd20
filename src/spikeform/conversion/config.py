"""What every method's configuration is: a frozen dataclass that transformers accepts as a quantization config."""

from __future__ import annotations

from dataclasses import asdict, field, fields
from typing import Any, ClassVar

from transformers.utils.quantization_config import QuantizationConfigMixin

from spikeform.errors import ConfigError, NewerFormatError


class MethodConfig(QuantizationConfigMixin):
    """Base of method configurations. Subclasses are dataclasses with a ``version`` field.

    transformers' mixin is itself a dataclass, not a frozen one, so freezing is done here.
    """

    quant_method: ClassVar[str] = ""  # type: ignore[misc]
    VERSION: ClassVar[int] = 1
    version: int

    def __init__(self, **options: Any) -> None:  # each dataclass below writes its own
        raise TypeError("MethodConfig is a base: use a method's configuration, e.g. spikeform.LAS")

    def __post_init__(self) -> None:
        """Check the version, then every option, then freeze.

        Raises:
            NewerFormatError: Written by a newer spikeform.
            ConfigError: A value is out of range; the message names it.
        """
        if not isinstance(self.version, int) or isinstance(self.version, bool) or self.version < 1:
            raise ConfigError(f"version must be a positive integer, got {self.version!r}")
        if self.version > self.VERSION:
            raise NewerFormatError(
                f"{type(self).__name__} config version {self.version} is newer than {self.VERSION}, the newest that "
                "this spikeform reads; upgrade spikeform"
            )
        self.check()
        object.__setattr__(self, "_frozen", True)

    def check(self) -> None:
        """Raise :class:`ConfigError` for a value out of range."""

    def __setattr__(self, name: str, value: Any) -> None:
        if getattr(self, "_frozen", False):
            raise ConfigError(f"{type(self).__name__} is frozen: make a new one instead of setting {name}")
        object.__setattr__(self, name, value)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able, with ``quant_method``."""
        return {"quant_method": self.quant_method, **_plain(asdict(self))}

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """Inverse of :meth:`to_dict`.

        Raises:
            ConfigError: A key is unknown.
            NewerFormatError: The version is newer.
        """
        named = config_dict.get("quant_method", cls.quant_method)
        if named != cls.quant_method:
            raise ConfigError(f"quant_method {named!r} is not {cls.quant_method!r}, that of {cls.__name__}")
        data = {k: v for k, v in config_dict.items() if k != "quant_method"}
        version = data.get("version", 1)
        if isinstance(version, int) and version > cls.VERSION:
            cls(version=version)  # a newer format may well have newer keys: name the version, not the key
        known = [f.name for f in fields(cls)]
        unknown = sorted(set(data) - set(known))
        if unknown:
            raise ConfigError(f"unknown {cls.__name__} option {', '.join(unknown)}; known: {', '.join(sorted(known))}")
        config = cls(**data)
        return (config, kwargs) if return_unused_kwargs else config

    def update(self, **kwargs: Any) -> dict[str, Any]:
        """Change nothing (the config is frozen): all of ``kwargs`` are unused."""
        return kwargs


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, list | tuple) else value


def option(default: Any, help: str) -> Any:
    """A field of a config; the help text feeds command lines and recipe checkers."""
    return field(default=default, metadata={"help": help})


def patterns(name: str, value: Any) -> tuple[str, ...]:
    """``value`` as a tuple of module name patterns; else :class:`ConfigError`."""
    if not isinstance(value, list | tuple) or not all(isinstance(pattern, str) for pattern in value):
        raise ConfigError(f"{name} must be a list of module name patterns, got {value!r}")
    return tuple(value)


def switches(config: Any, *names: str) -> None:
    """Raise :class:`ConfigError` unless these options of ``config`` are true or false."""
    for name in names:
        if not isinstance(getattr(config, name), bool):
            raise ConfigError(f"{name} must be true or false, got {getattr(config, name)!r}")


def choice(name: str, value: Any, allowed: tuple) -> None:
    """Raise :class:`ConfigError` unless ``value`` is one of ``allowed``."""
    if type(value) not in {type(a) for a in allowed} or value not in allowed:
        raise ConfigError(f"{name} must be one of {', '.join(map(str, allowed))}, got {value!r}")


def is_real(value: Any) -> bool:
    """Whether ``value`` is a number (a bool is not)."""
    return isinstance(value, int | float) and not isinstance(value, bool)
