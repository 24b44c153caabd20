"""Time for a streaming model: where it begins, what knows none yet, and where it ends.

All layers step together: step t of every layer is one full pass, and the T passes lie side by side in the batch,
row ``b T + t`` for step t of sequence b. Hooks do that to the modules of any family:

- the first block's input is repeated T times; what else a block is called with (masks, rotary tables) likewise;
- before the first spike all T streams are equal, so attention, norms and linear layers of the first block are computed
  for one of them;
- a cache keeps the T streams of a sequence in its row, as T times the heads, so that whatever reorders, crops or
  allocates caches by sequence goes on to work;
- the mean over the T streams is taken before the output head, which is linear: the same as the mean of T logits.
  Hidden states and attentions that the user asked for are means over the streams too.

With ``steps = 0`` the hooks do nothing: the network of QCFS activations is an ordinary one.
Source: arXiv 2502.04405 (the scheme); the reductions are exact.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache
from transformers.utils import ModelOutput

from spikeform.layers.cache import StreamCache, claim, through
from spikeform.neurons.streaming import Clock, Pass, StreamingNeuron, by_row, current


def repeat(x: Tensor, steps: int) -> Tensor:
    """``[B, ...]`` to ``[B T, ...]``, each row T times."""
    return x.unsqueeze(1).expand(-1, steps, *x.shape[1:]).flatten(0, 1)


def average(x: Tensor, steps: int) -> Tensor:
    """Mean over the streams: ``[B T, ...]`` to ``[B, ...]``."""
    return x.unflatten(0, (-1, steps)).mean(1)


def neurons_of(model: nn.Module) -> list[StreamingNeuron]:
    """The streaming neurons of a model, each once; none in any other model."""
    return [module for module in model.modules() if isinstance(module, StreamingNeuron)]


def clock_of(model: nn.Module) -> Clock | None:
    """The clock of a streaming model, None for any other."""
    return next((neuron.clock for neuron in neurons_of(model)), None)


def steps_of(model: nn.Module) -> int:
    """Time steps T that a model streams; 0 for one that does not."""
    clock = clock_of(model)
    return 0 if clock is None else clock.steps


@contextmanager
def running(model: nn.Module, steps: int) -> Iterator[None]:
    """Run a streaming model with other time steps in the block; others are left alone."""
    clock = clock_of(model)
    if clock is None:
        yield
        return
    before, clock.steps = clock.steps, steps
    try:
        yield
    finally:
        clock.steps = before


def paused(model: nn.Module) -> Any:
    """Without time in the block: a streaming model is its network of QCFS activations."""
    return running(model, 0)


def install(
    model: PreTrainedModel,
    clock: Clock,
    blocks: list[nn.Module],
    shared: list[nn.Module],
    beside: tuple[nn.Module, ...] = (),
) -> None:
    """Give a model its time.

    Args:
        model: Its neurons share ``clock``.
        clock: Says T.
        blocks: The repeated blocks, in order, all children of one module.
        shared: Modules of the first block that are computed once if they run before its first spike. Empty if spikes
            go into its attention.
        beside: Those of ``shared`` whose input is still without time when they run after the first spike (the up
            projection beside a spiking gate).
    """
    for index, block in enumerate(blocks):
        told: Any = block
        told.spikeform_clock, told.spikeform_first, told.spikeform_shares = clock, index == 0, bool(shared)
        block.register_forward_pre_hook(_enter, with_kwargs=True)
        block.register_forward_hook(_leave, always_call=True)
    for part in shared:
        share(part, clock, any(part is other for other in beside))
    # Time ends with the module that runs the blocks, unless neurons come after it (BERT's pooler and head).
    runner: Any = next(m for m in model.modules() for c in m.children() if any(b is blocks[0] for b in c.children()))
    head: Any = model.get_output_embeddings()

    def holds(part: Any) -> bool:
        inside = set(part.modules())
        return all(neuron in inside for neuron in neurons_of(model))

    last: Any = runner if holds(runner) else model.base_model
    last.spikeform_clock, last.spikeform_ends = clock, holds(last) or head is None
    last.register_forward_hook(_after)
    if not last.spikeform_ends:
        head.spikeform_clock = clock
        head.register_forward_pre_hook(_before_head)


def share(part: nn.Module, clock: Clock, beside: bool = False) -> None:
    """Compute a module of the first block once for all streams where they are still equal; see :func:`install`."""
    marks: Any = part
    marks.spikeform_clock, marks.spikeform_beside = clock, beside
    part.register_forward_pre_hook(_one_of_many, with_kwargs=True)
    part.register_forward_hook(_many_of_one)


def _enter(block: Any, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
    steps, first = block.spikeform_clock.steps, block.spikeform_first
    if first:
        for value in (*args, *kwargs.values()):
            claim(value, steps)
    if not steps:
        return None
    hidden = args[0] if args else kwargs["hidden_states"]
    hidden = repeat(hidden, steps) if first else hidden
    rows, length = hidden.shape[0] // steps, hidden.shape[1]
    shares = first and block.spikeform_shares
    current.set(Pass(rows * steps, length, shares, _positions(args, kwargs, length, hidden.device)))
    checkpoint = getattr(block, "_gradient_checkpointing_func", None)
    if checkpoint is not None and not isinstance(checkpoint, _Checkpoint):
        block._gradient_checkpointing_func = _Checkpoint(checkpoint)
    args, kwargs = args[1:], {name: value for name, value in kwargs.items() if name != "hidden_states"}
    if shares:
        # Attention runs on B rows: its mask and its cache stay as they are.
        return (hidden, *args), kwargs

    def folded(value: Any) -> Any:
        if isinstance(value, Tensor):
            by_sequence = value.ndim > 1 and value.shape[0] == rows and (rows > 1 or value.ndim == 2)
            return repeat(value, steps) if by_sequence else value
        return type(value)(folded(v) for v in value) if type(value) in (tuple, list) else value

    args, kwargs = tuple(folded(a) for a in args), {name: folded(value) for name, value in kwargs.items()}
    args, kwargs = through(lambda cache: StreamCache(cache, steps), args, kwargs)
    return (hidden, *args), kwargs


def _positions(args: tuple, kwargs: dict, length: int, device: Any) -> Tensor | None:
    told = kwargs.get("position_ids")
    if isinstance(told, Tensor):
        return told if told.ndim == 2 else None
    cached = any(isinstance(value, Cache) for value in (*args, *kwargs.values()))
    return None if cached else torch.arange(length, device=device)[None]


class _Checkpoint:
    """Transformers' gradient checkpointing, whose second run, hooks left out, finds the pass of the first."""

    def __init__(self, checkpoint: Any) -> None:
        self.checkpoint = checkpoint

    def __call__(self, forward: Any, *args: Any) -> Any:
        now = current.get()
        if now is None:
            return self.checkpoint(forward, *args)

        def run(*args: Any) -> Any:
            before = current.set(replace(now))  # a copy: the first spike changes it
            try:
                return forward(*args)
            finally:
                current.reset(before)

        return self.checkpoint(run, *args)


def _leave(block: Any, args: tuple, output: Any) -> None:
    # Each block has a pass of its own, so none outlives an error.
    if block.spikeform_clock.steps:
        current.set(None)


def _constant_rows(module: Any) -> int:
    """B T where the streams are still equal, else 0."""
    if not module.spikeform_clock.steps or (now := current.get()) is None:
        return 0
    return now.rows if now.constant or module.spikeform_beside else 0


def _one_of_many(module: Any, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
    rows, steps = _constant_rows(module), module.spikeform_clock.steps
    if not rows:
        return None

    def first(x: Tensor) -> Tensor:
        one = by_row(x, rows)[::steps]
        return one.flatten(0, one.ndim - x.ndim).contiguous()

    if args:
        return (first(args[0]), *args[1:]), kwargs
    return args, {**kwargs, "hidden_states": first(kwargs["hidden_states"])}


def _many_of_one(module: Any, args: tuple, output: Any) -> Any:
    rows, steps = _constant_rows(module), module.spikeform_clock.steps
    if not rows:
        return None

    def many(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        full = repeat(by_row(x, rows // steps), steps)
        return full.flatten(0, full.ndim - x.ndim)

    return many(output) if isinstance(output, Tensor) else tuple(many(value) for value in output)


def _before_head(head: Any, args: tuple) -> tuple | None:
    steps = head.spikeform_clock.steps
    return (average(args[0], steps), *args[1:]) if steps else None


def _after(last: Any, args: tuple, output: Any) -> Any:
    """Means over the streams; of hidden states and attentions too, where the user asked for them."""
    steps = last.spikeform_clock.steps
    if not steps:
        return None
    named: dict[Any, Any] = dict(output if isinstance(output, ModelOutput) else enumerate(output))
    name = "last_hidden_state" if isinstance(output, ModelOutput) else 0
    last_BTLD = named[name]
    streams = last_BTLD.flatten(0, -3)  # GPT-2 gives its rows the shape of input_ids, choices (say) and all
    mean_BLD = average(streams, steps).view(-1, *last_BTLD.shape[1:])

    def ended(key: Any, value: Any) -> Any:
        if value is last_BTLD:
            return mean_BLD if key != name or last.spikeform_ends else value
        if isinstance(value, tuple | list):
            return tuple(ended(key, x) for x in value)
        grown = isinstance(value, Tensor) and value.shape[0] == streams.shape[0]  # else from before time began
        return average(value, steps) if grown else value

    means = {key: ended(key, value) for key, value in named.items()}
    if not isinstance(output, ModelOutput):
        return tuple(means.values())
    for key, value in means.items():
        if value is not named[key]:
            output[key] = value
    return output
