"""Make converted checkpoints loadable by transformers without importing transformers.

transformers has no plug-in discovery: a quantizer exists once its module was imported, and that import takes
seconds. So the registration waits until transformers' own quantizer table is imported.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from types import ModuleType

_TABLE = "transformers.quantizers.auto"


def install() -> None:
    """Register spikeform's methods now if transformers' quantizers are loaded, else right after they are."""
    if _TABLE in sys.modules:
        importlib.import_module("spikeform.methods")
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class _Finder(importlib.abc.MetaPathFinder):
    """Finds the quantizer table as usual, and wraps its loader once."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != _TABLE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(importlib.abc.Loader):
    """Runs the real loader, then leaves the registration to the first use of the table.

    The table is imported in the middle of importing transformers' quantizers package, which spikeform's methods
    import themselves; so the methods are imported when ``AutoHfQuantizer`` is first asked, not here.
    """

    def __init__(self, loader: importlib.abc.Loader) -> None:
        self._loader = loader

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        vars(module)["AUTO_QUANTIZATION_CONFIG_MAPPING"] = _Table(vars(module)["AUTO_QUANTIZATION_CONFIG_MAPPING"])


class _Table(dict):
    """transformers' table of config classes, which imports spikeform's methods when a name of theirs is asked."""

    def __contains__(self, name: object) -> bool:
        if isinstance(name, str) and name.startswith("spikeform_") and not super().__contains__(name):
            importlib.import_module("spikeform.methods")
        return super().__contains__(name)
