"""Attention on spike trains, behind transformers' attention interface.

The module of the model family keeps its forward (projections, RoPE, cache). What spikeform adds is a child
module ``spiking`` with the neurons, an attention function registered under the name ``spikeform``, and a
cache view that stores codes: keys and values are encoded once, when they are appended.

    S = N_q(q) . N_k(k)^T * scale;  e = HG_exp(S - max S);  p = N_p(e * HG_1/x(sum e));  out = p . N_v(v)

N_* are whatever neurons a method puts there. With ``signs``, q and k are rotated by one orthogonal matrix first
(after RoPE), which leaves S as it is. A key neuron that has a range per channel sends codes of ``k / c``: queries are
multiplied by its ``c``. A value neuron that has a unit per token sends codes of ``v / u``: probabilities are
multiplied by that ``u`` before they are encoded, so that the last product is one of integers.

B batch, H query heads, G key/value heads, R = H / G, L queries, S keys, E head size.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, eager_mask

from spikeform.layers.cache import CacheView, through
from spikeform.layers.fused import gif_attention, oat_attention
from spikeform.layers.rotation import rotate_heads
from spikeform.neurons import GIF, MT, Dynamic, FixedPointHG, Neuron
from spikeform.neurons.fused import gif_pack, oat_pack
from spikeform.neurons.gif import GifForm
from spikeform.neurons.neuron import entry, recorder
from spikeform.neurons.oat import OatForm
from spikeform.spikes import SpikeTrain
from spikeform.spikes.trace import observer
from spikeform.synapses import fusible, hadamard, matmul

NAME = "spikeform"


class SpikingAttention(nn.Module):
    """The neurons of one attention layer, and its forward on real or cached (coded) keys and values.

    Args:
        query: Encodes the queries of one key/value head, ``[B, G, R L, E]``.
        key: Encodes the keys, ``[B, G, S, E]``.
        value: Encodes the values, ``[B, G, S, E]``.
        probability: Encodes the attention probabilities, ``[B, G, R L, S]``.
        exp: HG of exp, or None for a real softmax.
        reciprocal: HG of 1/x, or None for a real softmax.
        site: Qualified name of the attention module.

    Attributes:
        signs: int8 ``[E]``, each 1 or -1: queries and keys are rotated by the matrix of these; None: they are not.
    """

    signs: Tensor | None

    def __init__(
        self,
        query: Neuron,
        key: MT | GIF,
        value: MT | GIF,
        probability: Neuron,
        exp: Neuron | None,
        reciprocal: Neuron | None,
        site: str = "",
    ) -> None:
        super().__init__()
        self.query, self.key, self.value, self.probability = query, key, value, probability
        self.exp, self.reciprocal, self.site = exp, reciprocal, site
        self.register_buffer("signs", None)
        self._known: tuple | None = None

    def encode(self, keys: Tensor, values: Tensor) -> tuple[SpikeTrain, SpikeTrain]:
        """The trains of real keys and values, each ``[B, G, S, E]``."""
        return self.key(self._rotated(keys)), self.value(values)

    def forward(self, q_BHLE: Tensor, k_BGSE: Tensor, v_BGSE: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
        """Attention output ``[B, L, H, E]``.

        Args:
            q_BHLE: Real queries.
            k_BGSE: Real keys, or packed codes (an integer dtype) from the cache.
            v_BGSE: Real values, or packed codes.
            mask: Additive ``[B or 1, 1 or H, L, S]``, the dtype's minimum or -inf where hidden; None: all seen.
            scaling: Factor of the scores.
        """
        fused = self._fused(q_BHLE, k_BGSE, v_BGSE, mask, scaling)
        if fused is not None:
            return fused
        batch, heads, length, size = q_BHLE.shape
        groups, keys = k_BGSE.shape[1], k_BGSE.shape[2]
        # Query heads of one key/value head stand together as rows, so keys and values are never copied.
        q = self._query(q_BHLE.reshape(batch, groups, -1, size))
        if k_BGSE.is_floating_point():
            k, v = self.encode(k_BGSE, v_BGSE)
        else:
            k, v = self.key.unpack(k_BGSE, q.quantum.dtype), self.value.unpack(v_BGSE, q.quantum.dtype)
        visible = alive = None
        if mask is not None:
            mask = mask[..., :keys]
            by_head = (1, 1) if mask.shape[1] == 1 else (groups, heads // groups)
            mask = mask.unflatten(1, by_head)
            alive = (mask > torch.finfo(mask.dtype).min / 2).any(-1, keepdim=True)
            if observer() is not None:
                seen = (mask > torch.finfo(mask.dtype).min / 2).expand(batch, groups, heads // groups, length, keys)
                visible = seen.reshape(batch, groups, -1, keys)
        scores = matmul(q, k, transpose_b=True, mask=visible, site=f"{self.site}.scores") * scaling
        scores = scores.view(batch, groups, heads // groups, length, keys)
        if mask is not None and alive is not None:
            scores = scores + mask
            alive = alive.expand(batch, groups, heads // groups, length, 1).reshape(batch, groups, -1, 1)
        weights = self._softmax(scores.view(batch, groups, -1, keys), alive)
        v, unit = _whole(v)
        if unit is not None:
            weights = weights * unit.transpose(-1, -2)
        context = matmul(self.probability(weights), v, connected=visible, site=f"{self.site}.context")
        scale = _channel_scale(self.value)
        context = context if scale is None else context * scale
        return context.reshape(batch, heads, length, size).transpose(1, 2).contiguous().to(q_BHLE.dtype)

    def pack(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Real keys and values ``[B, G, S, E]`` as a cache holds them: packed codes."""
        own = self._modules
        return _pack(entry(self, own, "key"), self._rotated(keys)), _pack(entry(self, own, "value"), values)

    def _fused(
        self, q_BHLE: Tensor, k_BGSE: Tensor, v_BGSE: Tensor, mask: Tensor | None, scaling: float
    ) -> Tensor | None:
        """All of it as one operator, or None where there is none."""
        if not fusible(q_BHLE, k_BGSE, v_BGSE):
            return None
        own, known = self._modules, self._known
        forms = tuple([entry(self, own, name).closed_form() for name in ("query", "key", "value", "probability")])
        if known is None or not all(map(_same, known[0], forms)):  # found once, until a form changes
            known = self._known = forms, _oat_parameters(self, *forms), _gif_parameters(self, *forms)
        _, oat, gif = known
        if oat is None and gif is None:
            return None
        if k_BGSE.is_floating_point():
            k_BGSE, v_BGSE = self.pack(k_BGSE, v_BGSE)
        if oat is not None:
            return oat_attention(q_BHLE, k_BGSE, v_BGSE, mask, scaling, *oat)
        return gif_attention(q_BHLE, k_BGSE, v_BGSE, mask, scaling, entry(self, self._buffers, "signs"), *gif)

    def view(self, cache: Any) -> CacheView:
        """The cache as this layer sees it: keys and values are encoded when they are appended."""
        return CodeCache(cache, self)

    def _rotated(self, x: Tensor) -> Tensor:
        signs = entry(self, self._buffers, "signs")
        return x if signs is None else rotate_heads(x, signs)

    def _query(self, q_BGLE: Tensor) -> SpikeTrain:
        scale = _channel_scale(self.key)
        q_BGLE = self._rotated(q_BGLE)
        return self.query(q_BGLE if scale is None else q_BGLE * scale)

    def _softmax(self, scores: Tensor, alive: Tensor | None) -> Tensor:
        """HG softmax over the last axis.

        A hidden key's score is so low that its exponential is zero: it sends nothing. A row that sees no key at
        all (``alive`` false: padding) gives zeros.
        """
        lowest = torch.finfo(scores.dtype).min
        shifted = scores - scores.amax(-1, keepdim=True).clamp(min=lowest)  # finite, where all is -inf
        if self.exp is None or self.reciprocal is None:
            weights = torch.softmax(shifted, -1)
            return weights if alive is None else weights.masked_fill(~alive, 0.0)
        e = self.exp(shifted)
        # exp(0) = 1 is the largest term, so a row that sees any key sums to at least 1.
        inverse = self.reciprocal(e.decode().sum(-1, keepdim=True).clamp(min=0.5))
        if alive is not None:
            inverse = inverse.map(lambda x: x * alive.to(x.dtype))
        return hadamard(e, inverse, site=f"{self.site}.softmax")


def _oat_parameters(attention: SpikingAttention, *forms: Any) -> tuple | None:
    """What :func:`oat_attention` takes behind the scaling, or None where it cannot stand for ``attention``."""
    query, probability = forms[0], forms[-1]
    if not all(isinstance(form, OatForm) and form.shift is None and form[3:] == query[3:] for form in forms):
        return None
    bank = (0, True, 0, 0)
    if attention.exp is not None or attention.reciprocal is not None:
        if not (isinstance(attention.exp, FixedPointHG) and isinstance(attention.reciprocal, FixedPointHG)):
            return None
        bank = attention.exp.closed_form()
        if attention.reciprocal.closed_form() != bank:
            return None
    return *(form.threshold for form in forms), query.limit, probability.limit, *query[3:], *bank


def _gif_parameters(attention: SpikingAttention, query: Any, key: Any, value: Any, probability: Any) -> tuple | None:
    """What :func:`gif_attention` takes behind the signs, or None where it cannot stand for ``attention``."""
    trains = all(isinstance(form, GifForm) for form in (query, key, value))
    if not trains or not isinstance(attention.probability, Dynamic) or attention.exp or attention.reciprocal:
        return None
    tables = [x for form in (query, key, value) for x in (form.top, form.multiple, form.steps)]
    return *tables, query.levels, probability


def _same(a: Any, b: Any) -> bool:
    """Whether two closed forms are one; of those that hold tensors each neuron keeps its own."""
    return a is b or (type(a) is int and a == b)


def _pack(neuron: MT | GIF, x: Tensor) -> Tensor:
    """The codes of ``x`` ``[B, G, S, E]`` as a cache holds them; by one operator where there is one."""
    form = neuron.closed_form()
    if form is not None and fusible(x):
        if isinstance(form, GifForm):
            return gif_pack(x, *form)
        if form.shift is None:
            return oat_pack(x, form.threshold, *form[2:])
    return neuron.pack(neuron(x))


def _channel_scale(neuron: Any) -> Tensor | None:
    """``c`` ``[G, 1, E]`` of a neuron that sends codes of ``x / c``; None where codes are of ``x``."""
    if getattr(neuron, "axis", "token") != "channel" or (recorder() is not None and not neuron.calibrated):
        return None
    return neuron.channel_scale


def _whole(values: SpikeTrain) -> tuple[SpikeTrain, Tensor | None]:
    """Values in units of one, and the unit of each token ``[B, G, S, 1]`` that was taken off them, or None."""
    unit = values.common_quantum()
    if unit is None or unit.ndim == 0:
        return values, None
    multiples = getattr(values.coding, "multiples", (1,)) if values.branch is not None else (1,)
    quantum = torch.stack([unit.new_full((), multiple) for multiple in multiples])  # filled there: a copy would wait
    return replace(values, quantum=quantum, known_unit=None), unit


class CodeCache(CacheView):
    """A view of a cache that encodes keys and values as they are appended: what it holds are packed codes."""

    def __init__(self, cache: Any, spiking: SpikingAttention) -> None:
        super().__init__(cache)
        self._spiking = spiking

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any):
        """Append codes; returns the packed codes of all keys and values so far.

        Raises:
            ValueError: The cache was filled by a dense model: its numbers are no codes.
        """
        key, value = self._spiking.pack(key_states, value_states)
        held = self.held_keys(layer_idx)
        if held is not None and held.is_floating_point():
            raise ValueError(
                f"{self._spiking.site}: the cache holds real keys, as a dense model leaves them, and no codes; begin "
                "with a new cache"
            )
        return self._cache.update(key, value, layer_idx, *args, **kwargs)


def install(attention: nn.Module, spiking: nn.Module) -> None:
    """Make ``attention`` (a family's attention module) use ``spiking``, and its cache as ``spiking.view`` shows it."""
    attention.spiking = spiking
    attention.register_forward_pre_hook(_cache_in_view, with_kwargs=True)


def _cache_in_view(module: Any, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    return through(module.spiking.view, args, kwargs)


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """The attention interface of transformers. Dense attention modules of the same model take their family's own.

    Raises:
        ValueError: An option of the family that changes the scores is not known here.
    """
    spiking = getattr(module, "spiking", None)
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    if spiking is None:
        eager = eager_of(type(module))
        return eager(module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs)
    for option in ("softcap", "s_aux", "position_bias"):
        if kwargs.get(option) is not None:
            raise ValueError(f"spiking attention does not know {option!r}; leave {type(module).__name__} dense (skip)")
    return spiking(query, key, value, attention_mask, scaling), None


def eager_of(kind: type) -> Any:
    """The eager attention function of the family that ``kind`` comes from (its own, or a base class's, module)."""
    for base in kind.__mro__:
        eager = getattr(sys.modules.get(base.__module__), "eager_attention_forward", None)
        if eager is not None:
            return eager
    raise ValueError(f"{kind.__name__} stays dense, but its family has no eager attention to run it with")


# Without the mask registration a model would pass no mask at all, and padding would be ignored in silence.
AttentionInterface.register(NAME, attention_forward)
AttentionMaskInterface.register(NAME, eager_mask)
