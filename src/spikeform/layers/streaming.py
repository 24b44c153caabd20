"""Time for a streaming model: where it begins, what knows none yet, and where it ends.

All layers step together: step t of every layer is one full pass, and the T passes lie side by side in the batch,
row ``b T + t`` for step t of sequence b. Hooks do that to the modules of any family:

- the first block's input is repeated T times; what else a block is called with (masks, rotary tables) likewise;
- before the first spike all T streams are equal, so attention, norms and linear layers of the first block are computed
  for one of them;
- a cache keeps the T streams of a sequence in its row, as T times the heads, so that whatever reorders, crops or
  allocates caches by sequence goes on to work;
- the mean over the T streams is taken before the output head, which is linear: the same as the mean of T logits.

With ``steps = 0`` the hooks do nothing: the network of QCFS activations is an ordinary one.
Source: arXiv 2502.04405 (the scheme); the reductions are exact.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from spikeform.errors import SpikeformError
from spikeform.layers.cache import CacheView, through
from spikeform.neurons.streaming import Clock, Pass, StreamingNeuron, by_row, current

_AVERAGED = ("last_hidden_state", "pooler_output")


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
        """Append ``[B T, G, L, E]``; returns all keys and values so far, ``[B T, G, S, E]``.

        Raises:
            SpikeformError: The cache was filled with another number of steps.
        """
        folded = [x.unflatten(0, (-1, self._steps)).flatten(1, 2) for x in (key_states, value_states)]
        held = self.held_keys(layer_idx)
        if held is not None and held.shape[1] != folded[0].shape[1]:
            raise SpikeformError(
                f"the cache of layer {layer_idx} holds {held.shape[1]} heads, and {self._steps} streams have "
                f"{folded[0].shape[1]}: it was filled with another number of steps; begin with a new cache"
            )
        found = self._cache.update(*folded, layer_idx, *args, **kwargs)
        return tuple(x.unflatten(1, (self._steps, -1)).flatten(0, 1) for x in found)


def install(
    model: PreTrainedModel,
    clock: Clock,
    blocks: list[nn.Module],
    shared: list[nn.Module],
    positions: bool = False,
    beside: tuple[nn.Module, ...] = (),
) -> None:
    """Give a model its time.

    Args:
        model: Its neurons share ``clock``.
        clock: Says T.
        blocks: The repeated blocks, in order.
        shared: Modules of the first block that are computed once if they run before its first spike. Empty if spikes
            go into its attention.
        positions: Whether neurons have parameters by position, and so must know where a pass begins.
        beside: Those of ``shared`` whose input is still without time when they run after the first spike (the up
            projection beside a spiking gate).
    """
    for index, block in enumerate(blocks):
        told: Any = block
        told.spikeform_clock, told.spikeform_first, told.spikeform_shares = clock, index == 0, bool(shared)
        block.register_forward_pre_hook(_enter, with_kwargs=True)
    blocks[0].register_forward_hook(_left_first, always_call=True)
    for part in shared:
        share(part, clock, any(part is other for other in beside))
    head = model.get_output_embeddings()
    last: Any = head if head is not None else model.base_model
    last.spikeform_clock = clock
    if head is not None:
        head.register_forward_pre_hook(_before_head)
    else:
        last.register_forward_hook(_after_base)
    if positions:
        note_positions(model)


def share(part: nn.Module, clock: Clock, beside: bool = False) -> None:
    """Compute a module of the first block once for all streams where they are still equal; see :func:`install`."""
    marks: Any = part
    marks.spikeform_clock, marks.spikeform_beside = clock, beside
    part.register_forward_pre_hook(_one_of_many, with_kwargs=True)
    part.register_forward_hook(_many_of_one)


def note_positions(model: PreTrainedModel) -> None:
    """Let neurons whose parameters go by position know where in the sequence a pass begins."""
    base: Any = model.base_model
    base.register_forward_pre_hook(_note_offset, with_kwargs=True)


def _enter(block: Any, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
    steps = block.spikeform_clock.steps
    if not steps:
        return None
    hidden = args[0] if args else kwargs["hidden_states"]
    if block.spikeform_first:
        rows, hidden = hidden.shape[0], repeat(hidden, steps)
        before = current.get()
        current.set(Pass(rows * steps, block.spikeform_shares, 0 if before is None else before.offset))
    else:
        rows = hidden.shape[0] // steps
    args, kwargs = args[1:], {name: value for name, value in kwargs.items() if name != "hidden_states"}
    if block.spikeform_first and block.spikeform_shares:
        # Attention runs on B rows: its mask and its cache stay as they are.
        return (hidden, *args), kwargs

    def folded(value: Any) -> Any:
        if isinstance(value, Tensor):
            return repeat(value, steps) if value.ndim > 1 and value.shape[0] == rows > 1 else value
        return type(value)(folded(v) for v in value) if type(value) in (tuple, list) else value

    args, kwargs = tuple(folded(a) for a in args), {name: folded(value) for name, value in kwargs.items()}
    args, kwargs = through(lambda cache: StreamCache(cache, steps), args, kwargs)
    return (hidden, *args), kwargs


def _left_first(block: Any, args: tuple, output: Any) -> None:
    now = current.get()
    if now is not None:
        now.constant = False


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
    current.set(None)
    return (average(args[0], steps), *args[1:]) if steps else None


def _after_base(base: Any, args: tuple, output: Any) -> Any:
    steps = base.spikeform_clock.steps
    current.set(None)
    if not steps:
        return None
    if not isinstance(output, ModelOutput):
        return tuple(average(value, steps) if isinstance(value, Tensor) else value for value in output)
    for name in _AVERAGED:
        if isinstance(output.get(name), Tensor):
            output[name] = average(output[name], steps)
    return output


def _note_offset(base: Any, args: tuple, kwargs: dict) -> None:
    cache = kwargs.get("past_key_values")
    current.set(Pass(offset=cache.get_seq_length() if cache is not None else 0))
