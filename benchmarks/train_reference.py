"""Trains one of the reference models from scratch, and writes its folder, loss curve and figures.

    python benchmarks/train_reference.py --model llama --out DIR [--data DIR] [--minutes M] [--resume]

The learning rate warms up, then falls along a cosine that ends when either --epochs or --minutes is reached,
whichever comes first. The checkpoint with the lowest held-out loss (books/valid) is the one that is kept, and
training stops early when that loss has risen for a while. All learn to predict the next token, but bert masked ones
(bert_masked.py); mamba2 scans by spiking_mamba_scan.py. gpt2-1m and gpt2-8m are trained as gpt2 was with --epochs
21.235, --minutes long enough and --patience 1000: same text, tokens, batches, rates. Written into --out:

    NAME/                 the model folder, weights rounded to bfloat16
    reference-NAME.json   protocol, hardware, versions, loss curve, held-out figures of the saved weights
    NAME.state.pt         the last state, from which --resume goes on
    cache/                tokenizers and encoded text
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import bert_data
import bert_masked
import numpy as np
import reference_data as text
import reference_models as reference
import spiking_mamba_scan
import torch
import torch.nn.functional as F

BERT, MAMBA = "bert", "mamba2"


def parse_arguments() -> argparse.Namespace:
    """Returns the command line's arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=(*reference.NAMES, BERT), default="llama")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--data", type=Path, help="default: $SPIKEFORM_DATA, else ../shared/data")
    parser.add_argument("--cache", type=Path, help="default: OUT/cache")
    parser.add_argument("--minutes", type=float, default=30.0, help="end of the schedule in wall time")
    parser.add_argument("--epochs", type=float, default=30.0, help="end of the schedule in passes over the text")
    parser.add_argument("--batch-tokens", type=int, default=32768)
    parser.add_argument("--lr", type=float, help="peak; default: 2e-3 for llama and mamba2, 1e-3 for the others")
    parser.add_argument("--warm-up", type=float, help="share of the schedule; default: 0.06 for bert, else 0.02")
    parser.add_argument(
        "--score-penalty",
        type=float,
        help="times the mean square attention score, sum over layers; default: 1e-4, but 0 for llama and mamba2",
    )
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--dropout", type=float, default=0.0, help="on what blocks write to the residual stream")
    parser.add_argument("--evaluate-every", type=float, default=0.5, help="in epochs")
    parser.add_argument("--patience", type=int, default=12, help="evaluations without a new best before stopping")
    parser.add_argument("--init", type=Path, help="start from the weights of this folder (to cool down a model)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, help="stop after so many steps of this run (to try the script)")
    parser.add_argument("--resume", action="store_true", help="go on from OUT/NAME.state.pt")
    parser.add_argument("--no-compile", action="store_true")
    arguments = parser.parse_args()
    if arguments.lr is None:  # at 2.5e-3 the attention scores of gpt2 and opt run away
        arguments.lr = 2e-3 if arguments.model in ("llama", MAMBA) else 1e-3
    if arguments.warm_up is None:  # its norms follow the residual stream
        arguments.warm_up = 0.06 if arguments.model == BERT else 0.02
    if arguments.score_penalty is None:  # with learned positions nothing else holds the scores' size back
        arguments.score_penalty = 0.0 if arguments.model in ("llama", MAMBA) else 1e-4
    if arguments.model == MAMBA and arguments.score_penalty:
        parser.error("--score-penalty is of attention, which mamba2 has not")
    return arguments


class Batches:
    """The order of the text: each epoch cuts the stream at another offset and visits the pieces shuffled.

    The order depends on the seed and the epoch alone, so a resumed run sees what the stopped one would have.
    """

    def __init__(self, ids: np.ndarray, context: int, rows: int, seed: int, device: str):
        """Puts the whole stream on the device; its pieces are gathered there."""
        self.ids = torch.from_numpy(ids.astype(np.int32)).to(device)
        self.context, self.rows, self.seed = context, rows, seed
        self.per_epoch = (len(ids) - context) // context // rows
        self.epoch = -1

    def at(self, step: int) -> torch.Tensor:
        """Returns the token ids [rows, context + 1] of a step."""
        epoch, index = divmod(step, self.per_epoch)
        if epoch != self.epoch:
            rng = np.random.default_rng([self.seed, epoch])
            pieces = (len(self.ids) - self.context) // self.context
            starts = rng.permutation(pieces - 1) * self.context + rng.integers(self.context)
            self.starts = torch.from_numpy(starts).to(self.ids.device)
            self.span = torch.arange(self.context + 1, device=self.ids.device)
            self.epoch = epoch
        rows = self.starts[index * self.rows : (index + 1) * self.rows]
        return self.ids[rows[:, None] + self.span].long()


def make_optimizer(model: torch.nn.Module, arguments: argparse.Namespace, device: str) -> torch.optim.Optimizer:
    """Returns AdamW with weight decay on matrices only."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": arguments.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=arguments.lr, betas=(0.9, 0.95), fused=device == "cuda")


def learning_rate(progress: float, peak: float, warm_up: float, floor: float = 0.01) -> float:
    """Returns the rate at a share of the schedule: linear warm-up, then a cosine down to floor x peak."""
    if progress < warm_up:
        return peak * max(progress, 1e-4) / warm_up
    fall = min(1.0, (progress - warm_up) / (1 - warm_up))
    return peak * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * fall)))


@dataclass
class Run:
    """What a run has reached. It goes into the saved state, so that a resumed run goes on from it."""

    step: int = 0
    elapsed: float = 0.0  # seconds
    curve: list[dict] = field(default_factory=list)
    waited: int = 0  # evaluations since the best
    best: float = math.inf
    best_weights: dict[str, torch.Tensor] = field(default_factory=dict)

    def note(self, record: dict, model: torch.nn.Module) -> None:
        """Adds an evaluation to the curve, and keeps the weights if it is the best so far."""
        self.curve.append(record)
        self.waited += 1
        if record["valid_loss"] < self.best:
            self.best, self.waited = record["valid_loss"], 0
            self.best_weights = {key: value.detach().clone() for key, value in model.state_dict().items()}


def save_state(path: Path, run: Run, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Writes a run's state whole or not at all."""
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "run": vars(run)}
    state |= {"rng": torch.get_rng_state()}
    state |= {"cuda_rng": torch.cuda.get_rng_state() if torch.cuda.is_available() else None}
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    os.replace(partial, path)


def load_state(path: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer, device: str) -> Run:
    """Puts a saved state back into model, optimizer and random generators, and returns its run."""
    state = torch.load(path, map_location=device, weights_only=True)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    torch.set_rng_state(state["rng"].cpu())
    if device == "cuda":
        torch.cuda.set_rng_state(state["cuda_rng"].cpu())
    return Run(**state["run"])


def hardware(device: str) -> dict:
    """Describes what ran the training."""
    import transformers

    name = torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine()
    return {
        "device": name,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


@dataclass
class Objective:
    """What a model learns: how a step's inputs are made, their loss, and the held-out figures.

    Attributes:
        prepare: Token ids [rows, context + 1] of a step, and the step's number -> the inputs of `loss`.
        loss: -> (loss, score size summed over layers).
        measure: Model in eval mode -> the held-out figures, "nats_per_token" among them.
    """

    prepare: Callable
    loss: Callable
    measure: Callable[[], dict]


def next_token(model: torch.nn.Module, books: tuple, device: str) -> Objective:
    """The objective of the models that predict the next token."""
    if model.config.model_type == MAMBA:
        spiking_mamba_scan.install()
        score_sizes = []  # no attention, no scores
    else:
        score_sizes = reference.use_plain_attention(model)

    def logits_of(ids: torch.Tensor) -> torch.Tensor:
        with torch.autocast(device, dtype=torch.bfloat16, enabled=device == "cuda"):
            return model(input_ids=ids, use_cache=False).logits

    def loss_of(batch: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        score_sizes.clear()
        loss = F.cross_entropy(logits_of(batch[:, :-1]).float().flatten(0, 1), batch[:, 1:].flatten())
        return loss, torch.stack(score_sizes).sum() if score_sizes else torch.zeros((), device=device)

    return Objective(lambda ids, _: (ids,), loss_of, lambda: reference.held_out(logits_of, *books, device))


def masked_tokens(model: torch.nn.Module, books: tuple, tokenizer, seed: int, device: str) -> Objective:
    """The objective of bert."""
    score_sizes = reference.use_plain_attention(model, causal=False)
    generator = torch.Generator(device)

    def prepare(ids: torch.Tensor, step: int) -> tuple[torch.Tensor, ...]:
        generator.manual_seed((seed << 32) + step)  # a resumed run draws what the stopped one would have
        return bert_masked.mask(ids[:, :-1], generator, tokenizer)

    def loss_of(rows, positions, targets) -> tuple[torch.Tensor, torch.Tensor]:
        score_sizes.clear()
        with torch.autocast(device, dtype=torch.bfloat16, enabled=device == "cuda"):
            logits = bert_masked.predict(model, rows, positions)
        return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten()), torch.stack(score_sizes).sum()

    def measure() -> dict:
        with torch.autocast(device, dtype=torch.bfloat16, enabled=device == "cuda"):
            return bert_masked.held_out(model, books[0], tokenizer, device)

    return Objective(prepare, loss_of, measure)


def fit(arguments: argparse.Namespace, model, batches: Batches, objective: Objective, device: str) -> tuple[Run, str]:
    """Trains to the end of the schedule, or until the held-out loss has long not fallen.

    Returns:
        The run, and what ended it: "schedule" or "early".
    """
    compiled = objective.loss if arguments.no_compile else torch.compile(objective.loss)
    optimizer = make_optimizer(model, arguments, device)
    total_steps = math.ceil(arguments.epochs * batches.per_epoch)
    evaluate_every = max(1, round(arguments.evaluate_every * batches.per_epoch))
    state_path = arguments.out / f"{arguments.model}.state.pt"
    resumed = arguments.resume and state_path.is_file()
    run = load_state(state_path, model, optimizer, device) if resumed else Run()

    def evaluate(losses: list[torch.Tensor]) -> None:
        model.eval()
        valid = objective.measure()["nats_per_token"]
        model.train()
        record = {
            "step": run.step,
            "epoch": round(run.step / batches.per_epoch, 3),
            "tokens": run.step * batches.rows * batches.context,
            "seconds": round(run.elapsed, 1),
            "lr": optimizer.param_groups[0]["lr"],
            "train_loss": round(torch.stack(losses).mean().item(), 4) if losses else None,
            "valid_loss": valid,
        }
        run.note(record, model)
        print(arguments.model, json.dumps(record), flush=True)

    model.train()
    if not arguments.no_compile:  # before the clock starts, which the schedule follows: else it would skip the warm-up
        with torch.random.fork_rng():
            compiled(*objective.prepare(batches.at(run.step), run.step))[0].backward()
        optimizer.zero_grad(set_to_none=True)
    started, saved = time.monotonic() - run.elapsed, time.monotonic()
    first_step, losses, stopped = run.step, [], "schedule"
    while True:
        run.elapsed = time.monotonic() - started
        progress = max(run.step / total_steps, run.elapsed / (60 * arguments.minutes))
        last = progress >= 1 or (arguments.steps is not None and run.step - first_step >= arguments.steps)
        due = run.step % evaluate_every == 0 and (losses or (arguments.init and run.step == 0))
        if due or last:
            evaluate(losses)
            losses = []
            if run.waited >= arguments.patience:
                last, stopped = True, "early"
        if last or time.monotonic() - saved > 60:
            save_state(state_path, run, model, optimizer)
            saved = time.monotonic()
        if last:
            return run, stopped
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(progress, arguments.lr, arguments.warm_up)
        loss, score_size = compiled(*objective.prepare(batches.at(run.step), run.step))
        (loss + arguments.score_penalty * score_size).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        run.step += 1
        if run.step % 10 == 0:
            losses.append(loss.detach())


def train(arguments: argparse.Namespace) -> dict:
    """Trains, saves the best checkpoint rounded to bfloat16, and returns the report."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    name, out = arguments.model, arguments.out
    data, cache = text.data_folder(arguments.data), arguments.cache or arguments.out / "cache"
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(arguments.seed)
    if name == BERT:
        source, vocabulary, context = bert_data, bert_masked.VOCABULARY, bert_masked.WINDOW
    else:
        source, vocabulary, context = text, reference.VOCABULARY[name], reference.CONTEXT[name]
    tokenizer = source.load_tokenizer(data, cache, vocabulary)
    stream = source.encode_training(data, cache, vocabulary)
    books = source.encode_held_out(data, tokenizer, "books")
    if name == BERT:
        model = bert_masked.build(tokenizer.pad_token_id)
    else:
        model = reference.build(name, tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    if arguments.init:
        model.load_state_dict(type(model).from_pretrained(arguments.init, dtype=torch.float32).state_dict())
    reference.add_residual_dropout(model, arguments.dropout)
    model.to(device)
    batches = Batches(stream, context, max(1, arguments.batch_tokens // context), arguments.seed, device)
    if name == BERT:
        objective = masked_tokens(model, books, tokenizer, arguments.seed, device)
    else:
        objective = next_token(model, books, device)
    run, stopped = fit(arguments, model, batches, objective, device)

    model.load_state_dict(run.best_weights)
    left_out = {"model", "out", "data", "cache", "init", "resume", "no_compile"}
    stage = {key: value for key, value in vars(arguments).items() if key not in left_out}
    tokens = run.step * batches.rows * context
    stage |= {"unique_tokens": len(stream), "tokens": tokens, "steps": run.step}
    stage |= {"seconds": round(run.elapsed, 1), "stopped": stopped, "hardware": hardware(device)}
    stage |= {"curve": run.curve}
    return finish(arguments, model, tokenizer, stage if run.step else None, device)


def finish(arguments, model, tokenizer, stage: dict | None, device: str) -> dict:
    """Rounds, measures and saves the trained model, and returns the report."""
    name, data = arguments.model, text.data_folder(arguments.data)
    model.eval()
    reference.round_to_bfloat16(model)

    def logits_of(ids: torch.Tensor) -> torch.Tensor:
        return model(input_ids=ids, use_cache=False).logits

    def measure(held_out: str, every: int = 1) -> dict:
        ids, length = text.encode_held_out(data, tokenizer, held_out)
        if name == BERT:
            return bert_masked.held_out(model, ids, tokenizer, device, every)
        return reference.held_out(logits_of, ids, length, device, rows=16, every=every)

    stages = []
    if arguments.init:  # a cooled-down model keeps the account of what came before
        earlier = arguments.init.parent / f"reference-{name}.json"
        stages = json.loads(earlier.read_text(encoding="utf-8"))["stages"] if earlier.is_file() else []
    report = {
        "model": name,
        "parameters": sum(p.numel() for p in model.parameters()),
        "vocabulary": len(tokenizer),
        "context": bert_masked.CONTEXT if name == BERT else reference.CONTEXT[name],
        "protocol": bert_masked.PROTOCOL
        if name == BERT
        else "non-overlapping windows of 512 tokens over the concatenated text; the first token of "
        "each is context only; saved weights (rounded to bfloat16), computed in float32",
        "held_out": {
            "books": measure("books"),
            "wikitext": measure("wikitext"),
            "books_every_25th_window": measure("books", every=25),  # what a test can measure again
        },
        "measured_on": hardware(device),
        "stages": [*stages, stage] if stage else stages,
    }
    reference.save_folder(model, tokenizer, arguments.out / name)
    path = arguments.out / f"reference-{name}.json"
    path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return report


if __name__ == "__main__":
    final = train(parse_arguments())
    print(final["model"], json.dumps({"parameters": final["parameters"]} | final["held_out"]), flush=True)
