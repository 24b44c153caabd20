"""Attention on spike trains, behind transformers' attention interface.

The module of the model family keeps its forward (projections, RoPE, cache). What spikeform adds is a child
module ``spiking`` with the neurons, an attention function registered under the name ``spikeform``, and a
cache view that stores codes: keys and values are encoded once, when they are appended.

    S = OAT(q) . OAT(k)^T * scale;  e = HG_exp(S - max S);  p = OAT(e * HG_1/x(sum e));  out = p . OAT(v)

B batch, H query heads, G key/value heads, R = H / G, L queries, S keys, E head size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.cache_utils import Cache
from transformers.masking_utils import AttentionMaskInterface, eager_mask

from spikeform.neurons import MT, Neuron
from spikeform.spikes import SpikeTrain
from spikeform.synapses import hadamard, matmul

NAME = "spikeform"


class SpikingAttention(nn.Module):
    """The neurons of one attention layer, and its forward on real or cached (coded) keys and values.

    Args:
        query: OAT of the queries.
        key: OAT of the keys.
        value: OAT of the values.
        probability: OAT of the attention probabilities.
        exp: HG of exp, or None for a real softmax.
        reciprocal: HG of 1/x, or None for a real softmax.
        site: Qualified name of the attention module.
    """

    def __init__(
        self,
        query: MT,
        key: MT,
        value: MT,
        probability: MT,
        exp: Neuron | None,
        reciprocal: Neuron | None,
        site: str = "",
    ) -> None:
        super().__init__()
        self.query, self.key, self.value, self.probability = query, key, value, probability
        self.exp, self.reciprocal, self.site = exp, reciprocal, site

    def forward(
        self, q_BHLE: Tensor, k_BGSE: Tensor, v_BGSE: Tensor, mask: Tensor | None, scaling: float
    ) -> tuple[Tensor, Tensor]:
        """Attention output ``[B, L, H, E]`` and probabilities ``[B, H, L, S]``.

        Args:
            q_BHLE: Real queries.
            k_BGSE: Real keys, or packed codes (an integer dtype) from the cache.
            v_BGSE: Real values, or packed codes.
            mask: Additive ``[B or 1, 1 or H, L, S]``, the dtype's minimum or -inf where hidden; None: all seen.
            scaling: Factor of the scores.
        """
        batch, heads, length, size = q_BHLE.shape
        groups, keys = k_BGSE.shape[1], k_BGSE.shape[2]

        def by_group(x: Tensor) -> Tensor:  # query heads of one key/value head stand together: no copies of k, v
            return x.reshape(batch, groups, -1, x.shape[-1])

        q = self.query(q_BHLE).map(by_group)
        k = unpack(k_BGSE, self.key) if not k_BGSE.is_floating_point() else self.key(k_BGSE)
        v = unpack(v_BGSE, self.value) if not v_BGSE.is_floating_point() else self.value(v_BGSE)
        visible = None
        if mask is not None:
            mask = mask[..., :keys].expand(batch, heads, length, keys)
            visible = by_group(mask > torch.finfo(mask.dtype).min / 2)
        scores = matmul(q, k, transpose_b=True, mask=visible, site=f"{self.site}.scores") * scaling
        if mask is not None:
            # Soft biases are added; hidden keys are gated off below, so that they send nothing at all.
            scores = scores + by_group(mask.to(scores.dtype)).masked_fill(~visible, 0.0)
        p = self.probability(self._softmax(scores, visible))
        context = matmul(p, v, connected=visible, site=f"{self.site}.context")
        context_BHLE = context.reshape(batch, heads, length, size)
        probabilities = p.decode().reshape(batch, heads, length, keys)
        return context_BHLE.transpose(1, 2).contiguous().to(q_BHLE.dtype), probabilities

    def _softmax(self, scores: Tensor, visible: Tensor | None) -> Tensor:
        """HG softmax over the last axis; a row that sees nothing gives zeros."""
        if visible is not None:
            scores = scores.masked_fill(~visible, float("-inf"))
        peak = scores.amax(-1, keepdim=True)
        shifted = scores - peak.masked_fill(peak == float("-inf"), 0.0)
        if self.exp is None or self.reciprocal is None:
            return torch.softmax(shifted, -1).nan_to_num(0.0)
        e = self.exp(shifted)
        # exp(0) = 1 is the largest term, so a row that sees any key sums to at least 1.
        total = e.decode().sum(-1, keepdim=True).clamp(min=0.5)
        return hadamard(e, self.reciprocal(total), site=f"{self.site}.softmax")


def pack(train: SpikeTrain) -> Tensor:
    """Codes and branch in one integer, ``2 * code + branch``: int16 where they fit, else int32."""
    packed = train.integer_codes() * 2
    if train.branch is not None:
        packed = packed + train.branch.to(packed.dtype)
    return packed.to(torch.int16) if train.coding.limit < 2**14 else packed


def unpack(packed: Tensor, neuron: MT) -> SpikeTrain:
    """The train that :func:`pack` stored. A train from the cache has fired before: it is not reported again."""
    branch = (packed & 1).bool() if neuron.populations == 2 else None
    return SpikeTrain(packed >> 1, neuron.quantum(), neuron.coding, branch)


class CodeCache:
    """A view of a transformers cache that encodes keys and values as they are appended.

    Whatever cache the user chose keeps the memory; what it holds are packed codes.
    """

    def __init__(self, cache: Cache, spiking: SpikingAttention) -> None:
        self._cache, self._spiking = cache, spiking

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any):
        """Append codes; returns the packed codes of all keys and values so far."""
        key, value = pack(self._spiking.key(key_states)), pack(self._spiking.value(value_states))
        return self._cache.update(key, value, layer_idx, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)


def install(attention: nn.Module, spiking: SpikingAttention) -> None:
    """Make ``attention`` (a family's attention module) use ``spiking`` and keep codes in its cache."""
    attention.spiking = spiking
    attention.register_forward_pre_hook(_cache_of_codes, with_kwargs=True)


def _cache_of_codes(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    def view(value: Any) -> Any:
        return CodeCache(value, module.spiking) if isinstance(value, Cache) else value

    return tuple(view(a) for a in args), {name: view(value) for name, value in kwargs.items()}


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """transformers' attention interface. Dense attention modules of the same model fall through to eager.

    Raises:
        ValueError: An option of the family that changes the scores is not known here.
    """
    for option in ("softcap", "s_aux", "position_bias"):
        if kwargs.get(option) is not None:
            raise ValueError(f"spiking attention does not know {option!r}; leave {type(module).__name__} dense (skip)")
    spiking = getattr(module, "spiking", None)
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    if spiking is None:
        return _dense(query, key, value, attention_mask, scaling, dropout, module.training)
    return spiking(query, key, value, attention_mask, scaling)


def _dense(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float, dropout: float, training: bool
) -> tuple[Tensor, Tensor]:
    repeat = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)
    scores = q @ k.transpose(-1, -2) * scaling
    if mask is not None:
        scores = scores + mask[..., : k.shape[2]]
    p = torch.softmax(scores, -1, dtype=torch.float32).to(q.dtype)
    p = nn.functional.dropout(p, dropout, training)
    return (p @ v).transpose(1, 2).contiguous(), p


# Without the mask registration a model would pass no mask at all, and padding would be ignored in silence.
AttentionInterface.register(NAME, attention_forward)
AttentionMaskInterface.register(NAME, eager_mask)
