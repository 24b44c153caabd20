"""Spiking self-attention (SSA): queries, keys and values are spikes, and there is no softmax.

    Q, K, V = LIF(g_q q), LIF(g_k k), LIF(g_v v)                      T steps each, spikes per token
    C_t[i] = sum_{j <= i} (Q_t[i] . K_t[j]) V_t[j]                    integers
    O = LIF_{1/2}(s_h C_t[i] / n_i),   n_i = keys that i sees (or 1)
    out = mean over t of O

Without softmax the sum over j is linear, so it has a second form, equal bit for bit since all of it are integers:

    S_t[i] = S_t[i-1] + K_t[i]^T V_t[i];   C_t[i] = Q_t[i] S_t[i]

Chunks of positions use the first form inside, the second from chunk to chunk, so long inputs take linear time, and a
cache holds S alone: its size does not grow. On a CPU one operator does it all where no gradient is wanted and nobody
looks on (:data:`spikeform.layers.fused.ssa_attention`), by the second form and by events: a key's spike adds the row of
values to one row of S, a query's spike reads one. Source: arXiv 2510.00133 for the scheme, arXiv 2209.15425 for the
form; the row factor, the signed spikes and the gains of each head are ours.

B batch, H query heads, G key/value heads, R = H / G, L positions, E head size, T steps.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, causal_mask_function

from spikeform.errors import SpikeformError
from spikeform.layers.attention import eager_of
from spikeform.layers.cache import CacheView
from spikeform.layers.fused import ssa_attention
from spikeform.layers.state_cache import StateLayer
from spikeform.neurons import SignedInteger
from spikeform.neurons.lif import LIF
from spikeform.spikes import SpikeTrain
from spikeform.spikes.trace import Product, observer
from spikeform.synapses.dispatch import fusible

NAME = "spikeform_ssa"
CHUNK = 256  # positions that meet one another directly
CPU_CHUNK = 64  # on a CPU; measured: half the time of 256, for heads of 64 as for heads of 128


def causal_counts(q: Tensor, k: Tensor, v: Tensor, state: Tensor | None, chunk: int = CHUNK) -> tuple[Tensor, Tensor]:
    """``C`` and the last ``S``: integers, exact in fp32 while they are below 2^24.

    Args:
        q: Spikes ``[..., G, R, L, E]``, floating.
        k: ``[..., G, L, E]``.
        v: ``[..., G, L, E]``.
        state: ``S`` before the first position ``[..., G, E, E]``, or None: zero.
        chunk: Positions that meet one another directly; 1 is the recurrence, L the quadratic form.

    Returns:
        ``[..., G, R, L, E]`` and ``[..., G, E, E]``.
    """
    parts, length = [], q.shape[-2]
    for start in range(0, length, chunk):
        some = slice(start, start + chunk)
        q_, k_, v_ = q[..., some, :], k[..., some, :], v[..., some, :]
        scores = q_ @ k_.unsqueeze(-3).transpose(-1, -2)
        out = scores.tril() @ v_.unsqueeze(-3)
        parts.append(out if state is None else out + q_ @ state.unsqueeze(-3))
        step = k_.transpose(-1, -2) @ v_
        state = step if state is None else state + step
    if state is None:
        raise SpikeformError("attention over no positions")
    return torch.cat(parts, -2), state


class SpikingSelfAttention(nn.Module):
    """The neurons of one attention layer, and its forward.

    Args:
        heads: H.
        groups: G.
        steps: T.
        normalise: Divide by the number of keys that a query sees.
        neuron: Options of the LIF neurons: ``tau``, ``reset``, ``signed``, ``surrogate``.
        site: Qualified name of the attention module.

    Attributes:
        chunk: Positions that meet one another directly, where no fused operator is wanted; None: what suits the device.
        paused: Let the module attend as the dense model does: for calibration, or while others learn.
    """

    _receiver: SignedInteger | None

    def __init__(
        self, heads: int, groups: int, steps: int, *, normalise: bool = True, site: str = "", **neuron: Any
    ) -> None:
        super().__init__()
        self.heads, self.groups, self.steps, self.normalise, self.site = heads, groups, steps, normalise, site
        self.chunk: int | None = None
        self._paused = False
        self.__dict__["_receiver"] = None  # the neuron belongs to the layer that it encodes for
        self.query = LIF(heads, steps, site=f"{site}.query", **neuron)
        self.key = LIF(groups, steps, site=f"{site}.key", **neuron)
        self.value = LIF(groups, steps, site=f"{site}.value", **neuron)
        self.output = LIF(heads, steps, threshold=0.5, site=f"{site}.output", **neuron)

    def sends_to(self, neuron: SignedInteger) -> None:
        """Name the neuron that passes the output on: it is paused together with this layer."""
        self.__dict__["_receiver"] = neuron

    @property
    def paused(self) -> bool:
        """See the class."""
        return self._paused

    @paused.setter
    def paused(self, paused: bool) -> None:
        self._paused = paused
        if self._receiver is not None:
            self._receiver.paused = paused

    def forward(self, q_BHLE: Tensor, k_BGLE: Tensor, v_BGLE: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
        """Attention output ``[B, L, H, E]``, multiples of 1/T.

        Args:
            q_BHLE: Real queries.
            k_BGLE: Real keys of the same positions.
            v_BGLE: Real values.
            mask: ``[B or 1, 1, L or 1, L]``, bool (true where seen) or additive; what it hides from the last query is
                padding. None: nothing is.
            scaling: Of the dense scores; the gains stand for it.
        """
        state = getattr(k_BGLE, "spikeform_state", None)
        if k_BGLE.shape[-2] != q_BHLE.shape[-2]:
            raise SpikeformError(f"{self.site}: {k_BGLE.shape[-2]} keys came for {q_BHLE.shape[-2]} queries")
        seen_BL = _seen(mask, len(q_BHLE), q_BHLE.shape[-2])
        run = self._fused if self._fusible(q_BHLE, k_BGLE, v_BGLE, state) else self.attend
        return run(q_BHLE, k_BGLE, v_BGLE, seen_BL, state)

    def neurons(self) -> tuple[LIF, LIF, LIF, LIF]:
        """Those of queries, keys, values and the output."""
        return self.query, self.key, self.value, self.output

    def _fusible(self, q: Tensor, k: Tensor, v: Tensor, state: StateLayer | None) -> bool:
        """Whether one operator may do it all: the same bits, and no train in between."""
        if self.chunk is not None or not q.is_cpu or not q.dtype == k.dtype == v.dtype:
            return False
        neurons = self.neurons()
        if any(neuron._forward_hooks or neuron._forward_pre_hooks for neuron in neurons):
            return False
        one, key, value, output = neurons
        rule = one.tau, one.reset, one.signed
        if any((n.tau, n.reset, n.signed) != rule for n in (key, value, output)):
            return False
        if not one.threshold == key.threshold == value.threshold:
            return False
        return fusible(q, k, v, *(n.gain for n in neurons), None if state is None else state.keys)

    def _fused(self, q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None, state: StateLayer | None) -> Tensor:
        number, held = None, None
        if state is not None:
            number, shape = state.number, (self.steps, len(q), self.groups, q.shape[-1], q.shape[-1])
            held = q.new_zeros(shape, dtype=torch.float32) if state.keys is None else state.keys
            if held.shape != shape:
                raise SpikeformError(
                    f"{self.site}: the cache holds a state {tuple(held.shape)}, this input has {shape}"
                )
        neurons = self.neurons()
        one = neurons[0]
        out = ssa_attention(
            *(q, k, v, seen, held, number),
            *(neuron.gain for neuron in neurons),
            *(self.steps, one.tau, one.threshold, neurons[-1].threshold),
            *(one.reset == "hard", one.signed, self.normalise),
        )
        if state is not None and held is not None:
            state.keep(held, q.shape[-2], seen)
        return out

    def attend(self, q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None, state: StateLayer | None) -> Tensor:
        """Neurons and products one after the other; arguments as :meth:`forward`'s, ``seen`` ``[B, L]`` or None."""
        with torch.autocast(q.device.type, enabled=False):  # integers do not survive bf16
            out_BHLE = self._attend(q, k, v, seen, state)
        return out_BHLE.transpose(1, 2).contiguous().to(q.dtype)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, seen_BL: Tensor | None, state: StateLayer | None) -> Tensor:
        batch, length, size = len(q), q.shape[-2], q.shape[-1]
        queries, keys, values = self.query(q), self.key(k), self.value(v)
        if seen_BL is not None:
            hidden = ~seen_BL[None, :, None, :, None]
            keys, values = (_silenced(train, hidden) for train in (keys, values))
        dtype = queries.quantum.dtype
        q_, k_, v_ = (train.codes.to(dtype) for train in (queries, keys, values))
        q_ = q_.view(self.steps, batch, self.groups, self.heads // self.groups, length, size)
        before = None if state is None else state.keys
        chunk = self.chunk or (CPU_CHUNK if q.is_cpu else CHUNK)
        counts, after = causal_counts(q_, k_, v_, before, chunk)
        self._tell(queries, keys, values, seen_BL, state)
        counts = counts.view(self.steps, batch, self.heads, length, size)
        if self.normalise:
            number = _number(seen_BL, batch, length, None if state is None else state.number, counts)
            counts = counts / number[:, None, :, None]
        if state is not None:
            state.keep(after, length, seen_BL)
        return self.output(counts, varying=True).codes.to(dtype).mean(0)

    def _tell(
        self,
        queries: SpikeTrain,
        keys: SpikeTrain,
        values: SpikeTrain,
        seen_BL: Tensor | None,
        state: StateLayer | None,
    ) -> None:
        """Report both products as one: from an empty context as they are defined, with a cache as the recurrence."""
        listener = observer()
        if listener is None:
            return
        _, batch, heads, length, size = queries.codes.shape
        seen = torch.ones(batch, length, dtype=torch.bool) if seen_BL is None else seen_BL
        pairs = int(seen.long().cumsum(-1).sum())
        if state is not None and state.number is not None:
            pairs += length * int(state.number.sum())
        kind, fan = ("attention", length) if state is None or state.keys is None else ("recurrence", size)
        listener(Product(self.site, kind, (queries, keys, values), (fan,) * 3, 2 * pairs * heads * size))

    def view(self, cache: Any) -> CacheView:
        """The cache as this layer sees it: it is handed what is new, and keeps S."""
        return StateView(cache, self.site)

    def extra_repr(self) -> str:
        """Heads, steps and the row factor."""
        row = ", divided by the keys seen" if self.normalise else ""
        return f"heads={self.heads}, groups={self.groups}, T={self.steps}{row}"


class StateView(CacheView):
    """Puts a :class:`StateLayer` in the place of a cache's layer of keys and values."""

    def __init__(self, cache: Any, site: str) -> None:
        super().__init__(cache)
        self._site = site

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any):
        """Nothing is appended: keys and values come back as they are, the layer's state beside them.

        Raises:
            SpikeformError: The cache was filled by a dense model.
        """
        layers = self._cache.layers
        while len(layers) <= layer_idx:
            layers.append(StateLayer())
        if not isinstance(layers[layer_idx], StateLayer):
            if self.held_keys(layer_idx) is not None and layers[layer_idx].get_seq_length() > 0:
                raise SpikeformError(f"{self._site}: the cache holds keys of a dense model; begin with a new one")
            layers[layer_idx] = StateLayer()
        marked: Any = key_states
        marked.spikeform_state = layers[layer_idx]
        return key_states, value_states


def padding_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Any = causal_mask_function,
    attention_mask: Tensor | None = None,
    **_: Any,
) -> Tensor | None:
    """The mask of spiking self-attention: which keys are no padding, bool ``[B, 1, 1, S]``, or None: all.

    That no query sees a later key is in the attention itself, so nothing of size L x L is made.

    Raises:
        SpikeformError: Another pattern is asked for (packed sequences, a sliding window).
    """
    if mask_function is not causal_mask_function:
        raise SpikeformError(
            "spiking self-attention sees all earlier tokens: it knows neither packed sequences nor a sliding window"
        )
    if attention_mask is None:
        return None
    seen = attention_mask[:, kv_offset : kv_offset + kv_length].bool()
    return seen[:, None, None]


def attention_forward(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """The attention interface of transformers, for a layer of ours; a paused one attends as its family does."""
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    if not module.spiking.paused:
        return module.spiking(query, key, value, attention_mask, scaling), None
    length = query.shape[-2]
    hidden = torch.ones(length, key.shape[-2], dtype=torch.bool, device=query.device).triu(1 + key.shape[-2] - length)
    seen = _seen(attention_mask, len(query), key.shape[-2])
    hidden = hidden[None, None] if seen is None else hidden[None, None] | ~seen[:, None, None]
    mask = torch.zeros(hidden.shape, dtype=query.dtype, device=query.device)
    mask = mask.masked_fill(hidden, torch.finfo(query.dtype).min)
    return eager_of(type(module))(module, query, key, value, mask, scaling=scaling, dropout=dropout, **kwargs)


def _seen(mask: Tensor | None, batch: int, length: int) -> Tensor | None:
    """Which keys are no padding ``[B, L]``: what the last query sees. At first a static cache has room for more."""
    if mask is None:
        return None
    last = mask[:, 0, -1, :length]
    seen = last if last.dtype == torch.bool else last > torch.finfo(last.dtype).min / 2
    return seen.expand(batch, -1)


def _silenced(train: SpikeTrain, hidden: Tensor) -> SpikeTrain:
    return SpikeTrain(train.codes.masked_fill(hidden, 0), train.quantum, train.coding)


def _number(seen: Tensor | None, batch: int, length: int, before: Tensor | None, like: Tensor) -> Tensor:
    """Keys that each query sees, itself included, at least 1: ``[B, L]``."""
    if seen is None:
        number = torch.arange(1, length + 1, dtype=like.dtype, device=like.device).expand(batch, -1)
    else:
        number = seen.to(like.dtype).cumsum(-1)
    number = number if before is None else number + before[:, None].to(like.dtype)
    return number.clamp(min=1)


AttentionInterface.register(NAME, attention_forward)
AttentionMaskInterface.register(NAME, padding_mask)
