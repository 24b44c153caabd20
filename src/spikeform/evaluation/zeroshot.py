"""Zero-shot tasks through lm-evaluation-harness, offline, over local data files.

Each file in ``tasks/`` is one task: it includes the harness's own definition (prompt, metric) and swaps the
data for a local file, whose name and chance level stand in its metadata. A new task is a new YAML file.
"""

from __future__ import annotations

import json
import logging
import lzma
import math
import os
import string
import tarfile
import tempfile
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml
from torch import nn

from spikeform.evaluation import text
from spikeform.evaluation.perplexity import check_batch_size, context_of, device_of, evaluating

TASKS = Path(__file__).with_name("tasks")


def available_tasks() -> tuple[str, ...]:
    """The names that :func:`zeroshot` knows."""
    return tuple(sorted(path.stem for path in TASKS.glob("*.yaml")))


def zeroshot(
    model: nn.Module,
    tokenizer: Any,
    tasks: Sequence[str] = ("blimp", "piqa"),
    data_root: str | Path | None = None,
    limit: int | None = None,
    batch_size: int = 16,
) -> dict[str, Any]:
    """Accuracy of a causal language model on multiple-choice tasks, no examples shown.

    Args:
        model: a Hugging Face causal language model, dense or converted.
        tokenizer: its tokenizer.
        tasks: names from :func:`available_tasks`.
        data_root: folder of the data files; None takes the environment variable SPIKEFORM_DATA.
        limit: questions of each task (of each paradigm of BLiMP), the first ones; None takes all.
        batch_size: sequences read at once.

    Returns:
        ``{"protocol": str, "tasks": {name: {...}}}``, with "acc", "acc_stderr", "acc_norm" and
        "acc_norm_stderr" (where the task has it: choices weighed by their length in bytes), "chance" and "n"
        for each task. A group (blimp) has the mean over its parts, and the parts' accuracies as "parts".
        A standard error is None where one question was asked.

    Raises:
        ImportError: if lm-evaluation-harness is not installed.
        ValueError: if a task is unknown, or none is given, or ``limit`` is below 1.
        FileNotFoundError: if the data is not there.
    """
    names = [tasks] if isinstance(tasks, str) else list(dict.fromkeys(tasks))
    known = available_tasks()
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        fault = f"unknown task {unknown[0]!r}" if unknown else "no task given"
        raise ValueError(f"{fault}: choose from {', '.join(known)}")
    if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or limit < 1):
        raise ValueError(f"limit is {limit!r}: it must be a whole number of questions of at least 1, or None for all")
    check_batch_size(batch_size)
    if find_spec("lm_eval") is None:
        raise ImportError("zero-shot tasks need lm-evaluation-harness: pip install spikeform[eval]")
    data = text.data_root(data_root)
    files = {name: data / metadata_of(name)["file"] for name in names}
    for name, file in files.items():
        if not file.is_file():
            raise FileNotFoundError(
                f"task {name} needs {file}, which does not exist: point SPIKEFORM_DATA at its folder"
            )
    with tempfile.TemporaryDirectory(prefix="spikeform-") as scratch, offline(), evaluating(model):
        parts = {name: render(name, file, Path(scratch)) for name, file in files.items()}
        raw = run_harness(
            model, tokenizer, [task for tasks in parts.values() for task in tasks], scratch, limit, batch_size
        )
    return {
        "protocol": f"lm-evaluation-harness {version('lm_eval')}, 0-shot, local data"
        + (f", first {limit} of each" if limit else ""),
        "tasks": {name: score(name, parts[name], raw) for name in names},
    }


def metadata_of(task: str) -> dict[str, Any]:
    """What a task's file says of it: its data file under the data root, and its chance level."""
    return yaml.safe_load((TASKS / f"{task}.yaml").read_text(encoding="utf-8"))["metadata"]


def render(task: str, file: Path, scratch: Path) -> dict[str, str]:
    """Writes the task's YAML files with their paths filled in.

    Returns:
        Harness task name -> the part of the group that it is ("" for a task without parts).
    """
    import lm_eval

    template = string.Template((TASKS / f"{task}.yaml").read_text(encoding="utf-8"))
    written = {}
    for part, data in unpack(file, scratch / task).items():
        filled = template.substitute(
            harness=Path(lm_eval.__file__).with_name("tasks").as_posix(),
            data=data.resolve().as_posix(),
            cache=(scratch / "cache").as_posix(),
            part=part,
        )
        name = yaml.safe_load(filled)["task"]
        (scratch / f"{name}.yaml").write_text(filled, encoding="utf-8")
        written[name] = part
    return written


def unpack(file: Path, folder: Path) -> dict[str, Path]:
    """The JSON-lines files of a data file, by the part of the task that each holds ("" for the whole).

    A ``.tar.xz`` holds one for each part. A ``.txt.xz`` has six lines a question: context, index of the right
    ending, four endings.
    """
    if file.suffix == ".jsonl":
        return {"": file}
    folder.mkdir()
    if file.name.endswith(".tar.xz"):
        with tarfile.open(file) as archive:
            archive.extractall(folder, filter="data")
        return {path.stem: path for path in sorted(folder.rglob("*.jsonl"))}
    lines = lzma.decompress(file.read_bytes()).decode("utf-8").splitlines()
    path = folder / "data.jsonl"
    with path.open("w", encoding="utf-8") as out:
        for i in range(0, len(lines) - 5, 6):
            question = {"query": lines[i], "gold": int(lines[i + 1]), "choices": lines[i + 2 : i + 6]}
            out.write(json.dumps(question) + "\n")
    return {"": path}


def run_harness(
    model: Any, tokenizer: Any, tasks: list[str], folder: str, limit: int | None, batch_size: int
) -> dict[str, Any]:
    """The harness's own result for the tasks defined in ``folder``."""
    import datasets
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=folder, include_defaults=False)
    datasets.disable_progress_bars()  # one a file is too many; the harness's own bar stays
    logger = logging.getLogger("lm_eval")
    logger.setLevel(logging.ERROR)  # it warns of models that are not named by a string
    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, device=str(device_of(model)))
    logger.setLevel(logging.WARNING)  # of questions it has to cut
    # Not simple_evaluate: it reseeds the caller's random generators and runs pip to list the environment.
    try:
        results = evaluate(lm=lm, task_dict=manager.load(tasks), limit=limit, log_samples=False)
    except AssertionError as error:
        raise ValueError(
            "lm-evaluation-harness refused a question; the usual reason is a choice longer than the model's "
            f"context of {context_of(model)} tokens: leave that task out"
        ) from error
    assert results is not None  # None is for ranks above 0
    return results


def score(task: str, parts: dict[str, str], raw: dict[str, Any]) -> dict[str, Any]:
    """One task's entry of the result: the mean over its parts, each part weighing the same.

    The parts are independent samples, so the mean of K has the standard error √(Σ stderr²) / K.
    """
    results = [raw["results"][name] for name in parts]
    out: dict[str, Any] = {}
    for metric in ("acc", "acc_norm"):
        if f"{metric},none" in results[0]:
            out[metric] = math.fsum(r[f"{metric},none"] for r in results) / len(results)
            errors = [r[f"{metric}_stderr,none"] for r in results]
            known = all(isinstance(e, float) for e in errors)
            out[f"{metric}_stderr"] = math.sqrt(math.fsum(e * e for e in errors)) / len(errors) if known else None
    out["chance"] = metadata_of(task)["chance"]
    out["n"] = sum(raw["n-samples"][name]["effective"] for name in parts)
    if any(parts.values()):
        out["parts"] = {part: raw["results"][name]["acc,none"] for name, part in parts.items()}
    return out


@contextmanager
def offline() -> Generator[None]:
    """Tells the Hugging Face libraries to stay off the network inside the block."""
    names = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(dict.fromkeys(names, "1"))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
