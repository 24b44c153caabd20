"""The generalised integrate-and-fire (GIF) neuron of SpikeLLM (arXiv 2407.04752): several spikes in a step.

L integrate-and-fire sub-steps of threshold ``V / L``, merged, send ``clip(floor(L v / V), 0, L)`` unit spikes at once.
With the drive loaded at the start, half a unit of initial potential and soft reset, T such steps send

    q = clamp(round(x / unit) + z, 0, top),  value = (q - z) unit,  z = round(-low / unit),  unit = (high - low) / top

with ``L = 2^b - 1``. An ordinary channel takes T = 1 step, a salient one more, each with a finer unit:

    unified    top = T L                unit = Delta / T: all units of a token are multiples of one
    official   top = 2^(b + log2 T) - 1 as released: the last step sends what L spikes a step would leave behind
    ternary    codes -T L .. T L of |x| <= max|x|, no zero-point: a positive and a negative neuron, merged

Signed spikes send ``q - z``, silent at zero; unsigned ones ``q``, whose ``z`` is a bias current (as released). Ties
round to even. A token's range always holds zero: no signed code is then beyond the window's capacity.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from spikeform.errors import SpikeformError
from spikeform.neurons.burst import BurstNeuron
from spikeform.neurons.neuron import recorder
from spikeform.neurons.packing import pack_fields, unpack_fields
from spikeform.neurons.rounding import round_straight_through
from spikeform.spikes import Burst, SpikeTrain, narrowest
from spikeform.spikes.trace import Firing, observer

FORMS, SPANS, AXES = ("unified", "official", "ternary"), ("shared", "separate"), ("token", "channel")
LEAST_UNIT, LARGEST_UNIT, LARGEST_ZERO = 1e-5, 1e4, 1e4  # of the released code; the unit of a single step


class GifForm(NamedTuple):
    """What kernels need of neurons whose range is the token's, shared, signed and unified: see :mod:`.fused`."""

    top: Tensor
    multiple: Tensor
    levels: int
    steps: int


class GIF(BurstNeuron):
    """Generalised integrate-and-fire neurons, 1 to T steps a channel.

    Args:
        bits: b, 1 to 8: up to ``L = 2^b - 1`` unit spikes a step.
        channels: Shape of what has a T each: ``(C,)`` for ``[..., C]``; ``(G, 1, E)`` for keys ``[B, G, S, E]``.
        steps: Most steps of a channel: 1, 2, 4, 8 or 16.
        signed: Send ``q - z`` (bidirectional spikes); False: ``q``. Ternary spikes are signed.
        form: ``unified``, ``official`` or ``ternary`` levels.
        span: ``shared``: one range for all channels of a token, as released; ``separate``: a range for each T.
        axis: ``token``: the range is the token's own; ``channel``: static ranges (:meth:`set_range`), and codes are of
            ``x / channel_scale``, which the consumer multiplies in.
        site: The qualified name under which its firing is reported.

    Attributes:
        times: uint8 ``[*channels]``: T of each channel, 0 until set.
        low: fp32 ``[*channels]``, smallest value of each channel, NaN until set; None for ``axis="token"``.
        high: The largest, likewise.

    Raises:
        SpikeformError: An argument is none of these.
    """

    low: Tensor | None
    high: Tensor | None

    def __init__(
        self,
        bits: int,
        channels: tuple[int, ...],
        *,
        steps: int = 2,
        signed: bool = True,
        form: str = "unified",
        span: str = "shared",
        axis: str = "token",
        site: str = "",
    ) -> None:
        if type(bits) is not int or not 1 <= bits <= 8:
            raise SpikeformError(f"bits must be an integer from 1 to 8, got {bits!r}")
        if isinstance(steps, bool) or steps not in (1, 2, 4, 8, 16):
            raise SpikeformError(f"steps must be 1, 2, 4, 8 or 16, got {steps!r}")
        for name, value, known in (("form", form, FORMS), ("span", span, SPANS), ("axis", axis, AXES)):
            if value not in known:
                raise SpikeformError(f"{name} must be one of {', '.join(known)}, got {value!r}")
        if axis == "channel" and (span == "separate" or form == "ternary"):
            raise SpikeformError('axis="channel" has a range of each channel: use span="shared" and an affine form')
        if form == "ternary" and not signed:
            raise SpikeformError('form="ternary" has signed spikes: use signed=True')
        tiers = tuple(2**r for r in range(steps.bit_length()))
        common = steps == 1 or axis == "channel" or (form != "official" and span == "shared")
        super().__init__(Burst(steps, 2**bits - 1, tiers, form == "official", common), channels, site)
        self.bits, self.steps, self.levels, self.signed = bits, steps, 2**bits - 1, signed
        self.form, self.span, self.axis, self.role = form, span, axis, ""
        usual = signed and form == "unified" and span == "shared" and axis == "token"
        self._usual = usual and self.coding.limit <= 127
        self._closed: GifForm | None = None
        static = torch.full(self.channels, float("nan"), dtype=torch.float32) if axis == "channel" else None
        self.register_buffer("low", static)
        self.register_buffer("high", None if static is None else static.clone())

    @classmethod
    def ternary(cls, channels: tuple[int, ...], *, steps: int = 2, site: str = "") -> GIF:
        """Spikes of -1, 0 and 1 in each step: T of them carry ``-T .. T`` (one positive and one negative neuron)."""
        return cls(1, channels, steps=steps, form="ternary", site=site)

    def set_range(self, low: Tensor, high: Tensor) -> None:
        """Set the static range of each channel (``axis="channel"``), units of the input.

        Raises:
            SpikeformError: The range is the token's, or low and high are misshapen, not finite or the wrong way round.
        """
        if self.axis != "channel":
            raise SpikeformError(f'{self.name}: the range is the token\'s own; only axis="channel" has a static one')
        if tuple(low.shape) != self.channels or tuple(high.shape) != self.channels or not _sound(low, high):
            raise SpikeformError(f"{self.name}: needs finite low <= high of shape {list(self.channels)}")
        self.low, self.high = (x.to(self.times.device, torch.float32) for x in (low, high))

    @property
    def calibrated(self) -> bool:
        """Whether every channel has its steps, and a finite range where that is static."""
        return super().calibrated and (self.low is None or self.high is None or _sound(self.low, self.high))

    @property
    def channel_scale(self) -> Tensor:
        """What one common unit of each channel is worth where ranges are static (``axis="channel"``), ``[*channels]``.

        Raises:
            SpikeformError: The range is the token's own, or not set.
        """
        tables = self.tables()
        return self._static(tables.top)[1] / tables.multiple

    def _static(self, top: Tensor) -> tuple[Tensor, Tensor]:
        """Low end and own unit of each channel."""
        if self.low is None or self.high is None:
            raise SpikeformError(f"{self.name}: the unit is the token's own; see the quantum of its trains")
        return self.low, ((self.high - self.low) / top).clamp(LEAST_UNIT, LARGEST_UNIT)

    def closed_form(self) -> GifForm | None:
        """What kernels need, or None where there is no kernel: other forms, or integers beyond int8."""
        if not self._usual:
            return None
        tables, form = self.tables(), self._closed
        if form is None or form.top is not tables.top:
            form = GifForm(tables.top, tables.multiple, self.levels, self.steps)
            self._closed = form
        return form

    def encode(self, x: Tensor) -> SpikeTrain:
        """The spike train of real input ``x`` ``[..., *channels]``, in fp32 (fp64 stays fp64); see the module.

        Its quantum is ``[R, ..., 1]`` of each token, R the number of values that T may have; for ``axis="channel"``
        ``[R]``, constants. The train is exact where no gradient flows; else codes are real tensors, whose gradient is
        straight through the rounding, zero where clamped, and passes through the unit, not the zero-point.

        While calibrating, the input is shown to the recorder; before it is calibrated it is passed on unchanged.

        Raises:
            SpikeformError: Not calibrated, or the channels are others.
        """
        record = recorder()
        v = x if x.dtype == torch.float64 else x.float()
        if record is not None:
            record(self, x)
            if not self.calibrated:
                return SpikeTrain(v, v.new_ones(1), Burst(self.steps, self.levels))
        if x.ndim < len(self.channels) or x.shape[-1] != self.channels[-1]:
            raise SpikeformError(f"{self.name}: has channels {list(self.channels)}, got an input {list(x.shape)}")
        train = self._by_token(v) if self.axis == "token" else self._by_channel(v)
        if not (torch.is_grad_enabled() and (train.codes.requires_grad or train.quantum.requires_grad)):
            codes = train.codes.to(narrowest(self.coding.limit))
            train = replace(train, codes=codes, exact=True)
        listener = observer()
        if listener is not None:
            listener(Firing(self.site, "identity", train, x, self._outside(v)))
        return train

    def _outside(self, v: Tensor) -> Tensor:
        """Elements beyond a static range; a token's own range holds them all."""
        if self.low is None or self.high is None:
            return torch.zeros((), dtype=torch.int64, device=v.device)
        return ((v < self.low) | (v > self.high)).sum()

    def _by_token(self, v: Tensor) -> SpikeTrain:
        branch, top, multiple, _ = self.tables()
        masks = [None] if self.span == "shared" else [branch == r for r in range(len(self.tiers))]
        low, high = (torch.stack(ends) for ends in zip(*(_span(v, mask) for mask in masks), strict=True))
        quantum = torch.cat([self._unit(low, high, r) for r in range(len(self.tiers))])
        zero = None if self.form == "ternary" else self._token_zero(low, quantum)
        train = SpikeTrain(v, quantum, self.coding, branch, zero=zero)
        # Units of a token that are powers of two times one another: a division by row, exactly the same.
        scaled = v / train.unit() if self.coding.multiples is None else v / quantum[-1] / multiple
        shift = train.zero_of_branch()
        least = -top if zero is None else -shift
        codes = round_straight_through(scaled).clamp(least, top - shift)
        return replace(train, codes=codes, zero=None) if self.signed else replace(train, codes=codes + shift)

    def _unit(self, low: Tensor, high: Tensor, r: int) -> Tensor:
        """Unit of sub-neuron ``r``, ``[1, ..., 1]``, from the ranges ``[1 or R, ..., 1]``."""
        low, high = (x[r : r + 1] if len(x) > 1 else x for x in (low, high))
        width = torch.maximum(high, -low) if self.form == "ternary" else high - low
        levels = self.coding.capacity(self.tiers[r]) if self.form == "official" else self.levels
        # By a tensor: CUDA multiplies by the inverse of a number, and the last bit would depend on the device.
        unit = (width / torch.full_like(width, levels)).clamp(LEAST_UNIT, LARGEST_UNIT)
        return unit if self.form == "official" else unit / self.tiers[r]

    def _token_zero(self, low: Tensor, quantum: Tensor) -> Tensor:
        """Zero-points ``[R, ..., 1]``, within the codes even where the range is wider than the largest unit allows."""
        tops = [self.coding.capacity(t) for t in self.tiers]
        return torch.stack([z.clamp(max=top) for z, top in zip(_zero_point(low, quantum), tops, strict=True)])

    def _by_channel(self, v: Tensor) -> SpikeTrain:
        branch, top, _, multiples = self.tables()
        low, unit = self._static(top)
        zero, silent = _zero_point(low, unit), torch.zeros_like(top)
        codes = round_straight_through(v / unit.to(v.dtype)).clamp(-zero, top - zero)
        # Signed codes lie as close to silence as their range lets them; the rest is a bias current.
        zero = zero - zero.clamp(silent, top) if self.signed else zero
        rows = zero.expand(len(self.tiers), *self.channels)
        return SpikeTrain(codes + zero, multiples.to(v.dtype), self.coding, branch, zero=rows)

    def pack(self, train: SpikeTrain) -> Tensor:
        """What a cache holds of a train ``[..., S, E]``: int8 or int16 ``[..., S, E + n]``; n = 0 with static ranges.

        See :func:`~spikeform.neurons.packing.pack_fields`; of commensurate units one is kept.
        """
        codes = train.integer_codes()
        if self.axis == "channel":
            return codes
        return pack_fields(codes, train.quantum if self.coding.multiples is None else train.quantum[-1:], train.zero)

    def unpack(self, packed: Tensor, dtype: torch.dtype = torch.float32) -> SpikeTrain:
        """The train that :meth:`pack` stored, its quantum in ``dtype``.

        A train from the cache has fired before: it is not reported again.
        """
        tables, tiers, multiples = self.tables(), len(self.tiers), self.coding.multiples
        if self.axis == "channel":
            return replace(self._by_channel(tables.top.to(dtype)), codes=packed, exact=True)
        zeros = 0 if self.signed else tiers
        codes, units, zero = unpack_fields(packed, self.channels[-1], 1 if multiples else tiers, zeros)
        quantum = torch.cat([units.to(dtype) * m for m in multiples]) if multiples else units.to(dtype)
        return SpikeTrain(codes, quantum, self.coding, tables.branch, zero=zero, exact=True)

    def extra_repr(self) -> str:
        """Levels, steps and how ranges are found."""
        kind = "signed" if self.signed else "unsigned"
        return f"b={self.bits}, T<={self.steps}, {kind}, {self.form}, {self.span} range of a {self.axis}"


def _sound(low: Tensor, high: Tensor) -> bool:
    return bool((low.isfinite() & high.isfinite() & (low <= high)).all())


def _span(v: Tensor, where: Tensor | None) -> tuple[Tensor, Tensor]:
    """Smallest and largest element of each row (of the channels ``where``), zero among them: ``[..., 1]`` each."""
    own = v if where is None else v.masked_fill(~where, 0.0)
    # Not aminmax: on a CPU that is fifty times slower than both.
    return own.amin(-1, keepdim=True).clamp(max=0), own.amax(-1, keepdim=True).clamp(min=0)


def _zero_point(low: Tensor, unit: Tensor) -> Tensor:
    """``round(-low / unit)``: it has no gradient."""
    return (-low / unit).detach().round().clamp(-LARGEST_ZERO, LARGEST_ZERO)
