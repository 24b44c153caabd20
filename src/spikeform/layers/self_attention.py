"""Spiking self-attention (SSA): queries, keys and values are spikes, and there is no softmax.

    Q, K, V = LIF(g_q q), LIF(g_k k), LIF(g_v v)                      T steps each, spikes per token
    C_t[i] = sum_{j <= i} (Q_t[i] . K_t[j]) V_t[j]                    integers
    O = LIF_{1/2}(s_h C_t[i] / n_i),   n_i = keys that i sees (or 1)
    out = mean over t of O

Without softmax the sum over j is linear, so it has a second form, equal bit for bit since all of it are integers:

    S_t[i] = S_t[i-1] + K_t[i]^T V_t[i];   C_t[i] = Q_t[i] S_t[i]

Chunks of positions use the first form inside, the second from chunk to chunk, so long inputs take linear time, and a
cache holds S alone: its size does not grow. Heads may have a window w of tokens instead, the query's own the last of
them: the sum begins at ``j = i - w + 1``, ``n_i`` is at most w, and of such heads a cache holds the spikes of the last
w - 1 tokens.

One operator does it all where no gradient is wanted and nobody looks on
(:data:`spikeform.layers.fused.ssa_attention`). On a CPU it takes the second form, by events: a key's spike adds the row
of values to one row of S, a query's spike reads one; keys in a window are met one by one, bit-packed. Source: arXiv
2510.00133 for the scheme, arXiv 2209.15425 for the form; the row factor, the windows, the signed spikes and the gains
of each head are ours.

B batch, H query heads, G key/value heads, R = H / G, L positions, E head size, T steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, causal_mask_function

from spikeform.errors import SpikeformError
from spikeform.layers.attention import eager_of
from spikeform.layers.cache import CacheView
from spikeform.layers.fused import ssa_attention
from spikeform.layers.spike_counts import CHUNK, CPU_CHUNK, causal_counts, spread, window_counts
from spikeform.layers.state_cache import StateLayer
from spikeform.neurons import SignedInteger
from spikeform.neurons.lif import LIF
from spikeform.spikes import SpikeTrain
from spikeform.spikes.trace import Product, observer
from spikeform.synapses.dispatch import fusible

NAME = "spikeform_ssa"
DEVICES = {"cpu", "cuda"}  # devices that run the operator


class SpikingSelfAttention(nn.Module):
    """The neurons of one attention layer, and its forward.

    Args:
        heads: H.
        groups: G.
        steps: T.
        normalise: Divide by the number of keys that a query sees.
        windows: Tokens that heads see, in equal parts of them, 0 (all) last; none: all heads see all.
        neuron: Options of the LIF neurons: ``tau``, ``reset``, ``signed``, ``surrogate``.
        site: Qualified name of the attention module.

    Attributes:
        windows: That of each key/value head.
        local: How many of these, the first ones, see no more than a window.
        chunk: Positions that meet one another directly, where no fused operator is wanted; None: what suits the device.
        paused: Let the module attend as the dense model does: for calibration, or while others learn.
    """

    _receiver: SignedInteger | None

    def __init__(
        self,
        heads: int,
        groups: int,
        steps: int,
        *,
        normalise: bool = True,
        windows: Sequence[int] = (),
        site: str = "",
        **neuron: Any,
    ) -> None:
        super().__init__()
        self.heads, self.groups, self.steps, self.normalise, self.site = heads, groups, steps, normalise, site
        self.windows = spread(windows, groups)
        self.local = sum(window > 0 for window in self.windows)
        if any(self.windows[self.local :]):
            raise SpikeformError(f"windows end with the heads that see all tokens (0), got {tuple(windows)}")
        self._sizes: dict[torch.device, Tensor] = {}
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
        out_BLHE = run(q_BHLE, k_BGLE, v_BGLE, seen_BL, state)
        if state is not None:
            state.advance(q_BHLE.shape[-2], seen_BL)
        return out_BLHE

    def neurons(self) -> tuple[LIF, LIF, LIF, LIF]:
        """Those of queries, keys, values and the output."""
        return self.query, self.key, self.value, self.output

    def _fusible(self, q: Tensor, k: Tensor, v: Tensor, state: StateLayer | None) -> bool:
        """Whether one operator may do it all: the same bits, and no train in between."""
        if self.chunk is not None or q.device.type not in DEVICES or not q.dtype == k.dtype == v.dtype:
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
        held = (None, None) if state is None else (state.keys, state.recent)
        return fusible(q, k, v, *(n.gain for n in neurons), *held)

    def _fused(self, q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None, state: StateLayer | None) -> Tensor:
        number, held, recent = None, None, None
        if state is not None:
            batch, size = len(q), q.shape[-1]
            try:
                shape = self.steps, batch, self.groups - self.local, size, size
                held = state.room("keys", shape, torch.float32, q.device)
                if self.local:
                    shape = 2, self.steps, batch, self.local, max(self.windows) - 1, size
                    recent = state.room("recent", shape, torch.int8, q.device)
            except SpikeformError as error:
                raise SpikeformError(f"{self.site}: {error}") from None
            number = state.number
        neurons = self.neurons()
        one = neurons[0]
        return ssa_attention(
            *(q, k, v, seen, held, recent, number),
            *(neuron.gain for neuron in neurons),
            *(self.steps, one.tau, one.threshold, neurons[-1].threshold),
            *(one.reset == "hard", one.signed, self.normalise, self.windows),
        )

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
        chunk, local = self.chunk or (CPU_CHUNK if q.is_cpu else CHUNK), self.local
        parts, kept = [], {}
        if local:
            q, k, v = (x[:, :, :local] for x in (q_, k_, v_))
            before = None if state is None else state.recent
            sizes, width = self._windows_on(q.device)[:local], max(self.windows) - 1
            part, kept["recent"] = window_counts(q, k, v, before, sizes, width, chunk)
            parts.append(part)
        if local < self.groups:
            q, k, v = (x[:, :, local:] for x in (q_, k_, v_))
            part, kept["state"] = causal_counts(q, k, v, None if state is None else state.keys, chunk)
            parts.append(part)
        self._tell(queries, keys, values, seen_BL, state)
        counts = parts[0] if len(parts) == 1 else torch.cat(parts, 2)
        counts = counts.view(self.steps, batch, self.heads, length, size)
        if self.normalise:
            number = _number(seen_BL, batch, length, None if state is None else state.number, counts)[:, None]
            if local:
                sizes = self._windows_on(q.device).repeat_interleave(self.heads // self.groups)
                number = number.minimum(sizes[:, None])
            counts = counts / number[..., None]
        if state is not None:
            state.keep(kept.get("state"), kept.get("recent"))
        return self.output(counts, varying=True).codes.to(dtype).mean(0)

    def _windows_on(self, device: torch.device) -> Tensor:
        """Windows of the key/value heads, fp32 ``[G]``, infinite where there is none; copied to a device once."""
        if device not in self._sizes:
            self._sizes[device] = torch.tensor([float(w or "inf") for w in self.windows], device=device)
        return self._sizes[device]

    def _tell(
        self,
        queries: SpikeTrain,
        keys: SpikeTrain,
        values: SpikeTrain,
        seen_BL: Tensor | None,
        state: StateLayer | None,
    ) -> None:
        """Report both products as one: from an empty context as they are defined, with a cache as the recurrence.

        Where heads have windows, the spikes that the cache keeps of them stand before the new ones.
        """
        listener = observer()
        if listener is None:
            return
        _, batch, heads, length, size = queries.codes.shape
        seen = torch.ones(batch, length, dtype=torch.bool) if seen_BL is None else seen_BL
        pairs = int(seen.long().cumsum(-1).sum())
        if state is not None and state.number is not None:
            pairs += length * int(state.number[:-1].sum())
        kind, fan = ("attention", length) if state is None or state.number is None else ("recurrence", size)
        if state is not None and state.recent is not None:
            keys, values = (_after(old, train) for old, train in zip(state.recent, (keys, values), strict=True))
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
        if torch.compiler.is_compiling():
            raise SpikeformError(
                "spiking self-attention in a compiled model needs an attention_mask: without one transformers prepares "
                "for packed sequences, which it does not know"
            )
        raise SpikeformError(
            "spiking self-attention sees all earlier tokens: it knows neither packed sequences nor a sliding window"
        )
    if attention_mask is None:
        return None
    if isinstance(kv_offset, Tensor):  # of a StateLayer: a device is not asked where it is
        seen = attention_mask.index_select(1, kv_offset + torch.arange(kv_length, device=attention_mask.device))
    else:
        seen = attention_mask[:, kv_offset : kv_offset + kv_length]
    return seen.bool()[:, None, None]


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


def _after(old: Tensor, train: SpikeTrain) -> SpikeTrain:
    """A train ``[T, B, G, L, E]`` behind the spikes of some of its heads."""
    codes = F.pad(old.to(train.codes.dtype), (0, 0, 0, 0, 0, train.shape[-3] - old.shape[-3]))
    return SpikeTrain(torch.cat([codes, train.codes], -2), train.quantum, train.coding)


def _silenced(train: SpikeTrain, hidden: Tensor) -> SpikeTrain:
    return SpikeTrain(train.codes.masked_fill(hidden, 0), train.quantum, train.coding)


def _number(seen: Tensor | None, batch: int, length: int, before: Tensor | None, like: Tensor) -> Tensor:
    """Keys that each query sees, itself included, at least 1: ``[B, L]``."""
    if seen is None:
        number = torch.arange(1, length + 1, dtype=like.dtype, device=like.device).expand(batch, -1)
    else:
        number = seen.to(like.dtype).cumsum(-1)
    number = number if before is None else number + before[:batch, None].to(like.dtype)
    return number.clamp(min=1)


AttentionInterface.register(NAME, attention_forward)
AttentionMaskInterface.register(NAME, padding_mask)
