"""The configuration of SpikeLLM."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from spikeform.conversion.config import MethodConfig, choice, is_real, option
from spikeform.conversion.options import real, whole
from spikeform.errors import ConfigError

REAL = 16  # the number of bits that stands for real values
STEPS = (1, 2, 4, 8)
LISTS = ("skip", "weight_steps", "weight_salient")


@dataclass(eq=True, repr=True)
class SpikeLLM(MethodConfig):
    """Saliency decides the spikes: generalised integrate-and-fire neurons, Optimal Brain Spiking (arXiv 2407.04752).

    A neuron sends up to ``2^bits - 1`` spikes in a step; salient channels get ``steps`` steps, all others one. The
    weights are integers (``omniquant``, ``rtn``), or themselves few-step ternary spikes (``gptq``). The paper's
    settings are the defaults where the released code shows them; options marked *ours* are not in it.

    Args:
        pipeline: How weights are found: ``omniquant`` (learned clipping and equivalent transformation, block by
            block), ``gptq`` (column by column with error feedback) or ``rtn`` (round to nearest).
        bits: Bits b of one step of a neuron, 2 to 8; 16 leaves the activations of linear layers and attention real.
        weight_bits: Bits of a weight's step, 1 to 8; 16 leaves weights real.
        steps: T of salient channels: 1, 2, 4 or 8. Keys and values get at most 2.
        salient: Share of channels that get ``steps`` steps, 0 to 1 (``allocation="fraction"``).
        saliency: What makes a channel salient: ``obs`` (X o (X W^T) W, section 2 of the paper), ``diagonal``
            (its part diag(W^T W) E[x^2]), ``magnitude`` (largest |x|), ``random`` or ``none``.
        allocation: *Ours* but for ``fraction``: ``budget`` (the best channels of the whole model), ``sensitivity``
            (a share per layer by its measured error) or ``energy`` (saliency per expected spike).
        budget: For those: operations (``energy``: spikes) over those of T = 1, at least 1.
        masks: ``own`` (a mask for every linear layer, as released) or ``shared`` by layers of one input (*ours*).
        signed: Spikes of both signs, silent at zero (*ours*); False sends the unsigned code as released, whose zero
            lies in the middle of the code.
        form: ``unified`` (*ours*: T L levels, one integer product for all channels) or ``official`` (2^(b+log2 T) - 1
            levels, a product for each of the two units).
        span: Range of ordinary channels: ``shared`` with the salient ones (as released) or ``separate`` (*ours*).
        key_axis: ``token`` (each key by its own range) or ``channel`` (a range per channel from calibration). The
            released code's axis looks at later tokens and is not offered.
        attention: Queries, keys, values and probabilities as spikes; False leaves attention real.
        probability_bits: Bits of attention probabilities, 4 to 16.
        lm_head: Output head: ``real`` (as released), or ``int8`` (*ours*): weights of 8 bits, rounded to nearest, one
            scale an output row, and neurons of 7 bits and one step. A head tied to the embedding stays real.
        weight_form: ``affine``, ``ternary`` (T steps of -1, 0, 1), or ``partial_binary`` (a baseline like PB-LLM,
            whose weights are stored real; gptq only, ``weight_steps=[1, 8]``).
        weight_steps: T of each tier of input channels' weights, rising, such as ``[1, 2, 4]``.
        weight_salient: Shares of the channels of every tier but the first, by w^2 / U_jj^2 with U the Cholesky factor
            of H^-1 (``saliency="random"``: at random).
        rotate: Rotate the residual stream by a randomised Hadamard matrix (*ours*, after QuaRot).
        rotate_heads: With ``rotate``, also values (folded into the weights) and queries and keys (after RoPE).
        lwc: Learn weight clipping; None: where the pipeline is omniquant.
        let: Equivalent transformation: learned by omniquant, in closed form by the others; None: with omniquant.
        epochs: Of omniquant, over the calibration data; 0 takes the closed-form start. Epochs, rates and ``alpha`` are
            ours, for some 10,000 tokens; the released script has 20, 0.01, 0.001 and 0.75 for 262,144.
        batch_size: Sequences of one step of omniquant.
        lwc_lr: Learning rate of clipping.
        let_lr: Learning rate of the equivalent transformation.
        alpha: Exponent of the activations in its start, 0 to 1.
        damp: GPTQ's damping, over the mean diagonal.
        block_size: GPTQ's columns at a time.
        act_order: GPTQ takes columns by falling activation, those of the first tier before the others.
        sweeps: *Ours*: rounds after GPTQ's pass in which scales are solved for and every code is tried anew; 0 is
            GPTQ as it is known.
        seed: Of random masks, rotation and training.
        skip: Module name patterns that stay dense.
        version: Format of this config.

    Raises:
        ConfigError: A value is out of range, or two contradict each other; the message names them.
    """

    quant_method: ClassVar[str] = "spikeform_spikellm"  # type: ignore[misc]

    pipeline: str = option("omniquant", "omniquant, gptq or rtn")
    bits: int = option(4, "bits of a neuron's step, 2 to 8; 16 is real activations")
    weight_bits: int = option(4, "bits of a weight's step, 1 to 8; 16 is real weights")
    steps: int = option(2, "T of salient channels: 1, 2, 4 or 8")
    salient: float = option(0.1, "share of salient channels")
    saliency: str = option("obs", "obs, diagonal, magnitude, random or none")
    allocation: str = option("fraction", "fraction, budget, sensitivity or energy")
    budget: float = option(1.1, "operations (energy: spikes) over those of T = 1")
    masks: str = option("own", "own or shared")
    signed: bool = option(True, "spikes of both signs, silent at zero")
    form: str = option("unified", "unified or official")
    span: str = option("shared", "shared or separate")
    key_axis: str = option("token", "token or channel")
    attention: bool = option(True, "queries, keys, values and probabilities as spikes")
    probability_bits: int = option(16, "bits of attention probabilities, 4 to 16")
    lm_head: str = option("real", "output head: real or int8")
    weight_form: str = option("affine", "affine, ternary or partial_binary")
    weight_steps: tuple[int, ...] = option((1,), "T of each tier of weights, rising")
    weight_salient: tuple[float, ...] = option((), "shares of the channels of every tier but the first")
    rotate: bool = option(False, "rotate the residual stream")
    rotate_heads: bool = option(True, "with rotate, also values, queries and keys of each head")
    lwc: bool | None = option(None, "learn weight clipping")
    let: bool | None = option(None, "equivalent transformation")
    epochs: int = option(10, "epochs of omniquant")
    batch_size: int = option(1, "sequences of one step of omniquant")
    lwc_lr: float = option(0.1, "learning rate of clipping")
    let_lr: float = option(0.02, "learning rate of the equivalent transformation")
    alpha: float = option(0.5, "exponent of the activations in the transformation's start")
    damp: float = option(0.01, "damping of GPTQ, over the mean diagonal")
    block_size: int = option(128, "columns at a time of GPTQ")
    act_order: bool = option(True, "GPTQ takes columns by falling activation")
    sweeps: int = option(2, "GPTQ's rounds of scales and coordinate descent after its pass")
    seed: int = option(0, "of random masks, rotation and training")
    skip: tuple[str, ...] = option((), "module name patterns that stay dense")
    version: int = option(1, "format of this config")

    def check(self) -> None:
        """Every option in its range; lists become tuples."""
        self._numbers()
        choice("pipeline", self.pipeline, ("omniquant", "gptq", "rtn"))
        choice("saliency", self.saliency, ("obs", "diagonal", "magnitude", "random", "none"))
        choice("allocation", self.allocation, ("fraction", "budget", "sensitivity", "energy"))
        choice("masks", self.masks, ("own", "shared"))
        choice("form", self.form, ("unified", "official"))
        choice("span", self.span, ("shared", "separate"))
        choice("key_axis", self.key_axis, ("token", "channel"))
        choice("lm_head", self.lm_head, ("real", "int8"))
        choice("weight_form", self.weight_form, ("affine", "ternary", "partial_binary"))
        for name in LISTS:
            if not isinstance(getattr(self, name), list | tuple):
                raise ConfigError(f"{name} must be a list, got {getattr(self, name)!r}")
            setattr(self, name, tuple(getattr(self, name)))
        if not all(isinstance(pattern, str) for pattern in self.skip):
            raise ConfigError(f"skip must be a list of module name patterns, got {self.skip!r}")
        for name in ("signed", "attention", "rotate", "rotate_heads", "lwc", "let", "act_order"):
            optional = name in ("lwc", "let") and getattr(self, name) is None
            if not optional and not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name} must be true or false, got {getattr(self, name)!r}")
        self._tiers()
        self._contradictions()

    def _numbers(self) -> None:
        for name, least, most in (("bits", 2, 8), ("weight_bits", 1, 8)):
            if getattr(self, name) != REAL:
                whole(name, getattr(self, name), least, most)
        choice("steps", self.steps, STEPS)
        whole("probability_bits", self.probability_bits, 4, 16)
        for name, least in (("epochs", 0), ("batch_size", 1), ("block_size", 1), ("sweeps", 0), ("seed", 0)):
            whole(name, getattr(self, name), least)
        for name in ("lwc_lr", "let_lr", "damp"):
            real(name, getattr(self, name), positive=True)
        for name in ("salient", "alpha"):
            if not is_real(getattr(self, name)) or not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name} must be a number from 0 to 1, got {getattr(self, name)!r}")
        if not is_real(self.budget) or not 1 <= self.budget < float("inf"):
            raise ConfigError(f"budget must be a number of at least 1 (1 is T = 1 everywhere), got {self.budget!r}")

    def _tiers(self) -> None:
        steps, shares = self.weight_steps, self.weight_salient
        if not steps or any(type(s) is not int or s not in STEPS for s in steps) or list(steps) != sorted(set(steps)):
            raise ConfigError(f"weight_steps must be rising numbers among 1, 2, 4 and 8, got {list(steps)!r}")
        if len(shares) != len(steps) - 1:
            raise ConfigError(
                f"weight_salient must give a share for every tier but the first: {len(steps) - 1}, got {list(shares)!r}"
            )
        if not all(is_real(s) and 0 < s < 1 for s in shares) or sum(shares) >= 1:
            raise ConfigError(f"weight_salient must be shares above 0 that sum to less than 1, got {list(shares)!r}")

    def _contradictions(self) -> None:
        if self.bits == REAL and self.weight_bits == REAL:
            raise ConfigError("bits and weight_bits are both 16: nothing would spike")
        if self.weight_form == "partial_binary" and self.pipeline != "gptq":
            raise ConfigError("weight_form partial_binary is a baseline of the gptq pipeline: set pipeline to gptq")
        if self.weight_form == "partial_binary" and self.weight_steps != (1, 8):
            raise ConfigError("partial_binary has binary weights and some of 8 bits: set weight_steps to [1, 8]")
        if self.weight_form != "affine" and self.pipeline == "omniquant":
            raise ConfigError(f"omniquant learns affine weights; weight_form {self.weight_form} needs gptq or rtn")
        if self.weight_bits == REAL and (self.pipeline != "omniquant" or self.weight_steps != (1,)):
            raise ConfigError("weight_bits 16 leaves weights real: take pipeline omniquant and no weight_steps")
        if self.lwc and (self.pipeline != "omniquant" or self.weight_bits == REAL):
            raise ConfigError("lwc learns the clipping of integer weights: it needs omniquant and weight_bits below 16")
        if self.allocation != "fraction" and self.bits == REAL:
            raise ConfigError(f"allocation {self.allocation} gives steps to activations: set bits below 16")
        if self.allocation != "fraction" and self.saliency == "none":
            raise ConfigError(f"allocation {self.allocation} goes by saliency: none gives no channel more steps")

    @property
    def spikes(self) -> bool:
        """Whether the activations of linear layers are spikes."""
        return self.bits != REAL

    @property
    def clips(self) -> bool:
        """Whether weight clipping is learned."""
        return self.pipeline == "omniquant" and self.weight_bits != REAL if self.lwc is None else self.lwc

    @property
    def transforms(self) -> bool:
        """Whether channels are rescaled by the equivalent transformation."""
        return self.pipeline == "omniquant" if self.let is None else self.let

    @property
    def codes(self) -> bool:
        """Whether the weights of converted layers are stored as integers."""
        return self.weight_bits != REAL and self.weight_form != "partial_binary"
