"""Thresholds from data, block by block, resumable.

Each block is calibrated on what the already spiking blocks before it send, so errors are seen, not hidden; only
one block's statistics are held. A finished block is written to the work folder before the next begins.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from spikeform.conversion.histogram import Histogram
from spikeform.conversion.kinds import blocks
from spikeform.errors import CalibrationError
from spikeform.neurons import Neuron, ThresholdNeuron, recording

Progress = Callable[[int, int], None]


@dataclass
class Block:
    """A block, its name, and what it was called with for each batch."""

    name: str
    module: nn.Module
    calls: list[tuple[tuple, dict]]


class Statistics:
    """Collects a histogram per neuron; give it to :func:`spikeform.neurons.recording`."""

    def __init__(self) -> None:
        self.seen: dict[ThresholdNeuron, Histogram] = {}

    def __call__(self, neuron: Neuron, x: Tensor) -> None:
        """Record one input ``x``: ``[..., C]``, or ``[B, G, S, E]`` with channels (G, E)."""
        if not isinstance(neuron, ThresholdNeuron):
            return
        if not neuron.statistics_per_channel:
            shape, channels = (1,), x.reshape(1, -1)
        elif x.ndim == 4:
            shape = (x.shape[1], 1, x.shape[3])
            channels = x.permute(1, 3, 0, 2).reshape(x.shape[1] * x.shape[3], -1)
        else:
            shape = (x.shape[-1],)
            channels = x.reshape(-1, x.shape[-1]).T
        found = Histogram.of(channels, shape)
        if neuron in self.seen:
            self.seen[neuron].add(found)
        else:
            self.seen[neuron] = found


def calibrate(
    model: PreTrainedModel,
    batches: list[Tensor],
    fit: Callable[[Any, Histogram], float],
    workdir: str | Path | None = None,
    fingerprint: Any = None,
    progress: Progress | None = None,
) -> dict[str, float]:
    """Set the threshold of every uncalibrated neuron of ``model``.

    Args:
        model: Prepared (spiking layers in place).
        batches: Token ids ``[N, L]`` each.
        fit: Sets one neuron's threshold from its histogram; returns the share of inputs it saturates.
        workdir: Folder for finished blocks; a later call with the same model, data and config resumes there.
        fingerprint: What, with the data, must be equal for a resume (the config).
        progress: Called with ``(blocks done, blocks)``.

    Returns:
        Saturated share per site, where not zero.

    Raises:
        CalibrationError: A neuron saw no input, or the work folder belongs to another run.
    """
    store = _Store(workdir, batches, fingerprint, model) if workdir is not None else None
    saturation: dict[str, float] = {}

    def settle(statistics: Statistics) -> None:
        for neuron, histogram in statistics.seen.items():
            if not neuron.calibrated:
                share = fit(neuron, histogram)
                if share > 0:
                    saturation[neuron.site] = share

    training = model.training
    model.eval()
    with torch.no_grad():
        found = [Block(name, module, []) for name, module in blocks(model)]
        inside = {n for block in found for n in block.module.modules() if isinstance(n, ThresholdNeuron)}
        outside = Statistics()
        hidden = _capture(model, batches, found, lambda n, x: None if n in inside else outside(n, x))
        settle(outside)
        for index, block in enumerate(found):
            if store is None or not store.restore(index, block.module, saturation):
                statistics = Statistics()
                with recording(statistics):
                    for h, (args, kwargs) in zip(hidden, block.calls, strict=True):
                        block.module(h, *args, **kwargs)
                before = dict(saturation)
                settle(statistics)
                if store is not None:
                    store.save(index, block.module, {k: v for k, v in saturation.items() if k not in before})
            hidden = [_run(block.module, h, call) for h, call in zip(hidden, block.calls, strict=True)]
            if progress is not None:
                progress(index + 1, len(found))
    model.train(training)
    silent = [n.site for n in model.modules() if isinstance(n, ThresholdNeuron) and not n.calibrated]
    if silent:
        raise CalibrationError(
            f"{len(silent)} sites saw no calibration input, e.g. {silent[0]}; leave them dense (skip) or give their "
            "thresholds"
        )
    return saturation


def _run(block: nn.Module, hidden: Tensor, call: tuple[tuple, dict]) -> Tensor:
    out = block(hidden, *call[0], **call[1])
    return out[0] if isinstance(out, tuple) else out


def _capture(model: PreTrainedModel, batches: list[Tensor], found: list[Block], recorder) -> list[Tensor]:
    """Run the model with analog neurons; keep block 0's inputs, and each block's other arguments."""
    hidden: list[Tensor] = []

    def keep(block: Block, first: bool):
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            kwargs = dict(kwargs)
            x, rest = (args[0], args[1:]) if args else (kwargs.pop("hidden_states"), ())
            block.calls.append((rest, kwargs))
            if first:
                hidden.append(x)

        return hook

    handles = [
        b.module.register_forward_pre_hook(keep(b, i == 0), with_kwargs=True, prepend=True) for i, b in enumerate(found)
    ]
    device = model.get_input_embeddings().weight.device
    # With a cache the blocks would be run twice on it: once here, once when they are calibrated.
    extra = {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}
    try:
        with recording(recorder):
            for ids in batches:
                model(input_ids=ids.to(device), **extra)
    finally:
        for handle in handles:
            handle.remove()
    return hidden


class _Store:
    """Finished blocks on disk: ``block-0003.safetensors`` each, and ``calibration.json`` saying of what run."""

    def __init__(self, workdir: str | Path, batches: list[Tensor], fingerprint: Any, model: PreTrainedModel) -> None:
        self.path = Path(workdir)
        digest = hashlib.sha256(json.dumps([fingerprint, type(model).__name__], sort_keys=True, default=str).encode())
        for ids in batches:
            digest.update(ids.cpu().numpy().tobytes())
        for parameter in model.parameters():  # a cheap mark of the weights: not every bit, but every tensor
            digest.update(parameter.detach().double().sum().cpu().numpy().tobytes())
        manifest = self.path / "calibration.json"
        wanted = {"format": 1, "run": digest.hexdigest()}
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

    def save(self, index: int, block: nn.Module, saturation: dict[str, float]) -> None:
        tensors = {}
        for name, neuron in block.named_modules():
            if isinstance(neuron, ThresholdNeuron):
                tensors |= {f"{name}.{key}": tensor.cpu() for key, tensor in neuron.state_dict().items()}
        partial = self._file(index).with_suffix(".partial")
        save_file(tensors, partial, metadata={"saturation": json.dumps(saturation)})
        os.replace(partial, self._file(index))

    def restore(self, index: int, block: nn.Module, saturation: dict[str, float]) -> bool:
        file = self._file(index)
        if not file.exists():
            return False
        try:
            with safe_open(file, "pt") as opened:
                saturation.update(json.loads((opened.metadata() or {}).get("saturation", "{}")))
            tensors = load_file(file)
        except SafetensorError as error:
            raise CalibrationError(f"{file} is damaged ({error}); delete it: its block is calibrated anew") from None
        for name, neuron in block.named_modules():
            if isinstance(neuron, ThresholdNeuron):
                neuron.load_state_dict({key: tensors[f"{name}.{key}"] for key in neuron.state_dict()})
        return True


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except ValueError:
        return None


def _write(path: Path, data: bytes) -> None:
    partial = path.with_suffix(".partial")
    partial.write_bytes(data)
    os.replace(partial, path)
