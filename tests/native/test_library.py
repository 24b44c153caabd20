"""The compiled library: building, finding and loading it."""

import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch

from spikeform import native
from spikeform.native import build as builder
from spikeform.native.library import BUILD, function, level

ROOT = Path(__file__).parents[2]
needs_compiler = pytest.mark.skipif(builder.compiler() is None, reason="needs a C++ compiler")
needs_library = pytest.mark.skipif(native.library() is None, reason="the library is not built")


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """A builder whose sources are one small file, and which puts its library into a folder of its own."""
    sources = tmp_path / "csrc"
    sources.mkdir()
    shutil.copy(builder.SOURCES / "common.h", sources)
    shutil.copy(builder.SOURCES / "common.cpp", sources)
    monkeypatch.setattr(builder, "SOURCES", sources)
    monkeypatch.setattr(builder, "PLACE", tmp_path / "_spikeform.so")
    return tmp_path


@needs_compiler
def test_builds_once_and_anew_when_a_source_changes(elsewhere):
    made = builder.build()
    assert made == elsewhere / "_spikeform.so"
    first = made.stat().st_mtime_ns
    assert builder.build() == made
    assert made.stat().st_mtime_ns == first
    with (elsewhere / "csrc" / "common.cpp").open("a") as source:
        source.write("// more\n")
    assert builder.build() == made
    assert made.stat().st_mtime_ns > first
    assert [path.name for path in elsewhere.iterdir() if path.name.startswith("_")] == ["_spikeform.so"]


@needs_compiler
def test_a_source_that_does_not_compile_is_one_line_and_no_library(elsewhere, capfd):
    (elsewhere / "csrc" / "wrong.cpp").write_text("int f() { return nothing; }\n")
    assert builder.build() is None
    assert not builder.PLACE.exists()
    assert "does not compile" in capfd.readouterr().err


def test_no_compiler_is_one_line_and_no_library(elsewhere, monkeypatch, capfd):
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert builder.build() is None
    assert capfd.readouterr().err.count("\n") == 1


def test_says_why_there_is_none(monkeypatch, tmp_path):
    home = import_module("spikeform.native.library")
    monkeypatch.setattr(home, "PLACE", tmp_path / "_spikeform.so")
    home._load.cache_clear()
    assert home.library() is None
    assert BUILD in home.why()
    home.PLACE.write_text("no library")
    home._load.cache_clear()
    assert home.library() is None
    assert "does not load" in home.why()
    monkeypatch.undo()
    home._load.cache_clear()


@needs_compiler
def test_refuses_a_library_of_other_sources(elsewhere, monkeypatch):
    home = import_module("spikeform.native.library")
    monkeypatch.setattr(home, "PLACE", builder.build())
    monkeypatch.setattr(home, "SOURCES", builder.SOURCES)
    try:
        home._load.cache_clear()
        assert home.library() is not None
        (elsewhere / "csrc" / "more.h").write_text("// another source\n")
        home._load.cache_clear()
        assert home.library() is None
        assert "other sources" in home.why()
        assert BUILD in home.why()
    finally:
        monkeypatch.undo()
        home._load.cache_clear()


@needs_library
def test_the_instruction_set_is_the_machines_best_and_can_be_lowered():
    best = level()
    assert level(0) == 0
    assert level(99) == best
    assert level() == best


@needs_library
def test_shares_pytorchs_threads():
    """One OpenMP runtime in the process: two would fight for the cores."""
    if not sys.platform.startswith("linux"):
        pytest.skip("reads /proc")
    code = (
        "import spikeform.native as n; n.library(); "
        "print(len({x.split()[-1] for x in open('/proc/self/maps') if 'libgomp' in x or 'libomp' in x}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "1"


@needs_library
def test_functions_are_kept():
    assert function("level", "i", "i") is function("level", "i", "i")
    assert torch.get_num_threads() >= 1


@needs_library
def test_weights_lie_on_large_pages_to_their_last_byte():
    """Whole pages alone would leave out half of a weight of 4 MB."""
    from spikeform.synapses.fused import oat_linear_int

    if not Path("/sys/kernel/mm/transparent_hugepage").exists():
        pytest.skip("the kernel has no large pages")
    weight, scale = torch.ones(2048, 2049, dtype=torch.int8), torch.ones(2048)
    oat_linear_int(torch.ones(1, 2049), weight, scale, None, torch.tensor([1.0]), 127, 128, 0)
    first = weight.data_ptr()
    wanted, asked = {first, first + weight.numel() - 1}, set()
    inside: set[int] = set()
    for line in Path("/proc/self/smaps").read_text().splitlines():
        name, *rest = line.split()
        if not name.endswith(":"):
            begin, end = (int(x, 16) for x in name.split("-"))
            inside = {at for at in wanted if begin <= at < end}
        elif name == "VmFlags:" and "hg" in rest:
            asked |= inside
    assert asked == wanted
