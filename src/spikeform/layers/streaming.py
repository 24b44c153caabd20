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
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, EncoderDecoderCache
from transformers.utils import ModelOutput

from spikeform.errors import SpikeformError
from spikeform.layers.cache import CacheView, through
from spikeform.neurons.streaming import Clock, Pass, StreamingNeuron, by_row, current

def repeat(x: Tensor, steps: int) -> Tensor:
    """``[B, ...]`` to ``[B T, ...]``, each row T times."""
    return x.unsqueeze(1).expand(-1, steps, *x.shape[1:]).flatten(0, 1)


def average(x: Tensor, steps: int) -> Tensor:
    """Mean over the streams: ``[B T, ...]`` to ``[B, ...]``."""
    return x.unflatten(0, (-1, steps)).mean(1)


def clock_of(model: nn.Module) -> Clock | None:
    """The clock of a streaming model, None for any other."""
    return next((m.clock for m in model.modules() if isinstance(m, StreamingNeuron)), None)


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


class StreamCache(CacheView):
    """A view that folds the T streams of a sequence into the heads of its row: ``[B, T G, S, E]``.

    Args:
        cache: What keeps the memory.
        steps: T.
    """

    def __init__(self, cache: Any, steps: int) -> None:
        super().__init__(cache)
        self._steps = steps

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any):
        """Append ``[B T, G, L, E]``; returns all keys and values so far, ``[B T, G, S, E]``."""
        folded = [x.unflatten(0, (-1, self._steps)).flatten(1, 2) for x in (key_states, value_states)]
        found = self._cache.update(*folded, layer_idx, *args, **kwargs)
        return tuple(x.unflatten(1, (self._steps, -1)).flatten(0, 1) for x in found)


def _claim(value: Any, steps: int) -> None:
    """Mark a cache with the steps of what fills it; T = 1 and no time at all look alike in the memory."""
    value = value.self_attention_cache if isinstance(value, EncoderDecoderCache) else value
    if not isinstance(value, Cache):
        return
    marked: Any = value
    before = getattr(marked, "spikeform_steps", 0)
    if before != steps:
        if int(marked.get_seq_length()):
            raise SpikeformError(
                f"the cache was filled with {before} time steps, and the model runs with {steps}: begin with a new one"
            )
        marked.spikeform_steps = steps


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
        return all(m in inside for m in model.modules() if isinstance(m, StreamingNeuron))

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
            _claim(value, steps)
    if not steps:
        return None
    hidden = args[0] if args else kwargs["hidden_states"]
    hidden = repeat(hidden, steps) if first else hidden
    rows, length = hidden.shape[0] // steps, hidden.shape[1]
    shares = first and block.spikeform_shares
    current.set(Pass(rows * steps, length, shares, _positions(args, kwargs, length, hidden.device)))
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


def _leave(block: Any, args: tuple, output: Any) -> None:
    # Each block has a pass of its own, so none outlives an error, and a block may be run again by itself (gradient
    # checkpointing does that).
    current.set(None)


def _constant_rows(module: Any) -> int:
    """B T where the streams are still equal, else 0."""
    now = current.get()
    if now is None or not module.spikeform_clock.steps:
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
    named = output if isinstance(output, ModelOutput) else dict(enumerate(output))
    name = "last_hidden_state" if isinstance(output, ModelOutput) else 0
    rows, ended = named[name].shape[0], {}
    for key, value in named.items():
        if isinstance(value, tuple | list):
            ended[key] = tuple(average(x, steps) if x.shape[0] == rows else x for x in value)
        elif isinstance(value, Tensor) and (key != name or last.spikeform_ends):
            ended[key] = average(value, steps)
    if not isinstance(output, ModelOutput):
        return tuple(ended.get(key, value) for key, value in named.items())
    for key, value in ended.items():
        output[key] = value
    return output
