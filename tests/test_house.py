"""The house rules that a machine can check. (That imports go down the floors only is in test_import.)"""

import ast
import statistics
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "src").rglob("*.py"))
CODE = [file for file in SOURCES if file.name != "__init__.py"]


def lines(file):
    return len(file.read_text().splitlines())


def test_files_are_short():
    assert len(CODE) > 50
    assert not [file.name for file in SOURCES if lines(file) > 600]
    assert statistics.median(lines(file) for file in CODE) < 150


@pytest.mark.parametrize("file", SOURCES, ids=lambda file: str(file.relative_to(ROOT / "src")))
def test_nothing_unpickles_and_nothing_is_unfinished(file):
    text, tree = file.read_text(), ast.parse(file.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [a.name for a in node.names] + [getattr(node, "module", None) or ""]
            assert not {"pickle", "dill", "marshal", "shelve"} & {n.split(".")[0] for n in names}
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            assert (node.value.id, node.attr) not in {("torch", "load"), ("np", "load"), ("joblib", "load")}
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in {"eval", "exec"}
        if isinstance(node, ast.Raise) and node.exc is not None:
            assert "NotImplementedError" not in ast.unparse(node.exc)
    for word in ("TODO", "FIXME", "XXX"):
        assert word not in text


@pytest.mark.parametrize(
    "folder", ["spikes", "neurons", "synapses", "layers", "conversion", "methods", "checkpoint", "energy"]
)
def test_tests_mirror_the_sources(folder):
    assert (ROOT / "src" / "spikeform" / folder).is_dir()
    assert list((ROOT / "tests" / folder).glob("test_*.py"))
