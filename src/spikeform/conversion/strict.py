"""Is what was read from the files the model that was saved? Every tensor is, or one error names those that are not."""

from __future__ import annotations

from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from spikeform.errors import DamagedCheckpointError
from spikeform.layers import CodedLinear, SpikingAttention, SpikingLinear
from spikeform.neurons import MT, Neuron, SignedInteger, StreamingNeuron, ThresholdNeuron
from spikeform.neurons.oat import powers_of_two


def refuse(problems: list[str]) -> None:
    """Raise one :class:`DamagedCheckpointError` for all ``problems``, if there are any."""
    if problems:
        listed = "; ".join(problems[:5]) + (f"; and {len(problems) - 5} more" if len(problems) > 5 else "")
        raise DamagedCheckpointError(f"the spiking checkpoint is incomplete or damaged: {listed}", tuple(problems))


def wrong_tensors(model: PreTrainedModel, files: list[str]) -> list[str]:
    """Tensors that the files lack, that are not the model's, or of another shape.

    Transformers would warn of the first two, and not name the third in its error. A model loaded as another
    class than the one that was saved (a bare backbone, say) may leave tensors over.
    """
    if not files:
        return []
    shapes: dict[str, list[int]] = {}
    kinds: dict[str, str] = {}
    for file in files:
        if not str(file).endswith(".safetensors"):
            raise DamagedCheckpointError(f"{file}: spiking checkpoints are safetensors files")
        with safe_open(file, "pt") as opened:
            for key in opened.keys():  # noqa: SIM118
                header = opened.get_slice(key)
                shapes[key], kinds[key] = header.get_shape(), header.get_dtype()
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
            continue
        expected = _saved_shape(name, model, wanted[name], tied)
        if merged is None and expected is not None and list(shape) != expected:
            problems.append(f"{name} has shape {list(shape)}, not {expected}")
        if kinds[key].startswith(("F", "BF")) and not wanted[name].is_floating_point():
            problems.append(f"{name} is {kinds[key]}, not integers")
    return [f"{n} is missing from the files" for n in wanted if n not in found and n not in tied] + problems


def _saved_shape(name: str, model: PreTrainedModel, tensor: Tensor, tied: set[str]) -> list[int] | None:
    """The shape that a tensor has in the files; None where only its layer can tell, once it is loaded."""
    module, _, key = name.rpartition(".")
    owner = model.get_submodule(module) if key == "weight" and name not in tied else None
    if isinstance(owner, CodedLinear):
        return None
    return [1, *tensor.shape] if isinstance(owner, SpikingLinear) else list(tensor.shape)


def settle(name: str, module: nn.Module, model: PreTrainedModel, trainable: bool) -> list[str]:
    """Check one module's loaded tensors; give spiking weights their working shape."""
    problems = []
    if isinstance(module, SpikingLinear) and isinstance(module.neuron, MT | SignedInteger):
        module.neuron.folded = module.neuron.fold_factor() is not None  # written folded
    if isinstance(module, CodedLinear):
        problems += [f"{name}.{problem}" for problem in module.load_packed()]
    elif isinstance(module, SpikingLinear):
        weight = module.weight
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
        if hasattr(module, "threshold"):
            problems.append(f"{name}.threshold is missing, not finite or not positive")
        else:
            problems += [f"{name}.{key} is missing or out of range" for key in _unsound(module)]
    elif isinstance(module, MT) and module.power_of_two and not powers_of_two(module.threshold):
        problems.append(f"{name}.threshold is not made of powers of two: {module.threshold.tolist()}")
    if isinstance(module, SpikingAttention) and module.signs is not None and not bool((module.signs.abs() == 1).all()):
        problems.append(f"{name}.signs are not all 1 or -1")
    return problems


def _unsound(neuron: ThresholdNeuron) -> list[str]:
    """The buffers that are to blame for a neuron that is not calibrated: those not finite, or else any."""
    buffers = dict(neuron.named_buffers(recurse=False))
    return [key for key, tensor in buffers.items() if not bool(tensor.isfinite().all())] or list(buffers)
