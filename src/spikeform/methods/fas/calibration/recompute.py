"""Gradient checkpointing of a streaming model's blocks: keep their inputs, compute the rest again.

Not transformers' own: that one works in training mode only, where dropout would set the streams apart, and knows
nothing of the pass (see spikeform.neurons.streaming) that neurons ask for.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from spikeform.conversion.kinds import blocks
from spikeform.neurons.streaming import Pass, current


@contextmanager
def recomputing(model: PreTrainedModel, wanted: bool = True) -> Iterator[None]:
    """Inside the block, the backward pass computes each block's inside again; not at all unless ``wanted``."""
    found = [block for _, block in blocks(model)] if wanted else []
    try:
        for block in found:
            block.forward = _kept_small(block.forward)  # its hooks stay outside, and run once
        yield
    finally:
        for block in found:
            del block.forward  # the class's own again


def _kept_small(forward: Any) -> Any:
    def run(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        now = current.get()
        then = None if now is None else replace(now)  # as it is here: the first spike changes it
        return checkpoint(
            forward,
            *args,
            use_reentrant=False,
            preserve_rng_state=False,  # nothing is random in evaluation mode
            context_fn=lambda: (nullcontext(), _in_pass(then)),
            **kwargs,
        )

    return run


@contextmanager
def _in_pass(then: Pass | None) -> Iterator[None]:
    # The backward pass may run in a thread of its own, which knows of no pass.
    token = current.set(None if then is None else replace(then))
    try:
        yield
    finally:
        current.reset(token)
