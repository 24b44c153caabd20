"""The multi-threshold (MT) neuron and the outlier-aware threshold (OAT) neuron of LAS.

MT fires at most one spike a step, of weight ``theta * 2^-t``; OAT is two MT sub-neurons behind a gate:
inputs below ``theta_normal`` go to one of that threshold, the others to one of ``theta_outlier``
(arXiv 2505.09659). Both fire from the sum of their input window, so their train has a closed form:

    unit = threshold / resolution,   code = sign(x) * clip(round(|x| / unit), 0, limit)

with ``resolution`` and ``limit`` of the coding (2^T and 2^T - 1 for radix-2). Three roundings:
``nearest`` (ties to even; an initial membrane potential of half a unit), ``floor`` (the paper's ``>=``),
``strict`` (the released code's ``>``: an exact multiple k codes as k - 1).

With thresholds that are powers of two, a code of an input of s significant bits has at most s of them too: whatever
is sent for a bf16 input (8 bits) is one bf16 number, however many steps there are. So that the saturated code is one
as well, ``limit`` is then the largest code of 8 significant bits.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from spikeform.neurons.neuron import ThresholdNeuron, entry, recorder
from spikeform.spikes import Coding, SpikeTrain, power_of_two
from spikeform.spikes.trace import Firing, observer

ROUNDINGS = ("nearest", "floor", "strict")
BF16_BITS = 8  # significant bits of a bf16 number, the leading one included


class OatForm(NamedTuple):
    """An MT or OAT population as kernels take it: see :mod:`spikeform.neurons.fused`.

    Attributes:
        threshold: fp32 ``[R]``.
        shift: int8 ``[C]``, folded into the following weights, or None.
        limit: Largest magnitude of a code.
        resolution: Code units in one threshold.
        rounding: Index in :data:`ROUNDINGS`.
    """

    threshold: Tensor
    shift: Tensor | None
    limit: int
    resolution: int
    rounding: int


def powers_of_two(values: Tensor) -> bool:
    """Whether every value is a power of two."""
    return bool((values.frexp().mantissa == 0.5).all())


def round_codes(scaled: Tensor, coding: Coding, rounding: str, limit: int) -> Tensor:
    """Integer codes of inputs in code units.

    Args:
        scaled: Signed input over unit, ``[...]``.
        coding: Gives the representable codes.
        rounding: ``nearest``, ``floor`` or ``strict``.
        limit: Where codes saturate; at most ``coding.limit``.

    Returns:
        Integer-valued tensor of the dtype of ``scaled``, magnitudes at most ``limit``.
    """
    if rounding == "nearest":
        codes = scaled.round()
    elif rounding == "floor":
        codes = scaled.trunc()
    else:
        codes = (scaled.abs().ceil() - 1).clamp_(min=0) * scaled.sign()
    codes = codes.clamp_(-limit, limit)
    return codes if coding.dense else coding.nearest_code(codes.abs()) * codes.sign()


class MT(ThresholdNeuron):
    """Multi-threshold neuron: one threshold, signed input, sign and magnitude.

    Args:
        coding: How its codes unroll.
        threshold: Largest magnitude it carries, or None until calibrated.
        rounding: ``nearest``, ``floor`` or ``strict``.
        site: The qualified name under which its firing is reported.
        power_of_two: Thresholds are powers of two, and codes saturate at the largest one of 8 significant bits.

    Raises:
        ValueError: The rounding is none of these, a threshold is unsound, or ``power_of_two`` meets a coding in which
            some integers have no code.

    Attributes:
        threshold: fp32 ``[R]``, R = 1 (MT) or 2 (OAT: normal, outlier). NaN until calibrated.
        channel_shift: int8 ``[*b]`` or None. Channel c has threshold ``threshold * 2^channel_shift[c]``: a
            power of two, so that folding it into the next weights changes no bit of any product.
        folded: Whether the following weights already carry ``2^channel_shift``.
        role: What it encodes (``linear``, ``query`` …): calibration and given thresholds go by it.
        channel_weight: While calibrating: how much a squared error in each channel matters, ``[C]``, or None.
        balance_channels: While calibrating: weigh each channel by the inverse of its own mean square.
    """

    populations = 1
    threshold: Tensor
    channel_shift: Tensor | None
    channel_weight: Tensor | None

    def __init__(
        self,
        coding: Coding,
        threshold: tuple[float, ...] | None = None,
        rounding: str = "nearest",
        site: str = "",
        power_of_two: bool = False,
    ) -> None:
        super().__init__(site)
        if rounding not in ROUNDINGS:
            raise ValueError(f"rounding must be one of {', '.join(ROUNDINGS)}, got {rounding!r}")
        if power_of_two and not coding.dense:
            raise ValueError(f"thresholds that are powers of two need a code for every integer, and {coding} has gaps")
        self.coding, self.rounding, self.folded, self.power_of_two = coding, rounding, False, power_of_two
        self.role, self.channel_weight, self.balance_channels = "", None, False
        self._form: OatForm | None = None
        self.register_buffer("threshold", torch.full((self.populations,), float("nan"), dtype=torch.float32))
        self.register_buffer("channel_shift", None)
        if threshold is not None:
            self.set_threshold(threshold)

    def set_threshold(self, threshold: tuple[float, ...] | Tensor) -> None:
        """Set the thresholds, smallest first.

        Raises:
            ValueError: Wrong number of them; or they are not finite, positive and strictly increasing; or not powers
                of two where they must be.
        """
        values = torch.as_tensor(threshold, dtype=torch.float32).reshape(-1)
        rising = bool((values[1:] > values[:-1]).all())
        if len(values) != self.populations or not bool(values.isfinite().all() and (values > 0).all()) or not rising:
            raise ValueError(
                f"{self.site or type(self).__name__}: needs {self.populations} finite positive thresholds, rising, "
                f"got {values.tolist()}"
            )
        if self.power_of_two and not powers_of_two(values):
            raise ValueError(
                f"{self.site or type(self).__name__}: its thresholds must be powers of two, got {values.tolist()}"
            )
        self.threshold = values.to(self.threshold.device)

    @property
    def limit(self) -> int:
        """Largest magnitude of a code that it sends."""
        limit = self.coding.limit
        return limit & -(1 << max(limit.bit_length() - BF16_BITS, 0)) if self.power_of_two else limit

    def single(self, dtype: torch.dtype) -> bool:
        """Whether what it sends for any input of ``dtype`` is, element by element, a number of that dtype.

        ``strict`` sends k - 1 for an exact multiple k, which may have more significant bits than k.
        """
        if dtype != torch.bfloat16:
            return dtype in (torch.float32, torch.float64)  # what it is decoded in
        return self.power_of_two and (self.rounding != "strict" or self.limit < 1 << BF16_BITS)

    def closed_form(self) -> OatForm | None:
        """Its parameters as kernels take them; no device is waited for.

        None where no kernel sends the same: a coding with gaps, or channel shifts that the weights do not carry.
        """
        own, form = self._buffers, self._form
        threshold, shift = entry(self, own, "threshold"), entry(self, own, "channel_shift")
        if not self.coding.dense or (shift is not None and not self.folded):
            return None
        if form is None or form.threshold is not threshold or form.shift is not shift:  # kept until one changes
            rounding = ROUNDINGS.index(self.rounding)
            form = OatForm(threshold, shift, self.limit, self.coding.resolution, rounding)
            self._form = form
        return form

    @property
    def calibrated(self) -> bool:
        """Whether thresholds are set: finite and positive."""
        return bool((self.threshold.isfinite() & (self.threshold > 0)).all())

    @property
    def statistics_per_channel(self) -> bool:
        """Whether its channels are scaled or weighed one by one."""
        return self.channel_shift is not None or self.channel_weight is not None or self.balance_channels

    def fold_factor(self) -> Tensor | None:
        """What the following weights take over of each channel, ``[C]``: a power of two. None: nothing."""
        return None if self.channel_shift is None else power_of_two(self.channel_shift)

    def settle(self) -> None:
        """Forget what only calibration needed."""
        self.channel_weight, self.balance_channels = None, False

    def quantum(self) -> Tensor:
        """Value of one code unit per sub-neuron: ``[R]``, or ``[R, *b]`` with an unfolded channel shift."""
        unit = self.threshold / self.coding.resolution
        if self.channel_shift is None or self.folded:
            return unit
        return unit.view(-1, *[1] * self.channel_shift.ndim) * power_of_two(self.channel_shift)

    def drive(self, x: Tensor) -> Tensor:
        """Membrane potential on the thresholds' scale: ``x * 2^-channel_shift``, fp32 (fp64 stays fp64)."""
        x = x if x.dtype == torch.float64 else x.float()
        return x if self.channel_shift is None else x * power_of_two(-self.channel_shift, x.dtype)

    def gate(self, v: Tensor) -> tuple[Tensor | None, Tensor]:
        """Sub-neuron of each element (None where there is one), and its code unit (a scalar, or elementwise)."""
        return None, self.threshold[0] / self.coding.resolution

    def encode(self, x: Tensor) -> SpikeTrain:
        """The spike train of real input ``x`` ``[..., C]``.

        While calibrating, the input is shown to the recorder and passed on unchanged.
        """
        record = recorder()
        if record is not None:
            record(self, x)
        v = self.drive(x)
        if record is not None and not self.calibrated:
            return SpikeTrain(v, v.new_ones(1), self.coding)
        branch, unit = self.gate(v)
        codes = round_codes(v / unit, self.coding, self.rounding, self.limit)
        shifted = self.channel_shift is not None and not self.folded
        train = SpikeTrain(codes, self.quantum().to(v.dtype), self.coding, branch, None if shifted else unit)
        listener = observer()
        if listener is not None:
            listener(Firing(self.site, "identity", train, x, (v.abs() > self.threshold[-1]).sum()))
        return train

    def pack(self, train: SpikeTrain) -> Tensor:
        """What a cache holds of a train: ``2 * code + branch`` in one integer, int16 where they fit, else int32."""
        packed = train.integer_codes() * 2
        if train.branch is not None:
            packed = packed + train.branch.to(packed.dtype)
        return packed.to(torch.int16) if train.coding.limit < 2**14 else packed

    def unpack(self, packed: Tensor, dtype: torch.dtype = torch.float32) -> SpikeTrain:
        """The train that :meth:`pack` stored. A train from the cache has fired before: it is not reported again."""
        branch = (packed & 1).bool() if self.populations == 2 else None
        return SpikeTrain(packed >> 1, self.quantum().to(dtype), self.coding, branch)

    def extra_repr(self) -> str:
        """Coding, rounding and thresholds."""
        shift = "" if self.channel_shift is None else ", per channel"
        units = ", powers of two" if self.power_of_two else ""
        thresholds = [round(t, 6) for t in self.threshold.tolist()]
        return f"{self.coding}, {self.rounding}, threshold={thresholds}{units}{shift}"


class OAT(MT):
    """Outlier-aware threshold neuron.

    An element is an outlier where ``|x| >= theta_normal``; it is then coded whole (not the excess) by the
    sub-neuron of ``theta_outlier``.
    """

    populations = 2

    def gate(self, v: Tensor) -> tuple[Tensor | None, Tensor]:
        """The outlier sub-neuron takes what is not below the normal threshold."""
        unit = self.threshold / self.coding.resolution
        outlier = v.abs() >= self.threshold[0]
        return outlier, torch.where(outlier, unit[1], unit[0])
