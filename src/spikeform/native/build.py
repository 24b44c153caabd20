"""Compiles the CPU library: ``python -m spikeform.native.build``. Needs a C++ compiler and nothing else.

The library has a plain C interface, so it depends on the ABI of neither Python nor PyTorch.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HOME = Path(__file__).parent
SOURCES = HOME / "csrc"
PLACE = HOME / "_spikeform.so"
# No contraction of a * b + c: it would move codes that lie on a tie. Neither of the two -fno changes a value.
FLAGS = ["-O3", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-fno-math-errno"]
FLAGS += ["-fno-trapping-math", "-Wno-psabi", "-Wno-unknown-pragmas"]
OPENMP = "-fopenmp"


def compiler() -> str | None:
    """The C++ compiler: ``$CXX``, else g++, else clang++; None where there is none."""
    wanted = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "clang++"]
    return next((found for name in wanted if (found := shutil.which(name))), None)


def digest(folder: Path) -> str:
    """Of the sources in ``folder``; a library says of which it was built."""
    found = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        found.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return found.hexdigest()[:16]


def build(force: bool = False) -> Path | None:
    """Compile ``csrc/*.cpp`` into the library beside this file. Raises nothing: it prints one line if it cannot.

    Args:
        force: Also where the library is of these sources already.

    Returns:
        The library, or None: spikeform then runs on PyTorch's own operations.
    """
    found = compiler()
    if platform.system() == "Windows" or found is None:
        _say("found no C++ compiler ($CXX, g++, clang++); spikeform will run on PyTorch's own operations")
        return None
    sources = digest(SOURCES)
    if not force and PLACE.exists() and sources.encode() in PLACE.read_bytes():
        return PLACE
    error = ""
    for openmp in ([OPENMP], []):
        error = _compile(found, [*FLAGS, f'-DSF_SOURCES="{sources}"', *openmp])
        if not error:
            _say(f"built {PLACE} with {found}" + ("" if openmp else ", which has no OpenMP: it runs on one thread"))
            return PLACE
    _say(f"{found} does not compile the CPU library; spikeform will run on PyTorch's own operations: {error}")
    return None


def _compile(found: str, flags: list[str]) -> str:
    """What went wrong, or nothing."""
    with tempfile.TemporaryDirectory() as folder:
        objects = {path: str(Path(folder) / f"{path.stem}.o") for path in sorted(SOURCES.glob("*.cpp"))}
        commands = [[found, *flags, "-c", str(path), "-o", target] for path, target in objects.items()]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            errors = [error for error in pool.map(_run, commands) if error]
        if errors:
            return errors[0]
        made = str(Path(folder) / PLACE.name)
        error = _run([found, *flags, "-shared", *objects.values(), "-o", made])
        if error:
            return error
        try:
            # Beside its place first: a process that has the old library open keeps it whole.
            beside = PLACE.with_suffix(f".{os.getpid()}")
            shutil.copy(made, beside)
            beside.replace(PLACE)
        except OSError as problem:
            return str(problem)
    return ""


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as problem:
        return str(problem)
    return "" if done.returncode == 0 else (done.stderr.strip() or f"exit status {done.returncode}")[-2000:]


def _say(line: str) -> None:
    print(f"spikeform: {line}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(0 if build(force=True) else 1)
