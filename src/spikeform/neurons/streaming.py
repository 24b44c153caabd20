"""The streaming neuron of FAS: QCFS while its network is fine-tuned, integrate-and-fire when it spikes.

    steps = 0:  y = theta / L floor(L clip(x / theta, 0, 1) + 1/2)                            one pass, no time
    steps = T:  theta_f = theta scale;  v(0) = beta theta_f;  for t = 1..T:
                v += x(t);  s(t) = 1[v >= theta_f];  v -= theta_f s(t);  y(t) = theta_f s(t)

``scale = 1`` and ``beta = 1/2`` are the neuron before calibration: for an input constant in time and T = L the mean
of its T outputs is then QCFS, exactly. A signed neuron also fires -1; it starts empty and fires at ``(1 - beta)
theta_f``, which for the unsigned one is the same as starting at ``beta theta_f``. Source: arXiv 2502.04405.

Time is folded into the batch, batch-major: row ``b T + t`` is step t of sequence b. B sequences, P positions,
C channels.
"""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from spikeform.errors import SpikeformError
from spikeform.neurons.if_ import scan
from spikeform.neurons.neuron import ThresholdNeuron, recorder
from spikeform.neurons.qcfs import qcfs_codes
from spikeform.spikes import SpikeTrain, Thermometer
from spikeform.spikes.trace import Firing, observer


@dataclass
class Pass:
    """What the block that runs now knows of its pass; it lives no longer than the block runs.

    Args:
        rows: B T.
        length: Positions P of the pass.
        constant: Whether nothing varies in time yet: true from the first block's entry to the first spike. What is
            computed then is the same for all streams (see spikeform.layers.streaming).
        positions: Where in its sequence each of them stands, ``[1 or B, P]``; None: nobody said.
    """

    rows: int
    length: int
    constant: bool = False
    positions: Tensor | None = None


current: ContextVar[Pass | None] = ContextVar("spikeform_pass", default=None)


def by_row(x: Tensor, rows: int) -> Tensor:
    """``[rows, ..., C]``, whether ``x`` has this form or ``[rows positions, C]``."""
    return x.unflatten(0, (rows, -1)) if rows and x.ndim == 2 and x.shape[0] != rows else x


@dataclass
class Clock:
    """The time steps of a streaming model, one object for all its parts.

    Args:
        steps: T; 0 for the network of QCFS activations, which knows no time.
    """

    steps: int


class StreamingNeuron(ThresholdNeuron):
    """QCFS and its integrate-and-fire twin.

    Args:
        clock: Says how many steps the model runs.
        levels: L of QCFS, 1 to 16.
        signed: Fire -1 too.
        channels: C.
        per_channel: A QCFS threshold per channel; False: one in all.
        positional: Whether its input has positions, so that parameters may go by them.
        surrogate: Half width of the surrogate triangle, in thresholds.
        site: The qualified name under which its firing is reported.

    Attributes:
        threshold: theta, fp32 ``[1]`` or ``[C]``; NaN until calibrated. Stage 1 trains it.
        scale: IF threshold over theta, fp32; stage 2 trains it.
        initial: beta, initial potential over IF threshold, fp32; stage 2 trains it.
    """

    def __init__(
        self,
        clock: Clock,
        levels: int,
        *,
        signed: bool = False,
        channels: int,
        per_channel: bool = False,
        positional: bool = True,
        surrogate: float = 1.0,
        site: str = "",
    ) -> None:
        super().__init__(site)
        self.clock, self.levels, self.signed, self.surrogate = clock, levels, signed, surrogate
        self.channels, self.positional = channels, positional
        self.threshold = nn.Parameter(torch.full((channels if per_channel else 1,), float("nan"), dtype=torch.float32))
        self.scale = nn.Parameter(torch.ones(1, dtype=torch.float32), requires_grad=False)
        self.initial = nn.Parameter(torch.full((1,), 0.5, dtype=torch.float32), requires_grad=False)

    @property
    def calibrated(self) -> bool:
        """Whether thresholds are set, and everything is finite and in range."""
        positive = all(bool((p.isfinite() & (p > 0)).all()) for p in (self.threshold, self.scale))
        return positive and bool(((self.initial >= 0) & (self.initial < 1)).all())

    @property
    def statistics_per_channel(self) -> bool:
        """Whether thresholds are found channel by channel."""
        return len(self.threshold) > 1

    @torch.no_grad()
    def set_threshold(self, threshold: float | Tensor) -> None:
        """Set theta: one number, or ``[C]``.

        Raises:
            ValueError: Not finite and positive.
        """
        values = torch.as_tensor(threshold, dtype=torch.float32).expand(self.threshold.shape)
        if not bool((values.isfinite() & (values > 0)).all()):
            raise ValueError(f"{self.site or type(self).__name__}: thresholds must be finite and positive")
        self.threshold.copy_(values)

    @torch.no_grad()
    def refine(self, granularity: str, positions: int | None = None) -> None:
        """Give ``scale`` and ``initial`` the shape of a granularity, their values kept.

        Args:
            granularity: ``layer`` ``(1,)``, ``channel`` ``(C,)``, or ``position`` ``(P, C)`` (``(C,)`` where the input
                has no positions).
            positions: P.
        """
        shape: tuple[int, ...] = (1,) if granularity == "layer" else (self.channels,)
        if granularity == "position" and self.positional and positions is not None:
            shape = (positions, *shape)
        for name in ("scale", "initial"):
            old = getattr(self, name)
            setattr(self, name, nn.Parameter(old.expand(shape).clone(), old.requires_grad))

    def firing_threshold(self, length: int | None = None) -> Tensor:
        """``theta * scale``: ``[1]``, ``[C]``, or ``[length, C]`` for the positions of this pass."""
        return self.threshold * self._here(self.scale, length)

    def _here(self, parameter: Tensor, length: int | None) -> Tensor:
        """What holds in this pass: ``[B, P, C]`` where the sequences stand at positions of their own."""
        if parameter.ndim < 2 or length is None:
            return parameter
        now = current.get()
        if now is None:
            places = torch.arange(length, device=parameter.device)[None]
        elif now.positions is None:
            raise SpikeformError(f"{self.site}: the model does not tell its blocks position_ids; calibrate by channel")
        else:
            places = now.positions.to(parameter.device).clamp(min=0)  # some families count padding as -1
        asked, known = int(places.max()) + 1, parameter.shape[0]
        if asked > known:
            raise SpikeformError(
                f"{self.site}: calibrated for {known} positions, asked for position {asked}: parameters by position "
                "reach no further; calibrate by channel instead"
            )
        return parameter[places[0] if len(places) == 1 else places]

    def encode(self, x: Tensor) -> SpikeTrain:
        """The spike train of ``x``: ``[B, ..., C]`` without time, ``[B T, ..., C]`` with it.

        Without time, codes are 0..L (signed -L..L). With it, each row is a window of one step, and codes are 0 or 1
        (signed also -1). Codes carry gradients where they are asked for, and are int8 otherwise.

        Raises:
            SpikeformError: The rows are no multiple of T, or a position lies beyond what was calibrated.
        """
        record = recorder()
        if record is not None:
            seen = x.float() if self.signed else x.float().clamp(min=0)
            record(self, seen)
            if not self.calibrated:  # passed on as if the resolution were infinite
                return SpikeTrain(seen, seen.new_ones(1), Thermometer(1))
        grad = torch.is_grad_enabled() and (x.requires_grad or self._learns())
        train = self._fire(x, grad) if self.clock.steps else self._quantise(x, grad)
        train = train if train.codes.shape == x.shape else _flattened(train)
        listener = observer()
        if listener is not None:
            top = train.unit() * train.coding.limit
            beyond = x.abs() > top if self.signed else x > top
            listener(Firing(self.site, "identity", train, x, beyond.sum()))
        return train

    def _learns(self) -> bool:
        return any(p.requires_grad for p in (self.threshold, self.scale, self.initial))

    def _quantise(self, x: Tensor, grad: bool) -> SpikeTrain:
        codes = qcfs_codes(x, self.threshold, self.levels, signed=self.signed)
        quantum = self._quantum(self.threshold / self.levels, x)
        return SpikeTrain(codes if grad else codes.to(torch.int8), quantum, Thermometer(self.levels))

    def _fire(self, x: Tensor, grad: bool) -> SpikeTrain:
        steps, now = self.clock.steps, current.get()
        if now is not None:
            now.constant = False
            if x.ndim == 2 and x.shape[0] == now.rows * now.length:  # OPT's blocks flatten rows and positions
                x = x.unflatten(0, (now.rows, now.length))
            elif x.shape[0] != now.rows:
                raise SpikeformError(
                    f"{self.site}: {x.shape[0]} rows come in where the block has {now.rows}: rows that are no streams "
                    "(routed to experts, say) know no time; leave its activation dense (skip)"
                )
        if x.shape[0] % steps:
            raise SpikeformError(
                f"{self.site}: {x.shape[0]} rows are no multiple of {steps} steps: time begins at the first block, so "
                "run the whole model"
            )
        length = x.shape[-2] if x.ndim > 2 else None
        theta, beta = self.firing_threshold(length), self._here(self.initial, length)
        codes = scan(
            x,
            theta,
            0.0 if self.signed else beta * theta,
            1.0 - beta if self.signed else 1.0,
            signed=self.signed,
            surrogate=self.surrogate if grad else None,
            steps=steps,
        )
        theta = theta.repeat_interleave(steps, 0) if theta.ndim > 2 else theta
        return SpikeTrain(codes, self._quantum(theta, x), Thermometer(1))

    @staticmethod
    def _quantum(unit: Tensor, x: Tensor) -> Tensor:
        unit = unit.to(torch.float64) if x.dtype == torch.float64 else unit
        return unit if unit.numel() == 1 else unit[None]

    def extra_repr(self) -> str:
        """Levels, kind and shapes."""
        kind = "signed" if self.signed else "unsigned"
        return f"L={self.levels}, {kind}, threshold={list(self.threshold.shape)}, calibrated={list(self.scale.shape)}"


def _flattened(train: SpikeTrain) -> SpikeTrain:
    """``[rows, positions, C]`` as ``[rows positions, C]``, what goes by position repeated for each row."""
    unit = train.quantum[0]
    quantum = unit.expand(train.shape).flatten(0, 1)[None] if unit.ndim > 1 else train.quantum
    return SpikeTrain(train.codes.flatten(0, 1), quantum, train.coding)
