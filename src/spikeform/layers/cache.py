"""Views of a transformers cache: what lies in the memory is another form of what attention sees."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers.cache_utils import Cache, EncoderDecoderCache


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


def through(view: Callable[[Any], CacheView], args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """The arguments of a module, every cache among them behind ``view``."""

    def seen(value: Any) -> Any:
        value = value.self_attention_cache if isinstance(value, EncoderDecoderCache) else value
        return view(value) if isinstance(value, Cache | CacheView) else value

    return tuple(seen(a) for a in args), {name: seen(value) for name, value in kwargs.items()}
