"""Decoding with SpikingMamba on a CPU, one token of one sequence at a time: whole models, and projections alone.

    OMP_WAIT_POLICY=passive python benchmarks/mamba_decode.py --out benchmarks/results/mamba-decode-cpu.json

Whole models: Mamba-2 of the 130M shape, random weights (their values change no dense speed). Each density has its own
thresholds: those at which so many integers of each layer are not zero on random tokens; the density that the decoded
tokens then had is measured in a pass of its own. Tokens come one by one from the model's recurrent step, greedily,
after a short prompt. Rounds of all models take turns; a figure is the median over rounds of the median token of a
round. The parts of a token's time are of further tokens, with clocks around the modules.

Projections: whole layers as a model calls them (the neuron, the product, Python), in turn through enough copies of
their weights that none stays in a cache, and through seven random inputs. Rounds of all cases take turns; medians of
the rounds' means. ``event`` visits the rows of integers that are not zero, ``collapsed`` takes all of them; their
result is the same. Beside them PyTorch's own products of real inputs.

Random inputs have their zeros in other places at every call: the worst case for what a cache holds.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from timing import seconds_inside, taking_turns
from torch import Tensor, nn
from transformers import Mamba2Config, Mamba2ForCausalLM

import spikeform
from spikeform.conversion.tuning import input_major
from spikeform.conversion.weights import row_codes
from spikeform.layers import CodedLinear, SpikingLinear
from spikeform.native import library
from spikeform.native.library import level
from spikeform.neurons import SignedInteger
from spikeform.report.tables import show
from spikeform.spikes.trace import Product, observe

SHAPES = {"130M": (768, 24), "1.3B": (2048, 48)}  # width, layers
STATES, HEAD, TAPS, VOCABULARY, STEPS = 128, 64, 4, 50288, 4
PARTS = {"in_proj": "projections", "out_proj": "projections", "mixer": "mixers", "lm_head": "head"}
DENSITIES = (0.75, 0.5, 0.32, 0.2, 0.1)
INPUTS = 7
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def threshold_of(x: Tensor, density: float) -> float:
    """V_th at which this share of ``round(x / V_th)`` is not zero."""
    return max(2 * float(x.abs().float().flatten().quantile(1 - density)), 1e-6)


# Whole models


def dense_model(width: int, layers: int, vocabulary: int, dtype: torch.dtype) -> Mamba2ForCausalLM:
    """Random weights, the same each time."""
    torch.manual_seed(0)
    config = Mamba2Config(
        vocab_size=vocabulary,
        hidden_size=width,
        num_hidden_layers=layers,
        state_size=STATES,
        head_dim=HEAD,
        num_heads=2 * width // HEAD,
        expand=2,
        n_groups=1,
        conv_kernel=TAPS,
        tie_word_embeddings=True,
        **{"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0},
    )
    return Mamba2ForCausalLM(config).to(dtype).eval().requires_grad_(False)


def projections(model: nn.Module) -> dict[str, SpikingLinear]:
    """Its spiking layers."""
    return {name: module for name, module in model.named_modules() if isinstance(module, SpikingLinear)}


def set_density(model: nn.Module, ids: Tensor, density: float) -> None:
    """Thresholds layer by layer, each on what the layers before it give."""

    def before(layer: SpikingLinear, args: tuple) -> None:
        layer.neuron.set_threshold(threshold_of(args[0], density))

    handles = [layer.register_forward_pre_hook(before) for layer in projections(model).values()]
    model(ids, use_cache=False)
    for handle in handles:
        handle.remove()


def decode(model: nn.Module, ids: Tensor, new: int) -> list[float]:
    """Seconds of each of ``new`` tokens after the prompt ``ids``."""
    out = model(ids, use_cache=True, logits_to_keep=1)
    gaps = []
    for _ in range(new):
        token = out.logits[:, -1:].argmax(-1)
        begin = time.perf_counter()
        out = model(token, cache_params=out.cache_params, use_cache=True)
        gaps.append(time.perf_counter() - begin)
    return gaps


def measured_density(model: nn.Module, ids: Tensor, new: int) -> tuple[float, float]:
    """Share of integers that are not zero, and the mean of ``|n|``, over the decoded tokens."""
    active = elements = spikes = 0

    def listen(told: Any) -> None:
        nonlocal active, elements, spikes
        if isinstance(told, Product):
            codes = told.operands[0].codes
            active, elements = active + int((codes != 0).sum()), elements + codes.numel()
            spikes += int(codes.abs().sum())

    out = model(ids, use_cache=True, logits_to_keep=1)
    with observe(listen):
        for _ in range(new):
            token = out.logits[:, -1:].argmax(-1)
            out = model(token, cache_params=out.cache_params, use_cache=True)
    return active / elements, spikes / elements


def parts(model: nn.Module, ids: Tensor, new: int) -> dict[str, float]:
    """Milliseconds of a token by part."""
    decode(model, ids, 2)
    out = model(ids, use_cache=True, logits_to_keep=1)
    with seconds_inside(model, lambda name: PARTS.get(name.rpartition(".")[2])) as spent:
        begin = time.perf_counter()
        for _ in range(new):
            token = out.logits[:, -1:].argmax(-1)
            out = model(token, cache_params=out.cache_params, use_cache=True)
        whole = time.perf_counter() - begin
    spent["mixers"] -= spent["projections"]
    return {part: 1e3 * seconds / new for part, seconds in (*spent.items(), ("whole", whole))}


def run_models(given: argparse.Namespace) -> list[dict[str, Any]]:
    """Dense and spiking models, by density."""
    sizes = (given.width, given.layers, given.vocabulary)
    ids = torch.randint(given.vocabulary, (1, given.prompt), generator=torch.Generator().manual_seed(1))
    dense = {name: dense_model(*sizes, dtype) for name, dtype in DTYPES.items()}
    quantised = copy.deepcopy(dense["fp32"])
    inside = [name for name, _ in quantised.named_modules() if name.endswith(("in_proj", "out_proj"))]
    how = dict.fromkeys(inside, torch.ao.quantization.default_dynamic_qconfig)
    torch.ao.quantization.quantize_dynamic(quantised, how, inplace=True)
    models: dict[str, tuple[nn.Module, dict[str, Any]]] = {
        **{f"dense {name}": (model, {"weights": name}) for name, model in dense.items()},
        "dense fp32, int8 projections (PyTorch)": (quantised, {"weights": "int8"}),
    }
    for weights, bits in (("bf16", 16), ("int8", 8)):
        for density in given.densities:
            model = spikeform.convert(
                dense_model(*sizes, torch.bfloat16), spikeform.SpikingMamba(STEPS, threshold=1.0, weight_bits=bits)
            )
            model.requires_grad_(False)
            set_density(model, ids, density)
            event = copy.deepcopy(model)
            for layer in projections(event).values():
                layer.event_rows = input_major(layer)
            found = dict(zip(("density", "rate"), measured_density(model, ids, given.new), strict=True))
            about = {"weights": weights, "asked": density, **found}
            if density == given.densities[0]:
                models[f"spiking {weights}, collapsed"] = (model, {"weights": weights, "executor": "collapsed"})
            models[f"spiking {weights}, event, {density}"] = (event, about | {"executor": "event"})
    cases = {
        name: lambda model=model: statistics.median(decode(model, ids, given.new))
        for name, (model, _) in models.items()
    }
    times = taking_turns(cases, given.rounds)
    return [
        {
            "model": name,
            **about,
            "tokens_per_s": 1e3 / times[name]["ms"],
            **times[name],
            "parts_ms": parts(model, ids, given.new),
            "projection_bytes": sum(
                x.numel() * x.element_size()
                for n, m in model.named_modules()
                if n.endswith(("in_proj", "out_proj")) and isinstance(x := getattr(m, "weight", None), Tensor)
            ),
        }
        for name, (model, about) in models.items()
    ]


# Projections alone


def layers_of(K: int, N: int, weights: str, copies: int) -> list[SpikingLinear]:
    """Spiking layers of random weights."""
    made = []
    for _ in range(copies):
        linear = nn.Linear(K, N, bias=False).requires_grad_(False)
        neuron = SignedInteger(STEPS, site="layer")
        neuron.requires_grad_(False)
        if weights == "int8":
            linear.neuron = neuron
            made.append(CodedLinear.from_spiking(linear, row_codes(linear.weight)))
        else:
            made.append(SpikingLinear.from_dense(linear.to(DTYPES[weights]), neuron))
    return made


def projection_cases(K: int, N: int, weights: str, given: argparse.Namespace) -> dict[str, Callable[[], float]]:
    """Seconds of a call, by case; each case walks through all copies once."""
    size = {"int8": 1, "bf16": 2, "fp32": 4}[weights] * K * N
    copies = max(-(-given.cold * 2**20 // size), 1)
    layers = layers_of(K, N, weights, copies)
    rows = [input_major(layer) for layer in layers]
    dtype = torch.float32 if weights == "int8" else DTYPES[weights]
    inputs = [torch.randn(1, K, generator=torch.Generator().manual_seed(i)).to(dtype) for i in range(INPUTS)]
    thresholds = {density: threshold_of(torch.cat(inputs), density) for density in (0.5, *given.densities)}

    def walk(density: float, visit: bool) -> float:
        for layer, event in zip(layers, rows, strict=True):
            layer.neuron.set_threshold(thresholds[density])
            layer.event_rows = event if visit else None
        return over(layers)

    def over(calls: list) -> float:
        begin = time.perf_counter()
        for i, layer in enumerate(calls):
            layer(inputs[i % INPUTS])
        return (time.perf_counter() - begin) / len(calls)

    cases: dict[str, Callable[[], float]] = {"collapsed": lambda: walk(0.5, False)}
    cases |= {f"event {density}": lambda density=density: walk(density, True) for density in given.densities}
    if weights == "int8":
        plain = nn.ModuleList(nn.Linear(K, N, bias=False) for _ in range(copies))
        plain = torch.ao.quantization.quantize_dynamic(plain, {nn.Linear}, torch.qint8)
        cases["torch quantize_dynamic"] = lambda: over(list(plain))
    else:
        dense = [layer.weight for layer in layers]
        cases["torch F.linear"] = lambda: over([lambda x, w=w: nn.functional.linear(x, w) for w in dense])
    return cases


def run_projections(given: argparse.Namespace) -> list[dict[str, Any]]:
    """Each shape and kind of weights: milliseconds of a call by case."""
    found = []
    for shape, (width, _) in SHAPES.items():
        inner = 2 * width
        for part, K, N in (
            ("in_proj", width, 2 * inner + 2 * STATES + inner // HEAD),
            ("out_proj", inner, width),
        ):
            for weights in ("int8", "bf16", "fp32"):
                times = taking_turns(projection_cases(K, N, weights, given), given.rounds)
                row = {"shape": shape, "part": part, "inputs": K, "outputs": N, "weights": weights}
                row |= {"cases": times, "times_as_fast_as_collapsed": ratios(times, "collapsed")}
                found.append(row | {"times_as_fast_as_torch": ratios(times, next(k for k in times if "torch" in k))})
                print(json.dumps(row["times_as_fast_as_collapsed"]), shape, part, weights, flush=True)
    return found


def ratios(times: dict[str, dict[str, float]], base: str) -> dict[str, float]:
    """How many times as fast as ``base`` each case is."""
    return {name: times[base]["ms"] / value["ms"] for name, value in times.items()}


def hardware() -> dict[str, Any]:
    """What it ran on."""
    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return {
        "hardware": names[0].partition(":")[2].strip() if names else platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "wait_policy": os.environ.get("OMP_WAIT_POLICY", ""),
        "level": level(),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }


def table(result: dict[str, Any]) -> None:
    """To the screen."""
    names = ("projections", "mixers", "head", "whole")
    show(
        [
            {key: row.get(key) for key in ("model", "density", "rate", "tokens_per_s", "ms", "spread_ms")}
            | {f"{part} ms": row["parts_ms"][part] for part in names}
            for row in result.get("models", [])
        ],
        title="one token of one sequence (parts in a run of their own, clocks included)",
    )
    show(
        [
            {key: row[key] for key in ("shape", "part", "weights")}
            | {
                name: f"{own['ms']:.3f} ms ({row['times_as_fast_as_collapsed'][name]:.2f} x)"
                for name, own in row["cases"].items()
            }
            for row in result.get("projections", [])
        ],
        title="one call of a projection; in brackets: times as fast as collapsed",
    )


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", choices=("models", "projections"))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--new", type=int, default=32, help="tokens of a round")
    parser.add_argument("--prompt", type=int, default=16)
    parser.add_argument("--cold", type=int, default=256, help="MiB of weights that a case walks through")
    parser.add_argument("--densities", type=float, nargs="+", default=list(DENSITIES))
    parser.add_argument("--width", type=int, default=SHAPES["130M"][0])
    parser.add_argument("--layers", type=int, default=SHAPES["130M"][1])
    parser.add_argument("--vocabulary", type=int, default=VOCABULARY)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    if library() is None:
        parser.error("the compiled library is missing: run python -m spikeform.native.build")
    settings = {key: value for key, value in vars(given).items() if key not in ("out", "only")}
    result: dict[str, Any] = {"protocol": " ".join(__doc__.split()), "settings": settings, **hardware()}
    with torch.inference_mode():
        if given.only != "projections":
            result["models"] = run_models(given)
        if given.only != "models":
            result["projections"] = run_projections(given)
    table(result)
    if given.out:
        given.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
