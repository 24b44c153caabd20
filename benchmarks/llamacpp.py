"""Spiking models beside llama.cpp on a CPU: a LLaMA of 1.1 billion random weights, prefill and decoding.

    pip install --no-deps --target gguf gguf            # writes the files
    python -m venv env && env/bin/pip install llama-cpp-python==0.3.36
    PYTHONPATH=gguf python benchmarks/llamacpp.py --python env/bin/python --folder DIR --out benchmarks/results/...

22 layers of width 2048, 32 query heads, 4 key/value heads, 5632 hidden units, 32,000 tokens. Weights are random, and
tokens too: speed does not depend on their values (files repeat the weights of one layer in all). llama.cpp runs in a
process of its own, kept alive, by its C interface; rounds of all models take turns, and no two run at once. Prefill is
one eager pass over the prompt into an empty static cache, last logits alone; decoding one token at a time, eager or
compiled as ``spikeform.compile_config`` says. Medians of rounds (of the tokens of a round, too). llama.cpp, too, works
out the last logits of a prompt alone; it also spares the last block's feed-forward layers all rows but that one, which
transformers does not: 1/28 of the products of 22 blocks. In its files all matrices are of one type; "Q8_0 head" has
the output head in 8 bits, as that of ours called "int8 head" is. ``bytes`` are those that a token reads: of ours all
parameters and buffers but the input embedding, 4-bit weights as the kernels read them; of llama.cpp its file without
that embedding.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import platform
import statistics
import subprocess
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from decode_7b import THRESHOLDS, weight_bytes
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, StaticCache

import spikeform

SHAPE: dict[str, Any] = {"vocab_size": 32000, "hidden_size": 2048, "intermediate_size": 5632}
SHAPE |= {"num_attention_heads": 32, "num_key_value_heads": 4, "max_position_embeddings": 2048}
LAYERS, SEED = 22, 0
BASES = ("Q8_0", "Q4_0")  # which every row is compared with
FILES = {kind: (kind, kind) for kind in BASES}  # types of the blocks and of the head
FILES["Q4_0, Q8_0 head"] = "Q4_0", "Q8_0"
BYTES = {"Q8_0": 34, "Q4_0": 18}  # of 32 weights

# Runs in llama.cpp's environment: a line of JSON in, a line of JSON out.
WORKER = r"""
import ctypes, json, statistics, sys, time
import llama_cpp as lib
lib.llama_backend_init()
silent = lib.llama_log_callback(lambda level, text, data: None)
lib.llama_log_set(silent, None)
models = {}
for line in sys.stdin:
    asked = json.loads(line)
    name, threads = asked["file"], asked["threads"]
    if name not in models:
        options = lib.llama_model_default_params()
        options.n_gpu_layers = 0
        model = lib.llama_model_load_from_file(name.encode(), options)
        options = lib.llama_context_default_params()
        options.n_ctx = options.n_batch = options.n_ubatch = 512
        options.n_threads = options.n_threads_batch = threads
        models[name] = model, lib.llama_init_from_model(model, options)
    model, context = models[name]
    lib.llama_memory_clear(lib.llama_get_memory(context), True)
    def run(tokens):
        array = (lib.llama_token * len(tokens))(*tokens)
        begin = time.perf_counter()
        if lib.llama_decode(context, lib.llama_batch_get_one(array, len(tokens))):
            raise RuntimeError("llama_decode failed")
        lib.llama_get_logits_ith(context, -1)[0]  # waits for the result
        return time.perf_counter() - begin
    prefill = run(asked["tokens"])
    gaps = [run([17 + step]) for step in range(asked["new"])]
    print(json.dumps([prefill, statistics.median(gaps)]), flush=True)
"""


def write_gguf(path: Path, kind: str, head: str, layers: int) -> None:
    """A file of random weights in llama.cpp's quantised types: all of one, the output head of ``head``."""
    import gguf
    import numpy as np

    random = np.random.default_rng(SEED)
    width, hidden, vocabulary = SHAPE["hidden_size"], SHAPE["intermediate_size"], SHAPE["vocab_size"]
    heads, groups = SHAPE["num_attention_heads"], SHAPE["num_key_value_heads"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(SHAPE["max_position_embeddings"])
    writer.add_embedding_length(width)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(hidden)
    writer.add_head_count(heads)
    writer.add_head_count_kv(groups)
    writer.add_rope_dimension_count(width // heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(vocabulary)
    writer.add_tokenizer_model("no_vocab")
    known: dict[tuple[int, int, str], Any] = {}

    def add(name: str, rows: int, columns: int, kind: str = kind) -> None:
        dtype, key = getattr(gguf.GGMLQuantizationType, kind), (rows, columns, kind)
        if key not in known:
            weight = random.standard_normal((rows, columns), dtype=np.float32) * np.float32(0.02)
            known[key] = gguf.quants.quantize(weight, dtype)
        writer.add_tensor(name, known[key], raw_dtype=dtype)

    ones, small = np.ones(width, dtype=np.float32), groups * width // heads
    add("token_embd.weight", vocabulary, width)
    add("output.weight", vocabulary, width, head)
    writer.add_tensor("output_norm.weight", ones)
    for layer in range(layers):
        for norm in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{layer}.{norm}.weight", ones)
        sizes = {"attn_q": (width, width), "attn_k": (small, width), "attn_v": (small, width)}
        sizes |= {"attn_output": (width, width), "ffn_gate": (hidden, width), "ffn_up": (hidden, width)}
        sizes |= {"ffn_down": (width, hidden)}
        for name, size in sizes.items():
            add(f"blk.{layer}.{name}.weight", *size)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def ours(layers: int, dtype: torch.dtype) -> dict[str, Any]:
    """The dense model, and spiking ones made of it."""
    torch.manual_seed(SEED)
    dense = AutoModelForCausalLM.from_config(LlamaConfig(**SHAPE, num_hidden_layers=layers), dtype=dtype).eval()
    ids = torch.randint(SHAPE["vocab_size"], (1, 32))
    las = {"weight_bits": 8, "lm_head": True, "thresholds": THRESHOLDS}
    # Which channels get two steps does not matter for speed: the cheapest measure of saliency chooses them.
    four: dict[str, Any] = {"pipeline": "rtn", "bits": 4, "weight_bits": 4, "saliency": "magnitude"}
    return {
        "dense": dense,
        "las7-int8": spikeform.convert(copy.deepcopy(dense), spikeform.LAS(steps=7, **las)),
        "las15-int8": spikeform.convert(copy.deepcopy(dense), spikeform.LAS(steps=15, **las)),
        "w4a4": spikeform.convert(copy.deepcopy(dense), spikeform.SpikeLLM(**four), ids),
        "w4a4, int8 head": spikeform.convert(copy.deepcopy(dense), spikeform.SpikeLLM(**four, lm_head="int8"), ids),
    }


class Ours:
    """A model as transformers runs it: a static cache, decoding compiled or eager.

    Args:
        model: Dense or spiking.
        length: Tokens that the cache holds.
        compiled: Compile a decoding step (once, before anything is timed).
    """

    def __init__(self, model: Any, length: int, compiled: bool) -> None:
        self.model, self.cache = model, StaticCache(config=model.config, max_cache_len=length)
        how = spikeform.compile_config(model).to_dict()
        self.step = torch.compile(model.forward, **how) if compiled else model.forward

    def round(self, ids: Tensor, new: int) -> list[float]:
        """Seconds of the prefill, and of a token."""
        self.cache.reset()
        begin = time.perf_counter()
        self.model(input_ids=ids, past_key_values=self.cache, logits_to_keep=1)
        prefill = time.perf_counter() - begin
        gaps = []
        for step in range(new):
            begin = time.perf_counter()
            self.step(input_ids=torch.tensor([[17 + step]]), past_key_values=self.cache)
            gaps.append(time.perf_counter() - begin)
        return [prefill, statistics.median(gaps)]


class Theirs:
    """llama.cpp's process. Its threads wait for one another as this process's do (OMP_WAIT_POLICY)."""

    def __init__(self, python: Path, threads: int) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": ""}
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen([python, "-c", WORKER], env=environment, **pipes)
        self.threads = threads

    def round(self, file: Path, ids: Tensor, new: int) -> list[float]:
        """Seconds of the prefill, and of a token."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        asked = {"file": str(file.resolve()), "threads": self.threads, "tokens": ids[0].tolist(), "new": new}
        print(json.dumps(asked), file=self.process.stdin, flush=True)
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError("llama.cpp's process ended")
        return json.loads(line)

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--python", type=Path, required=True, help="of the environment with llama-cpp-python")
    parser.add_argument("--folder", type=Path, required=True, help="for the GGUF files; kept")
    parser.add_argument("--layers", type=int, default=LAYERS)
    parser.add_argument("--dtype", default="bfloat16", help="of what is not integer in ours")
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.folder.mkdir(parents=True, exist_ok=True)
    files = {}
    for name, kinds in FILES.items():
        file = files[name] = args.folder / f"random-{args.layers}-{'-'.join(dict.fromkeys(kinds))}.gguf"
        if not file.exists():
            partial = file.with_suffix(".partial")
            write_gguf(partial, *kinds, args.layers)
            partial.rename(file)
    theirs, length = Theirs(args.python, args.threads), args.prompt + args.new
    models = {
        f"{name}{', compiled' if compiled else ''}": Ours(model, length, compiled)
        for name, model in ours(args.layers, getattr(torch, args.dtype)).items()
        for compiled in (False, True)
    }
    ids = torch.randint(SHAPE["vocab_size"], (1, args.prompt), generator=torch.Generator().manual_seed(SEED))
    times: dict[str, list[list[float]]] = {}
    for turn in range(args.rounds + 1):
        found = {f"llama.cpp {name}": theirs.round(file, ids, args.new) for name, file in files.items()}
        found |= {name: model.round(ids, args.new) for name, model in models.items()}
        if turn:
            for name, pair in found.items():
                times.setdefault(name, []).append(pair)
    theirs.close()
    embedding = SHAPE["vocab_size"] * SHAPE["hidden_size"] // 32
    unread = {name: embedding * BYTES[kinds[0]] for name, kinds in FILES.items()}
    sizes = {f"llama.cpp {name}": file.stat().st_size - unread[name] for name, file in files.items()}
    sizes |= {name: weight_bytes(own.model) for name, own in models.items()}
    rows = []
    for name, pairs in times.items():
        prefill, decode = (statistics.median(values) for values in zip(*pairs, strict=True))
        row = {"model": name, "prefill_tokens_per_s": args.prompt / prefill, "decode_tokens_per_s": 1 / decode}
        rows.append({**row, "bytes": sizes[name], "GB_per_s": sizes[name] / decode / 1e9})
    for row in rows:
        for kind, other in zip(BASES, rows, strict=False):
            for what in ("prefill", "decode"):
                row[f"{what}_vs_{kind}"] = row[f"{what}_tokens_per_s"] / other[f"{what}_tokens_per_s"]
        print(json.dumps(row), flush=True)
    result = {
        "protocol": " ".join(__doc__.split("\n\n", 2)[2].split()),
        "hardware": f"CPU {platform.machine()}, {args.threads} threads",
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "settings": {key: value for key, value in vars(args).items() if isinstance(value, int | str)}
        | {"OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "as it comes")},
        "rows": rows,
    }
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
