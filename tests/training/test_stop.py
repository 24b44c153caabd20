"""A run that is stopped or killed and resumed ends as one that was not."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from spikeform.training import TrainingError
from spikeform.training.signals import StopSignals
from spikeform.training.state import check_work, checkpoints, is_complete, mark_complete, open_work

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folder of all runs of stopped.py, and what it says of each."""
    folder = tmp_path_factory.mktemp("runs")
    result = subprocess.run(
        [sys.executable, HERE / "stopped.py", folder],
        env={**os.environ, "PYTHONPATH": f"{HERE.parent}:{HERE.parents[1] / 'src'}"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return folder, {line["name"]: line for line in map(json.loads, result.stdout.splitlines())}


def curve(out):
    """The measured points, without their times."""
    (entry,) = json.loads((out / "training.json").read_text())["history"]
    return [{k: p[k] for k in ("step", "held_out_loss")} for p in entry["curve"] if "held_out_loss" in p]


@pytest.mark.parametrize("name", ["between", "measuring", "killed"])
def test_resumed_ends_as_undisturbed(runs, name):
    folder, said = runs
    assert said[f"{name} resumed"] == {"name": f"{name} resumed", "code": 0, "stopped": None, "states": []}
    ours, theirs = (load_file(folder / run / "model.safetensors") for run in (name, "whole"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert curve(folder / name) == curve(folder / "whole")


@pytest.mark.parametrize(("name", "step"), [("between", 8), ("measuring", 8)])
def test_terminated_saves_its_step(runs, name, step):
    said = runs[1][name]
    assert (said["code"], said["stopped"], said["states"][-1]) == (0, step, f"checkpoint-{step}")


def test_killed_had_saved_before(runs):
    said = runs[1]["killed"]
    assert (said["code"], said["states"]) == (-signal.SIGKILL, ["checkpoint-10", "checkpoint-15"])


def test_a_second_signal_ends_it_at_once():
    code = (
        "import os, signal, sys\n"
        "from spikeform.training.signals import StopSignals\n"
        "with StopSignals() as stop:\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    print(stop.signal, flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    print('still here', flush=True)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == -signal.SIGTERM
    assert result.stdout.split() == ["15"]


def test_handlers_are_put_back():
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with StopSignals() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.signal == signal.SIGINT
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def a_checkpoint(work, step):
    folder = work / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"1234")
    mark_complete(folder, 1.0)
    return folder


def test_incomplete_states_are_passed_over(tmp_path):
    open_work(tmp_path, {"seed": 0})
    first, second, third = (a_checkpoint(tmp_path, step) for step in (9, 10, 100))
    assert checkpoints(tmp_path) == [first, second, third]
    (third / "complete.json").write_text("{")
    (second / "model.safetensors").write_bytes(b"123")
    assert [is_complete(path) for path in (first, second, third)] == [True, False, False]
    assert open_work(tmp_path, {"seed": 0}) == first
    assert checkpoints(tmp_path) == [first]


def test_other_runs_are_refused(tmp_path):
    work = tmp_path / "work"
    open_work(work, {"seed": 0, "data": 1})
    check_work(work, resume=False)  # nothing in it to lose yet
    a_checkpoint(work, 5)
    with pytest.raises(TrainingError, match=r"holds a stopped run \(at step 5\): resume it"):
        check_work(work, resume=False)
    check_work(work, resume=True)
    with pytest.raises(TrainingError, match="another run, of other data"):
        open_work(work, {"seed": 0, "data": 2})
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").touch()
    with pytest.raises(TrainingError, match="files that are not of a training run"):
        check_work(tmp_path / "notes", resume=True)
