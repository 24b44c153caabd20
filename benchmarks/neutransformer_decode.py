"""Decoding and prefill with spiking self-attention beside the dense parent's, by position.

    OMP_WAIT_POLICY=passive python benchmarks/neutransformer_decode.py \
        --out benchmarks/results/neutransformer-decode-cpu.json
    python benchmarks/neutransformer_decode.py --device cuda --dtype bf16 --layers 0 --compiled --windows 2 8 32 0 \
        --rounds 3 --chunks --out benchmarks/results/neutransformer-decode-gpu-windows.json

Decoding: whole models of random weights, eager, one token of one sequence at a time, after so many positions. Their
caches are filled by hand: random keys and values of that length for the dense model (scaled dot product attention; a
dynamic and a static cache), random integers for the spiking one, whose state has no length. Gains are calibrated on
random tokens, feed-forward blocks stay dense, so attention is all that differs. Rounds of all cases take turns; a
figure is the median over rounds of the median token of a round, which moves the position on by one. ``cache_bytes`` are
those of one sequence. ``--compiled`` adds the static and the spiking cache in steps compiled as one graph (on a GPU in
mode ``reduce-overhead``, CUDA graphs); the first round compiles, and no round waits for that. On a CPU ``attention_ms``
is, in a round of its own, the time inside the attention modules but outside their projections. GPT-2 has a table of
positions, made as long as is wanted here.

Prefill: one attention layer, its heads as in the shape, real random queries, keys and values of a sequence: the module
as it runs, all heads seeing all tokens, its PyTorch operations by chunks of several sizes, and scaled dot product
attention. Spikes of ``rate``.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from timing import seconds_inside, taking_turns
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import DynamicCache, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, StaticCache

import spikeform
from spikeform.layers.self_attention import SpikingSelfAttention
from spikeform.layers.state_cache import StateLayer
from spikeform.native.library import level
from spikeform.report.tables import show

SIZE = 64  # of a head
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
ENDS = {"bos_token_id": 0, "eos_token_id": 0}
PROJECTIONS = ("c_attn", "c_proj", "q_proj", "k_proj", "v_proj", "o_proj")
SHAPES: dict[str, dict[str, Any]] = {
    "gpt2": {"layers": 12, "heads": 12, "groups": 12, "longest": 8192},
    "llama": {"layers": 22, "heads": 32, "groups": 4, "longest": 1 << 20},
}


def dense_model(shape: str, layers: int, positions: int, dtype: torch.dtype, device: str) -> Any:
    """GPT-2 small, or a LLaMA of 1.1B, of random weights and so many layers."""
    torch.manual_seed(0)
    if shape == "gpt2":
        config: Any = GPT2Config(n_layer=layers, n_positions=positions, **ENDS)
        model: Any = GPT2LMHeadModel
    else:
        sizes = {"hidden_size": 2048, "intermediate_size": 5632, "num_attention_heads": 32, "num_key_value_heads": 4}
        config = LlamaConfig(num_hidden_layers=layers, max_position_embeddings=positions, **sizes, **ENDS)
        model = LlamaForCausalLM
    config._attn_implementation = "sdpa"
    with torch.device(device):
        made: Any = model(config)
    return made.to(dtype).eval().requires_grad_(False)


def filled(cache: Any, given: dict[str, Any], position: int, dtype: torch.dtype, device: str) -> Any:
    """The cache after so many positions of random keys and values."""
    for layer in range(given["layers"]):
        shape = 1, given["groups"], position, SIZE
        cache.update(*(torch.randn(shape, dtype=dtype, device=device) for _ in range(2)), layer)
    return cache


def summed(model: nn.Module, position: int, device: str) -> DynamicCache:
    """The spiking model's cache after so many positions: sums of that many keys times values."""
    cache: Any = DynamicCache()
    for spiking in (m for m in model.modules() if isinstance(m, SpikingSelfAttention)):
        layer = StateLayer()
        steps, near = spiking.steps, spiking.local
        shape = steps, 1, spiking.groups - near, SIZE, SIZE
        recent = (2, steps, 1, near, max(spiking.windows) - 1, SIZE) if near else None
        spikes = None if recent is None else torch.randint(2, recent, device=device)
        layer.keep(torch.randint(position // 16 + 2, shape, device=device).float(), spikes)
        layer.advance(position, None)
        cache.layers.append(layer)
    return cache


def bytes_of(cache: Any) -> int:
    """What the cache keeps of one sequence."""
    kept = (getattr(layer, name, None) for layer in cache.layers for name in ("keys", "values", "number", "recent"))
    return sum(x.numel() * x.element_size() for x in kept if isinstance(x, torch.Tensor))


def part_of(name: str) -> str | None:
    """Attention, or a projection in it."""
    last = name.rpartition(".")[2]
    if last in ("attn", "self_attn"):
        return "attention"
    return "projections" if last in PROJECTIONS and "attn" in name else None


def wait(device: str) -> None:
    """Until the device is done."""
    if device == "cuda":
        torch.cuda.synchronize()


def decode(model: Callable[..., Any], cache: Any, new: int, device: str) -> list[float]:
    """Seconds of each of ``new`` tokens."""
    token, gaps = torch.zeros(1, 1, dtype=torch.long, device=device), []
    for _ in range(new):
        wait(device)
        begin = time.perf_counter()
        token = model(token, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)
        wait(device)
        gaps.append(time.perf_counter() - begin)
    return gaps


def median_token(model: Callable[..., Any], cache: Any, new: int, device: str) -> float:
    """Of a round, in seconds."""
    return statistics.median(decode(model, cache, new, device))


def decoding(given: argparse.Namespace, name: str) -> list[dict[str, Any]]:
    """One row for each position and model."""
    dtype, device, rows = DTYPES[given.dtype], given.device, []
    shape = SHAPES[name] | {"layers": given.layers or SHAPES[name]["layers"]}
    positions = [p for p in given.positions if p <= shape["longest"]]
    tokens = (given.rounds + 2) * given.new
    dense = dense_model(name, shape["layers"], max(positions) + tokens, dtype, device)
    ids = torch.randint(1000, (2, 64), device=device)
    spiking = spikeform.convert(
        copy.deepcopy(dense), spikeform.NeuTransformer(steps=given.steps, ffn="none", windows=given.windows), ids
    )
    spiking.requires_grad_(False)
    mode = "reduce-overhead" if device == "cuda" else None
    steps = [torch.compile(model.forward, fullgraph=True, dynamic=False, mode=mode) for model in (dense, spiking)]
    for position in positions:
        still, other = (StaticCache(config=dense.config, max_cache_len=position + tokens) for _ in range(2))
        caches: dict[str, tuple[Callable[..., Any], Any]]
        caches = {
            "dense, dynamic cache": (dense, filled(DynamicCache(), shape, position, dtype, device)),
            "dense, static cache": (dense, filled(still, shape, position, dtype, device)),
            f"spiking, T = {given.steps}": (spiking, summed(spiking, position, device)),
        }
        if given.compiled:
            caches["dense, static cache, compiled"] = steps[0], filled(other, shape, position, dtype, device)
            caches[f"spiking, T = {given.steps}, compiled"] = steps[1], summed(spiking, position, device)
        cases: dict[str, Callable[[], float]]
        cases = {case: partial(median_token, *pair, given.new, device) for case, pair in caches.items()}
        measured = taking_turns(cases, given.rounds)
        for case, (model, cache) in caches.items():
            row = {"shape": name, "layers": shape["layers"], "position": position, "model": case, **measured[case]}
            row["cache_bytes"] = bytes_of(cache)
            if device == "cpu" and isinstance(model, nn.Module):
                with seconds_inside(model, part_of) as spent:
                    decode(model, cache, given.new, device)
                row["attention_ms"] = 1e3 * (spent["attention"] - spent["projections"]) / given.new
            rows.append(row)
        del caches, cases, still, other
        gc.collect()
    return rows


def with_rate(shape: dict[str, Any], rate: float, steps: int, device: str) -> SpikingSelfAttention:
    """A layer whose neurons fire in this share of the steps for currents drawn from a standard normal."""
    layer = SpikingSelfAttention(shape["heads"], shape["groups"], steps).to(device).requires_grad_(False)
    drawn, low, high = torch.randn(100000, device=device), 1e-3, 1e3
    for _ in range(40):
        gain = (low * high) ** 0.5
        low, high = (gain, high) if float(layer.query.rate(gain * drawn).mean()) < rate else (low, gain)
    for neuron in layer.neurons()[:3]:
        neuron.gain.fill_(low)
    return layer


def timed(run: Callable[[], Any], device: str) -> float:
    """Seconds of one call."""
    wait(device)
    begin = time.perf_counter()
    run()
    wait(device)
    return time.perf_counter() - begin


def prefill(given: argparse.Namespace, name: str) -> list[dict[str, Any]]:
    """One row for each length."""
    dtype, device, rows, shape = DTYPES[given.dtype], given.device, [], SHAPES[name]
    whole = with_rate(shape, given.rate, given.steps, device)
    for length in given.lengths:
        q, k, v = (
            torch.randn(1, shape[n], length, SIZE, dtype=dtype, device=device) for n in ("heads", "groups", "groups")
        )
        runs: dict[str, Callable[[], Any]] = {
            "dense": partial(scaled_dot_product_attention, q, k, v, is_causal=True, enable_gqa=True),
            "spiking": partial(whole, q, k, v, None, 1.0),
        }
        for chunk in given.chunks:
            parts = copy.deepcopy(whole)
            parts.chunk = chunk
            runs[f"spiking, chunks of {chunk}"] = partial(parts, q, k, v, None, 1.0)
        cases = {case: partial(timed, run, device) for case, run in runs.items()}
        for case, own in taking_turns(cases, given.prefill_rounds).items():
            rows.append(
                {"shape": name, "length": length, "model": case, **own, "us_per_token": 1e3 * own["ms"] / length}
            )
    return rows


def hardware(device: str) -> dict[str, Any]:
    """Of this machine."""
    text = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    names = [line for line in text.splitlines() if line.startswith("model name")]
    found = {
        "hardware": names[0].partition(":")[2].strip() if names else platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "wait_policy": os.environ.get("OMP_WAIT_POLICY", ""),
        "level": level(),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }
    return found | ({"gpu": torch.cuda.get_device_name()} if device == "cuda" else {})


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="fp32")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--shapes", nargs="+", choices=tuple(SHAPES), default=list(SHAPES))
    parser.add_argument("--layers", type=int, default=4, help="of each model; 0: all of the shape's")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--compiled", action="store_true", help="decode in compiled steps too")
    parser.add_argument("--windows", type=int, nargs="*", default=[], help="of heads; none: all see all tokens")
    parser.add_argument("--positions", type=int, nargs="*", default=[1024, 8192, 65536])
    parser.add_argument("--lengths", type=int, nargs="*", default=[1024, 4096, 16384], help="of the prefill")
    parser.add_argument("--chunks", type=int, nargs="*", default=[32, 64, 128, 256])
    parser.add_argument("--rate", type=float, default=0.15, help="of spikes in the prefill")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--new", type=int, default=8, help="tokens of a round")
    parser.add_argument("--prefill-rounds", type=int, default=2)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    settings = {key: value for key, value in vars(given).items() if key != "out"}
    result: dict[str, Any] = {"protocol": " ".join(__doc__.split()), "settings": settings, **hardware(given.device)}
    with torch.inference_mode():
        result["decoding"] = [row for name in given.shapes for row in decoding(given, name)] if given.positions else []
        result["prefill"] = [row for name in given.shapes for row in prefill(given, name)] if given.lengths else []
    show(result["decoding"], title="one token of one sequence")
    show(result["prefill"], title="one attention layer, a whole sequence")
    if given.out:
        given.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
