"""The Hugging Face quantizer: convert at load, save, reload, each checked strictly.

In the files, every spiking linear's weight has a leading axis of length one, and integer weights are packed bits. A
program that does not know the format fails on the shape, instead of running the dense model in silence.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer

from spikeform.conversion.registry import Method, add, method_of
from spikeform.conversion.report import ConversionReport
from spikeform.conversion.strict import refuse, settle, wrong_tensors
from spikeform.conversion.transform import transform
from spikeform.layers import CodedLinear, SpikingLinear
from spikeform.neurons import Neuron


class SpikeformQuantizer(HfQuantizer):
    """Builds the spiking skeleton before a checkpoint loads, or converts a dense model after it loaded."""

    requires_calibration = False

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> PreTrainedModel:
        if self.pre_quantized:
            # Buffers of the skeleton are real, not meta: one absent from the files stays NaN and is found below.
            method = method_of(self.quantization_config)
            with torch.device("cpu"):
                self._report = (method.skeleton or method.prepare)(model, self.quantization_config)
            # Thresholds are fp32 whatever dtype is asked for. (Those that are buffers are anyway.)
            kept = set(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
            model._keep_in_fp32_modules_strict = kept | {
                name.rpartition(".")[2]
                for name, module in model.named_modules()
                if isinstance(module, Neuron) and module._parameters
            }
            refuse(wrong_tensors(model, checkpoint_files or []))
        return model

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **kwargs: Any) -> bool:
        """True for the weights whose shape in the files differs: transformers then leaves the check to us."""
        if not self.pre_quantized:
            return False
        module_name, _, parameter = param_name.rpartition(".")
        return parameter == "weight" and isinstance(model.get_submodule(module_name), SpikingLinear)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        if not self.pre_quantized:
            vars(model.config).pop("quantization_config", None)
            attach(model, self.quantization_config, transform(model, self.quantization_config))
            return model
        refuse([p for name, module in model.named_modules() for p in settle(name, module, model, self.is_trainable)])
        attach(model, self.quantization_config, self._report)
        return model

    def get_state_dict_and_metadata(  # type: ignore[override]  # the base returns None for "as it is"
        self, model: PreTrainedModel
    ) -> tuple[dict[str, Tensor], dict[str, str]]:
        """The state dict as it is written: spiking weights ``[1, N, K]``, but for those tied to an embedding.

        Integer weights are packed, ``[1, N, bytes]``.
        """
        state = model.state_dict()
        tied = set(getattr(model, "all_tied_weights_keys", None) or {})
        for name, module in model.named_modules():
            key = f"{name}.weight"
            if isinstance(module, CodedLinear):
                state |= {f"{name}.{buffer}": tensor for buffer, tensor in module.packed().items()}
            elif isinstance(module, SpikingLinear) and key in state and key not in tied:
                state[key] = state[key].unsqueeze(0)
        return state, {"spikeform_format": "1"}

    def is_serializable(self) -> bool:  # type: ignore[override]
        """Yes."""
        return True

    @property
    def is_trainable(self) -> bool:  # type: ignore[override]
        """Whether gradients pass the neurons (streaming ones). Adapters may be trained on top of any method."""
        return method_of(self.quantization_config).trainable

    @property
    def is_compileable(self) -> bool:  # type: ignore[override]
        """Whether ``generate`` may compile the model with a static cache. A streaming model steps through hooks."""
        return not method_of(self.quantization_config).streams

    @property
    def is_qat_trainable(self) -> bool:  # type: ignore[override]
        """The same: all parameters are real, so all of them may be trained."""
        return self.is_trainable


def attach(model: PreTrainedModel, config: Any, report: ConversionReport) -> None:
    """Give a converted model what transformers needs to save it, and what users ask it."""
    model.config.quantization_config = config
    marks: Any = model
    marks.spikeform_report = report
    marks.hf_quantizer = SpikeformQuantizer(config, pre_quantized=True)
    marks.is_quantized = True
    marks.quantization_method = config.quant_method


def register(method: Method) -> None:
    """Make a method known to :func:`spikeform.convert` and to transformers' ``from_pretrained``."""
    add(method)
    name = f"spikeform_{method.name}"
    register_quantization_config(name)(method.config_type)
    register_quantizer(name)(SpikeformQuantizer)
