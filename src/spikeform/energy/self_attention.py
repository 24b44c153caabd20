"""Counting spiking self-attention: what its two forms add, from the literal spikes of T steps.

Additions of one step, of one sequence and head, L queries, keys ``j <= i``, head size E; a product of two spikes is an
AND, so an addition takes place where both are there, and where a score is not zero:

    quadratic   scores    sum_ij sum_e |Q_ie| |K_je|            the score counts coinciding spikes
                context   sum_ij [A_ij != 0] sum_e |V_je|       the score is added at every spike of the value
    recurrent   state     sum_i (sum_e |K_ie|) (sum_e |V_ie|)   a key's spike adds the value's spikes to a row of S
                reads     E sum_i sum_e |Q_ie|                  a query's spike adds a row of S to its context

State is that of key/value heads, all else of query heads. Both forms are counted of a whole input; with a cache there
is the recurrence alone. Heads with a window have one form, the quadratic one over the keys in it: it counts in both,
among the reads of the second, and what they read of a cache is a byte a spike. The LIF neurons take in a current a step
and are counted where they fire: one addition an element and step (none with tau = 1, which keeps nothing), a
multiplication where what the leak leaves, ``1 - 1/tau``, is no power of two, one addition a spike for the reset.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import frexp

import torch
from torch import Tensor, nn

from spikeform.energy.codings import bits_for
from spikeform.energy.tallies import FiringTally, Population, ProductTally, total
from spikeform.errors import SpikeformError
from spikeform.layers.self_attention import SpikingSelfAttention
from spikeform.neurons.lif import LIF
from spikeform.spikes import SpikeTrain
from spikeform.spikes.trace import Firing, Product

KINDS = ("attention", "recurrence")
NEURONS = ("query", "key", "value", "output")
_ROWS = 512  # queries whose scores are held at once


@dataclass
class AttentionTally:
    """One layer's sums over all its calls.

    Attributes:
        site: The attention module's name.
        steps: T.
        size: E.
        score_bits: Width of a score of one step.
        pairs: Pairs of a query and a key that it sees, times query heads.
        squares: The same without the causal mask, ``L^2``, of whole inputs.
        scores: Additions of the quadratic form's first product.
        context: Of its second.
        state: Additions of the recurrence to S.
        reads: Of rows of S to contexts, and all additions of heads with a window.
        row_factors: Multiplications by one over the number of keys seen.
        quadratic_macs: Of the dense products of whole inputs.
        cached: Keys and values that the dense network reads from its cache.
        touched: Numbers of S that spikes read or write where there is a cache; of windows, of four spikes each.
    """

    site: str
    steps: int
    size: int
    score_bits: int
    pairs: int = 0
    squares: int = 0
    scores: int = 0
    context: int = 0
    state: int = 0
    reads: int = 0
    row_factors: int = 0
    quadratic_macs: int = 0
    cached: int = 0
    touched: int = 0


class SelfAttentions:
    """The layers of spiking self-attention in a model, and what they do while it runs.

    Attributes:
        tallies: By site.
    """

    def __init__(self) -> None:
        self.tallies: dict[str, AttentionTally] = {}
        self._layers: dict[str, SpikingSelfAttention] = {}
        self._neurons: dict[str, LIF] = {}

    def know(self, model: nn.Module) -> None:
        """Note the layers of a model that is about to run."""
        self._layers = {m.site: m for m in model.modules() if isinstance(m, SpikingSelfAttention)}
        self._neurons = {m.site: m for m in model.modules() if isinstance(m, LIF)}

    def steps(self, site: str) -> int:
        """T of the LIF neurons that fire there, whose trains have a row for each step; 0 of all others."""
        neuron = self._neurons.get(site)
        return 0 if neuron is None else neuron.steps

    def relays(self, site: str) -> bool:
        """Whether what fires there only sums the T steps of attention's output for the projection behind it.

        Its spikes were counted when the LIF neurons sent them.
        """
        return site not in self._neurons and site.rpartition(".")[0] in self._layers

    def firing(self, tally: FiringTally, event: Firing, spikes: int) -> None:
        """What the LIF neurons do beside comparisons.

        Spikes of both signs are summed before they reach the projection, an addition each: there they are a count.
        """
        neuron, slots = self._neurons[event.site], event.train.codes.numel()
        if neuron.tau != 1:
            tally.additions += slots + spikes
            tally.multiplications += 0 if neuron.tau == 0 or frexp(1 - 1 / neuron.tau)[0] == 0.5 else slots
        if neuron.signed and event.site.rpartition(".")[2] == "output":
            tally.additions += spikes

    def product(self, tally: ProductTally, event: Product) -> None:
        """Both products of one call, in the form that it reports.

        Raises:
            SpikeformError: The layer is not of the model that is watched.
        """
        layer = self._layers.get(event.site)
        if layer is None:
            raise SpikeformError(f"{event.site}: spiking self-attention is counted inside Counter.watch(model)")
        queries, keys, _ = event.operands
        steps, batch, heads, length, size = queries.shape
        levels = 2 * size + 1 if layer.query.signed or layer.key.signed else size + 1
        own = self.tallies.setdefault(event.site, AttentionTally(event.site, steps, size, bits_for(levels)))
        tally.operands = tally.operands or [Population() for _ in event.operands]
        for train, population in zip(event.operands, tally.operands, strict=True):
            population.add(_last(train, length), rows=steps)
        pairs = event.macs // (2 * size)
        tally.macs += event.macs
        own.pairs += pairs
        own.row_factors += queries.codes.numel() if layer.normalise else 0
        near, far = (_heads(event.operands, layer, within) for within in (True, False))
        sums = quadratic(*near, layer.windows) if near else (0, 0)
        state, reads = recurrent(far[0], *(_last(train, length) for train in far[1:])) if far else (0, 0)
        own.state, own.reads = own.state + state, own.reads + reads + sum(sums)
        if event.kind == "recurrence":
            tally.accumulations += state + reads + sum(sums)
            before = (pairs // heads - batch * length * (length + 1) // 2) // length  # keys, of calls without padding
            own.cached += 2 * before * keys.shape[2] * size
            read = sum(min(before // batch, window - 1) for window in layer.windows[: layer.local])
            own.touched += 2 * state + reads + length * steps * batch * read * 2 * size // 4
            return
        whole = quadratic(*far) if far else (0, 0)
        scores, context = sums[0] + whole[0], sums[1] + whole[1]
        tally.accumulations += scores + context
        own.scores, own.context = own.scores + scores, own.context + context
        own.squares += batch * heads * length * length
        own.quadratic_macs += event.macs


def _last(train: SpikeTrain, length: int) -> SpikeTrain:
    """Of the last positions; before them there may be spikes that a cache kept."""
    return SpikeTrain(train.codes[..., -length:, :], train.quantum, train.coding)


def _heads(
    operands: tuple[SpikeTrain, ...], layer: SpikingSelfAttention, within: bool
) -> tuple[SpikeTrain, SpikeTrain, SpikeTrain] | None:
    """Queries, keys and values of the heads that have a window, or of those that have none; None: there are none."""
    if layer.local == (0 if within else layer.groups):
        return None

    def some(train: SpikeTrain) -> SpikeTrain:
        codes = train.codes.unflatten(2, (layer.groups, -1))
        codes = codes[:, :, : layer.local] if within else codes[:, :, layer.local :]
        return SpikeTrain(codes.flatten(2, 3), train.quantum, train.coding)

    queries, keys, values = operands
    return some(queries), some(keys), some(values)


def recurrent(queries: SpikeTrain, keys: SpikeTrain, values: SpikeTrain) -> tuple[int, int]:
    """Additions to S and of its rows; trains ``[T, B, heads, L, E]``."""
    k, v = (total_by_token(train) for train in (keys, values))
    return total(k * v), total(queries.codes != 0) * queries.shape[-1]


def total_by_token(train: SpikeTrain) -> Tensor:
    """Spikes of each step, head and token, int64 ``[T, B, heads, L]``."""
    return (train.codes != 0).sum(-1, dtype=torch.int64)


def quadratic(
    queries: SpikeTrain, keys: SpikeTrain, values: SpikeTrain, windows: Sequence[int] = ()
) -> tuple[int, int]:
    """Additions of scores and context; trains ``[T, B, heads, L, E]``, of keys and values perhaps longer before.

    Args:
        queries: Of the last positions.
        keys: Of all positions.
        values: Of the same.
        windows: How many keys the first key/value heads see; none: all.
    """
    length, before = queries.shape[-2], keys.shape[-2] - queries.shape[-2]
    groups, repeat = keys.shape[2], queries.shape[2] // keys.shape[2]
    sizes = torch.tensor(windows[:groups] or [keys.shape[-2]] * groups, device=queries.codes.device)
    sizes = sizes.repeat_interleave(repeat)[:, None, None]
    scores = context = 0
    for q, k, v in zip(queries.codes, keys.codes, total_by_token(values), strict=True):
        q, k, v = q.float(), k.float().repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)
        for start in range(0, length, _ROWS):
            some, seen = q[..., start : start + _ROWS, :], slice(0, before + start + _ROWS)
            earlier = k[..., seen, :].transpose(-1, -2)
            at = torch.arange(before + start, before + start + some.shape[-2], device=q.device)[:, None]
            apart = at - torch.arange(earlier.shape[-1], device=q.device)
            visible = (apart >= 0) & (apart < sizes)
            scores += total((some.abs() @ earlier.abs() * visible).to(torch.int64))
            met = (some @ earlier != 0) & visible
            context += total(met * v[..., None, seen])
    return scores, context
