"""Train tiny models in children that are killed, and resume them. Usage: stopped.py FOLDER

Prints one JSON line a run: {"name", "code": how the child ended, "stopped": the step it said, "states": the
checkpoint folders it left}. Run "whole" is not disturbed. test_stop.py compares what they wrote.
"""

import json
import os
import shutil
import signal
import sys
from pathlib import Path

import torch

import families
from spikeform.training import Interrupted, TrainOptions, train
from spikeform.training.state import checkpoints

OPTIONS = TrainOptions(
    window=16, batch_size=4, accumulate=2, steps=24, learning_rate=1e-3, save_every=5, evaluate_every=4
)


def run(out, resume, say):
    """Train a model with dropout: the state of the random generators has to come back, too."""
    model, ids = families.build("gpt2"), families.tokens(30, 100).reshape(-1)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.1
    try:
        train(model, ids, options=OPTIONS, valid=ids[:1600], out=out, resume=resume, progress=say)
    except Interrupted as stopped:
        return stopped.step
    return None


def child(name, out, resume=False, kill=None, number=signal.SIGTERM):
    """Train in a child, which sends itself a signal at the first point of the curve that ``kill`` accepts."""
    reader, writer = os.pipe()
    if (pid := os.fork()) == 0:
        said = run(out, resume, lambda point: kill and kill(point) and os.kill(os.getpid(), number))
        os.write(writer, json.dumps(said).encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        said = pipe.read()
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    work = Path(f"{out}.work")
    states = [path.name for path in checkpoints(work)] if work.exists() else []
    print(json.dumps({"name": name, "code": code, "stopped": json.loads(said or "null"), "states": states}), flush=True)
    return work, states


def main(folder):
    """All runs."""
    torch.set_num_threads(1)
    child("whole", folder / "whole")
    child("between", folder / "between", kill=lambda point: point["step"] == 7)
    child("between resumed", folder / "between", resume=True)
    while_it_measures(folder / "measuring")
    work, states = child("killed", folder / "killed", kill=lambda point: point["step"] == 16, number=signal.SIGKILL)
    partial = work / "checkpoint-99"  # as if killed while it wrote one more
    shutil.copytree(work / states[-1], partial)
    (partial / "complete.json").unlink()
    child("killed resumed", folder / "killed", resume=True)


def while_it_measures(out):
    """Stopped in the middle of a measurement: it has to be taken after the resume."""
    from spikeform.training import losses

    sums_of, calls = losses.sums_of, []

    def interrupted(model, batches, extra, go_on):
        calls.append(0)

        def ask():
            if len(calls) == 3:
                os.kill(os.getpid(), signal.SIGTERM)
            return go_on()

        return sums_of(model, batches, extra, ask)

    losses.sums_of = interrupted
    child("measuring", out)
    losses.sums_of = sums_of
    child("measuring resumed", out, resume=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
