"""A cache layer whose size does not grow: the running sum of keys times values."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from spikeform.errors import SpikeformError


class StateLayer(CacheLayerMixin):
    """What a layer of linear attention keeps of all tokens so far.

    Attributes:
        keys: S ``[T, B, G, E, E]``, or None before the first token. (The name is transformers'.)
        number: Keys summed in it, ``[B]``.
    """

    is_sliding = False
    is_croppable = False

    def __init__(self) -> None:
        super().__init__()
        self.number: Tensor | None = None
        self.cumulative_length = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing is known before the first sum."""

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Refused: attention that wants keys and values has nothing to look for here.

        Raises:
            SpikeformError: Always.
        """
        raise SpikeformError("the cache holds the state of spiking attention, and a dense layer wants its keys")

    def keep(self, state: Tensor, length: int, seen: Tensor | None) -> None:
        """Take the sum over all tokens so far.

        Args:
            state: S ``[T, B, G, E, E]``.
            length: How many tokens are new.
            seen: Which of them are no padding ``[B, length]``; None: all.
        """
        new = torch.full((state.shape[1],), length, device=state.device) if seen is None else seen.sum(-1)
        self.keys, self.number = state, new if self.number is None else self.number + new
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
        self.keys = self.number = None
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
