"""``spikeform generate``: let a spiking model write."""

from __future__ import annotations

import time
from contextlib import nullcontext
from typing import Annotated, Any

import typer

from spikeform.cli.models import Checkpoint, load_spiking, need_tokenizer, positive
from spikeform.cli.output import Json, Output
from spikeform.errors import SpikeformError

Temperature = Annotated[
    float | None,
    typer.Option(help="Sample at this temperature, above 0. Without it the likeliest token is taken."),
]
TopK = Annotated[int | None, typer.Option(metavar="K", help="Sample from the K likeliest tokens.")]


def run(
    out: Checkpoint,
    prompt: Annotated[str, typer.Option(help="Text to go on from.")],
    max_new_tokens: Annotated[int, typer.Option(metavar="N", help="Most tokens to write.")] = 100,
    greedy: Annotated[bool, typer.Option("--greedy", help="Take the likeliest token (the default).")] = False,
    temperature: Temperature = None,
    top_k: TopK = None,
    seed: Annotated[int, typer.Option(help="Of the sampling.")] = 0,
    executor: Annotated[
        str | None, typer.Option(help="temporal (literal spikes, step by step), collapsed or event.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Write text with a converted model."""
    with Output(as_json) as output:
        positive("--max-new-tokens", max_new_tokens)
        if greedy and (temperature is not None or top_k is not None):
            raise SpikeformError("--greedy takes no --temperature and no --top-k: leave one of them out")
        _check_sampling(temperature, top_k)
        from spikeform.synapses import executor as use

        chosen = use(executor) if executor else nullcontext()
        with chosen:
            with output.task(f"loading {out}"):
                model, tokenizer = load_spiking(out), need_tokenizer(out)
            started = time.perf_counter()
            from transformers import TextStreamer

            streamer = None if as_json else TextStreamer(tokenizer, skip_special_tokens=True)
            ids, length = write(model, tokenizer, prompt, max_new_tokens, temperature, top_k, seed, streamer)
        seconds = time.perf_counter() - started
        written = len(ids) - length
        rate = f"{written} tokens in {seconds:.1f} s, {written / seconds:.1f} a second"
        output.say(f"({rate})", "dim")
        output.document(
            {
                "prompt": prompt,
                "text": tokenizer.decode(ids, skip_special_tokens=True),
                "ids": ids,
                "prompt_tokens": length,
                "new_tokens": written,
                "seconds": seconds,
                "temperature": temperature,
                "top_k": top_k,
                "seed": None if temperature is None and top_k is None else seed,
                "executor": executor or "automatic",
            }
        )


def write(
    model: Any,
    tokenizer: Any,
    prompt: str,
    tokens: int,
    temperature: float | None = None,
    top_k: int | None = None,
    seed: int = 0,
    streamer: Any = None,
) -> tuple[list[int], int]:
    """Go on from a prompt: greedily, or sampled where a temperature or top_k is given.

    Returns:
        All ids, the prompt's included, and how many those are.

    Raises:
        SpikeformError: The model does not generate, or the prompt is empty or too long for its context.
    """
    import torch

    from spikeform.conversion.data import context_length

    if not model.can_generate():
        raise SpikeformError(f"{type(model).__name__} does not write text")
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    length, context = inputs["input_ids"].shape[1], context_length(model)
    if length == 0:
        raise SpikeformError("the prompt is empty: give at least one token")
    if length + tokens > context:
        raise SpikeformError(
            f"a prompt of {length} tokens and {tokens} new ones exceed the model's context of {context}: "
            f"lower --max-new-tokens to {context - length} or shorten the prompt"
        )
    sampled = temperature is not None or top_k is not None
    options: dict[str, Any] = {"do_sample": sampled}
    if sampled:
        # 0 turns a filter off; both named, so that no default of the model's own slips in
        options |= {"temperature": temperature or 1.0, "top_k": top_k or 0, "top_p": 1.0}
    torch.manual_seed(seed)
    out = model.generate(**inputs.to(model.device), max_new_tokens=tokens, streamer=streamer, **options)
    return out[0].tolist(), length


def _check_sampling(temperature: float | None, top_k: int | None) -> None:
    if temperature is not None and not 0 < temperature < float("inf"):
        raise SpikeformError(f"--temperature must be a number above 0, got {temperature}: use --greedy for 0")
    positive("--top-k", top_k)
