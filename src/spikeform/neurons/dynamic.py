"""A neuron whose threshold is its row's largest element, and so never saturates: attention probabilities."""

from __future__ import annotations

import torch
from torch import Tensor

from spikeform.neurons.neuron import Neuron, recorder
from spikeform.neurons.rounding import round_straight_through
from spikeform.spikes import Coding, Radix2, SpikeTrain
from spikeform.spikes.trace import Firing, observer


class Dynamic(Neuron):
    """``code = round(x / unit)``, ``unit = max_row(x) / limit``: the largest has the top code.

    Two passes over a row (the threshold is known before it fires); what is negative never reaches a threshold and is
    silent. An all-zero row is silent. Gradients: straight through the rounding, and through the unit.

    Args:
        coding: How codes unroll. Sixteen bits stand for the released code's "16 bits", there the identity.
        site: The qualified name under which its firing is reported.
    """

    def __init__(self, coding: Coding | None = None, site: str = "") -> None:
        super().__init__(site)
        self.coding = Radix2(16) if coding is None else coding

    def closed_form(self) -> int:
        """What kernels need: the largest code."""
        return self.coding.limit

    def encode(self, x: Tensor) -> SpikeTrain:
        """The spike train of ``x`` ``[..., C]``, its quantum ``[1, ..., 1]``; exact where no gradient flows.

        While calibrating, the input is shown to the recorder and passed on unchanged.
        """
        record = recorder()
        v = x if x.dtype == torch.float64 else x.float()
        if record is not None:
            record(self, x)
            return SpikeTrain(v, v.new_ones(1), self.coding)
        most = v.amax(-1, keepdim=True)
        # By a tensor: CUDA multiplies by the inverse of a number, and the last bit would depend on the device.
        unit = (most / torch.full_like(most, self.coding.limit)).clamp(min=torch.finfo(v.dtype).tiny)
        codes = round_straight_through(v / unit).clamp(0, self.coding.limit)
        train = SpikeTrain(codes, unit[None], self.coding, exact=not (torch.is_grad_enabled() and codes.requires_grad))
        listener = observer()
        if listener is not None:
            listener(Firing(self.site, "identity", train, x, (v < 0).sum()))
        return train

    def extra_repr(self) -> str:
        """Coding."""
        return f"{self.coding}"
