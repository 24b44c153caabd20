"""Several processes, each with its share of every batch, learn what one process learns."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def test_two_processes_learn_what_one_does(tmp_path):
    result = subprocess.run(
        [sys.executable, HERE / "several.py", tmp_path],
        env={**os.environ, "PYTHONPATH": f"{HERE.parent}:{HERE.parents[1] / 'src'}"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout.splitlines()[-1])
    assert found["devices"] == [1, 2]
    assert found["difference"] < 1e-4
    assert found["held_out"][0] == pytest.approx(found["held_out"][1], rel=1e-4)
