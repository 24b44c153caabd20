"""What the runs of methods that are trained share: points, the dense model and its texts, and a file that fills up.

Used by spiking_mamba_run.py and neutransformer_run.py. A point is converted, perhaps trained towards the dense model,
and measured; its row is appended to the file as soon as it is finished, and what is in the file already is not run
again. Several processes, one file each, may share a GPU.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import reference_data as text
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

import spikeform
from spikeform import pretrained
from spikeform.training import TrainOptions

WINDOW, CALIBRATION_WINDOWS, COUNTED, PROMPT = 512, 128, 8192, 16


@dataclass(frozen=True)
class Point:
    """One row.

    Args:
        group: What ``--only`` names.
        config: Options of the method; None: the dense model.
        training: Changes to the options of training; None: converted alone.
        length: 0: trained with ``--steps``; n: with n times ``--long-steps``.
        model: Which model; None: that of ``--model``.
        sampled: Train on text that the dense model draws from itself, instead of the text that it was trained on.
    """

    group: str
    config: dict[str, Any] | None
    training: dict[str, Any] | None = field(default=None)
    length: int = 0
    model: str | None = None
    sampled: bool = False


def folder_of(model: str) -> Path:
    """A folder as it is, or that of an embedded model."""
    return Path(model) if Path(model).is_dir() else pretrained.path(model)


def training_stream(data: Path, cache: Path, tokenizer: Any) -> torch.Tensor:
    """Ids of the training text, encoded once for each size of vocabulary: models that share it share a tokenizer."""
    path = cache / f"train-{len(tokenizer)}.npy"
    if not path.is_file():
        text.encode_documents(tokenizer, text.training_documents(data), tokenizer.eos_token_id, path)
    return torch.from_numpy(text.encode_training(data, cache, len(tokenizer)).astype("int64"))


def sampled_stream(dense: Any, stream: torch.Tensor, tokens: int, cache: Path, rows: int = 4096) -> torch.Tensor:
    """Ids that a dense model draws from itself at temperature 1, in windows that begin with 16 tokens of a text.

    Drawn once: a file in ``cache`` keeps them. What a model says of its own text it has not learned by heart.

    Args:
        dense: The model, in evaluation mode.
        stream: The text, ``[N]``.
        tokens: How many to draw, prompts included.
        cache: Folder.
        rows: Windows that are drawn side by side.
    """
    path = cache / f"sampled-{dense.config.model_type}-{dense.num_parameters()}-{tokens}.npy"
    if not path.is_file():
        places = torch.Generator().manual_seed(0)
        wanted, windows = tokens // WINDOW, []
        torch.manual_seed(0)
        for done in range(0, wanted, rows):
            begin = torch.randint(len(stream) - PROMPT, (min(rows, wanted - done), 1), generator=places)
            prompts = stream[begin + torch.arange(PROMPT)].to(dense.device)
            new = WINDOW - PROMPT
            how = {"do_sample": True, "top_k": 0, "top_p": 1.0, "min_new_tokens": new, "max_new_tokens": new}
            with (
                torch.no_grad(),
                torch.autocast(dense.device.type, torch.bfloat16, enabled=dense.device.type == "cuda"),
            ):
                drawn = dense.generate(prompts, attention_mask=torch.ones_like(prompts), pad_token_id=0, **how)
            windows.append(drawn.cpu().numpy().astype("uint16"))
            print(f"    {min(done + rows, wanted) * WINDOW} tokens drawn", flush=True)
        partial = path.with_suffix(".partial.npy")
        np.save(partial, np.concatenate(windows).reshape(-1))
        partial.replace(path)
    return torch.from_numpy(np.load(path).astype("int64"))


class Bench(ABC):
    """A dense model, its texts, and what every row of it is held against.

    Args:
        arguments: As :func:`parser` reads them.
        folder: The dense model's.
    """

    method: Callable[..., Any]

    def __init__(self, arguments: argparse.Namespace, folder: Path) -> None:
        self.arguments, self.folder, self.device = arguments, folder, arguments.device
        self.data = text.data_folder(arguments.data)
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.stream = training_stream(self.data, arguments.cache, self.tokenizer)
        held, _ = text.encode_held_out(self.data, self.tokenizer, "books")
        self.held = torch.from_numpy(held[: arguments.tokens])
        self.calibration = self.stream[: arguments.calibration * WINDOW].view(-1, WINDOW)
        self.dense = self.fresh()

    @abstractmethod
    def options(self, point: Point) -> dict[str, Any]:
        """How a point is trained, but for steps and seed."""

    @abstractmethod
    def quality(self, model: Any) -> dict[str, Any]:
        """What goes into the row of any model."""

    @abstractmethod
    def cost(self, model: Any) -> dict[str, Any]:
        """What goes into the row of a spiking model."""

    def fresh(self) -> Any:
        """The dense model, loaded again."""
        return AutoModelForCausalLM.from_pretrained(self.folder).to(self.device).eval()

    def counted(self) -> torch.Tensor:
        """Ids that spikes are counted on, ``[N, 512]``."""
        return self.held[: min(COUNTED, len(self.held) // WINDOW * WINDOW)].view(-1, WINDOW).to(self.device)

    def run(self, name: str, point: Point, seed: int) -> dict[str, Any]:
        """One row."""
        started, arguments = time.monotonic(), self.arguments
        row: dict[str, Any] = {"point": name, "group": point.group, "seed": seed, "config": point.config}
        row |= {"model": point.model} if point.model else {}
        model = self.dense
        if point.config is not None:
            model = spikeform.convert(self.fresh(), self.method(**point.config), self.calibration)
        row["seconds"] = {"convert": round(time.monotonic() - started, 1)}
        if point.training is not None:
            steps = point.length * arguments.long_steps if point.length else arguments.steps
            given = {**self.options(point), **point.training, "steps": steps, "seed": seed}
            row |= self.train(model, given, self.learned_from(point), f"{name}-{seed}")
            row["seconds"]["train"] = round(time.monotonic() - started - row["seconds"]["convert"], 1)
        begin = time.monotonic()
        row |= self.quality(model)
        if model is not self.dense:
            row |= self.cost(model)
        row["seconds"]["measure"] = round(time.monotonic() - begin, 1)
        if arguments.save is not None and name in arguments.saved:
            spikeform.save(model, arguments.save / f"{name}{f'-seed{seed}' if seed else ''}", self.tokenizer)
        return row

    def learned_from(self, point: Point) -> torch.Tensor:
        """The text that a point is trained on."""
        arguments = self.arguments
        if not point.sampled:
            return self.stream
        return sampled_stream(self.dense, self.stream, arguments.sampled_tokens, arguments.cache)

    def train(self, model: Any, options: dict[str, Any], stream: torch.Tensor, name: str) -> dict[str, Any]:
        """Train in place, or go on where a run of the same name was stopped; returns the options and the curve."""
        options |= {"bf16": self.device == "cuda", "save_every": 2000}
        options["compile"] = self.arguments.compile and options.get("compile", True)
        options |= {"batch_size": self.arguments.batch_size or options["batch_size"]}
        torch.compiler.reset()  # what was compiled of the last model would count towards a limit
        chosen = TrainOptions(**options, evaluate_every=max(1, options["steps"] // 4))
        teacher = self.fresh() if chosen.taught else None
        work = self.arguments.out.with_suffix(".work") / name
        more: dict[str, Any] = {"teacher": teacher, "progress": told, "work": work, "resume": True}
        spikeform.train(model, stream, self.tokenizer, chosen, valid=self.held[: 50 * WINDOW], **more)
        done: Any = model.spikeform_report.history[-1]
        return {"training": chosen.to_dict(), "tokens": len(stream), "curve": done["curve"]}


def told(point: dict[str, Any]) -> None:
    """Show a point of the curve that has a held-out loss."""
    if "perplexity" in point:
        print("   ", {k: round(v, 4) for k, v in point.items() if isinstance(v, int | float)}, flush=True)


def parser(description: str | None, points: Mapping[str, Point], saved: list[str]) -> argparse.ArgumentParser:
    """The arguments that all runs have; ``--model`` is the caller's."""
    found = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--out", type=Path, required=True)
    found.add_argument("--data", type=Path, help="default: $SPIKEFORM_DATA, else ../shared/data")
    found.add_argument("--cache", type=Path, required=True, help="encoded training text, as of train_reference.py")
    found.add_argument("--only", nargs="+", choices=[*dict.fromkeys(p.group for p in points.values()), *points])
    found.add_argument("--steps", type=int, default=1000, help="of every training but the long ones")
    found.add_argument("--long-steps", type=int, default=4000)
    found.add_argument("--batch-size", type=int, help="sequences a step; default: the method's")
    found.add_argument("--seeds", type=int, nargs="+", default=[0], help="of trainings")
    found.add_argument("--tokens", type=int, default=100_000, help="of the held-out text")
    found.add_argument("--calibration", type=int, default=CALIBRATION_WINDOWS, help="windows")
    found.add_argument("--save", type=Path, help="folder for checkpoints of --saved")
    found.add_argument("--saved", nargs="*", default=saved)
    found.add_argument("--minutes", type=float, default=600.0, help="take up no new row after this")
    found.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    found.add_argument(
        "--compile", action=argparse.BooleanOptionalAction, default=torch.cuda.is_available(), help="training passes"
    )
    found.add_argument("--sampled-tokens", type=int, default=1 << 25, help="that points on sampled text learn from")
    return found


def run_missing(
    arguments: argparse.Namespace,
    points: Mapping[str, Point],
    protocol: str,
    bench_of: Callable[[str | None], Bench],
    summary: Callable[[dict[str, Any]], str],
) -> None:
    """Run what is wanted and missing from the file. A point that fails is told, and the others go on.

    Args:
        arguments: The command line's.
        points: All of them, by name, in the order in which they are run.
        protocol: What the numbers are; one file holds one protocol.
        bench_of: The bench of a point's ``model``; that of the last one is kept.
        summary: One line of a row.

    Raises:
        SystemExit: The file is of another protocol, or points failed.
    """
    begin = time.monotonic()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    result: dict[str, Any] = {"rows": []}
    if arguments.out.exists():
        result = json.loads(arguments.out.read_text(encoding="utf-8"))
        if result["protocol"] != protocol:
            raise SystemExit(f"{arguments.out} is of another protocol: {result['protocol']}; give another --out")
    hardware = torch.cuda.get_device_name() if arguments.device == "cuda" else f"CPU {platform.machine()}"
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    result |= {"protocol": protocol, "hardware": hardware, "versions": versions}
    have = {(row["point"], row["seed"]) for row in result["rows"]}
    bench: Bench | None = None
    of: str | None = None
    failed: list[str] = []
    for name, seed in wanted(arguments, points):
        if (name, seed) in have:
            continue
        if time.monotonic() - begin > 60 * arguments.minutes:
            print(f"time is up: {name} and what follows are missing", flush=True)
            break
        point = points[name]
        try:
            if bench is None or of != point.model:
                bench, of = bench_of(point.model), point.model
                print(f"texts and dense model after {time.monotonic() - begin:.0f} s", flush=True)
            row = bench.run(name, point, seed)
        except Exception:
            traceback.print_exc()
            failed.append(name)
            continue
        result["rows"].append(row)
        partial = arguments.out.with_suffix(".partial")
        partial.write_text(json.dumps(result, indent=1), encoding="utf-8")
        partial.replace(arguments.out)
        print(f"{summary(row)}; {time.monotonic() - begin:.0f} s in all", flush=True)
    if failed:
        raise SystemExit(f"failed, see above: {', '.join(failed)}")


def wanted(arguments: argparse.Namespace, points: Mapping[str, Point]) -> list[tuple[str, int]]:
    """Points and seeds that ``--only`` and ``--seeds`` ask for, in order. A conversion draws nothing: one seed."""
    only = None if arguments.only is None else set(arguments.only)
    return [
        (name, seed)
        for seed in arguments.seeds
        for name, point in points.items()
        if (only is None or {name, point.group} & only) and (seed == arguments.seeds[0] or point.training is not None)
    ]
