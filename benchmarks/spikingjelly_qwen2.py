"""LAS beside SpikingJelly 2.0's Qwen2 recipe on a CPU: the same small Qwen2 model, its speed and its perplexity.

    pip install --no-deps --target sj spikingjelly==2.0.0 loguru
    PYTHONPATH=sj python benchmarks/spikingjelly_qwen2.py --out benchmarks/results/spikingjelly-cpu.json --text FILE

The model is the embedded llama as a Qwen2ForCausalLM, whose biases of queries, keys and values are zero: the same
function. SpikingJelly runs with the settings that its documentation gives for Qwen2.5-0.5B (T 160, 16 levels,
quantile 0.999), mode ``signed_if``, its own cache. LAS runs at the fewest steps whose perplexity is not above
SpikingJelly's (``matched``), and at 16. Both are calibrated on the same 4,096 tokens that the dense model writes. Other
rows are LAS at the matched steps in the temporal executor, step by step; and ``folded``: the same literal spikes, but
the steps of every linear layer side by side in one product, all other operations collapsed. Prefill is one pass over
the prompt into an empty cache, decoding one token at a time, greedy; medians of rounds, all rows by turns, in one
process.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import statistics
import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from spikingjelly.activation_based import ann2snn, functional
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

import spikeform
from spikeform import pretrained
from spikeform.evaluation import load_text, sample_ids, tokenize
from spikeform.synapses import collapsed, executor, products, temporal

THEIRS = {"time_steps": 160, "calibration_levels": 16, "calibration_quantile": 0.999}
CALIBRATION, LENGTH = 4096, 128
STEPS = (4, 5, 6, 7, 8, 10, 12, 16)


def qwen2() -> Any:
    """The embedded llama's weights in a Qwen2 model."""
    llama = AutoModelForCausalLM.from_pretrained(pretrained.path("llama")).eval()
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    names += ("num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "rope_parameters")
    names += ("tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id")
    model = Qwen2ForCausalLM(Qwen2Config(**{name: getattr(llama.config, name) for name in names})).eval()
    found = model.load_state_dict(llama.state_dict(), strict=False)
    if found.unexpected_keys or not all(name.endswith("_proj.bias") for name in found.missing_keys):
        raise RuntimeError(f"not the same model: {found}")
    for name, parameter in model.named_parameters():
        if name in found.missing_keys:
            torch.nn.init.zeros_(parameter)
    ids = torch.arange(32)[None]
    torch.testing.assert_close(model(ids).logits, llama(ids).logits)
    return model


def convert_theirs(dense: Any, ids: Tensor) -> Any:
    """SpikingJelly's conversion."""
    config = ann2snn.Qwen2SNNConfig(**THEIRS)
    batches = [{"input_ids": x, "attention_mask": torch.ones_like(x)} for x in ids.split(8)]
    calibration = ann2snn.calibrate_qwen2_snn(dense, batches, config)
    recipe = ann2snn.Qwen2SNNRecipe(calibration, config)
    return ann2snn.ModuleConverter(recipe, device="cpu").convert(copy.deepcopy(dense))


def folded(train: Any, weight: Tensor) -> tuple[Tensor, None]:
    """The steps side by side in one product."""
    return F.linear(train.step_values(), weight.to(train.quantum.dtype)).sum(0), None


class Runner:
    """A model that reads and writes; SpikingJelly's differs in how it is called."""

    def __init__(self, name: str, model: Any, context: Callable[[], Any] = nullcontext) -> None:
        self.name, self.model, self.context = name, model, context
        self.theirs = not isinstance(model, transformers.PreTrainedModel)
        self.prefills: list[float] = []
        self.decodes: list[float] = []

    def _call(self, ids: Tensor, cache: Any, seen: int) -> Any:
        if self.theirs:
            functional.reset_net(self.model)
        mask = torch.ones(len(ids), seen + ids.shape[1], dtype=torch.long)
        options = {} if self.theirs else {"logits_to_keep": 1}
        return self.model(input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True, **options)

    def round(self, ids: Tensor, new: int, counted: bool) -> None:
        """Read ``ids`` and write ``new`` tokens."""
        with self.context():
            begin = time.perf_counter()
            out = self._call(ids, None, 0)
            prefill = time.perf_counter() - begin
            gaps = []
            for step in range(new):
                begin = time.perf_counter()
                token = out.logits[:, -1].argmax(-1, keepdim=True)
                out = self._call(token, out.past_key_values, ids.shape[1] + step)
                gaps.append(time.perf_counter() - begin)
        if counted:
            self.prefills.append(prefill)
            self.decodes.append(statistics.median(gaps))

    def row(self, prompt: int) -> dict[str, Any]:
        """Its figures."""
        prefill, decode = statistics.median(self.prefills), statistics.median(self.decodes)
        row = {"model": self.name, "prefill_tokens_per_s": prompt / prefill, "decode_tokens_per_s": 1 / decode}
        return row | {"prefill_s": prefill, "decode_s": decode, "rounds": len(self.prefills)}


def perplexity(model: Any, windows: Iterable[Tensor]) -> float:
    """Of windows ``[L]`` each, every one from an empty context."""
    total, count = 0.0, 0
    for window in windows:
        if not isinstance(model, transformers.PreTrainedModel):
            functional.reset_net(model)
        logits = model(input_ids=window[None]).logits[0, :-1].float()
        total += float(F.cross_entropy(logits, window[1:], reduction="sum"))
        count += len(window) - 1
    return float(torch.tensor(total / count).exp())


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--text", type=Path, help="text of the perplexity; without it the dense model writes one")
    parser.add_argument("--windows", type=int, default=8, help=f"of {LENGTH} tokens, for the perplexity")
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--new", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    dense = qwen2()
    calibration = sample_ids(dense, CALIBRATION, seed=0, window=LENGTH)
    if args.text:
        tokenizer = AutoTokenizer.from_pretrained(pretrained.path("llama"))
        text = tokenize(tokenizer, load_text(args.text))
    else:
        text = sample_ids(dense, args.windows * LENGTH, seed=1, window=LENGTH).reshape(-1)
    windows = text[: args.windows * LENGTH].split(LENGTH)
    theirs = convert_theirs(dense, calibration)
    found = {"dense": perplexity(dense, windows), "spikingjelly": perplexity(theirs, windows)}
    print(json.dumps(found), flush=True)
    ours, matched = {}, None
    for steps in STEPS:
        model = spikeform.convert(copy.deepcopy(dense), spikeform.LAS(steps=steps), calibration)
        found[f"las{steps}"] = perplexity(model, windows)
        print(json.dumps({f"las{steps}": found[f"las{steps}"]}), flush=True)
        if matched is None and found[f"las{steps}"] <= found["spikingjelly"]:
            matched = steps
        if steps == matched or steps == STEPS[-1]:
            ours[steps] = model
    matched = STEPS[-1] if matched is None else matched
    runners = [Runner("dense", dense), Runner("spikingjelly", theirs), Runner("las, matched", ours[matched])]
    runners += [Runner(f"las{STEPS[-1]}", ours[STEPS[-1]])]
    runners += [Runner("las, matched, temporal", ours[matched], lambda: executor("temporal"))]
    merged = SimpleNamespace(linear=folded, matmul=collapsed.matmul, hadamard=collapsed.hadamard)

    class Folded:
        """The temporal executor, its linear layers folded."""

        def __enter__(self) -> None:
            products._MODULES["temporal"] = merged
            self.used = executor("temporal")
            self.used.__enter__()

        def __exit__(self, *error: Any) -> None:
            self.used.__exit__(*error)
            products._MODULES["temporal"] = temporal

    runners += [Runner("las, matched, folded", ours[matched], Folded)]
    ids = text[None, : args.prompt]
    for turn in range(args.rounds + 1):
        for runner in runners:
            runner.round(ids, args.new, counted=turn > 0)
    rows = [runner.row(args.prompt) for runner in runners]
    for row in rows:
        for name in ("prefill", "decode"):
            row[f"{name}_vs_spikingjelly"] = row[f"{name}_tokens_per_s"] / rows[1][f"{name}_tokens_per_s"]
            row[f"{name}_vs_dense"] = row[f"{name}_tokens_per_s"] / rows[0][f"{name}_tokens_per_s"]
        print(json.dumps(row), flush=True)
    result = {
        "protocol": " ".join(__doc__.split("\n\n", 2)[2].split()),
        "hardware": f"CPU {platform.machine()}, {args.threads} threads",
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__, "spikingjelly": "2.0.0"},
        "text": args.text.name if args.text else "sampled from the dense model",
        "settings": {"prompt": args.prompt, "new": args.new, "rounds": args.rounds, "windows": len(windows)},
        "matched_steps": matched,
        "perplexity": found,
        "rows": rows,
    }
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
