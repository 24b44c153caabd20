"""The Hugging Face quantizer: convert at load, save, reload, each checked strictly.

In the files, every spiking linear's weight has a leading axis of length one. A program that does not know the
format fails on the shape, instead of running the dense model in silence.
"""

from __future__ import annotations

from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer

from spikeform.conversion.registry import Method, add, method_of
from spikeform.conversion.report import ConversionReport
from spikeform.conversion.transform import transform
from spikeform.errors import DamagedCheckpointError
from spikeform.layers import SpikingLinear
from spikeform.layers.streaming import neurons_of
from spikeform.neurons import MT, Neuron, StreamingNeuron, ThresholdNeuron


class SpikeformQuantizer(HfQuantizer):
    """Builds the spiking skeleton before a checkpoint loads, or converts a dense model after it loaded."""

    requires_calibration = False

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> PreTrainedModel:
        if self.pre_quantized:
            # Buffers of the skeleton are real, not meta: one absent from the files stays NaN and is found below.
            with torch.device("cpu"):
                self._report = method_of(self.quantization_config).prepare(model, self.quantization_config)
            # Thresholds are fp32 whatever dtype is asked for. (Those that are buffers are anyway.)
            if neurons_of(model):
                kept = set(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
                model._keep_in_fp32_modules_strict = kept | {"neuron"}
            _refuse(_wrong_tensors(model, checkpoint_files or []))
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
        _refuse([p for name, module in model.named_modules() for p in _settle(name, module, model, self.is_trainable)])
        attach(model, self.quantization_config, self._report)
        return model

    def get_state_dict_and_metadata(  # type: ignore[override]  # the base returns None for "as it is"
        self, model: PreTrainedModel
    ) -> tuple[dict[str, Tensor], dict[str, str]]:
        """The state dict as it is written: spiking weights ``[1, N, K]``, but for those tied to an embedding."""
        state = model.state_dict()
        tied = set(getattr(model, "all_tied_weights_keys", None) or {})
        for name, module in model.named_modules():
            key = f"{name}.weight"
            if isinstance(module, SpikingLinear) and key in state and key not in tied:
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


def _refuse(problems: list[str]) -> None:
    if problems:
        listed = "; ".join(problems[:5]) + (f"; and {len(problems) - 5} more" if len(problems) > 5 else "")
        raise DamagedCheckpointError(f"the spiking checkpoint is incomplete or damaged: {listed}", tuple(problems))


def _wrong_tensors(model: PreTrainedModel, files: list[str]) -> list[str]:
    """Tensors that the files lack, that are not the model's, or of another shape.

    Transformers would warn of the first two, and not name the third in its error. A model loaded as another
    class than the one that was saved (a bare backbone, say) may leave tensors over.
    """
    if not files:
        return []
    shapes: dict[str, list[int]] = {}
    for file in files:
        if not str(file).endswith(".safetensors"):
            raise DamagedCheckpointError(f"{file}: spiking checkpoints are safetensors files")
        with safe_open(file, "pt") as opened:
            shapes |= {key: opened.get_slice(key).get_shape() for key in opened.keys()}  # noqa: SIM118
    # Some families are saved under older names than their modules have.
    transforms = get_model_conversion_mapping(model)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    wanted, tied = model.state_dict(), set(getattr(model, "all_tied_weights_keys", None) or {})
    problems, found = [], set()
    same_class = type(model).__name__ in (getattr(model.config, "architectures", None) or [])
    for key, shape in sorted(shapes.items()):
        name, merged = rename_source_key(key, renamings, converters, model.base_model_prefix, wanted)
        name = key if name not in wanted and key in wanted else name
        found.add(name)
        if name not in wanted:
            problems += [f"{key} is not of this model"] if same_class else []
        elif merged is None and list(shape) != (expected := _saved_shape(name, model, wanted[name], tied)):
            problems.append(f"{name} has shape {list(shape)}, not {expected}")
    return [f"{n} is missing from the files" for n in wanted if n not in found and n not in tied] + problems


def _saved_shape(name: str, model: PreTrainedModel, tensor: Tensor, tied: set[str]) -> list[int]:
    module, _, key = name.rpartition(".")
    spiking = key == "weight" and name not in tied and isinstance(model.get_submodule(module), SpikingLinear)
    return [1, *tensor.shape] if spiking else list(tensor.shape)


def _settle(name: str, module: nn.Module, model: PreTrainedModel, trainable: bool) -> list[str]:
    """Check one module's loaded tensors; give spiking weights their working shape."""
    problems = []
    if isinstance(module, SpikingLinear):
        weight = module.weight
        if isinstance(module.neuron, MT):
            module.neuron.folded = module.neuron.channel_shift is not None  # written folded
        wanted = (module.out_features, module.in_features)
        tied = f"{name}.weight" in (getattr(model, "all_tied_weights_keys", None) or {})
        if tuple(weight.shape) == (1, *wanted):
            module.weight = nn.Parameter(weight.data[0], requires_grad=trainable)
        elif not (tied and tuple(weight.shape) == wanted):
            problems.append(f"{name}.weight has shape {list(weight.shape)}, not {[1, *wanted]}")
    for key, parameter in module.named_parameters(recurse=False):
        if parameter.device.type == "meta" or not bool(parameter.isfinite().all()):
            problems.append(f"{name}.{key} is missing or not finite")
        elif not getattr(parameter, "_is_hf_initialized", True):
            problems.append(f"{name}.{key} is missing from the files")
    if isinstance(module, Neuron) and not isinstance(module, ThresholdNeuron):
        damaged = [k for k, b in module.named_buffers(recurse=False) if not bool(b.isfinite().all())]
        problems += [f"{name}.{key} is not finite" for key in damaged]
    if isinstance(module, StreamingNeuron):
        for parameter in (module.scale, module.initial):
            parameter.requires_grad_(False)  # as conversion leaves them
    if isinstance(module, ThresholdNeuron) and not module.calibrated:
        problems.append(f"{name}.threshold is missing, not finite or not positive")
    return problems
