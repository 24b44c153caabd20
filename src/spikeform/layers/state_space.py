"""What a state-space mixer needs so that its projections can spike."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from spikeform.layers.linear import SpikingLinear
from spikeform.neurons import SignedInteger
from spikeform.spikes.trace import Product, observer


def call_projections(mixer: nn.Module) -> None:
    """Make a mixer of transformers call its output projection, whatever kernels are installed.

    In training and without a cache it hands the projection's *weight* to a fused kernel where there is one, and the
    neuron before it would be skipped in silence. Its ``training`` flag, which decides nothing else, is kept down.
    """
    mixer.register_forward_pre_hook(_not_fused)


def _not_fused(mixer: nn.Module, _args: Any) -> None:
    mixer.training = False  # of this module alone: its parts keep theirs


class ConvolvedProjection(SpikingLinear):
    """An input projection, a part of whose output is sent as spikes into the causal convolution that follows.

    What the convolution keeps in its cache are then integers too. Use :meth:`send`.
    """

    sends: SignedInteger
    part: tuple[int, int]
    taps: int

    def send(self, neuron: SignedInteger, start: int, stop: int, taps: int) -> None:
        """Let ``neuron`` encode outputs ``start .. stop``, each of which ``taps`` weights of the convolution meet."""
        self.sends, self.part, self.taps = neuron, (start, stop), taps

    def forward(self, input: Tensor) -> Tensor:
        """Real ``[..., K]`` to real ``[..., N]``."""
        out = super().forward(input)
        start, stop = self.part
        train = self.sends(out[..., start:stop])
        listener = observer()
        if listener is not None:
            told = Product(self.sends.site, "linear", (train,), (self.taps,), train.codes.numel() * self.taps)
            listener(told)
        return torch.cat([out[..., :start], train.decode().to(out.dtype), out[..., stop:]], -1)
