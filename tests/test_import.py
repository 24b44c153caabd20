"""Importing is cheap, and the house's floors hold."""

import ast
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

SRC = Path(__file__).parents[1] / "src" / "spikeform"
# From the ground up; folders on one line do not import each other.
FLOORS = [
    {"errors", "_plugin", "native"},
    {"spikes"},
    {"neurons"},
    {"synapses"},
    {"layers"},
    {"conversion"},
    {"methods", "pretrained"},
    {"checkpoint", "energy", "evaluation"},
    {"training"},
    {"report"},
    {"cli"},
]
HEAVY = ("torch", "transformers", "numpy", "matplotlib", "lm_eval", "huggingface_hub")


def fastest(code, runs=4):
    """Least seconds of a fresh interpreter running ``code``, less those of an empty one: noise only adds."""

    def seconds(code):
        started = time.perf_counter()
        subprocess.run([sys.executable, "-c", code], check=True, env=os.environ, stdout=subprocess.DEVNULL)
        return time.perf_counter() - started

    return min(seconds(code) for _ in range(runs)) - min(seconds("pass") for _ in range(runs))


def test_import_takes_less_than_300_ms():
    assert fastest("import spikeform") < 0.3


def test_help_takes_less_than_a_second():
    assert fastest("import sys; sys.argv = ['spikeform', '--help']; from spikeform.cli import main; main()") < 1


@pytest.mark.parametrize("module", ["spikeform", "spikeform.cli"])
def test_nothing_heavy_is_imported(module):
    code = f"import sys, {module}; print(*sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert set(HEAVY).isdisjoint(out.split())


def test_every_public_name_exists():
    import spikeform

    for name in spikeform.__all__:
        assert getattr(spikeform, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = spikeform.nothing


def imported(file):
    """Folders of spikeform that a file imports, anywhere in it, but for what only type checkers read."""
    tree = ast.parse(file.read_text())
    for block in ast.walk(tree):
        if isinstance(block, ast.If) and getattr(block.test, "id", "") == "TYPE_CHECKING":
            block.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
            if node.module == "spikeform":
                names = [f"spikeform.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            parts = name.split(".")
            if parts[0] == "spikeform" and len(parts) > 1:
                yield parts[1], node.lineno


def test_imports_go_down_the_floors_only():
    height = {name: i for i, floor in enumerate(FLOORS) for name in floor}
    files = [file for file in SRC.rglob("*.py") if file.parent != SRC]
    assert len(files) > 30
    wrong = []
    for file in files:
        home = file.relative_to(SRC).parts[0]
        assert home in height, f"{home} is on no floor: add it to FLOORS"
        for name, line in imported(file):
            # names of the package itself (spikeform.convert) are found lazily; only folders have a floor
            if name in height and name != home and height[name] >= height[home]:
                wrong.append(f"{file.relative_to(SRC)}:{line} imports {name}")
    assert not wrong
