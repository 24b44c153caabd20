"""How fast a spiking model reads and writes, beside the dense one it came from.

Both run in one process, turn by turn, so that what slows the machine down for a while slows both. Prefill is one
forward pass over the prompt that fills a new cache and gives the last logits. Decoding is ``model.generate``; a token
takes what lies between two calls of its logits processors. Compiled, ``generate`` does as it does by itself on a GPU:
a static cache, and a compiled forward pass for tokens after the prompt. Each figure is the median of the rounds (of a
round's tokens, too); the spread is the distance of its quartiles over the rounds.
"""

from __future__ import annotations

import inspect
import statistics
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import CompileConfig, LogitsProcessorList, PreTrainedModel

from spikeform.conversion.data import context_length
from spikeform.errors import SpikeformError
from spikeform.report.bench_measures import Clock, held_bytes, memory, spread
from spikeform.synapses import executor

AUTOMATIC = "automatic"
SETTLING = 2  # tokens after the prompt that are not counted: graphs are recorded anew for a new cache


@dataclass
class Speed:
    """What one model did.

    Attributes:
        model: ``dense`` or ``spiking``.
        executor: ``temporal``, ``collapsed``, ``event``, or ``automatic``.
        compiled: Whether tokens after the prompt ran compiled.
        prefill_tokens_per_s: Of all sequences of the batch together; ``prefill_spread`` likewise.
        decode_ms: Milliseconds from one token (of each sequence) to the next; None where the model does not write.
        decode_tokens_per_s: Of all sequences together.
        weight_bytes: Of all parameters and buffers, as they lie in memory.
        peak_bytes: Those and the most that was needed beside them; None where the system does not say.
        prefill_speedup: Times as fast as the dense model; None without one.
        decode_speedup: The same of decoding.
    """

    model: str
    executor: str
    compiled: bool
    prefill_tokens_per_s: float
    prefill_spread: float
    decode_ms: float | None
    decode_spread_ms: float | None
    decode_tokens_per_s: float | None
    weight_bytes: int
    peak_bytes: int | None
    prefill_speedup: float | None = None
    decode_speedup: float | None = None


@dataclass
class Bench:
    """What :func:`bench` found: one row a model and executor, and under which conditions."""

    rows: list[Speed]
    protocol: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return asdict(self)


def bench(
    spiking: PreTrainedModel,
    dense: PreTrainedModel | None = None,
    *,
    prompt: int = 128,
    new: int = 64,
    batch: int = 1,
    repeat: int = 5,
    executors: Sequence[str] = (AUTOMATIC,),
    compiled: bool | None = None,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Bench:
    """Measure speed and memory.

    Args:
        spiking: A converted model, on the device and in the dtype to be measured.
        dense: The model it came from, on the same device and in the same dtype; None: no ratios.
        prompt: Tokens that are read at once, random ones.
        new: Tokens that are written after them.
        batch: Sequences side by side.
        repeat: Rounds, after one that is not counted.
        executors: Which executors the spiking model runs with; one that is named is never compiled.
        compiled: Compile tokens after the prompt; None: on CUDA.
        seed: Of the tokens.
        progress: Called with ``(rounds done, rounds)``.

    Raises:
        SpikeformError: Prompt and new tokens exceed the context, or the two models lie on different devices.
        ValueError: Unknown executor.
    """
    _check(spiking, dense, prompt, new)
    compiled = spiking.device.type == "cuda" if compiled is None else compiled
    runs = [_Run("dense", dense, AUTOMATIC, compiled)] if dense is not None else []
    runs += [_Run("spiking", spiking, name, compiled and name == AUTOMATIC) for name in executors]
    vocabulary = spiking.config.get_text_config().vocab_size
    ids = torch.randint(vocabulary, (batch, prompt), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        for done in range(repeat + 1):
            for run in runs:
                run.round(ids, new, counted=done > 0)
            if progress is not None:
                progress(done + 1, repeat + 1)
    rows = [run.speed(batch, prompt) for run in runs]
    if dense is not None:
        base = rows[0]
        for row in rows[1:]:
            row.prefill_speedup = row.prefill_tokens_per_s / base.prefill_tokens_per_s
            if row.decode_ms is not None and base.decode_ms is not None:
                row.decode_speedup = base.decode_ms / row.decode_ms
    return Bench(rows, _protocol(spiking, prompt, new, batch, repeat, seed))


def _check(spiking: PreTrainedModel, dense: PreTrainedModel | None, prompt: int, new: int) -> None:
    for network in (spiking, dense):
        if network is None:
            continue
        longest, context = prompt + (new if network.can_generate() else 0), context_length(network)
        if longest > context:
            raise SpikeformError(f"{longest} tokens exceed the model's context of {context}: take fewer")
        if network.device != spiking.device:
            raise SpikeformError(f"the models lie on {spiking.device} and {network.device}: move one of them")


@dataclass
class _Run:
    """One model with one executor, and its rounds so far."""

    label: str
    model: Any
    executor: str
    compiled: bool
    prefills: list[float] = field(default_factory=list)
    decodes: list[float] = field(default_factory=list)
    beside: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        with self._executor():  # refuses an unknown name
            self.compiled = self.compiled and _compiles(self.model)

    def _executor(self) -> Any:
        return nullcontext() if self.executor == AUTOMATIC else executor(self.executor)

    def round(self, ids: Tensor, new: int, counted: bool) -> None:
        ids = ids.to(self.model.device)
        with self._executor(), memory(self.model.device, self.beside if counted else []):
            prefill = self._prefill(ids)
            gaps = self._decode(ids, new) if self.model.can_generate() else []
        if counted:
            self.prefills.append(prefill)
            self.decodes += [statistics.median(gaps[min(SETTLING, len(gaps) - 1) :])] if gaps else []

    def _prefill(self, ids: Tensor) -> float:
        known = inspect.signature(self.model.forward).parameters
        options = {"use_cache": True, "logits_to_keep": 1}
        clock = Clock(self.model.device)
        clock.mark()
        self.model(input_ids=ids, **{name: value for name, value in options.items() if name in known})
        clock.mark()
        return clock.gaps()[0]

    def _decode(self, ids: Tensor, new: int) -> list[float]:
        clock = Clock(self.model.device)
        options: dict[str, Any] = {}
        if self.compiled:
            how = CompileConfig()
            how._compile_all_devices = True  # generate compiles on accelerators alone unless told
            options = {"cache_implementation": "static", "compile_config": how}
        self.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            min_new_tokens=new,
            max_new_tokens=new,
            do_sample=False,
            pad_token_id=0,
            logits_processor=LogitsProcessorList([clock]),
            **options,
        )
        return clock.gaps()

    def speed(self, batch: int, prompt: int) -> Speed:
        rates = [batch * prompt / seconds for seconds in self.prefills]
        decode = statistics.median(self.decodes) if self.decodes else None
        held = held_bytes(self.model)
        return Speed(
            self.label,
            self.executor,
            self.compiled,
            statistics.median(rates),
            spread(rates),
            None if decode is None else 1e3 * decode,
            None if decode is None else 1e3 * spread(self.decodes),
            None if decode is None else batch / decode,
            held,
            held + max(self.beside) if self.beside else None,
        )


def _compiles(model: Any) -> bool:
    """Whether ``generate`` would compile this model with a static cache."""
    quantizer = getattr(model, "hf_quantizer", None)
    return model.can_generate() and model._can_compile_fullgraph and (quantizer is None or quantizer.is_compileable)


def _protocol(model: PreTrainedModel, prompt: int, new: int, batch: int, repeat: int, seed: int) -> dict[str, Any]:
    import transformers

    cuda = model.device.type == "cuda"
    return {
        "prompt": prompt,
        "new": new,
        "batch": batch,
        "rounds": repeat,
        "seed": seed,
        "device": torch.cuda.get_device_name(model.device) if cuda else "CPU",
        "threads": None if cuda else torch.get_num_threads(),
        "dtype": str(model.dtype).removeprefix("torch."),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
