"""What option dataclasses share: checked when made, versioned, and the same thing as a mapping in a recipe."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar, Self

from spikeform.conversion.config import is_real
from spikeform.errors import ConfigError, NewerFormatError


@dataclass(frozen=True)
class Options:
    """Base of frozen option dataclasses, which end with a ``version`` field.

    Attributes:
        WHAT: How messages call them.
        VERSION: The newest format that is read.
        REALS: Fields that hold numbers with a fraction.
    """

    WHAT: ClassVar[str] = "option"
    VERSION: ClassVar[int] = 1
    REALS: ClassVar[tuple[str, ...]] = ()
    version: int

    def __post_init__(self) -> None:
        """Check the version, then every option.

        Raises:
            NewerFormatError: Written by a newer spikeform.
            ConfigError: A value is out of range; the message names it.
        """
        whole("version", self.version)
        if self.version > self.VERSION:
            raise NewerFormatError(
                f"{self.WHAT} options version {self.version} is newer than {self.VERSION}, the newest that this "
                "spikeform reads; upgrade spikeform"
            )
        self.check()

    def check(self) -> None:
        """Raise :class:`ConfigError` for a value out of range."""

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """Inverse of :meth:`to_dict`; what is not named keeps its default.

        Raises:
            ConfigError: A key is unknown, or a value out of range.
            NewerFormatError: The version is newer.
        """
        version = data.get("version", 1)
        if isinstance(version, int) and version > cls.VERSION:
            cls(version=version)  # a newer format may well have newer keys: name the version, not the key
        known = [f.name for f in fields(cls)]
        if unknown := sorted(set(map(str, data)) - set(known)):
            raise ConfigError(f"unknown {cls.WHAT} option {', '.join(unknown)}; known: {', '.join(sorted(known))}")
        return cls(**{name: _number(value) if name in cls.REALS else value for name, value in data.items()})


def whole(name: str, value: Any, least: int = 1, most: int | None = None) -> None:
    """Raise :class:`ConfigError` unless ``value`` is a whole number in the range."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least or (most is not None and value > most):
        span = f"of at least {least}" if most is None else f"from {least} to {most}"
        raise ConfigError(f"{name} must be a whole number {span}, got {value!r}")


def real(name: str, value: Any, positive: bool) -> None:
    """Raise :class:`ConfigError` unless ``value`` is a finite number, above 0 or at least 0."""
    if not is_real(value) or not math.isfinite(value) or value < 0 or (positive and value == 0):
        raise ConfigError(f"{name} must be a number {'above' if positive else 'of at least'} 0, got {value!r}")


def _number(value: Any) -> Any:
    """A number that YAML took for text: it wants a point in 1.0e-3."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value
