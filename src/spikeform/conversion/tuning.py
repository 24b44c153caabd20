"""Which linear layers are faster by the event executor: measured, on the machine that is to run them.

Visiting only the weight rows whose integer is not zero pays where most integers are zero: behind a ReLU, seldom
elsewhere. Absent spikes are not enough (an 8-step code has 60% empty slots and 1% zero integers). So each layer
is asked twice: how many of its integers are zero on the user's own text, and which executor is faster on these rows.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from spikeform.conversion.data import windows
from spikeform.errors import ConversionError
from spikeform.layers import CodedLinear, SpikingLinear
from spikeform.native import fixed
from spikeform.neurons import GIF, MT, SignedInteger
from spikeform.spikes.trace import Product, observe
from spikeform.synapses import fusible
from spikeform.synapses.dispatch import FUSED

LEAST_ZEROS = 0.3  # below that no kernel of ours was ever faster
MARGIN = 0.03  # an event executor that gains less than this is not chosen
ROWS, ROUNDS = 8, 15


@dataclass(frozen=True)
class Choice:
    """What was found of one layer.

    Args:
        site: Its name.
        zeros: Share of its integers that are zero.
        collapsed: Median seconds of one row by the collapsed executor; NaN where it was not timed.
        event: By the event executor.
        executor: The faster one, as chosen.
    """

    site: str
    zeros: float
    collapsed: float
    event: float
    executor: str

    def to_dict(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self)


def tune(model: PreTrainedModel, text: Any, tokenizer: Any = None) -> list[Choice]:
    """Choose an executor for each linear layer's decoding (up to four rows), in place.

    A chosen layer keeps its weights a second time, input-major, in memory. Nothing of it is saved.

    Args:
        model: Converted by a windowed method, where it is to run.
        text: Texts, or token ids ``[N, L]``: what the zeros are measured on.
        tokenizer: Needed for texts.

    Returns:
        What was found, a row for each linear layer that was looked at.

    Raises:
        ConversionError: The model has no spiking linear layer with a kernel here.
    """
    layers = {name: m for name, m in model.named_modules() if isinstance(m, SpikingLinear) and m.neuron is not None}
    for layer in layers.values():
        layer.event_rows = None
    batches, _ = windows(model, text, tokenizer)
    zeros, rows = _look(model, layers, batches[0][:1])
    found = []
    for name, layer in layers.items():
        timed = zeros.get(name, 0.0) >= LEAST_ZEROS and fusible(rows[name][:1])
        layer.event_rows = input_major(layer) if timed else None
    candidates = {name: layer for name, layer in layers.items() if layer.event_rows is not None}
    seconds = _race(candidates, rows) if candidates else {}
    for name, layer in layers.items():
        if name not in zeros:
            continue
        collapsed, event = seconds.get(name, (float("nan"), float("nan")))
        faster = event < (1 - MARGIN) * collapsed
        if not faster:
            layer.event_rows = None
        found.append(Choice(name, zeros[name], collapsed, event, "event" if faster else "collapsed"))
    if not found:
        raise ConversionError(f"{type(model).__name__} has no spiking linear layer: convert it first")
    return found


@torch.no_grad()
def _look(
    model: PreTrainedModel, layers: dict[str, SpikingLinear], ids: Tensor
) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Share of zero integers of each layer, and its last few inputs ``[ROWS, K]``."""
    zeros: dict[str, float] = {}
    rows: dict[str, Tensor] = {}
    current: list[str] = []

    def listen(told: Any) -> None:
        if isinstance(told, Product) and told.kind == "linear" and current:  # a layer's first product is its own
            zeros[current.pop()] = float((told.operands[0].codes == 0).float().mean())

    def before(name: str) -> Callable[..., None]:
        def hook(_module: Any, args: tuple) -> None:
            current[:] = [name]
            rows[name] = args[0].detach().reshape(-1, args[0].shape[-1])[-ROWS:].clone()

        return hook

    hooks = [layer.register_forward_pre_hook(before(name)) for name, layer in layers.items()]
    try:
        with observe(listen):
            model(ids.to(model.device), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return zeros, rows


def input_major(layer: SpikingLinear) -> Tensor | None:
    """``[K, N]``, where there is a kernel for it: of real weights, and of int8 ones that meet codes of a byte."""
    if isinstance(layer, CodedLinear):
        narrow = isinstance(layer.neuron, GIF | SignedInteger)
        usable = layer.weight.dtype == torch.int8 and layer.tier is None and narrow
    else:
        usable = layer.weight.dtype in FUSED and isinstance(layer.neuron, MT | SignedInteger)
    usable = usable and layer.neuron is not None and layer.neuron.closed_form() is not None
    return fixed(layer.weight.detach().t().contiguous()) if usable else None


@torch.no_grad()
def _race(layers: dict[str, SpikingLinear], rows: dict[str, Tensor]) -> dict[str, tuple[float, float]]:
    """Median seconds of one row by both executors. All layers in turn, as in decoding: no weights stay in a cache."""
    times: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in layers}
    for round_ in range(-2, ROUNDS):  # the first two warm up
        for which in (0, 1):
            for name, layer in layers.items():
                x = rows[name][round_ % len(rows[name])][None]
                kept, layer.event_rows = layer.event_rows, layer.event_rows if which else None
                spent = _seconds(layer, x)
                layer.event_rows = kept
                if round_ >= 0:
                    times[name][which].append(spent)
    return {name: (statistics.median(a), statistics.median(b)) for name, (a, b) in times.items()}


def _seconds(layer: SpikingLinear, x: Tensor) -> float:
    if not x.is_cuda:
        start = time.perf_counter()
        layer(x)
        return time.perf_counter() - start
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda._sleep(200_000)  # the launches queue up behind it: the device's time is measured, not Python's
    begin.record()
    layer(x)
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1000
