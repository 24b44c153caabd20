"""What every neuron is: a module that turns a real tensor into a spike train."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from torch import Tensor, nn
from torch.compiler import is_compiling

from spikeform.spikes import SpikeTrain

Recorder = Callable[["Neuron", Tensor], None]
_recorder: ContextVar[Recorder | None] = ContextVar("spikeform_recorder", default=None)


@contextmanager
def recording(recorder: Recorder) -> Iterator[None]:
    """Calibration: in the block, neurons that need thresholds show ``recorder`` their input.

    They pass it on unchanged, as if their resolution were infinite.
    """
    token = _recorder.set(recorder)
    try:
        yield
    finally:
        _recorder.reset(token)


def recorder() -> Recorder | None:
    """The active calibration recorder, or None."""
    return None if is_compiling() else _recorder.get()  # a compiled pass is neither calibrated nor watched


def unseen(_neuron: Neuron, _x: Tensor) -> None:
    """The recorder that looks at nothing: uncalibrated neurons pass their input on, the others fire as ever."""


def entry(module: nn.Module, table: dict[str, Any], name: str) -> Any:
    """``module.name``, out of ``table`` (its ``_parameters``, ``_buffers`` or ``_modules``) if it is there.

    What a module does to find an attribute takes as long as a small kernel, and layers ask for several at each token.
    """
    return table[name] if name in table else getattr(module, name)


class Neuron(nn.Module):
    """A module from real inputs to spikes. It has no state between calls.

    A windowed neuron sees the sum of its input window, then fires; a streaming one sees its steps side by side.

    Args:
        site: The qualified name under which its firing is reported.
    """

    def __init__(self, site: str = "") -> None:
        super().__init__()
        self.site = site

    def encode(self, x: Tensor) -> SpikeTrain:
        """The spike train of input ``x`` ``[...]``; the train has the same shape."""
        raise AttributeError(f"{type(self).__name__} does not encode")

    def closed_form(self) -> Any:
        """Its parameters as the fused kernels of :mod:`spikeform.neurons.fused` take them, or None: there is none."""
        return None

    def forward(self, x: Tensor) -> SpikeTrain:
        """Alias of :meth:`encode`, so that module hooks work."""
        return self.encode(x)

    def _apply(self, fn, recurse=True):
        # A model-wide .to(bfloat16) must not round thresholds: what is real moves, but keeps its dtype.
        kept = {name: tensor.data for name, tensor in self._parameters.items() if tensor is not None}
        kept |= {name: tensor for name, tensor in self._buffers.items() if tensor is not None}
        super()._apply(fn, recurse)
        for name, old in kept.items():
            new = getattr(self, name)
            if new.dtype == old.dtype:
                continue
            if name in self._buffers:
                self._buffers[name] = old.to(new.device)
            else:
                grad, new.grad = new.grad, None
                new.data = old.to(new.device)
                new.grad = None if grad is None else grad.to(old.dtype)
        return self


class ThresholdNeuron(Neuron):
    """A neuron whose thresholds are found on calibration data, block by block."""

    @property
    def calibrated(self) -> bool:
        """Whether its thresholds are set and sound."""
        raise AttributeError(f"{type(self).__name__} has no thresholds")

    @property
    def statistics_per_channel(self) -> bool:
        """Whether calibration must show it a histogram per channel."""
        return False
