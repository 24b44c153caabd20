"""What a state-space mixer does in real numbers: the weights that it reads without calling their modules, and the scan.

One rule for the dense and the spiking network, by the recurrent form (chunks, as prefill computes them, do more), for
each token; di inner channels, N states of each, a causal convolution of k taps over C channels, R the rank of Mamba's
step size:

    convolution   k C MACs and its bias     C = di (Mamba) or di + 2 G N (Mamba-2, G groups)
    dt_proj       R di MACs and its bias    Mamba alone
    scan          3 di N MACs               the state's decay, what enters it, what is read from it; di = heads x size
    gate          di multiplications

What enters a convolution as spikes is a product of the spiking network, and no MAC here.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from spikeform.conversion.kinds import MIXERS, mixers, type_name
from spikeform.energy.real import RealTally
from spikeform.energy.tallies import DenseTally
from spikeform.layers.state_space import ConvolvedProjection


def unheard(model: nn.Module) -> set[str]:
    """Names of the modules whose weights a mixer reads itself: none of their calls may count beside that."""
    return {f"{name}.{part}" for name, mixer in mixers(model) for part in _parts(mixer)}


def _parts(mixer: nn.Module) -> tuple[str, ...]:
    named = dict.fromkeys(("conv1d", *MIXERS[type_name(mixer)]))
    return tuple(part for part in named if isinstance(getattr(mixer.get_submodule(part), "weight", None), Tensor))


def mixer_hooks(
    dense: dict[str, DenseTally], real: dict[str, RealTally] | None, model: nn.Module
) -> list[RemovableHandle]:
    """Fill ``dense`` (weights) and, if wanted, ``real`` (scan and gate) whenever ``model`` runs, until removed."""
    return [
        mixer.get_submodule("in_proj").register_forward_hook(_counts(dense, real, name, mixer))
        for name, mixer in mixers(model)
    ]


def _counts(dense: dict[str, DenseTally], real: dict[str, RealTally] | None, name: str, mixer: Any) -> Any:
    inner, states, convolved = mixer.intermediate_size, mixer.ssm_state_size, mixer.conv1d.weight.shape[0]
    spikes = isinstance(mixer.in_proj, ConvolvedProjection)

    def after(_module: nn.Module, _args: tuple, output: Tensor) -> None:
        tokens = output.numel() // output.shape[-1]
        reads = 0
        for part in _parts(mixer):
            module = mixer.get_submodule(part)
            tally = dense.setdefault(f"{name}.{part}", DenseTally(f"{name}.{part}", type(module).__name__))
            if not (spikes and part == "conv1d"):
                tally.macs += tokens * module.weight.numel()
                tally.weights += module.weight.numel()
                reads += convolved if part == "conv1d" else module.weight.shape[1]
            tally.additions += tokens * (0 if module.bias is None else module.bias.numel())
        if real is not None:
            tally = real.setdefault(name, RealTally(name, "scan"))
            tally.macs += tokens * 3 * inner * states
            tally.multiplications += tokens * inner
            # The inputs of the parts above; the scan's: its channels, what enters and reads the state, the step sizes.
            both = convolved - inner or 2 * states
            steps = inner if convolved == inner else mixer.num_heads
            tally.elements += tokens * (reads + inner + both + steps)

    return after
