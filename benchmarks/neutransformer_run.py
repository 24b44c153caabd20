"""NeuTransformer beside the dense models: three sizes of GPT-2, ablations on the middle one, LLaMA.

    python benchmarks/neutransformer_run.py --data DIR --cache DIR --out benchmarks/results/neutransformer-quality.json
        [--trained DIR] [--only sizes steps …] [--steps 400] [--long-steps 1000] [--save DIR]

Protocol: the first 100,000 tokens of books/valid in windows of 512; thresholds and gains from 128 windows of the
training text, on which all but the embeddings is fine-tuned, the dense model its teacher. gpt2-1m and gpt2-8m are not
embedded: ``train_reference.py --out DIR`` makes them, and --trained names that DIR. Rows are appended as they are
finished, and what is in the file already is not run again. Several processes, one file each, may share a GPU;
neutransformer_tables.py reads all of them.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from method_runs import COUNTED, WINDOW, Bench, Point, parser, run_missing
from torch import Tensor

import spikeform
from spikeform import pretrained
from spikeform.layers.self_attention import SpikingSelfAttention

SIZES, MIDDLE = ("gpt2-1m", "gpt2", "gpt2-8m"), "gpt2"
MODELS = (*SIZES, "llama")
STEPS, FFN_STEPS = (1, 2, 4, 8), (8, 16, 32)
# What came nearest to the dense models in short runs: windows for most heads, signed spikes, membranes that keep all.
NEAR: dict[str, Any] = {"spikes": "signed", "windows": [2, 8, 32, 0], "tau": 0.0, "reset": "soft"}
# What stays as it is: embeddings, and with them a tied head.
FROZEN = {"gpt2": ("*wte*", "*wpe*"), "llama": ("*embed_tokens*",)}
# In the paper attention alone learns; here with the norm before it.
ATTENTION = ("*wte*", "*wpe*", "*.mlp.*", "*.ln_2.*", "*.ln_f.*")
TUNED: dict[str, Any] = {
    "window": WINDOW,
    "batch_size": 16,
    "learning_rate": 2e-3,
    "threshold_learning_rate": 2e-3,
    "weight_decay": 0.01,
    "warm_up": 0.05,
    "schedule": "cosine",
    "ce": 1.0,
    "distil": 1.0,
    "hidden": 100.0,
    "hidden_distance": "cosine",
    "layer_by_layer": 0.2,
    "compile": False,  # a compiled model of spiking self-attention needs attention masks, which texts have none of
}
ALIGNED = {"ce": 0.0, "distil": 0.0, "hidden": 1.0}
BATCH = 16


def points() -> dict[str, Point]:
    """All of them, by name; of each group the most wanted first."""
    found = {}
    for model in (MIDDLE, *(m for m in MODELS if m != MIDDLE)):
        group = "sizes" if model in SIZES else model
        found[f"{model}-dense"] = Point(group, None, model=model)
        found[f"{model}-converted"] = Point(group, NEAR, model=model)
        found[model] = Point(group, NEAR, {}, length=1, model=model)
    for model in SIZES:
        found[f"{model}-aligned"] = Point("reach", NEAR, ALIGNED, length=1, model=model)

    def add(group: str, name: str, config: dict[str, Any], training: dict[str, Any] | None) -> None:
        found[name] = Point(group, NEAR | config, training, 0, MIDDLE)

    leaky = {"tau": 2.0, "reset": "hard"}
    add("steps", "base", {}, {})
    for steps in STEPS:
        if steps != 4:
            add("steps", f"t{steps}", {"steps": steps}, {})
    add("neurons", "binary", {"spikes": "binary"}, {})
    add("neurons", "leaky", leaky, {})
    add("neurons", "sum", {"normalise": False}, {})
    add("heads", "far", {"windows": []}, {})
    add("heads", "near", {"windows": [2, 8, 32]}, {})
    add("heads", "wide", {"windows": [4, 16, 64, 0]}, {})
    add("heads", "plain", {"spikes": "binary", "windows": [], **leaky}, {})
    add("heads", "plain-attention", {"spikes": "binary", "windows": [], **leaky}, {"freeze": ATTENTION})
    add("heads", "attention", {}, {"freeze": ATTENTION})
    add("losses", "text", {}, {"distil": 0.0, "hidden": 0.0})
    add("losses", "logits", {}, {"hidden": 0.0})
    add("losses", "hidden-10", {}, {"hidden": 10.0})
    add("losses", "aligned", {}, ALIGNED)
    add("losses", "at-once", {}, {"layer_by_layer": 0.0})
    kinds = {f"ffn{steps}": {"ffn_steps": steps} for steps in FFN_STEPS if steps != 16}
    kinds |= {"ffn-relu": {"ffn": "relu_if"}, "ffn-none": {"ffn": "none"}}
    for name, config in kinds.items():
        add("ffn", name, config, {})
        if name != "ffn-none":
            add("ffn", f"{name}-converted", config, None)
    for rate in (1e-3, 4e-3):
        add("rates", f"rate-{rate:g}", {}, {"learning_rate": rate})
    return found


class NeuBench(Bench):
    """How close a spiking model is to the dense one, and what its attention costs."""

    method = spikeform.NeuTransformer

    def __init__(self, arguments: argparse.Namespace, folder: Path) -> None:
        super().__init__(arguments, folder)
        self.windows = self.held[: len(self.held) // WINDOW * WINDOW].view(-1, WINDOW)
        self.mean = self._mean()

    def options(self, point: Point) -> dict[str, Any]:
        """Fine-tuned, embeddings frozen."""
        return TUNED | {"freeze": FROZEN[self.dense.config.model_type]}

    def quality(self, model: Any) -> dict[str, Any]:
        """Perplexity, accuracy, closeness to the dense model; where nothing was trained, also with dense attention."""
        found = {"closeness": self.closeness(model)}
        if model is self.dense:
            return found | {"text": spikeform.perplexity(model, self.held, window=WINDOW, batch_size=BATCH).to_dict()}
        if not model.spikeform_report.history:
            attention = [module for module in model.modules() if isinstance(module, SpikingSelfAttention)]
            for layer in attention:
                layer.paused = True
            found["feed_forward"] = self._near(model)
            for layer in attention:
                layer.paused = False
        return found | {"text": self._near(model)}

    def _near(self, model: Any) -> dict[str, Any]:
        return spikeform.fidelity(model, self.dense, self.held, window=WINDOW, batch_size=BATCH).to_dict()

    def _outputs(self, model: Any, batch: Tensor) -> tuple[Tensor, Tensor]:
        """The head's input and the logits, fp32."""
        out = model(input_ids=batch.to(self.device), use_cache=False, output_hidden_states=True)
        return out.hidden_states[-1].float(), out.logits.float()

    @torch.no_grad()
    def _mean(self) -> Tensor:
        """Of the dense model's last hidden states, over all tokens."""
        sums = [self._outputs(self.dense, batch)[0].double().sum((0, 1)) for batch in self.windows.split(BATCH)]
        return (torch.stack(sums).sum(0) / self.windows.numel()).float()

    @torch.no_grad()
    def closeness(self, model: Any) -> dict[str, float]:
        """Cosines with the dense model, mean over tokens, and the share of tokens predicted rightly.

        ``hidden``: of the head's input; ``centred``: of it less the dense model's mean, which all tokens share;
        ``logits``; ``unrelated``: of the head's input with the dense model's one window further on, what any two
        tokens have in common.
        """
        sums, places = dict.fromkeys(("hidden", "centred", "logits", "unrelated", "accuracy"), 0.0), 0
        for batch in self.windows.split(BATCH):
            (found, logits), (wanted, dense_logits) = (self._outputs(m, batch) for m in (model, self.dense))
            pairs = {"hidden": (found, wanted), "centred": (found - self.mean, wanted - self.mean)}
            pairs |= {"logits": (logits, dense_logits), "unrelated": (found, wanted.roll((1, WINDOW // 2), (0, 1)))}
            for name, (a, b) in pairs.items():
                sums[name] += float(F.cosine_similarity(a, b, dim=-1).sum())
            sums["accuracy"] += int((logits[:, :-1].argmax(-1) == batch[:, 1:].to(self.device)).sum())
            places += batch.numel()
        predicted = places - len(self.windows)
        return {name: total / (predicted if name == "accuracy" else places) for name, total in sums.items()}

    def cost(self, model: Any) -> dict[str, Any]:
        """Rates, attention's operations by two accountings, and ESTIMATED energy."""
        report = spikeform.energy(model, self.counted(), batch_size=4)
        ratios = {
            name: {"vs_dense": e["ratio_vs_dense"], "vs_dense_with_memory": e["with_memory"]["ratio_vs_dense"]}
            for name, e in report.estimates.items()
        }
        facts = {"estimated": ratios, "spikes_per_token": report.spikes_per_token, "attention": report.attention}
        return {"energy": facts}


def protocol(arguments: argparse.Namespace) -> str:
    """What the numbers are."""
    return (
        f"books/valid, first {arguments.tokens} tokens, windows of {WINDOW} side by side; calibrated on "
        f"{arguments.calibration * WINDOW} tokens of the training text; rates and ESTIMATED energy on the first "
        f"{COUNTED} tokens, prefill; measured in fp32 without TF32"
    )


def summary(row: dict[str, Any]) -> str:
    """One line."""
    close, found = row["closeness"], row["text"]
    said = f"{row['point']:18} seed {row['seed']} perplexity {found['perplexity']:9.3f} "
    if "perplexity_ratio" in found:
        said += f"ratio {found['perplexity_ratio']:.4f} agreement {found['top1_agreement']:.4f} "
    said += f"cosine {close['hidden']:.4f} centred {close['centred']:.4f} accuracy {close['accuracy']:.4f}"
    return f"{said} seconds {row['seconds']}"


def folder_of(name: str, trained: Path | None) -> Path:
    """Where a model lies: with those just trained, or embedded.

    Raises:
        FileNotFoundError: It is not embedded, and was not trained.
    """
    if trained is not None and (trained / name / "config.json").is_file():
        return trained / name
    if name not in pretrained.names():
        raise FileNotFoundError(
            f"no {name} in {trained or '--trained'}: python benchmarks/train_reference.py --model {name} --out DIR "
            "makes it, then pass --trained DIR; or leave it out with --only"
        )
    return pretrained.path(name)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line's arguments."""
    found = parser(__doc__, points(), [*SIZES, f"{MIDDLE}-aligned"])
    found.add_argument("--trained", type=Path, help="folder of train_reference.py --out, for what is not embedded")
    found.set_defaults(steps=400, long_steps=1000)
    return found.parse_args(arguments)


def main(arguments: argparse.Namespace) -> None:
    """Run what is missing from the file."""

    def bench_of(model: str | None) -> NeuBench:
        return NeuBench(arguments, folder_of(model or MIDDLE, arguments.trained))

    run_missing(arguments, points(), protocol(arguments), bench_of, summary)


if __name__ == "__main__":
    main(parse())
