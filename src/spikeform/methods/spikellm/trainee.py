"""What is learned about one block: its weights' clip factors, and the scales of its pairs.

A pair's scale is ``s = exp(u)``, u from 0, on top of what balancing has folded already: positive, and alike for a
model whose channels were rescaled (the released code learns ``s`` itself, kept above 0.01).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call

from spikeform.conversion.pairs import Pair, scaled
from spikeform.errors import CalibrationError
from spikeform.layers import SpikingLinear
from spikeform.methods.spikellm import clipping
from spikeform.methods.spikellm.clipping import Factors, fake_quantise
from spikeform.methods.spikellm.config import REAL, SpikeLLM
from spikeform.methods.spikellm.grids import levels_of
from spikeform.neurons import ThresholdNeuron

Batch = tuple[Tensor, Tensor, tuple[tuple, dict]]  # input, target, the block's other arguments


class Trainee:
    """A block's real parameters in (at least) fp32, and what is learned about them.

    Attributes:
        scales: Each pair, and the logarithm ``u`` of its scale, ``[channels]``.
        logits: Of the clip factors of each linear layer (its name in the block), ``[R, N]``.
    """

    def __init__(
        self,
        block: nn.Module,
        name: str,
        pairs: Sequence[Pair],
        config: SpikeLLM,
        tiers: dict[str, Tensor | None],
    ) -> None:
        silent = [n.site for n in block.modules() if isinstance(n, ThresholdNeuron) and not n.calibrated]
        if silent:
            raise CalibrationError(f"{silent[0]} is not calibrated: set its steps before the block is trained")
        self.block, self.prefix = block, f"{name}."
        self.masters = {n: wide(p.detach()) for n, p in block.named_parameters()}
        self.layers = [n for n, m in block.named_modules() if isinstance(m, SpikingLinear)]
        self.tiers = {n: tiers.get(self.prefix + n) for n in self.layers}
        real = config.weight_bits == REAL
        self.levels = () if real else levels_of(config.weight_bits, config.weight_steps, ternary=False)
        self.scales: list[tuple[Pair, Tensor]] = []
        for pair in pairs if config.transforms else ():
            device = self.masters[f"{pair.producer_name.removeprefix(self.prefix)}.weight"].device
            self.scales.append((pair, torch.zeros(pair.channels, device=device, requires_grad=True)))
        self.logits: dict[str, Factors] = {}
        for layer in self.layers if config.clips else ():
            weight = self.masters[f"{layer}.weight"]
            self.logits[layer] = clipping.start(len(self.levels), len(weight), weight.device)

    def leaves(self) -> tuple[list[Tensor], list[Tensor]]:
        """What is learned: of the scales, and of the clip factors."""
        return [u for _, u in self.scales], [logit for pair in self.logits.values() for logit in pair]

    def transformed(self) -> dict[str, Tensor]:
        """The block's parameters, real, every pair rescaled."""
        params = self.masters
        for pair, u in self.scales:
            params = scaled(pair, u.exp(), params, self.prefix)
        return params

    def parameters(self) -> dict[str, Tensor]:
        """The same with the values that the weights' codes stand for."""
        params = dict(self.transformed())
        for layer in self.layers if self.levels else ():
            key, logits = f"{layer}.weight", self.logits.get(layer)
            factors = None if logits is None else (logits[0].sigmoid(), logits[1].sigmoid())
            params[key] = fake_quantise(params[key], self.levels, self.tiers[layer], factors)
        return params

    def error(self, params: dict[str, Tensor], batch: Batch) -> Tensor:
        """Sum of squared differences from the target."""
        x, target, (args, kwargs) = batch
        out = functional_call(self.block, params, (x, *args), kwargs)
        return ((out[0] if isinstance(out, tuple) else out) - target).square().sum()

    @torch.no_grad()
    def fold(self) -> None:
        """Put the rescaled parameters into the block."""
        params = self.transformed()
        for name, parameter in self.block.named_parameters():
            parameter.copy_(params[name])

    def factors(self) -> dict[str, Factors]:
        """Clip factors of each layer, by its qualified name."""
        return {
            self.prefix + layer: (g.detach().sigmoid(), b.detach().sigmoid()) for layer, (g, b) in self.logits.items()
        }


def wide(tensor: Tensor) -> Tensor:
    """Half precision as fp32; anything else as it is."""
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor
