"""The method's configuration in a checkpoint: there, known, not from the future, and every option valid."""

from pathlib import Path
from typing import Any

from spikeform.checkpoint.manifest import Manifest
from spikeform.checkpoint.paths import method_name, read_json
from spikeform.errors import CheckpointError, DamagedCheckpointError, ForeignFolderError, NewerFormatError


def check_configuration(folder: Path, manifest: Manifest | None) -> str:
    """Parse the method's configuration as strictly as at its making; return the method's name."""
    content = read_json(folder / "config.json")
    quantization = content.get("quantization_config")
    if quantization is None and manifest is not None:
        raise DamagedCheckpointError(
            f"{folder}/config.json has lost its quantization_config: transformers would load a dense model. "
            "Save the checkpoint again",
            ("config.json: missing quantization_config",),
        )
    method = method_name(content)
    if method is None or not isinstance(quantization, dict):
        what = "a dense model" if quantization is None else f"quantized by other software ({quantization!r:.80})"
        raise ForeignFolderError(f"{folder} is not a converted checkpoint: it is {what}. Convert the dense model first")
    if manifest is not None and manifest.config != quantization:
        keys = sorted(k for k in {*manifest.config, *quantization} if manifest.config.get(k) != quantization.get(k))
        raise DamagedCheckpointError(f"{folder}: config.json and spikeform.json disagree on {', '.join(keys)}")
    _parse_method(folder, method, quantization)
    return method


def _parse_method(folder: Path, method: str, quantization: dict[str, Any]) -> None:
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

    import spikeform.methods  # noqa: F401 - registers the methods' configurations with transformers

    known = AUTO_QUANTIZATION_CONFIG_MAPPING.get(method)
    if known is None:
        raise NewerFormatError(
            f"{folder} was converted by the method {method!r}, which this spikeform does not know: upgrade it"
        )
    found, ours = quantization.get("version", 1), getattr(known, "version", 1)
    if isinstance(found, int) and isinstance(ours, int) and found > ours:
        raise NewerFormatError(
            f"{folder}: its {method} configuration was written by a newer spikeform (version {found}, this "
            f"one reads up to {ours}): upgrade with `pip install -U spikeform`"
        )
    try:
        known.from_dict(dict(quantization))
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{folder}/config.json, quantization_config: {error}") from error
