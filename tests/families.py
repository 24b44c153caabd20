"""Tiny random models of every family that spikeform knows, shared by the tests.

Hidden size 64, four heads of 16, two layers, a vocabulary of 120. Weights are drawn four times larger than
usual, because the logits of a fresh tiny model are all but flat, and attention that sees everything alike
hides mistakes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    GemmaConfig,
    GemmaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Mamba2Config,
    Mamba2ForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

VOCABULARY, CONTEXT, WINDOW = 120, 64, 6
_TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": CONTEXT,
    **_TOKENS,
}
_LLAMA = {**_SIZES, "intermediate_size": 112, "num_key_value_heads": 2}
_MAMBA = {"vocab_size": VOCABULARY, "hidden_size": 64, "num_hidden_layers": 2, **_TOKENS}
_MAMBA2 = {"state_size": 16, "num_heads": 8, "head_dim": 16, "n_groups": 1, "chunk_size": 16}


def _opt(**more):
    sizes = {k: v for k, v in _SIZES.items() if k != "intermediate_size"}
    return OPTForCausalLM(OPTConfig(**sizes, ffn_dim=112, word_embed_proj_dim=more.pop("proj", 64), **more))


def _bert(cls, **more):
    return cls(BertConfig(**_SIZES, intermediate_size=112, **more))


_BUILDERS: dict[str, Callable[[], PreTrainedModel]] = {
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=VOCABULARY, n_embd=64, n_layer=2, n_head=4, n_positions=CONTEXT, **_TOKENS)
    ),
    "opt": _opt,
    "opt_post_norm": lambda: _opt(do_layer_norm_before=False, proj=32),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**_LLAMA)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**_LLAMA, sliding_window=None)),
    "mistral_window": lambda: MistralForCausalLM(MistralConfig(**_LLAMA, sliding_window=WINDOW)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**_LLAMA)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**_LLAMA, head_dim=16, tie_word_embeddings=True)),
    "gpt_neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**_SIZES, intermediate_size=112)),
    "phi": lambda: PhiForCausalLM(PhiConfig(**_LLAMA, partial_rotary_factor=0.5)),
    "phi_qk_norm": lambda: PhiForCausalLM(PhiConfig(**_LLAMA, partial_rotary_factor=0.5, qk_layernorm=True)),
    "gemma": lambda: GemmaForCausalLM(GemmaConfig(**{**_LLAMA, "num_key_value_heads": 1}, head_dim=24)),
    "bert": lambda: _bert(BertForSequenceClassification, num_labels=3),
    "bert_mlm": lambda: _bert(BertForMaskedLM),
}
FAMILIES = tuple(_BUILDERS)
_STATE_SPACE: dict[str, Callable[[], PreTrainedModel]] = {
    "mamba": lambda: MambaForCausalLM(MambaConfig(**_MAMBA, state_size=8)),
    "mamba2": lambda: Mamba2ForCausalLM(Mamba2Config(**_MAMBA, **_MAMBA2, tie_word_embeddings=True)),
}
STATE_SPACE = tuple(_STATE_SPACE)  # not for methods that replace attention or feed-forward blocks
CAUSAL = tuple(name for name in FAMILIES if not name.startswith("bert"))
TWINS = ("gpt2", "opt", "llama", "mistral", "qwen2", "qwen3", "gpt_neox", "phi", "gemma", "bert")
ALL = tuple((name, False) for name in FAMILIES) + tuple((name, True) for name in TWINS)  # (family, is a twin)


def build(family: str, seed: int = 0) -> PreTrainedModel:
    """A dense model of a family; the same bits for the same seed."""
    torch.manual_seed(seed)
    model = {**_BUILDERS, **_STATE_SPACE}[family]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter *= 4
            else:  # biases, gains and offsets that say nothing (0, 1) would hide mistakes too
                parameter += 0.2 * torch.randn_like(parameter)
    return model


def tokens(rows: int = 2, length: int = 16, seed: int = 1) -> torch.Tensor:
    """Random token ids ``[rows, length]``, no padding or special token among them."""
    return torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """Relative difference of two tensors, by norm."""
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).norm() / a.norm())


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    """Equal but for the order of fp64 sums."""
    assert a.shape == b.shape
    assert difference(a, b) <= 1e-9
