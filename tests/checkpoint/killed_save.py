"""Fork one child per file operation of a save, kill it just before that operation, and check what is left.

Usage: killed_save.py FOLDER
For each way to swap, over a checkpoint and over nothing, prints a line: one word a kill, what a reader finds
afterwards ("old", "new" or "none"), then "finished".
"""

import os
import shutil
import signal
import sys
from pathlib import Path

import standin
import torch
from safetensors.torch import load_file

from spikeform import checkpoint
from spikeform.checkpoint import atomic
from spikeform.errors import ForeignFolderError

EVENTS = {
    "open",
    "os.rename",
    "os.mkdir",
    "os.remove",
    "os.rmdir",
    "os.scandir",
    "os.listdir",
    "os.utime",
    "os.chmod",
}


def save_and_die(model, path, number):
    """Save in this process, which dies before its `number`-th file operation below `path`'s parent."""
    left = number

    def step():
        nonlocal left
        left -= 1
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def hook(event, arguments):
        if event in EVENTS and str(path) in str(arguments[0]):
            step()

    exchange, fsync = atomic._exchange, os.fsync

    def around(call):
        def stepped(*arguments):
            step()
            result = call(*arguments)
            step()
            return result

        return stepped

    atomic._exchange, os.fsync = around(exchange), around(fsync)
    sys.addaudithook(hook)
    checkpoint.save(model, path)


def version(path, reference):
    """Which version a reader finds; the checkpoint must be sound."""
    try:
        checkpoint.verify(path)
    except ForeignFolderError:
        return "none"
    return "new" if torch.equal(load_file(path / "model.safetensors")["lm_head.weight"], reference) else "old"


def kill_all(folder, pristine, new, swap, before):
    """One line of the output."""
    for number in range(10_000):
        path = folder / str(number) / "model"
        path.parent.mkdir()
        if before == "checkpoint":
            shutil.copytree(pristine, path)
        if (child := os.fork()) == 0:
            save_and_die(new, path, number)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if os.WIFEXITED(status):
            assert os.WEXITSTATUS(status) == 0, "the save failed"
            break
        if swap == "exchange" and before == "checkpoint":
            assert (path / "config.json").is_file(), f"kill {number}: even a plain reader must find a model"
        print(found := version(path, new.lm_head.weight), end=" ")
        beside = set(os.listdir(path.parent))
        assert beside == ({"model"} if found != "none" else set()), f"kill {number} left {beside}"
        shutil.rmtree(path.parent)
    assert version(path, new.lm_head.weight) == "new"
    print("finished")
    shutil.rmtree(path.parent)


def main(folder):
    torch.set_num_threads(1)
    new, exchange = standin.converted(1), atomic._exchange
    pristine = checkpoint.save(standin.converted(0), folder / "pristine")
    for swap in ("exchange", "two renames"):
        atomic._exchange = exchange if swap == "exchange" else lambda first, second: False
        for before in ("checkpoint", "nothing"):
            kill_all(folder, pristine, new, swap, before)


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
