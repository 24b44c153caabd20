"""Builds the CPU library into wheels and editable installs. Without a compiler they are pure Python."""

from __future__ import annotations

import runpy
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

NATIVE = Path("src/spikeform/native")


class CustomBuildHook(BuildHookInterface):
    """Compiles ``src/spikeform/native/csrc``."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Build, and give the wheel its platform. The builder runs by its path: spikeform needs torch, it does not."""
        library = runpy.run_path(str(Path(self.root) / NATIVE / "build.py"))["build"]()
        if library is not None:
            platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
            build_data["pure_python"] = False
            build_data["tag"] = f"py3-none-{platform}"
            build_data["artifacts"].append(f"/{NATIVE.as_posix()}/{library.name}")
