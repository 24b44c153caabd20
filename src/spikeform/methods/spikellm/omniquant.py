"""Learned clipping and equivalent transformation, one block at a time (OmniQuant, arXiv 2308.13137, in SpikeLLM).

    minimise  || block(x) - block'(x^) ||^2   over clip factors and scales s;   block': integer weights, spikes

``x`` is the stream of the dense model, ``x^`` that of the converted blocks before. A pair's scale divides what its
producer puts out and multiplies its consumers' columns, so the real block is the same, and only what rounding takes
from it changes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from spikeform.conversion.pairs import Pair
from spikeform.errors import CalibrationError
from spikeform.methods.spikellm.clipping import Factors
from spikeform.methods.spikellm.config import SpikeLLM
from spikeform.methods.spikellm.trainee import Batch, Trainee, wide
from spikeform.neurons import recording, unseen


def train_block(
    block: nn.Module,
    name: str,
    pairs: Sequence[Pair],
    inputs: list[Tensor],
    targets: list[Tensor],
    calls: list[tuple[tuple, dict]],
    config: SpikeLLM,
    tiers: dict[str, Tensor | None] | None = None,
    notify: Callable[[int, float], None] | None = None,
) -> dict[str, Factors]:
    """Fold the pairs' scales into ``block``, in place, and give the factors that clip its weights.

    What is kept is the best of the start and of the state after each epoch, by the loss over all batches: training
    makes no block worse on its data. With ``config.epochs`` 0, and in other pipelines than omniquant, the start is
    taken: in closed form, without data.

    Args:
        block: Its linear layers are :class:`SpikingLinear` with real weights; its neurons are calibrated.
        name: Its qualified name; names below are of the whole model.
        pairs: Those that lie inside the block.
        inputs: The converted blocks' stream, ``[B, L, D]`` each.
        targets: The dense block's output on the dense stream, likewise.
        calls: The block's other positional and keyword arguments for each batch.
        config: ``pipeline``, ``lwc``, ``let``, ``epochs``, ``batch_size``, ``lwc_lr``, ``let_lr``, ``alpha``,
            ``weight_bits``, ``weight_steps`` and ``seed`` count here.
        tiers: Weight tier of each input channel ``[K]`` of a layer; a layer that is absent or None has one tier.
        notify: Called with the number of epochs done and the mean squared error over all batches.

    Returns:
        Clip factors ``(gamma, beta)``, each ``[R, N]``, of each linear layer; none where ``config.clips`` is off.

    Raises:
        CalibrationError: A neuron is not calibrated, the data are not finite, or training diverged.
    """
    trainee = Trainee(block, name, pairs, config, tiers or {})
    if config.pipeline == "omniquant" and config.epochs and (trainee.scales or trainee.logits):
        batches = list(zip(inputs, targets, calls, strict=True))
        with torch.enable_grad(), recording(unseen):  # probabilities stay real: their 16 bits round nothing here
            _train(trainee, batches, config, notify)
    trainee.fold()
    return trainee.factors()


def _train(
    trainee: Trainee, batches: list[Batch], config: SpikeLLM, notify: Callable[[int, float], None] | None
) -> None:
    """Train, and leave the best state in the trainee."""
    scales, logits = trainee.leaves()
    leaves, size = [*scales, *logits], config.batch_size
    groups = [(scales, config.let_lr), (logits, config.lwc_lr)]
    optimizer = torch.optim.AdamW([{"params": p, "lr": lr} for p, lr in groups if p], weight_decay=0.0)
    steps = config.epochs * sum(math.ceil(len(x) / size) for x, _, _ in batches)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5 + 0.5 * math.cos(math.pi * step / steps))
    generator = torch.Generator().manual_seed(config.seed)
    first, least, best = None, math.inf, []
    for epoch in range(config.epochs + 1):
        if first is not None:
            for piece in _shuffled(batches, size, generator):
                # In units of the start's error, or Adam's epsilon would weigh differently in every block.
                loss = trainee.error(trainee.parameters(), piece) / (piece[1].numel() * first)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
        error = _mean_error(trainee, batches)
        if not math.isfinite(error):
            raise CalibrationError(
                f"{trainee.prefix[:-1]}: the error after {epoch} epochs is {error}; "
                + ("lower let_lr or lwc_lr" if epoch else "the calibration data or the weights are not finite")
            )
        if notify is not None:
            notify(epoch, error)
        first = max(error, torch.finfo(torch.float32).tiny) if first is None else first
        if error < least:
            least, best = error, [leaf.detach().clone() for leaf in leaves]
    with torch.no_grad():
        torch._foreach_copy_(leaves, best)


@torch.no_grad()
def _mean_error(trainee: Trainee, batches: list[Batch]) -> float:
    params, total = trainee.parameters(), 0.0
    for batch in batches:
        for rows in torch.arange(len(batch[0])).split(1):  # small tensors are reused, large ones mapped anew
            total += float(trainee.error(params, _piece(batch, rows)))
    return total / sum(target.numel() for _, target, _ in batches)


def _shuffled(batches: list[Batch], size: int, generator: torch.Generator) -> Iterator[Batch]:
    """All sequences in random order, ``size`` of one batch at a time."""
    orders = [torch.randperm(len(x), generator=generator) for x, _, _ in batches]
    pieces = [(batch, rows) for batch, order in zip(batches, orders, strict=True) for rows in order.split(size)]
    for index in torch.randperm(len(pieces), generator=generator).tolist():
        yield _piece(*pieces[index])


def _piece(batch: Batch, rows: Tensor) -> Batch:
    """Some sequences of a batch, and what belongs to them of the block's other arguments; half precision widened."""
    x, target, (args, kwargs) = batch
    whole = len(x)

    def of(value):
        if isinstance(value, tuple | list):
            return type(value)(of(part) for part in value)
        if not isinstance(value, Tensor):
            return value
        mine = value.ndim > 1 and len(value) == whole  # masks and positions may be shared by all: [1, ...]
        return wide(value[rows.to(value.device)] if mine else value)

    return of(x), of(target), (of(args), {key: of(value) for key, value in kwargs.items()})
