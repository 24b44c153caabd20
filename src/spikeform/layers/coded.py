"""A linear layer whose weights are integers: codes on a grid, or themselves few-step spikes.

    W[n, k] = weight[n, k] * scale[tier[k], n]

N output features, K input channels, R tiers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from spikeform.layers.linear import SpikingLinear
from spikeform.layers.packed import NAMES, Form, narrow, pack, problems, unpack
from spikeform.native import fixed
from spikeform.neurons import GIF, MT, Neuron, SignedInteger
from spikeform.neurons.fused import gif_integers
from spikeform.neurons.neuron import entry
from spikeform.neurons.oat import OatForm
from spikeform.synapses import fusible, linear
from spikeform.synapses.fused import GROUP, event_product, gif_linear, oat_linear_int, pack_nibbles
from spikeform.synapses.integer import IntegerWeight


class CodedLinear(SpikingLinear):
    """``y = sum_t spikes(t) W^T + b`` with an integer ``W``. As constructed, a skeleton whose values are not there yet.

    Args:
        in_features: K.
        out_features: N.
        bias: The bias itself, or whether to make one.
        neuron: Encodes the input. None: the input is real, and the weights are the spikes.
        bits: Bits of one step of a weight.
        tiers: Steps T of each tier of input channels.
        ternary: Whether a step is -1, 0 or 1, instead of one of ``2^bits`` levels.
        site: Name reported to the observer; None: the neuron's.

    Attributes:
        weight: int8 or int16 ``[N, K]``, its zero-points taken off; on the meta device until set or loaded.
        scale: fp32 ``[R, N]``, NaN until set. Keeps its dtype when the model is cast.
        zero: int16 ``[R, N]``, how far a file's codes lie above the weight's; None if ternary (there it is T).
        tier: uint8 ``[K]``; None where there is one tier.
    """

    weight: Tensor  # type: ignore[assignment]  # a buffer, not the parameter of nn.Linear
    scale: Tensor
    zero: Tensor | None
    tier: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: nn.Parameter | bool | None,
        neuron: Neuron | None,
        bits: int,
        tiers: tuple[int, ...] = (1,),
        ternary: bool = False,
        site: str | None = None,
    ) -> None:
        super().__init__(in_features, out_features, False, neuron, device="meta")
        if isinstance(bias, nn.Parameter):
            self.bias = bias
        elif bias:
            self.bias = nn.Parameter(torch.zeros(out_features))
        self.form = Form(bits, tuple(tiers), ternary)
        self.site = site if site is not None else neuron.site if neuron is not None else ""
        self._known: tuple[tuple, IntegerWeight] | None = None
        self._nibbles: tuple[Tensor, Tensor | None] | None = None
        self._views: tuple[Tensor, Tensor | None, Tensor, Tensor | None] | None = None
        del self.weight
        rows = (len(tiers), out_features)
        tier = torch.full((in_features,), 255, dtype=torch.uint8) if len(tiers) > 1 else None
        self.register_buffer("weight", torch.empty(out_features, in_features, dtype=torch.int8, device="meta"))
        self.register_buffer("scale", torch.full(rows, float("nan"), dtype=torch.float32))
        self.register_buffer("zero", None if ternary else torch.zeros(rows, dtype=torch.int16))
        self.register_buffer("tier", tier)

    @classmethod
    def from_spiking(cls, layer: nn.Linear, weight: IntegerWeight, site: str | None = None) -> CodedLinear:
        """``layer`` with ``weight`` in place of its own; its bias and its neuron are taken over.

        Raises:
            ValueError: The weight has another shape.
        """
        wanted = (layer.out_features, layer.in_features)
        if tuple(weight.shape) != wanted:
            raise ValueError(f"{site or 'weight'}: codes of shape {list(weight.shape)} for weights of {list(wanted)}")
        neuron = getattr(layer, "neuron", None)
        coded = cls(wanted[1], wanted[0], layer.bias, neuron, weight.bits, weight.tiers, weight.ternary, site)
        coded._take(weight)
        coded.train(layer.training)
        return coded

    def _take(self, weight: IntegerWeight) -> None:
        self.weight, self.scale = narrow(weight.codes), weight.scale.detach().float().contiguous()
        self.zero = None if self.form.ternary else weight.zero.to(torch.int16).contiguous()
        self.tier = weight.tier if self.tier is not None else None

    def integer_weight(self) -> IntegerWeight:
        """The weights as synapses take them: the same tensors. Kept, with what it keeps, until one of them changes."""
        known = self._known
        if torch.compiler.is_compiling() and known is not None and known[1].codes is self.weight:
            return known[1]
        own = [x for x in (self.weight, self.scale, self.zero, self.tier) if x is not None]
        key = tuple((id(x), 0 if x.is_inference() else x._version) for x in own)
        if self._known is None or self._known[0] != key:  # ids are safe: what is kept holds the tensors themselves
            zero = self.form.zeros(self.scale) if self.zero is None else self.zero
            self._known = key, IntegerWeight(self.weight, self.scale, zero, self.tier, *self.form)
        return self._known[1]

    def forward(self, input: Tensor) -> Tensor:
        """Real ``[..., K]`` to real ``[..., N]``, in the dtype of ``input``."""
        out = self._fused(input)
        if out is not None:
            return out
        sent = input if self.neuron is None else self.neuron(input)
        wide = torch.float64 if input.dtype == torch.float64 else torch.float32
        bias = None if self.bias is None else self.bias.to(wide)
        return linear(sent, self.integer_weight(), bias, site=self.site).to(input.dtype)

    def _fused(self, x: Tensor) -> Tensor | None:
        own, neuron = self._buffers, entry(self, self._modules, "neuron")
        form = neuron.closed_form() if isinstance(neuron, MT | GIF | SignedInteger) else None
        weight, bias = entry(self, own, "weight"), entry(self, self._parameters, "bias")
        learned = entry(neuron, neuron._parameters, "threshold") if isinstance(neuron, SignedInteger) else None
        if (
            form is None
            or weight.dtype != torch.int8
            or entry(self, own, "tier") is not None
            or not fusible(x, bias, learned)
        ):
            return None
        scale, zero = self._only_tier(entry(self, own, "scale"), entry(self, own, "zero"))
        if isinstance(form, OatForm):
            if form.shift is not None:
                return None
            if not isinstance(neuron, SignedInteger):
                return oat_linear_int(x, weight, scale, bias, form.threshold, *form[2:])
            if self.event_rows is not None and self.visits(x):
                out = event_product(neuron.integers(x), self.event_rows, scale, self.out_features)
            else:
                out = oat_linear_int(neuron.potential(x), weight, scale, None, form.threshold, *form[2:])
            return self.finished(out, neuron.unit(), bias, x.dtype)
        if self.event_rows is not None and self.visits(x):
            integers, unit = gif_integers(x, *form)
            out = event_product(integers, self.event_rows, scale, self.out_features)
            return self.finished(out, unit, bias, x.dtype)
        return gif_linear(x, weight, scale, self.nibbles(), zero, bias, *form)

    def _only_tier(self, scale: Tensor, zero: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Scale and zero-points ``[N]`` where there is one tier; kept, since to make a view costs as a small kernel."""
        known = self._views
        if torch.compiler.is_compiling():
            return scale[0], None if zero is None else zero[0]
        if known is None or known[0] is not scale or known[1] is not zero:
            known = self._views = scale, zero, scale[0], None if zero is None else zero[0]
        return known[2:]

    def nibbles(self) -> Tensor | None:
        """The weights and their zero-points in 4 bits (:func:`~spikeform.synapses.fused.pack_nibbles`), made once.

        None where they do not fit.
        """
        known = self._nibbles
        if known is not None and known[0] is entry(self, self._buffers, "weight"):
            return known[1]
        packed = None
        if self.zero is not None and self.form.levels == [15] and self.in_features % GROUP == 0:
            packed = fixed(pack_nibbles(self.weight + self.zero[0][:, None]))
        self._nibbles = self.weight, packed
        return packed

    def fold(self) -> None:
        """Nothing: integer weights take no channel shifts."""

    def packed(self) -> dict[str, Tensor]:
        """The buffers that a file holds in another form: see :mod:`spikeform.layers.packed`."""
        return pack(self.integer_weight())

    def load_packed(self) -> list[str]:
        """Give buffers that were just read from a file their working form.

        Returns:
            What is wrong with them, each beginning with the buffer's name; nothing has changed then.
        """
        return self._unpack({name: getattr(self, name) for name in NAMES if getattr(self, name) is not None})

    def _unpack(self, read: dict[str, Tensor]) -> list[str]:
        found = problems(read, self.form, self.out_features, self.in_features)
        if not found:
            try:
                self._take(unpack(read, self.form, self.in_features))
            except ValueError as error:
                found = [str(error)]
        return found

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: Any, **kwargs: Any) -> None:
        # Trainers and work folders resume by load_state_dict: from files (packed) and from memory.
        own = [name for name in NAMES if getattr(self, name) is not None]
        read = {name: state_dict[f"{prefix}{name}"] for name in own if f"{prefix}{name}" in state_dict}
        weight = read.get("weight")
        if weight is not None and weight.dtype == torch.uint8 and len(read) == len(own):
            where = self.scale.device
            args[-1].extend(f"{prefix}{p}" for p in self._unpack({name: x.to(where) for name, x in read.items()}))
            state_dict |= {f"{prefix}{name}": getattr(self, name) for name in own}
        elif weight is not None and weight.dtype in (torch.int8, torch.int16):
            self.weight = torch.empty(self.weight.shape, dtype=weight.dtype, device=self.scale.device)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _apply(self, fn, recurse=True):
        # As for neurons: a model-wide .to(bfloat16) must not round the scales. Of a skeleton there is no weight yet.
        weight, scale = self.weight, self.scale
        if weight.device.type == "meta":
            self.weight = torch.empty(0, dtype=weight.dtype)
        super()._apply(fn, recurse)
        self.weight = weight if weight.device.type == "meta" else self.weight
        self.scale = self.scale if self.scale.dtype == torch.float32 else scale.to(self.scale.device)
        return self

    def extra_repr(self) -> str:
        """Sizes and the weights' form."""
        kind = "ternary" if self.form.ternary else f"{self.form.bits} bits"
        return f"{super().extra_repr()}, weights: {kind}, steps {'/'.join(map(str, self.form.tiers))}"
