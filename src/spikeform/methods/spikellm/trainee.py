"""What is learned about one block: its weights' clip factors, and the scales of its pairs.

A pair's scale is ``s = s0 exp(u)``, u from 0: positive, and alike for a model whose channels were rescaled (the
released code learns ``s`` itself, kept above 0.01). The start, per channel, over all layers that read it:

    s0 = x^alpha / w^(1 - alpha),  x = max |x_j|,  w = max_i |W_ij| / sqrt(sum_k (W_ik x_k)^2);   1 for query_key

The released code's w is ``max_i |W_ij|`` of one of the layers. But each row has a scale of its own, so that a row's
size must not count; neither then does the order of the pairs, of which one's consumer is the other's producer.
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
        scales: Each pair, its start ``s0`` and the logarithm ``u`` of what is learned beyond, ``[channels]``.
        logits: Of the clip factors of each linear layer (its name in the block), ``[R, N]``.
    """

    def __init__(
        self,
        block: nn.Module,
        name: str,
        pairs: Sequence[Pair],
        config: SpikeLLM,
        actmax: dict[str, Tensor],
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
        self.scales: list[tuple[Pair, Tensor, Tensor]] = []
        for pair in pairs if config.let else ():
            s0 = self._start(pair, actmax, config.alpha)
            self.scales.append((pair, s0, torch.zeros_like(s0, requires_grad=True)))
        self.logits: dict[str, Factors] = {}
        for layer in self.layers if config.lwc else ():
            weight = self.masters[f"{layer}.weight"]
            self.logits[layer] = clipping.start(len(self.levels), len(weight), weight.device)

    def leaves(self) -> tuple[list[Tensor], list[Tensor]]:
        """What is learned: of the scales, and of the clip factors."""
        return [u for _, _, u in self.scales], [logit for pair in self.logits.values() for logit in pair]

    def transformed(self) -> dict[str, Tensor]:
        """The block's parameters, real, every pair rescaled."""
        params = self.masters
        for pair, s0, u in self.scales:
            params = scaled(pair, s0 * u.exp(), params, self.prefix)
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

    def _start(self, pair: Pair, actmax: dict[str, Tensor], alpha: float) -> Tensor:
        readers = [n for n in pair.consumer_names if n.removeprefix(self.prefix) in self.layers]
        device = self.masters[f"{pair.producer_name.removeprefix(self.prefix)}.weight"].device
        if pair.kind == "query_key" or not readers:
            return torch.ones(pair.channels, device=device)
        peaks, shares = [], []
        for reader in readers:
            peak = actmax[reader].to(device).double()
            weight = self.masters[f"{reader.removeprefix(self.prefix)}.weight"].double().abs()
            row = (weight * peak).square().sum(1, keepdim=True).sqrt()
            peaks.append(peak)
            shares.append((weight / torch.where(row > 0, row, 1.0)).amax(0))
        return start(pair.largest(torch.stack(peaks).amax(0)), pair.largest(torch.stack(shares).amax(0)), alpha)


def start(act: Tensor, weight: Tensor, alpha: float) -> Tensor:
    """``act^alpha / weight^(1 - alpha)`` of each channel's largest magnitudes, fp32 ``[channels]``, both fp64.

    A channel that is zero in one of them is given the other channels' median product; one zero in both, 1. Worked out
    in fp64, so that a channel rescaled by a power of two gets the same fp32 number, so much larger.
    """
    product = (act * weight)[(act > 0) & (weight > 0)]
    if not len(product):
        return torch.ones_like(act, dtype=torch.float32)
    typical, dead = product.median(), (act == 0) & (weight == 0)
    act = torch.where(act > 0, act, typical / weight)
    weight = torch.where(weight > 0, weight, typical / act)
    return torch.where(dead, 1.0, act**alpha / weight ** (1 - alpha)).float()


def wide(tensor: Tensor) -> Tensor:
    """Half precision as fp32; anything else as it is."""
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor
