"""Views of a transformers cache: what lies in the memory is another form of what attention sees."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache, EncoderDecoderCache

from spikeform.errors import SpikeformError


class CacheView:
    """Stands in front of a cache; whatever cache the user chose keeps the memory.

    Args:
        cache: A transformers cache, or another view.
    """

    def __init__(self, cache: Any) -> None:
        self._cache = cache

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)

    def held_keys(self, layer: int) -> Any:
        """The keys that a layer's memory holds, or None before the first."""
        layers = getattr(self._cache, "layers", ())
        held = getattr(layers[layer], "keys", None) if layer < len(layers) else None
        return held if held is not None and held.numel() else None


CACHES = (Cache, CacheView)


def through(view: Callable[[Any], CacheView], args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """The arguments of a module, every cache among them behind ``view``."""

    def seen(value: Any) -> Any:
        if not isinstance(value, CACHES):
            return value
        return view(value.self_attention_cache if isinstance(value, EncoderDecoderCache) else value)

    return tuple(seen(a) for a in args), {name: seen(value) for name, value in kwargs.items()}


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


def claim(value: Any, steps: int) -> None:
    """Mark a cache with the steps of what fills it: T = 1 and no time at all look alike in the memory.

    Args:
        value: A cache; anything else is passed over.
        steps: T, or 0.

    Raises:
        SpikeformError: It was filled with another number of steps.
    """
    value = value.self_attention_cache if isinstance(value, EncoderDecoderCache) else value
    if not isinstance(value, Cache):
        return
    marked: Any = value
    before = getattr(marked, "spikeform_steps", 0)
    if before != steps:
        if any(getattr(layer, "keys", None) is not None for layer in marked.layers):
            raise SpikeformError(
                f"the cache was filled with {before} time steps, and the model runs with {steps}: begin with a new one"
            )
        marked.spikeform_steps = steps
