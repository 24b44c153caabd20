"""Speed of spiking 7B models beside the dense one they came from, on one GPU, with random weights.

    python benchmarks/decode_7b.py --out benchmarks/results/decode-7b.json [--shape opt-6.7b]
        [--variants dense,las16,las8,las8-int8,w4a4] [--layers 4] [--brief] [--apart] [--profile] [--tiny]

Weights are random, and so are the tokens: what is measured here does not depend on their values. LAS's thresholds are
given; SpikeLLM's saliency is found on 128 random tokens, and its weights are rounded to nearest. Each variant runs in
a process of its own, so that none meets the memory, or the fault, of another.

Decoding, batch 1, static cache of transformers' own length (prompt + new tokens):
- ``generate``: median of the gaps between tokens of ``model.generate(cache_implementation="static")``, which compiles
  the forward pass by itself (mode ``reduce-overhead``, here with ``fullgraph``); ``eager`` the same, not compiled;
- ``step``: the same compiled forward pass alone, called again and again with what ``generate`` passes to it; median
  over rounds of the mean of 32 steps. ``difference`` is that of its logits from eager ones, over the largest logit.
Prefill: one forward pass over ``--prefill`` tokens that fills a new dynamic cache and gives the last logits, eager and
compiled as ``spikeform.compile_config`` says; median.
``weight_bytes`` are those of all parameters and buffers but the input embedding (unless it is the head too): what a
token has to read; ``GB_per_s`` is that over the time of a ``step``.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LogitsProcessor,
    LogitsProcessorList,
    OPTConfig,
    StoppingCriteria,
    StoppingCriteriaList,
)

import spikeform
from spikeform.layers import CodedLinear

LLAMA = {"vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32}
OPT = {"vocab_size": 50272, "hidden_size": 4096, "ffn_dim": 16384, "num_attention_heads": 32}
OPT |= {"word_embed_proj_dim": 4096}
TINY = {"vocab_size": 512, "hidden_size": 128, "num_attention_heads": 2}
SHAPES: dict[str, Callable[..., Any]] = {
    "llama-7b": lambda layers: LlamaConfig(**LLAMA, num_hidden_layers=layers, max_position_embeddings=4096),
    "opt-6.7b": lambda layers: OPTConfig(**OPT, num_hidden_layers=layers),
    "llama-tiny": lambda layers: LlamaConfig(**TINY, num_hidden_layers=layers, intermediate_size=256),
    "opt-tiny": lambda layers: OPTConfig(**TINY, num_hidden_layers=layers, ffn_dim=512, word_embed_proj_dim=128),
}
# Powers of two that hold what such a random model sends; of roles whose trains meet no weight, any numbers would do.
THRESHOLDS = {"linear": (4.0, 32.0), "query": (4.0, 32.0), "key": (4.0, 32.0), "value": (4.0, 32.0)}
THRESHOLDS |= {"norm": (16.0, 256.0), "up": (8.0, 64.0), "act": (8.0, 64.0), "probability": (0.25, 1.0)}
THRESHOLDS |= {"lm_head": (4.0, 32.0)}
FREE = {role: (a * 0.9, b * 0.9) for role, (a, b) in THRESHOLDS.items()}
SPIKELLM = {"pipeline": "rtn", "bits": 4, "weight_bits": 4}
VARIANTS: dict[str, tuple[str, dict[str, Any]] | None] = {
    "dense": None,
    "las16": ("LAS", {"steps": 16, "units": "power_of_two"}),
    "las15": ("LAS", {"steps": 15, "units": "power_of_two"}),
    "las8": ("LAS", {"steps": 8, "units": "power_of_two"}),
    "las16-free": ("LAS", {"steps": 16, "thresholds": FREE}),
    "las8-free": ("LAS", {"steps": 8, "thresholds": FREE}),
    "las15-int8": ("LAS", {"steps": 15, "weight_bits": 8}),
    "las15-int8-head": ("LAS", {"steps": 15, "weight_bits": 8, "lm_head": True}),
    "las8-int8": ("LAS", {"steps": 8, "weight_bits": 8}),
    "las7-int8": ("LAS", {"steps": 7, "weight_bits": 8}),
    "las7-int8-head": ("LAS", {"steps": 7, "weight_bits": 8, "lm_head": True}),
    "w4a4": ("SpikeLLM", {**SPIKELLM, "steps": 2, "salient": 0.1}),
    "w4a4-t1": ("SpikeLLM", {**SPIKELLM, "steps": 1}),
    "w8a8": ("SpikeLLM", {**SPIKELLM, "bits": 8, "weight_bits": 8, "steps": 1}),
}
DEFAULT = "dense,las16,las8,las15-int8,las8-int8,w4a4"
STEPS_OF_ROUND, EAGER_TOKENS = 32, 16


@torch.no_grad()
def build(shape: str, layers: int, device: str, dtype: torch.dtype) -> Any:
    """A dense model of random weights, made on the device; embeddings as large as what the blocks add to them."""
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(SHAPES[shape](layers), dtype=dtype)
    model.get_input_embeddings().weight.normal_()
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    return model.eval()


def make_spiking(model: Any, variant: str) -> Any:
    """Convert in place as the variant says."""
    chosen = VARIANTS[variant]
    if chosen is None:
        return model
    method, settings = chosen
    calibration = None
    if method == "LAS":
        settings = {"thresholds": THRESHOLDS, **settings}
    else:
        calibration = torch.randint(model.config.vocab_size, (1, 128), generator=torch.Generator().manual_seed(0))
    return spikeform.convert(model, getattr(spikeform, method)(**settings), calibration)


def wait(device: str) -> None:
    """Until the device is done."""
    if device == "cuda":
        torch.cuda.synchronize()


class Marks:
    """Points in time on the device's own clock."""

    def __init__(self, device: str) -> None:
        self.device, self.points = device, []

    def mark(self) -> None:
        """One more point, after what was sent to the device so far."""
        if self.device == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.points.append(event)
        else:
            self.points.append(time.perf_counter())

    def gaps(self) -> list[float]:
        """Milliseconds between neighbours."""
        wait(self.device)
        pairs = zip(self.points[:-1], self.points[1:], strict=True)
        return [a.elapsed_time(b) if self.device == "cuda" else 1e3 * (b - a) for a, b in pairs]


class Clock(LogitsProcessor):
    """Marks the time of every token that ``generate`` writes."""

    def __init__(self, device: str) -> None:
        self.marks = Marks(device)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Scores as they are."""
        self.marks.mark()
        return scores


class After(StoppingCriteria):
    """Stop at a length, whatever room the cache has."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        """True for every row at the length."""
        return torch.full((len(input_ids),), input_ids.shape[1] >= self.length, device=input_ids.device)


def summary(milliseconds: list[float]) -> dict[str, float]:
    """Median and the quartiles' distance."""
    low, middle, high = statistics.quantiles(milliseconds, n=4) if len(milliseconds) > 1 else milliseconds * 3
    return {"ms": round(middle, 4), "spread_ms": round(high - low, 4)}


def written(model: Any, args: argparse.Namespace, tokens: int | None, **options: Any) -> dict[str, float]:
    """Gaps between the tokens of one ``generate``; it stops after ``tokens`` of them, or at the cache's end."""
    clock = Clock(args.device)
    stop = [After(args.prompt + tokens)] if tokens else []
    ids = torch.randint(model.config.vocab_size, (1, args.prompt), device=args.device)
    model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=args.new,
        do_sample=False,
        cache_implementation="static",
        logits_processor=LogitsProcessorList([clock]),
        stopping_criteria=StoppingCriteriaList(stop),
        **options,
    )
    return summary(clock.marks.gaps()[2:])


def rewind(cache: Any, length: int) -> None:
    """Let a static cache write after ``length`` tokens again (where it counts them itself)."""
    for layer in cache.layers:
        if hasattr(layer, "cumulative_length"):
            layer.cumulative_length.fill_(length)


def decoding(model: Any, args: argparse.Namespace) -> dict[str, Any]:
    """One token at a time: eager, compiled steps, and ``generate``."""
    seen: dict[str, Any] = {}
    hook = model.register_forward_pre_hook(lambda _m, _args, kwargs: seen.update(kwargs), with_kwargs=True)
    eager = written(model, args, EAGER_TOKENS, disable_compile=True)
    hook.remove()
    row: dict[str, Any] = {"eager": eager}
    cache = seen["past_key_values"]
    start = args.prompt + EAGER_TOKENS // 2
    rewind(cache, start)
    wanted = model(**seen).logits.float()
    how = spikeform.compile_config(model, together=not args.apart)
    step = model.get_compiled_call(how)
    begin = time.perf_counter()
    rewind(cache, start)
    found = step(**seen).logits.float()
    wait(args.device)
    row["compile_s"] = round(time.perf_counter() - begin, 1)
    row["difference"] = float((found - wanted).abs().max() / wanted.abs().max())
    row["finite"] = bool(found.isfinite().all())
    for _ in range(3):
        rewind(cache, start)
        step(**seen)
    rounds = []
    for _ in range(args.repeat):
        rewind(cache, start)
        marks = Marks(args.device)
        marks.mark()
        for _ in range(min(STEPS_OF_ROUND, args.new // 2)):
            step(**seen)
        marks.mark()
        rounds.append(marks.gaps()[0] / min(STEPS_OF_ROUND, args.new // 2))
    row["step"] = summary(rounds)
    if args.profile:
        profile(lambda: step(**seen), args.device)
    del cache
    seen.clear()
    if args.brief:
        return row
    written(model, args, EAGER_TOKENS, compile_config=how)
    row["generate"] = written(model, args, None, compile_config=how)
    return row


def prefill(model: Any, args: argparse.Namespace) -> dict[str, Any]:
    """Many tokens at once: eager, and compiled (if asked for)."""
    row: dict[str, Any] = {}
    ids = torch.randint(model.config.vocab_size, (1, args.prefill), device=args.device)
    runs = {"eager": model.__call__}
    if not args.no_compiled_prefill:
        how = spikeform.compile_config(model, together=not args.apart).to_dict()
        runs["compiled"] = torch.compile(model.__call__, **how | {"dynamic": False})
    for name, run in runs.items():
        begin = time.perf_counter()
        for _ in range(2):
            run(input_ids=ids, use_cache=True, logits_to_keep=1)
        wait(args.device)
        row[f"{name}_first_s"] = round(time.perf_counter() - begin, 1)
        gaps = []
        for _ in range(args.repeat):
            marks = Marks(args.device)
            marks.mark()
            run(input_ids=ids, use_cache=True, logits_to_keep=1)
            marks.mark()
            gaps += marks.gaps()
        row[name] = summary(gaps)
        if args.profile:
            print(f"{args.one}: prefill, {name}", file=sys.stderr)
            profile(lambda run=run: run(input_ids=ids, use_cache=True, logits_to_keep=1), args.device)
    return row


def profile(run: Callable[[], object], device: str) -> None:
    """Print where one call spends its time."""
    kinds = [torch.profiler.ProfilerActivity.CUDA if device == "cuda" else torch.profiler.ProfilerActivity.CPU]
    wait(device)
    with torch.profiler.profile(activities=kinds) as found:
        run()
        wait(device)
    key = "self_cuda_time_total" if device == "cuda" else "self_cpu_time_total"
    print(found.key_averages().table(sort_by=key, row_limit=25, max_name_column_width=70), file=sys.stderr)


def weight_bytes(model: nn.Module) -> int:
    """Bytes that a token reads of parameters and buffers; of 4-bit weights, in the form that the kernels read."""
    tensors = {id(x): x for x in [*model.parameters(), *model.buffers()]}
    for layer in model.modules():
        packed = layer.nibbles() if isinstance(layer, CodedLinear) else None
        if packed is not None:
            tensors[id(layer.weight)] = packed
    embedding: Any = model.get_input_embeddings()
    head: Any = model.get_output_embeddings()
    if head is None or head.weight is not embedding.weight:
        tensors.pop(id(embedding.weight))
    return sum(x.numel() * x.element_size() for x in tensors.values())


@torch.no_grad()
def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Everything about one variant."""
    cuda = args.device == "cuda"
    begin = time.perf_counter()
    model = build(args.shape, args.layers, args.device, getattr(torch, args.dtype))
    wait(args.device)
    row: dict[str, Any] = {"variant": args.one, "build_s": round(time.perf_counter() - begin, 1)}
    begin = time.perf_counter()
    model = make_spiking(model, args.one)
    wait(args.device)
    row["convert_s"] = round(time.perf_counter() - begin, 1)
    gc.collect()
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        row["model_GiB"] = round(torch.cuda.memory_allocated() / 2**30, 3)
    if not args.prefill_only:
        row["decode"] = decoding(model, args)
        row["weight_bytes"] = weight_bytes(model)
        row["GB_per_s"] = round(row["weight_bytes"] / row["decode"]["step"]["ms"] / 1e6, 1)
        if cuda:
            row["decode_peak_GiB"] = round(torch.cuda.max_memory_allocated() / 2**30, 3)
    torch._dynamo.reset()  # else the new length would be compiled as a dynamic one
    gc.collect()
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    if args.prefill:
        row["prefill"] = prefill(model, args)
        if cuda:
            row["prefill_peak_GiB"] = round(torch.cuda.max_memory_allocated() / 2**30, 3)
    return row


def in_its_own_process(variant: str, limit: float) -> dict[str, Any]:
    """The row of one variant, or what went wrong."""
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        command = [sys.executable, __file__, *sys.argv[1:], "--one", variant, "--row", file.name]
        try:
            code = subprocess.run(command, timeout=limit, check=False).returncode
        except subprocess.TimeoutExpired:
            return {"variant": variant, "error": f"not done in {limit:.0f} s"}
        text = Path(file.name).read_text()
    return json.loads(text) if text else {"variant": variant, "error": f"exit code {code}"}


def against_dense(row: dict[str, Any], dense: dict[str, Any]) -> dict[str, Any]:
    """How many times as fast as the dense model."""
    found: dict[str, Any] = {}
    for part in ("decode", "prefill"):
        for name, value in row.get(part, {}).items():
            if isinstance(value, dict) and name in dense.get(part, {}):
                found[f"{part}_{name}"] = round(dense[part][name]["ms"] / value["ms"], 3)
    return found


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="llama-7b")
    parser.add_argument("--variants", default=DEFAULT, help=f"of {', '.join(VARIANTS)}")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--new", type=int, default=384)
    parser.add_argument("--prefill", type=int, default=2048, help="tokens; 0: not measured")
    parser.add_argument("--no-compiled-prefill", action="store_true", help="saves a compilation a variant")
    parser.add_argument("--repeat", type=int, default=7)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--minutes", type=float, default=9.0, help="begin no variant, and end one, after these")
    parser.add_argument("--profile", action="store_true", help="print kernels by time")
    parser.add_argument("--brief", action="store_true", help="the compiled step alone: no generate, no prefill")
    parser.add_argument("--prefill-only", action="store_true", help="no decoding")
    parser.add_argument("--apart", action="store_true", help="compiled as layers are, nothing put together")
    parser.add_argument("--tiny", action="store_true", help="a dry run on the CPU")
    parser.add_argument("--one", choices=list(VARIANTS), help=argparse.SUPPRESS)
    parser.add_argument("--row", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.device = "cpu" if args.tiny else "cuda"
    args.prefill = 0 if args.brief else args.prefill
    if args.tiny:
        args.shape = "opt-tiny" if "opt" in args.shape else "llama-tiny"
        args.layers, args.prompt, args.new, args.prefill, args.repeat = 2, 16, 24, min(args.prefill, 32), 2
    return args


def main() -> None:
    args = arguments()
    if args.one:
        torch.set_float32_matmul_precision("highest")
        try:
            row = measure(args)
        except Exception as error:  # one variant's fault is a row of the result
            traceback.print_exc()
            row = {"variant": args.one, "error": f"{type(error).__name__}: {error}"[:2000]}
        args.row.write_text(json.dumps(row))
        return
    begin, rows = time.perf_counter(), []
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    result = {
        "protocol": " ".join(__doc__.split("\n\n", 2)[2].split()),
        "hardware": torch.cuda.get_device_name() if args.device == "cuda" else "CPU",
        "versions": versions,
        "settings": {k: v for k, v in vars(args).items() if isinstance(v, int | float | str) and k != "variants"},
        "rows": rows,
    }
    for variant in args.variants.split(","):
        left = 60 * args.minutes - (time.perf_counter() - begin)
        if left < 20:
            print(f"no time left for {variant}", flush=True)
            continue
        rows.append(in_its_own_process(variant, left))
        dense = next((r for r in rows if r["variant"] == "dense" and "error" not in r), None)
        if dense is not None:
            rows[-1]["speedup"] = against_dense(rows[-1], dense)
        rows[-1]["seconds"] = round(time.perf_counter() - begin - sum(r["seconds"] for r in rows[:-1]), 1)
        print(json.dumps(rows[-1]), flush=True)
        if args.out:
            args.out.parent.mkdir(parents=True, exist_ok=True)
            args.out.write_text(json.dumps(result, indent=1) + "\n")
    if any("error" in row for row in rows):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
