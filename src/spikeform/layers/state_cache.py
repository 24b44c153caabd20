"""A cache layer whose size does not grow: the running sum of keys times values, and the spikes of the last tokens."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from spikeform.errors import SpikeformError


class StateLayer(CacheLayerMixin):
    """What a layer of linear attention keeps of all tokens so far.

    Attributes:
        keys: S of the key/value heads that see all tokens ``[T, B, G, E, E]``, or None before the first token. (The
            name is transformers'.)
        number: Tokens so far without padding, ``[B]``.
        recent: Of the heads that see a window, the spikes of keys and values of the last tokens, int8 ``[2, T, B, G, W,
            E]``, or None: before the first token, or without such heads.
    """

    is_sliding = False
    is_croppable = False

    def __init__(self) -> None:
        super().__init__()
        self.number: Tensor | None = None
        self.recent: Tensor | None = None
        self.cumulative_length = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing is known before the first sum."""

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Refused: attention that wants keys and values has nothing to look for here.

        Raises:
            SpikeformError: Always.
        """
        raise SpikeformError("the cache holds the state of spiking attention, and a dense layer wants its keys")

    def keep(self, state: Tensor | None, length: int, seen: Tensor | None, recent: Tensor | None = None) -> None:
        """Take what is known after all tokens so far.

        Args:
            state: S ``[T, B, G, E, E]``, or None: all heads have windows.
            length: How many tokens are new.
            seen: Which of them are no padding ``[B, length]``; None: all.
            recent: ``[2, T, B, G, W, E]``, any dtype, or None: no head has a window.
        """
        if recent is not None:
            self.recent = recent.to(torch.int8)
            if state is None:
                state = recent.new_empty(*recent.shape[1:3], 0, recent.shape[-1], recent.shape[-1])
        if state is None:
            raise SpikeformError("a cache keeps a state, or the spikes of windows")
        self.keys = state
        new = torch.full((state.shape[1],), length, device=state.device) if seen is None else seen.sum(-1)
        self.number = new if self.number is None else self.number + new
        self.cumulative_length += length
        self.is_initialized = True

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Masks are wanted for what is new alone."""
        return query_length, self.cumulative_length

    def get_seq_length(self) -> int:
        """Tokens so far, padding included."""
        return self.cumulative_length

    def get_max_length(self) -> int:
        """No maximum."""
        return -1

    def reset(self) -> None:
        """Forget everything."""
        self.keys = self.number = self.recent = None
        self.cumulative_length, self.is_initialized = 0, False

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
        if self.keys is not None and self.number is not None:
            rows = rows.to(self.keys.device)
            self.keys, self.number = self.keys.index_select(1, rows), self.number.index_select(0, rows)
            self.recent = None if self.recent is None else self.recent.index_select(2, rows)
