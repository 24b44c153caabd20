"""A model block by block: what each is called with, and finished blocks on disk, so that a run resumes."""

from __future__ import annotations

import hashlib
import inspect
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from spikeform.errors import CalibrationError
from spikeform.neurons import recording


@dataclass
class Block:
    """A block, its name, and what it was called with for each batch.

    Args:
        name: Qualified name.
        module: The block.
        calls: Positional and keyword arguments of each call, without the hidden states.
    """

    name: str
    module: nn.Module
    calls: list[tuple[tuple, dict]]

    def run(self, hidden: Tensor, call: tuple[tuple, dict]) -> Tensor:
        """The block's output ``[B, L, D]`` for one batch, on the device where ``hidden`` is kept."""
        parameter = next(self.module.parameters(), hidden)
        out = self.module(hidden.to(parameter.device), *call[0], **call[1])
        return (out[0] if isinstance(out, tuple) else out).to(hidden.device)

    def run_all(self, hidden: list[Tensor]) -> list[Tensor]:
        """The same for every batch."""
        return [self.run(h, call) for h, call in zip(hidden, self.calls, strict=True)]


def capture(
    model: PreTrainedModel, batches: list[Tensor], found: list[Block], recorder: Any, device: str | None = None
) -> list[Tensor]:
    """Run the model with analog neurons; keep block 0's inputs, and each block's other arguments.

    Args:
        model: Prepared.
        batches: Token ids ``[N, L]`` each.
        found: The model's blocks; their ``calls`` are filled.
        recorder: Shown what neurons see meanwhile (see :func:`spikeform.neurons.recording`).
        device: Where inputs are kept; None: where the block is.

    Returns:
        Block 0's input for each batch.
    """
    hidden: list[Tensor] = []

    def keep(block: Block, first: bool):
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            kwargs = dict(kwargs)
            x, rest = (args[0], args[1:]) if args else (kwargs.pop("hidden_states"), ())
            block.calls.append((rest, kwargs))
            if first:
                hidden.append(x.to(device))

        return hook

    handles = [
        b.module.register_forward_pre_hook(keep(b, i == 0), with_kwargs=True, prepend=True) for i, b in enumerate(found)
    ]
    home = model.get_input_embeddings().weight.device
    # With a cache the blocks would be run twice on it: once here, once when they are calibrated.
    extra = {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}
    try:
        with recording(recorder):
            for ids in batches:
                model(input_ids=ids.to(home), **extra)
    finally:
        for handle in handles:
            handle.remove()
    return hidden


class Store:
    """Finished blocks on disk: ``block-0003.safetensors`` each, and ``calibration.json`` saying of what run.

    Args:
        workdir: The folder; made if absent.
        batches: Token ids, part of the run's mark.
        fingerprint: What else must be equal for a resume (the config).
        model: Prepared, before anything was found; a cheap mark of its weights is taken.

    Raises:
        CalibrationError: The folder belongs to another run, or holds something else.
    """

    def __init__(self, workdir: str | Path, batches: list[Tensor], fingerprint: Any, model: PreTrainedModel) -> None:
        self.path = Path(workdir)
        digest = hashlib.sha256(json.dumps([fingerprint, type(model).__name__], sort_keys=True, default=str).encode())
        for ids in batches:
            digest.update(ids.cpu().numpy().tobytes())
        for parameter in model.parameters():  # a cheap mark of the weights: not every bit, but every tensor
            digest.update(parameter.detach().double().sum().cpu().numpy().tobytes())
        manifest = self.path / "calibration.json"
        wanted = {"format": 2, "run": digest.hexdigest()}
        if manifest.exists():
            if _read(manifest) != wanted:
                raise CalibrationError(
                    f"{self.path} holds the calibration of another run (other model, data or config); "
                    "give another folder, or delete it"
                )
        elif self.path.is_file():
            raise CalibrationError(f"{self.path} is a file; give a folder")
        elif self.path.exists() and any(f.suffix != ".partial" for f in self.path.iterdir()):
            raise CalibrationError(f"{self.path} is not empty and holds no calibration; give another folder")
        else:
            self.path.mkdir(parents=True, exist_ok=True)
            _write(manifest, json.dumps(wanted).encode())

    def _file(self, index: int) -> Path:
        return self.path / f"block-{index:04d}.safetensors"

    def save(self, index: int, tensors: dict[str, Tensor], facts: Any) -> None:
        """Keep a finished block: its tensors, and JSON-able facts."""
        partial = self._file(index).with_suffix(".partial")
        kept = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
        save_file(kept, partial, metadata={"facts": json.dumps(facts)})
        os.replace(partial, self._file(index))

    def restore(self, index: int) -> tuple[dict[str, Tensor], Any] | None:
        """What :meth:`save` kept, or None.

        Raises:
            CalibrationError: The file is damaged.
        """
        file = self._file(index)
        if not file.exists():
            return None
        try:
            with safe_open(file, "pt") as opened:
                facts = json.loads((opened.metadata() or {}).get("facts", "null"))
            return load_file(file), facts
        except SafetensorError as error:
            raise CalibrationError(f"{file} is damaged ({error}); delete it: its block is calibrated anew") from None


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except ValueError:
        return None


def _write(path: Path, data: bytes) -> None:
    partial = path.with_suffix(".partial")
    partial.write_bytes(data)
    os.replace(partial, path)
