"""Model types of their own: an installation that does not know them refuses the checkpoint.

Spiking self-attention is another architecture, so a converted GPT-2 is no ``gpt2`` any more. Its class is a subclass of
the dense one, under a name and a model type that only spikeform registers.
"""

from __future__ import annotations

from typing import Any

from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from spikeform.errors import ConversionError

PREFIX = "neutransformer_"


class NeuGPT2Config(GPT2Config):
    """Of a GPT-2 with spiking self-attention."""

    model_type = f"{PREFIX}gpt2"


class NeuGPT2LMHeadModel(GPT2LMHeadModel):
    """GPT-2 with spiking self-attention."""

    config_class = NeuGPT2Config


class NeuLlamaConfig(LlamaConfig):
    """Of a LLaMA with spiking self-attention."""

    model_type = f"{PREFIX}llama"


class NeuLlamaForCausalLM(LlamaForCausalLM):
    """LLaMA with spiking self-attention."""

    config_class = NeuLlamaConfig


_KINDS: dict[type, tuple[type, type]] = {
    GPT2LMHeadModel: (NeuGPT2Config, NeuGPT2LMHeadModel),
    LlamaForCausalLM: (NeuLlamaConfig, NeuLlamaForCausalLM),
}
for _config, _model in _KINDS.values():
    AutoConfig.register(_config.model_type, _config)
    AutoModelForCausalLM.register(_config, _model)


def become(model: PreTrainedModel) -> None:
    """Give a dense model its spiking type, in place; nothing happens to one that has it.

    Raises:
        ConversionError: There is no such type for its class.
    """
    if type(model) in {spiking for _, spiking in _KINDS.values()}:
        return
    if type(model) not in _KINDS:
        known = ", ".join(kind.__name__ for kind in _KINDS)
        raise ConversionError(f"{type(model).__name__} has no spiking self-attention in spikeform: known are {known}")
    config, spiking = _KINDS[type(model)]
    changed: Any = model
    changed.__class__ = spiking
    changed.config.__class__ = config
    changed.config.architectures = [spiking.__name__]
