"""What tests of Triton kernels share: a CUDA device, or Triton's interpreter in a process of its own.

The interpreter is chosen when Triton is first imported, hence the process: :func:`on_the_interpreter` runs a test file
again, with ``TRITON_INTERPRET=1``.
"""

import os
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
_runs = pytest.mark.skipif(
    not INTERPRETED and not torch.cuda.is_available(), reason="runs on a CUDA device, or in the interpreter's process"
)
not_interpreted = pytest.mark.skipif(INTERPRETED, reason="this is the test that starts the interpreter's process")


def fused(test):
    """Marks a test that launches kernels."""
    return needs_triton(_runs(test))


def on_the_interpreter(file):
    """Run the tests of ``file`` there; what failed is in the error."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", file, "-p", "no:cacheprovider", "-p", "no:xdist"],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert " passed" in done.stdout


def let_bounds_be_scalars(monkeypatch):
    """The interpreter keeps scalars as arrays of one element, which new versions of numpy do not take for integers."""
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patched(tensor, scope):
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    monkeypatch.setattr(interpreter, "_patch_lang_tensor", patched)
