"""A cache layer whose size does not grow: the running sum of keys times values, and the spikes of the last tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from spikeform.errors import SpikeformError
from spikeform.native import fixed


class StateLayer(CacheLayerMixin):
    """What a layer of linear attention keeps of all tokens so far.

    Its tensors stay where they are from the first token on, through :meth:`reset` too, and the count of tokens is one
    of them: so a compiled step, or a CUDA graph, serves all tokens.

    Attributes:
        keys: S of the key/value heads that see all tokens ``[T, B, G, E, E]``, or None before the first token. (The
            name is transformers'.)
        number: Tokens so far without padding of each row, then those with padding: int64 ``[B + 1]``, or None.
        recent: Of the heads that see a window, the spikes of keys and values of the last tokens, int8 ``[2, T, B, G, W,
            E]``, or None: before the first token, or without such heads.
    """

    is_compileable = True
    is_sliding = False
    is_croppable = False

    def __init__(self) -> None:
        super().__init__()
        self.number: Tensor | None = None
        self.recent: Tensor | None = None
        self._spare: dict[str, Tensor] = {}

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing is known before the first sum."""

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Refused: attention that wants keys and values has nothing to look for here.

        Raises:
            SpikeformError: Always.
        """
        raise SpikeformError("the cache holds the state of spiking attention, and a dense layer wants its keys")

    def room(self, name: str, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """The tensor ``name`` of the attributes: what it holds, or zeros before the first token.

        Raises:
            SpikeformError: It holds something of another shape.
        """
        held: Tensor | None = getattr(self, name)
        if held is None:
            held = self._spare.pop(name, None)
            if held is not None and (held.shape, held.dtype, held.device) == (torch.Size(shape), dtype, device):
                held.zero_()
            else:
                held = torch.zeros(tuple(shape), dtype=dtype, device=device)
                held = held if torch.compiler.is_compiling() else fixed(held)
            setattr(self, name, held)
        if held.shape != torch.Size(shape):
            raise SpikeformError(f"the cache holds a state {tuple(held.shape)}, this input has {tuple(shape)}")
        return held

    def keep(self, state: Tensor | None, recent: Tensor | None = None) -> None:
        """Take what is known after all tokens so far; :meth:`advance` says how many they are.

        Args:
            state: S ``[T, B, G, E, E]``, or None: all heads have windows.
            recent: ``[2, T, B, G, W, E]``, any dtype, or None: no head has a window.
        """
        if recent is not None:
            self._put("recent", recent.to(torch.int8))
            if state is None:
                state = recent.new_empty((*recent.shape[1:3], 0, recent.shape[-1], recent.shape[-1]))
        if state is None:
            raise SpikeformError("a cache keeps a state, or the spikes of windows")
        self._put("keys", state)

    def _put(self, name: str, given: Tensor) -> None:
        if given.requires_grad:  # the graph needs what was there
            setattr(self, name, given)
            return
        held: Tensor | None = getattr(self, name)
        if held is None or held.dtype != given.dtype or held.requires_grad:
            setattr(self, name, None)
        self.room(name, given.shape, given.dtype, given.device).copy_(given)

    def advance(self, length: int, seen: Tensor | None) -> None:
        """Count ``length`` new tokens, of which those of ``seen`` ``[B, length]`` are no padding; None: all."""
        if self.keys is None:
            raise SpikeformError("tokens are counted once their state is known")
        number = self.room("number", (self.keys.shape[1] + 1,), torch.int64, self.keys.device)
        number.add_(length if seen is None else F.pad(seen.sum(-1), (0, 1), value=length))
        self.is_initialized = True

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Masks are wanted for what is new alone."""
        return query_length, self.get_seq_length()

    def get_seq_length(self) -> int:
        """Tokens so far, padding included; as a static cache of transformers has it, a tensor of one integer."""
        return 0 if self.number is None else self.number[-1]  # type: ignore[return-value]  # as said

    def get_max_length(self) -> int:
        """No maximum."""
        return -1

    def reset(self) -> None:
        """Forget everything; tensors of the same shapes will lie in the same place."""
        for name in ("keys", "number", "recent"):
            held: Tensor | None = getattr(self, name)
            if held is not None:
                self._spare[name] = held.detach()
                setattr(self, name, None)
        self.is_initialized = False

    def crop(self, tokens_to_remove: int) -> None:
        """Refused: a sum does not say what it was before.

        Raises:
            SpikeformError: Something is to be removed.
        """
        if tokens_to_remove:
            raise SpikeformError("the cache is a running sum: tokens cannot be taken out of it again")

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Rows in another order, as beam search asks."""
        self._select(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row several times."""
        if self.keys is not None:
            self._select(torch.arange(self.keys.shape[1], device=self.keys.device).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Some rows."""
        self._select(indices)

    def _select(self, rows: Tensor) -> None:
        if self.keys is None or self.number is None:
            return
        rows = rows.to(self.keys.device)
        counted = torch.cat([rows, rows.new_full((1,), len(self.number) - 1)])
        for name, axis, chosen in (("keys", 1, rows), ("recent", 2, rows), ("number", 0, counted)):
            held: Tensor | None = getattr(self, name)
            if held is not None:
                found = held.index_select(axis, chosen)
                setattr(self, name, held.copy_(found) if found.shape == held.shape else fixed(found))
