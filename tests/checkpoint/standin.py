"""A converted model without any conversion: a tiny LLaMA whose query projections carry a threshold."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from spikeform.errors import ConfigError

METHOD = "spikeform_standin"


@register_quantization_config(METHOD)
class StandIn(QuantizationConfigMixin):
    version = 1

    def __init__(self, steps=16, version=1):
        self.quant_method, self.steps, self.version = METHOD, steps, version

    @classmethod
    def from_dict(cls, config_dict, return_unused_kwargs=False, **kwargs):
        if unknown := config_dict.keys() - {"steps", "version", "quant_method"}:
            raise ConfigError(f"unknown key {', '.join(sorted(unknown))}")
        config = cls(config_dict.get("steps", 16), config_dict.get("version", 1))
        return (config, kwargs) if return_unused_kwargs else config

    def to_dict(self):
        return {"quant_method": METHOD, "steps": self.steps, "version": self.version}


@register_quantizer(METHOD)
class StandInQuantizer(HfQuantizer):
    requires_calibration = False

    def _process_model_before_weight_loading(self, model, **kwargs):
        add_thresholds(model)

    def _process_model_after_weight_loading(self, model, **kwargs):
        return model

    def is_serializable(self):
        return True

    @property
    def is_trainable(self):
        return False


def add_thresholds(model):
    for layer in model.model.layers:
        projection = layer.self_attn.q_proj
        projection.register_buffer("threshold", torch.ones(2, device=projection.weight.device))


def dense(seed=0):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=100,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    return LlamaForCausalLM(config).eval()


def converted(seed=0):
    model = dense(seed)
    add_thresholds(model)
    model.config.quantization_config = StandIn()
    return model
