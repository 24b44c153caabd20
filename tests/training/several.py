"""Distil a tiny model on two processes, then on one that sees the same batches. Usage: several.py FOLDER

Prints one JSON line: the largest relative difference of a tensor, and how many devices each run says it had.
"""

import json
import os
import socket
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

import families
import spikeform
from spikeform.training import TrainOptions, train

COMMON = {"window": 16, "steps": 4, "learning_rate": 1e-4, "gradient_checkpointing": True, "compensation": "add"}


def run(out, batch_size):
    """P is left out of the pass once lambda is 0: no process may wait for its gradient."""
    torch.set_num_threads(1)
    ids = families.tokens(30, 100).reshape(-1)
    model = spikeform.convert(families.build("mamba2"), spikeform.SpikingMamba(threshold=0.5))
    options = TrainOptions(**COMMON, batch_size=batch_size, ce=0, distil=1, hidden=1, freeze=("*embed*",))
    train(model, ids, options=options, teacher=families.build("mamba2"), valid=ids[:160], out=out)


def several(out, count):
    """``run`` on so many processes."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    children = []
    for rank in range(count):
        if (pid := os.fork()) == 0:
            place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1"}
            os.environ.update({name: str(value) for name, value in (place | {"MASTER_PORT": port}).items()})
            run(out, 4 // count)
            torch.distributed.destroy_process_group()
            os._exit(0)
        children.append(pid)
    assert [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children] == [0] * count


def main(folder):
    """Both runs, compared."""
    several(folder / "two", 2)
    run(folder / "one", 4)
    one, two = (load_file(folder / name / "model.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys()
    histories = [json.loads((folder / n / "spikeform.json").read_text())["report"]["history"] for n in ("one", "two")]
    found = {
        "difference": max(families.difference(one[name], two[name]) for name in one),
        "devices": [history[-1]["devices"] for history in histories],
        "held_out": [history[-1]["metrics"]["held_out_loss"] for history in histories],
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
