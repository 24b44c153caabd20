"""The signed-integer neuron of SpikingMamba (arXiv 2510.04595): an integer in training, ternary spikes when it runs.

    u = x / V_th;   n = clip(round(u), -D, D);   value = n V_th                    ties round to even
    t(i) = sgn(n) 1[|n| >= i],  i = 1 .. D;   sum_i t(i) = n

The integer enters the membrane in the first of D steps, and every step whose potential has reached the threshold fires
and takes it off; membranes are empty at the beginning of every token. (Fed with ``|x|`` itself, the printed dynamics
give its floor, and training and inference would differ.) In training the gradient of the rounding is rectangular,

    dn / du = alpha 1[-D <= u <= D]

and the threshold's follows from ``x / V_th`` and ``n V_th``. Two poorer neurons share its code, to compare with:
``unsigned`` has integers 0 .. D (no polarity), ``binary`` fires once where ``u >= 1`` (no polarity, no magnitude), with
a gradient where ``|u - 1| <= 1/2``.

Smoothed gradient compensation is a second, continuous path of training alone (its formula is not published: these
three are ours), with ``g(u) = D tanh(u / D)``, ``clip(u, -D, D)`` or ``u``:

    grad    q = n + lambda (g(u) - stop_gradient(g(u)))       the forward pass stays that of the spikes
    mix     q = (1 - lambda) n + lambda g(u)                  lambda goes to 0 while it trains
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from spikeform.errors import SpikeformError
from spikeform.native import fixed
from spikeform.neurons.hadamard import Factors, factors, turned
from spikeform.neurons.neuron import ThresholdNeuron, entry, recorder
from spikeform.neurons.oat import ROUNDINGS, OatForm
from spikeform.spikes import SpikeTrain, Thermometer
from spikeform.spikes.codings import MAX_RATE_STEPS, check_steps
from spikeform.spikes.trace import Firing, observer

SPIKES = ("signed", "unsigned", "binary")
SMOOTH = ("tanh", "clip", "identity")


@dataclass
class Compensation:
    """The continuous path of training, one object for all neurons of a model: whoever trains moves its weight.

    Args:
        mode: ``grad`` or ``mix``.
        weight: lambda, at least 0.
        smooth: g: ``tanh``, ``clip`` or ``identity``.
    """

    mode: str
    weight: float
    smooth: str = "tanh"


class _Integer(torch.autograd.Function):
    """``n`` of ``u``; backward the rectangle, and what compensation adds to it."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, spikes: str, steps: int, alpha: float, weight: float, smooth: str) -> Tensor:
        ctx.save_for_backward(u)
        ctx.rest = spikes, steps, alpha, weight, smooth
        return integers(u, spikes, steps)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple:
        (u,) = ctx.saved_tensors
        spikes, steps, alpha, weight, smooth = ctx.rest
        if spikes == "binary":
            window = (u - 1).abs() <= 0.5
        else:
            window = (u >= (-steps if spikes == "signed" else 0)) & (u <= steps)
        slope = alpha * window.to(u.dtype)
        if weight:
            slope = slope + weight * _slope(u, steps, smooth)
        return grads[0] * slope, None, None, None, None, None


def integers(u: Tensor, spikes: str, steps: int) -> Tensor:
    """``n`` of potentials in thresholds ``u`` ``[...]``, integer-valued in its dtype."""
    if spikes == "binary":
        return (u >= 1).to(u.dtype)
    return u.round().clamp(-steps if spikes == "signed" else 0, steps)


def _smooth(u: Tensor, steps: int, smooth: str) -> Tensor:
    if smooth == "tanh":
        return steps * torch.tanh(u / steps)
    return u.clamp(-steps, steps) if smooth == "clip" else u


def _slope(u: Tensor, steps: int, smooth: str) -> Tensor:
    if smooth == "tanh":
        return 1 - torch.tanh(u / steps).square()
    return (u.abs() <= steps).to(u.dtype) if smooth == "clip" else torch.ones_like(u)


class SignedInteger(ThresholdNeuron):
    """Signed integers ``-D .. D``, sent as ternary spikes in D steps.

    Args:
        steps: D, 1 to 64 (1 for ``binary``).
        channels: C, for a threshold of each channel; None: one threshold.
        spikes: ``signed``, ``unsigned`` or ``binary``.
        alpha: Height of the surrogate gradient.
        learns: Whether the threshold is a thing to learn.
        rotates: Whether channels are turned first (:mod:`spikeform.neurons.hadamard`), because the following weights
            are. Its input is then what was turned, for thresholds and observers too.
        site: The qualified name under which its firing is reported.

    Raises:
        SpikeformError: An argument is none of these.

    Attributes:
        threshold: V_th, fp32 ``[1]`` or ``[C]``, a parameter; NaN until calibrated.
        folded: Whether the following weights carry the thresholds of the channels; trains are then in units of 1.
        compensation: The continuous path while a model trains, None at all other times; never saved.
        paused: Pass real input on as it is, as if the resolution were infinite.
    """

    def __init__(
        self,
        steps: int,
        channels: int | None = None,
        *,
        spikes: str = "signed",
        alpha: float = 1.0,
        learns: bool = True,
        rotates: bool = False,
        site: str = "",
    ) -> None:
        super().__init__(site)
        try:
            check_steps(steps, MAX_RATE_STEPS)
        except ValueError as error:
            raise SpikeformError(str(error)) from None
        if spikes not in SPIKES:
            raise SpikeformError(f"spikes must be one of {', '.join(SPIKES)}, got {spikes!r}")
        if spikes == "binary" and steps != 1:
            raise SpikeformError(f"binary spikes have one step, got steps={steps}")
        self.steps, self.spikes, self.alpha = steps, spikes, alpha
        self.coding = Thermometer(steps, early=True)
        self.folded = False
        self.compensation: Compensation | None = None
        unset = torch.full((channels or 1,), float("nan"), dtype=torch.float32)
        self.threshold = nn.Parameter(unset, requires_grad=learns)
        self.learns, self.rotates, self.paused = learns, rotates, False
        self._form: OatForm | None = None
        self._factors: Factors | None = None
        self.per_channel = channels is not None

    @torch.no_grad()
    def set_threshold(self, threshold: float | Tensor) -> None:
        """Set V_th: one number, or ``[C]``.

        Raises:
            SpikeformError: Not finite and positive, or the weights carry the old ones.
        """
        if self.folded:
            raise SpikeformError(f"{self.site}: its thresholds are folded into the weights; unfold the layer first")
        values = torch.as_tensor(threshold, dtype=torch.float32).expand(self.threshold.shape)
        if not bool((values.isfinite() & (values > 0)).all()):
            raise SpikeformError(f"{self.site or type(self).__name__}: thresholds must be finite and positive")
        self.threshold.copy_(values)

    @property
    def calibrated(self) -> bool:
        """Whether thresholds are set: finite and positive."""
        return bool((self.threshold.isfinite() & (self.threshold > 0)).all())

    @property
    def statistics_per_channel(self) -> bool:
        """Whether thresholds are found channel by channel."""
        return self.per_channel

    def potential(self, x: Tensor) -> Tensor:
        """``u = x / V_th``, in fp32 (fp64 stays fp64): in bf16 exact ties would be common, and round as they like."""
        return self._in_thresholds(self._turned(x))

    def _turned(self, x: Tensor) -> Tensor:
        if not self.rotates:
            return x
        found = self._factors
        if found is None or found[0].device != x.device:
            found = self._factors = factors(x.shape[-1], x.device)
        return turned(x, found)

    def _in_thresholds(self, x: Tensor) -> Tensor:
        x = x if x.dtype == torch.float64 else x.float()
        return x / entry(self, self._parameters, "threshold").to(x.dtype)

    def integers(self, x: Tensor) -> Tensor:
        """``n`` of real input ``x`` ``[..., C]``: int8."""
        return integers(self.potential(x), self.spikes, self.steps).to(torch.int8)

    def fold_factor(self) -> Tensor | None:
        """What the following weights take over of each channel, ``[C]``: its threshold. None: nothing."""
        return self.threshold if self.per_channel else None

    def unit(self) -> Tensor | None:
        """What one spike is worth beside the weights: fp32 ``[1]`` or ``[C]``; None where the weights say it."""
        return None if self.folded else entry(self, self._parameters, "threshold")

    def closed_form(self) -> OatForm | None:
        """How kernels encode :meth:`potential`, in units of a spike.

        None where no kernel sends the same: other spikes, or thresholds of channels that the weights do not carry.
        """
        if self.spikes != "signed" or self.paused or (self.per_channel and not self.folded):
            return None
        form, device = self._form, entry(self, self._parameters, "threshold").device
        if form is None or form.threshold.device != device:
            # No buffer: loading a model leaves those that are not in its files with any value.
            with torch.inference_mode(False):
                one = fixed(torch.ones(1, dtype=torch.float32, device=device))
            form = self._form = OatForm(one, None, self.steps, 1, ROUNDINGS.index("nearest"))
        return form

    def encode(self, x: Tensor) -> SpikeTrain:
        """The spike train of real input ``x`` ``[..., C]``.

        Where gradients flow its codes are differentiable; with ``mix`` they are then no integers. While calibrating,
        the input is shown to the recorder, and passed on unchanged by a neuron that is not calibrated.
        """
        x = self._turned(x)
        record = recorder()
        if record is not None:
            record(self, x)
        if self.paused or (record is not None and not self.calibrated):
            v = x if x.dtype == torch.float64 else x.float()
            return SpikeTrain(v, v.new_ones(1), self.coding)
        u = self._in_thresholds(x)
        codes = self._differentiable(u) if torch.is_grad_enabled() and u.requires_grad else None
        exact = codes is None
        codes = integers(u, self.spikes, self.steps).to(torch.int8) if codes is None else codes
        unit = self.unit()
        quantum = u.new_ones(1) if unit is None else unit.to(u.dtype)
        train = SpikeTrain(codes, quantum[None] if quantum.numel() > 1 else quantum, self.coding, exact=exact)
        listener = observer()
        if listener is not None:
            least = -self.steps if self.spikes == "signed" else 0
            listener(Firing(self.site, "identity", train, x, ((u < least - 0.5) | (u > self.steps + 0.5)).sum()))
        return train

    def _differentiable(self, u: Tensor) -> Tensor:
        path = self.compensation if self.training else None
        added = path.weight if path is not None and path.mode == "grad" else 0.0
        n = _Integer.apply(u, self.spikes, self.steps, self.alpha, added, path.smooth if path is not None else "tanh")
        if path is None or path.mode == "grad" or not path.weight:
            return n
        return (1 - path.weight) * n + path.weight * _smooth(u, self.steps, path.smooth)

    def extra_repr(self) -> str:
        """Range, spikes and thresholds."""
        shown = [round(t, 6) for t in self.threshold.tolist()] if self.threshold.numel() == 1 else "per channel"
        more = f"{', rotates' if self.rotates else ''}{', folded' if self.folded else ''}"
        return f"D={self.steps}, {self.spikes}, threshold={shown}{more}"
