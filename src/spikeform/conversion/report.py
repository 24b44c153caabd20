"""What a conversion did: which module became what, what stayed dense and why."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import Any


@dataclass(frozen=True)
class Row:
    """One module of the dense model.

    Args:
        name: Qualified name.
        kind: ``linear``, ``norm``, ``activation``, ``attention``, ``gated_mlp``, ``embedding``, ``state_space``
            or ``unknown``.
        replaced_by: The spiking layer's class name, or None where it stayed dense.
        reason: Why it stayed dense, or which neurons it got.
    """

    name: str
    kind: str
    replaced_by: str | None
    reason: str


@dataclass
class ConversionReport:
    """The record of one conversion; saved with the checkpoint.

    Args:
        method: ``las`` …
        rows: One a module that computes something.
        calibration: What the thresholds were found on.
        saturation: Share of calibration inputs above the largest threshold, per site, where not zero.
        history: What was done since, a stage an entry: options, data, steps, results, hardware, versions.
    """

    method: str
    rows: list[Row] = field(default_factory=list)
    calibration: dict[str, Any] = field(default_factory=dict)
    saturation: dict[str, float] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)

    @property
    def replaced(self) -> list[Row]:
        """Modules that spike now."""
        return [row for row in self.rows if row.replaced_by]

    @property
    def dense(self) -> list[Row]:
        """Modules that stayed as they were."""
        return [row for row in self.rows if not row.replaced_by]

    def summary(self) -> str:
        """One line: how many of each kind spike, and what stayed dense for other than designed reasons."""
        kinds: dict[str, int] = {}
        for row in self.replaced:
            kinds[row.kind] = kinds.get(row.kind, 0) + 1
        parts = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))
        unknown = [row.name for row in self.dense if row.kind == "unknown"]
        tail = f"; left dense, unknown: {', '.join(unknown)}" if unknown else ""
        return f"{len(self.replaced)} modules spike ({parts}), {len(self.dense)} stay real{tail}"

    def follow(self, model: Any) -> None:
        """Let the rows of linear layers name the layers that now stand in their places."""
        self.rows = [
            replace(row, replaced_by=type(model.get_submodule(row.name)).__name__)
            if row.kind == "linear" and row.replaced_by
            else row
            for row in self.rows
        ]

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> ConversionReport:
        """Inverse of :meth:`to_dict`."""
        fields: dict[str, Any] = {**data, "rows": [Row(**row) for row in data["rows"]]}
        return cls(**fields)
