"""Make converted checkpoints loadable by transformers without importing transformers.

transformers has no plug-in discovery: a quantizer, or a model type, exists once its module was imported, and that
import takes seconds. So the registration waits until one of transformers' own tables is asked for a name of ours.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

# Modules that hold the tables of quantisation configs and of model types, the table's name, and how our names begin.
_TABLES = {
    "transformers.quantizers.auto": ("AUTO_QUANTIZATION_CONFIG_MAPPING", "spikeform_"),
    "transformers.models.auto.configuration_auto": ("CONFIG_MAPPING", "neutransformer_"),
}


def install() -> None:
    """Register spikeform's methods now if transformers' quantizers are loaded, else when a name of theirs is asked."""
    if all(name in sys.modules for name in _TABLES):
        importlib.import_module("spikeform.methods")
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        for name in _TABLES:
            if name in sys.modules:
                _watch(sys.modules[name])
        sys.meta_path.insert(0, _Finder())


def _watch(module: ModuleType) -> None:
    """Let the module's table import spikeform's methods when a name of theirs is asked."""
    name, prefix = _TABLES[module.__name__]
    table: Any = vars(module)[name]
    base = type(table)

    def contains(self: Any, asked: object) -> bool:
        if isinstance(asked, str) and asked.startswith(prefix) and not base.__contains__(self, asked):
            importlib.import_module("spikeform.methods")
        return base.__contains__(self, asked)

    watching = type(f"Watched{base.__name__}", (base,), {"__contains__": contains})
    if base is dict:  # a plain dict cannot change its class
        vars(module)[name] = watching(table)
    else:
        table.__class__ = watching


class _Finder(importlib.abc.MetaPathFinder):
    """Finds the modules of the tables as usual, and wraps the loader of each once."""

    def __init__(self) -> None:
        self._awaited = {name for name in _TABLES if name not in sys.modules}

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname not in self._awaited:
            return None
        self._awaited.discard(fullname)
        if not self._awaited:
            sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(importlib.abc.Loader):
    """Runs the real loader, then leaves the registration to the first use of the table.

    A table is imported in the middle of importing transformers, whose packages spikeform's methods import themselves;
    so the methods are imported when the table is first asked, not here.
    """

    def __init__(self, loader: importlib.abc.Loader) -> None:
        self._loader = loader

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        _watch(module)
