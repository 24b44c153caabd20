"""Loading a checkpoint: verified first, and with no tensor missing, left over or of another shape."""

from pathlib import Path
from typing import Any

from spikeform.checkpoint.manifest import read_manifest
from spikeform.checkpoint.paths import read_json
from spikeform.checkpoint.verification import lines, verify
from spikeform.conversion import ConversionReport
from spikeform.errors import CheckpointError, DamagedCheckpointError

_AUTO_CLASSES = {
    "ForCausalLM": "AutoModelForCausalLM",
    "LMHeadModel": "AutoModelForCausalLM",
    "ForSequenceClassification": "AutoModelForSequenceClassification",
    "ForMaskedLM": "AutoModelForMaskedLM",
}
_FIXED = {
    "use_safetensors",
    "trust_remote_code",
    "output_loading_info",
    "ignore_mismatched_sizes",
    "state_dict",
}
_FIXED |= {"quantization_config", "config", "weights_only", "variant", "subfolder", "from_tf", "from_flax"}


def load(path: str | Path, *, cheap: bool = False, **from_pretrained_kwargs: Any) -> Any:
    """Load a converted checkpoint.

    Args:
        path: a folder written by ``spikeform.save`` or by a converted model's ``save_pretrained``.
        cheap: do not hash the files nor read the values beforehand; names, sizes, shapes and dtypes are still
            checked.
        **from_pretrained_kwargs: passed on, such as ``device_map`` or ``attn_implementation``.

    Returns:
        The model, of the class that config.json names, in evaluation mode.

    Raises:
        CheckpointError: as ``verify``; an argument that would weaken the checks; or an unknown model class.
        DamagedCheckpointError: a tensor is missing, not expected, or of the wrong shape.
    """
    if refused := sorted(_FIXED & from_pretrained_kwargs.keys()):
        raise CheckpointError(f"load() does not take {', '.join(refused)}: a checkpoint is loaded as it was saved")
    folder = Path(verify(path, hashes=not cheap, values=not cheap).path)
    model_class = _model_class(folder)
    try:
        model, info = model_class.from_pretrained(
            folder,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they come back in `info`, by name, and are refused below
            local_files_only=True,
            **from_pretrained_kwargs,
        )
    except RuntimeError as error:  # how transformers reports tensors that do not fit
        raise DamagedCheckpointError(f"{folder} does not fit its own configuration: {error}") from error
    kinds = {"missing_keys": "missing", "unexpected_keys": "unexpected", "mismatched_keys": "misshapen"}
    problems = tuple(
        f"{key if isinstance(key, str) else key[0]}: tensor {kind}"
        for name, kind in kinds.items()
        for key in sorted(info.get(name) or (), key=str)
    )
    if problems:
        raise DamagedCheckpointError(f"{folder} does not fit its own configuration:\n{lines(problems)}", problems)
    manifest = read_manifest(folder)
    if manifest is not None and manifest.report is not None:
        model.spikeform_report = ConversionReport.from_dict(manifest.report)
    return model


def _model_class(folder: Path) -> Any:
    """The class that config.json's ``architectures`` names."""
    import transformers

    names = read_json(folder / "config.json").get("architectures")
    if not (isinstance(names, list) and len(names) == 1 and isinstance(names[0], str)):
        raise CheckpointError(f"{folder}/config.json: `architectures` must name one model class, not {names!r}")
    found = getattr(transformers, names[0], None)
    if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel):
        return found
    for suffix, auto in _AUTO_CLASSES.items():  # an architecture of ours, registered with the Auto classes
        if names[0].endswith(suffix):
            return getattr(transformers, auto)
    raise CheckpointError(f"{folder}: transformers has no model class {names[0]!r}; install the version that has it")
