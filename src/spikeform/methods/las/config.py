"""The configuration of LAS."""

from __future__ import annotations

from dataclasses import dataclass
from math import frexp
from typing import Any, ClassVar

from spikeform.conversion.config import MethodConfig, choice, is_real, option, patterns, switches
from spikeform.errors import ConfigError
from spikeform.neurons.oat import ROUNDINGS
from spikeform.spikes import Coding, MultiThreshold, Radix2, SignedDigit
from spikeform.spikes.codings import check_steps

CODINGS = ("radix2", "signed_digit", "multi_threshold")
ROLES = ("linear", "query", "key", "value", "probability", "norm", "up", "act", "lm_head")
MULTIPLIED = ("linear", "lm_head", "query", "key", "value")  # operands of matrix products, which ``units`` is about


def check_powers_of_two(name: str, values: tuple[float, ...]) -> None:
    """Raise :class:`ConfigError` unless all ``values`` given for ``name`` are powers of two."""
    if any(frexp(v)[0] != 0.5 for v in values):
        raise ConfigError(f"thresholds[{name!r}] must be powers of two with units='power_of_two', got {values!r}")


@dataclass(eq=True, repr=True)
class LAS(MethodConfig):
    """Lossless ANN-to-SNN conversion (arXiv 2505.09659).

    OAT neurons before every product, HG neurons for every non-linearity. Where the paper gives no rule
    (thresholds, the HG fit) the defaults are ours.

    Args:
        steps: Time steps T, 1 to 16.
        coding: ``radix2`` (as released), ``signed_digit`` (the same codes in fewer, ternary spikes) or
            ``multi_threshold`` (``levels`` sub-levels a step).
        levels: Sub-levels of ``multi_threshold``: 2 or 4.
        rounding: ``nearest``, ``floor`` (the paper's >=) or ``strict`` (the released code's >).
        outlier: Two thresholds a site (OAT); False: one (MT).
        threshold: How thresholds follow from calibration: ``least_error`` or ``quantile``.
        quantile: Share of inputs below the normal threshold, for ``quantile``.
        margin: Largest threshold over the largest calibration input.
        per_channel: A power-of-two threshold scale per input channel, folded into the weights.
        nonlinear: HG realisation: ``fixed_point`` (exact, bounded error) or ``few_spike`` (learned sub-neurons).
        softmax: Softmax by HG neurons; False leaves it real.
        norms: LayerNorm and RMSNorm by HG neurons; False leaves them dense.
        activations: Activation functions by HG neurons; False leaves them dense.
        lm_head: Make the output head spiking too.
        skip: Module name patterns (``*.layers.0.*``) that stay dense.
        units: ``free``; or ``power_of_two``: thresholds of the operands of matrix products (linear layers, queries,
            keys, values) are powers of two, so that what is sent for a bf16 input is one bf16 number, at any T.
        weight_bits: 16: weights stay real. 8: int8 weights, one scale an output row; products are then exact sums of
            integers. A head tied to the embedding stays real.
        thresholds: Given thresholds: role (``linear``, ``query``, ``key``, ``value``, ``probability``, ``norm``,
            ``up``, ``act``, ``lm_head``) or site pattern -> ``[normal, outlier]`` (``[theta]`` without outlier).
            Sites not named are calibrated.
        version: Format of this config.

    Raises:
        ConfigError: A value is out of range; the message names it.
    """

    quant_method: ClassVar[str] = "spikeform_las"  # type: ignore[misc]

    steps: int = option(16, "time steps T, 1 to 16")
    coding: str = option("radix2", "radix2, signed_digit or multi_threshold")
    levels: int = option(2, "sub-levels a step of multi_threshold: 2 or 4")
    rounding: str = option("nearest", "nearest, floor or strict")
    outlier: bool = option(True, "two thresholds a site (OAT) or one (MT)")
    threshold: str = option("least_error", "least_error or quantile")
    quantile: float = option(0.999, "share of inputs below the normal threshold")
    margin: float = option(2.0, "largest threshold over the largest calibration input")
    per_channel: bool = option(False, "power-of-two threshold scale per input channel, folded into the weights")
    nonlinear: str = option("fixed_point", "fixed_point or few_spike")
    softmax: bool = option(True, "softmax by HG neurons")
    norms: bool = option(True, "LayerNorm and RMSNorm by HG neurons")
    activations: bool = option(True, "activation functions by HG neurons")
    lm_head: bool = option(False, "make the output head spiking")
    skip: tuple[str, ...] = option((), "module name patterns that stay dense")
    units: str = option("free", "free, or power_of_two thresholds where trains meet weights, keys or values")
    weight_bits: int = option(16, "16: real weights; 8: int8 weights, one scale an output row")
    thresholds: dict[str, tuple[float, ...]] | None = option(None, "given thresholds by role or site pattern")
    version: int = option(1, "format of this config")

    def check(self) -> None:
        """Every option in its range; lists become tuples."""
        try:
            check_steps(self.steps)
        except ValueError as error:
            raise ConfigError(str(error)) from None
        choice("coding", self.coding, CODINGS)
        choice("rounding", self.rounding, ROUNDINGS)
        choice("threshold", self.threshold, ("least_error", "quantile"))
        choice("nonlinear", self.nonlinear, ("fixed_point", "few_spike"))
        choice("levels", self.levels, (2, 4))
        choice("units", self.units, ("free", "power_of_two"))
        choice("weight_bits", self.weight_bits, (8, 16))
        if self.units == "power_of_two" and self.coding == "multi_threshold":
            raise ConfigError("units='power_of_two' needs a code for every integer: multi_threshold has gaps")
        switches(self, "outlier", "per_channel", "softmax", "norms", "activations", "lm_head")
        if not is_real(self.quantile) or not 0 < self.quantile <= 1:
            raise ConfigError(f"quantile must be above 0 and at most 1, got {self.quantile!r}")
        if not is_real(self.margin) or not 0 < self.margin < float("inf"):
            raise ConfigError(f"margin must be a finite number above 0, got {self.margin!r}")
        self.skip = patterns("skip", self.skip)
        if self.thresholds is not None:
            if not isinstance(self.thresholds, dict) or not all(isinstance(k, str) for k in self.thresholds):
                raise ConfigError(f"thresholds must map roles or site patterns to numbers, got {self.thresholds!r}")
            self.thresholds = {k: self._given(k, v) for k, v in self.thresholds.items()}

    def _given(self, name: str, values: Any) -> tuple[float, ...]:
        wanted = 2 if self.outlier else 1
        values = tuple(values) if isinstance(values, list | tuple) else (values,)
        rising = all(is_real(v) and 0 < v < float("inf") for v in values) and list(values) == sorted(set(values))
        if len(values) != wanted or not rising:
            raise ConfigError(f"thresholds[{name!r}] must be {wanted} finite positive rising numbers, got {values!r}")
        if name in MULTIPLIED and self.units == "power_of_two":
            check_powers_of_two(name, values)
        return tuple(float(v) for v in values)

    def make_coding(self) -> Coding:
        """The coding of OAT and MT neurons."""
        if self.coding == "multi_threshold":
            return MultiThreshold(self.steps, self.levels)
        return self.make_bit_coding()

    def make_bit_coding(self) -> Coding:
        """The coding of fixed-point HG neurons: bits, ternary where ``coding`` is."""
        return SignedDigit(self.steps) if self.coding == "signed_digit" else Radix2(self.steps)
