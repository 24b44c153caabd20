"""The preference stage on a distilled SpikingMamba: DPO and KTO on pairs of the dense model's own making.

    python benchmarks/spiking_mamba_preference.py --checkpoint DIR/d4-long --data DIR
        --out benchmarks/results/spiking-mamba-preference.json [--model FOLDER] [--rates 2e-5 1e-4]

The dense model writes continuations of its own samples (--prompts text: of windows of the training text; --chosen text:
the text itself goes on); each is paired with one made worse. Held-out pairs have other prompts. Every run starts from
the checkpoint, which is also its reference, and every run is reported; ``interpolated`` holds what weights between it
and the tuned model do (--parts of the way; arXiv 2109.01903). Measured before and after: held-out pairs ranked rightly,
with 95% intervals and McNemar's exact test; perplexity on the first tokens of books/valid; spikes and density while
reading them; BLiMP.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import reference_data as text
import spiking_mamba_blimp as blimp
import spiking_mamba_scan
import torch
from method_runs import WINDOW, folder_of
from transformers import AutoModelForCausalLM, AutoTokenizer

import spikeform
from spikeform.training.preference import PairOptions, Pairs, PreferOptions, load_pairs, prefer, preference_pairs, rank
from spikeform.training.preference.measures import mcnemar, measure
from spikeform.training.preference.tune import interpolate, weights

METHODS = ("dpo", "kto")


def parse() -> argparse.Namespace:
    """The command line's arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True, help="of spiking_mamba_run.py --save")
    parser.add_argument("--model", default="mamba2", help="the dense model: an embedded one, or a folder")
    parser.add_argument("--data", type=Path, help="default: $SPIKEFORM_DATA, else ../shared/data")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--rates", type=float, nargs="+", default=[2e-5, 1e-4], help="peak learning rates")
    parser.add_argument("--beta", type=float, default=0.1)
    parser.add_argument("--sft", type=float, default=1.0, help="of dpo: weight of the chosen responses' cross entropy")
    parser.add_argument("--compensation", type=float, default=0.0, help="weight of the neurons' gradient compensation")
    parser.add_argument("--made", type=Path, help="folder of pairs that were made before (Pairs.save)")
    parser.add_argument("--prompts", choices=("own", "text"), default="own")
    parser.add_argument("--chosen", choices=("sampled", "text"), default="sampled")
    parser.add_argument("--temperature", type=float, default=0.9, help="of chosen responses")
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--response-tokens", type=int, default=32)
    parser.add_argument("--held-out", type=float, default=0.2, help="share of the prompts to measure on")
    parser.add_argument("--pairs", type=int, default=5000, help="train and held-out together")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--steps", type=int, help="default: one epoch")
    parser.add_argument(
        "--parts", type=float, nargs="*", default=[0.25, 0.5, 0.75], help="of the way to the tuned model"
    )
    parser.add_argument("--tokens", type=int, default=100_000, help="of the held-out text")
    parser.add_argument("--blimp", type=int, help="pairs of each paradigm; default: all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args()


def interpolated(
    model: Any,
    start: dict[str, torch.Tensor],
    parts: list[float],
    ranked: Any,
    before: dict[str, Any],
    pairs: Pairs,
    texts: dict[str, Any],
    sizes: tuple[int, int, int],
) -> list[dict[str, Any]]:
    """What models between the checkpoint and the tuned one do; the tuned one is as it was afterwards."""
    tuned, found = weights(model), []
    for part in parts:
        interpolate(model, start, tuned, part)
        again: Any
        again, after = measure(model, pairs, texts["tokenizer"], texts["held"], *sizes)
        change = mcnemar(ranked.wins(False), again.wins(False))
        ratio = after["perplexity"] / before["perplexity"]
        found.append({"part": part, "metrics": after, "mcnemar": change, "perplexity_ratio": ratio})
        print(f"  part {part}: {after['preference']['summed']['accuracy']:.4f}, {change}, x {ratio:.4f}", flush=True)
    interpolate(model, start, tuned, 1.0)
    return found


def run(arguments: argparse.Namespace, method: str, rate: float, pairs: Pairs, texts: dict[str, Any]) -> dict[str, Any]:
    """One method at one rate, from the checkpoint."""
    started = time.monotonic()
    model = spikeform.load(arguments.checkpoint).to(arguments.device)
    start = weights(model)
    before = blimp.answers(model, texts["blimp"])
    sizes = PreferOptions().max_length, arguments.batch_size, WINDOW
    ranked, _ = measure(model, pairs, texts["tokenizer"], None, *sizes)
    options = PreferOptions(
        method=method,
        beta=arguments.beta,
        sft=arguments.sft if method == "dpo" else 0.0,
        learning_rate=rate,
        threshold_learning_rate=rate,
        batch_size=arguments.batch_size,
        steps=arguments.steps,
        compensation=arguments.compensation,
        bf16=arguments.device == "cuda",
        seed=arguments.seed,
    )
    prefer(model, pairs, texts["tokenizer"], options, valid=texts["held"])
    done: Any = model.spikeform_report.history[-1]
    after = blimp.answers(model, texts["blimp"])
    metrics = done["metrics"]
    return {
        "interpolated": interpolated(model, start, arguments.parts, ranked, metrics["before"], pairs, texts, sizes),
        "method": method,
        "learning_rate": rate,
        "options": options.to_dict(),
        "steps": done["steps"],
        "metrics": metrics,
        "perplexity_ratio": metrics["after"]["perplexity"] / metrics["before"]["perplexity"],
        "density_change": metrics["after"]["density"] - metrics["before"]["density"],
        "blimp": {
            "before": blimp.accuracy(before, texts["blimp"]),
            "after": blimp.accuracy(after, texts["blimp"]),
            "gained": blimp.difference(after, before, texts["blimp"]),
        },
        "curve": done["curve"],
        "seconds": round(time.monotonic() - started, 1),
    }


def made(arguments: argparse.Namespace, dense: Any, tokenizer: Any, data: Path) -> Pairs:
    """Pairs as the options say."""
    options = PairOptions(
        count=arguments.pairs,
        prompt_tokens=arguments.prompt_tokens,
        response_tokens=arguments.response_tokens,
        chosen=arguments.chosen,
        temperature=arguments.temperature,
        held_out=arguments.held_out,
        batch_size=min(512, arguments.pairs),
        seed=arguments.seed,
    )
    documents = list(text.training_documents(data)) if arguments.prompts == "text" else None
    return preference_pairs(dense, tokenizer, documents, options)


def main() -> None:
    """Run every method at every rate that the file lacks."""
    arguments = parse()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    spiking_mamba_scan.install()
    data, folder = text.data_folder(arguments.data), folder_of(arguments.model)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    held, _ = text.encode_held_out(data, tokenizer, "books")
    texts = {
        "tokenizer": tokenizer,
        "held": torch.from_numpy(held[: arguments.tokens]),
        "blimp": blimp.Pairs(data / "blimp.tar.xz", tokenizer, arguments.blimp),
    }
    dense = AutoModelForCausalLM.from_pretrained(folder).to(arguments.device).eval()
    begin = time.monotonic()
    pairs = load_pairs(arguments.made, tokenizer) if arguments.made else made(arguments, dense, tokenizer, data)
    print(f"{len(pairs.train)} + {len(pairs.held_out)} pairs after {time.monotonic() - begin:.0f} s", flush=True)
    protocol = (
        f"{len(pairs.train)} pairs to learn from, {len(pairs.held_out)} of other prompts to measure on; text: "
        f"books/valid, first {arguments.tokens} tokens, non-overlapping windows of {WINDOW}"
    )
    result: dict[str, Any] = {"rows": []}
    if arguments.out.exists():
        result = json.loads(arguments.out.read_text(encoding="utf-8"))
        if result["protocol"] != protocol or result["checkpoint"] != arguments.checkpoint.name:
            raise SystemExit(f"{arguments.out} is of another checkpoint or protocol: give another --out")
    ranking = rank(dense, pairs.held_out, tokenizer, end_token=pairs.end_token, batch_size=arguments.batch_size)
    result |= {
        "checkpoint": arguments.checkpoint.name,
        "protocol": protocol,
        "pairs": pairs.card,
        "dense": ranking.to_dict(),
        "hardware": torch.cuda.get_device_name() if arguments.device == "cuda" else f"CPU {platform.machine()}",
        "versions": {name: version(name) for name in ("torch", "transformers", "trl")},
    }
    have = {(row["method"], row["learning_rate"]) for row in result["rows"]}
    for method in arguments.methods:
        for rate in arguments.rates:
            if (method, rate) in have:
                continue
            row = run(arguments, method, rate, pairs, texts)
            result["rows"].append(row)
            arguments.out.write_text(json.dumps(result, indent=1), encoding="utf-8")
            metrics, p = row["metrics"], row["metrics"]["mcnemar"]["summed"]["p"]
            won = [metrics[when]["preference"]["summed"]["accuracy"] for when in ("before", "after")]
            print(
                f"{method} rate {rate:g}: preference {won[0]:.4f} to {won[1]:.4f}, p {p}, perplexity x "
                f"{row['perplexity_ratio']:.4f}, density {row['density_change']:+.4f}, {row['seconds']} s",
                flush=True,
            )


if __name__ == "__main__":
    main()
