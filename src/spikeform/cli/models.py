"""From what a user typed to models, tokenizers and token ids; each failure is one line."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from spikeform.errors import ConversionError, ForeignFolderError, SpikeformError

if TYPE_CHECKING:
    from torch import Tensor

Checkpoint = Annotated[str, typer.Argument(metavar="OUT", help="Folder of a converted model.")]
Reference = Annotated[
    str | None,
    typer.Option(metavar="MODEL", help="The dense model it came from: hub id, folder, or embedded name."),
]
Text = Annotated[
    list[Path] | None,
    typer.Option(metavar="FILE", help="Text to measure on (.txt .json .jsonl, .xz .gz); may be repeated."),
]

_HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?$")
_TOKENIZER_FILES = ("tokenizer*", "vocab*", "*.model", "spiece*", "merges.txt")
_CLASSES = (
    ("AutoModelForCausalLM", "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES"),
    ("AutoModelForSequenceClassification", "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES"),
    ("AutoModelForMaskedLM", "MODEL_FOR_MASKED_LM_MAPPING_NAMES"),
)


def dense_source(name: str) -> str:
    """Where a dense model lies: a folder (checked to hold one) or a hub id.

    Raises:
        ForeignFolderError: The path holds no model.
        ConversionError: It holds a converted model.
    """
    from spikeform import pretrained
    from spikeform.checkpoint import assert_model_path, is_converted

    source = pretrained.resolve(name)
    if not Path(source).exists():
        if not _HUB_ID.match(source):
            raise ForeignFolderError(f"no model at {name}: there is no such folder")
        return source
    assert_model_path(source)
    if is_converted(source):
        raise ConversionError(f"{name} is a converted model already: give the dense model it came from")
    return source


def load_dense(name: str, revision: str | None = None) -> Any:
    """A dense model in evaluation mode, with the head that its config names.

    Raises:
        SpikeformError: It is not there, is no model of a known task, or its files are damaged or incomplete.
    """
    import transformers
    from transformers.models.auto import modeling_auto

    quiet()
    source = dense_source(name)
    try:
        config = transformers.AutoConfig.from_pretrained(source, revision=revision)
        # A config that names no class is a language model's: what this tool is for.
        causal = next(iter(modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()))
        architecture = (config.architectures or [causal])[0]
        found = [a for a, names in _CLASSES if architecture in getattr(modeling_auto, names).values()]
        if not found:
            raise SpikeformError(
                f"{name} is a {architecture}: only causal and masked language models and sequence "
                "classifiers can be converted"
            )
        model, info = getattr(transformers, found[0]).from_pretrained(
            source, revision=revision, output_loading_info=True
        )
    except SpikeformError:
        raise
    except Exception as error:  # OSError, SafetensorError, RuntimeError ...: each library has its own
        if Path(source).exists():
            raise SpikeformError(f"cannot load {name}: {_first_line(error)}") from error
        raise SpikeformError(
            f"no model {name!r}: no folder and no embedded model has that name, and the Hugging Face Hub "
            f"gave none ({_first_line(error)})"
        ) from error
    if absent := sorted(info["missing_keys"]):
        raise SpikeformError(f"{name} lacks the tensor {absent[0]}" + _more(absent))
    broken = [n for n, p in model.named_parameters() if not bool(p.isfinite().all())]
    if broken:
        raise SpikeformError(f"{name}: the tensor {broken[0]} is not finite" + _more(broken))
    return model.eval()


def load_spiking(path: str) -> Any:
    """A converted model, verified."""
    import spikeform

    quiet()
    return spikeform.load(path)


def load_tokenizer(name: str, revision: str | None = None) -> Any:
    """The tokenizer of a folder or a hub id; None if the folder has none.

    Raises:
        SpikeformError: There is one, and it cannot be loaded.
    """
    from transformers import AutoTokenizer

    from spikeform import pretrained

    quiet()
    source = pretrained.resolve(name)
    folder = Path(source)
    if folder.is_dir() and not any(any(folder.glob(pattern)) for pattern in _TOKENIZER_FILES):
        return None
    try:
        return AutoTokenizer.from_pretrained(source, revision=revision)
    except Exception as error:
        raise SpikeformError(f"cannot load the tokenizer of {name}: {_first_line(error)}") from error


def need_tokenizer(name: str) -> Any:
    """As :func:`load_tokenizer`, but having none is an error."""
    tokenizer = load_tokenizer(name)
    if tokenizer is None:
        raise SpikeformError(f"{name} has no tokenizer: save one into the folder (tokenizer.save_pretrained)")
    return tokenizer


@contextmanager
def resumable(main: bool) -> Iterator[None]:
    """In the block, training that is asked to stop says how to go on, and exits with the signal's code.

    Args:
        main: Whether this process speaks.
    """
    from spikeform.training import Interrupted

    try:
        yield
    except Interrupted as stopped:
        if main:
            print(f"{stopped}: the same command with --resume", file=sys.stderr)
        raise typer.Exit(128 + stopped.signal) from None


def last_record(network: Any) -> dict[str, Any]:
    """What the last stage left in a model's history, converted or dense."""
    report = getattr(network, "spikeform_report", None)
    return (report.history if report else network.spikeform_history)[-1]


def read_ids(tokenizer: Any, files: Sequence[Path], most: int | None = None) -> Tensor:
    """Token ids ``[N]`` of the files' documents, the first ``most`` of them."""
    from spikeform.evaluation import load_text, tokenize

    return tokenize(tokenizer, [document for file in files for document in load_text(file)])[:most]


def positive(name: str, value: int | None) -> None:
    """Raise SpikeformError unless ``value`` is None or at least 1."""
    if value is not None and value < 1:
        raise SpikeformError(f"{name} must be at least 1, got {value}")


def quiet() -> None:
    """Stop transformers' warnings and progress bars: they would tear ours, and say nothing to act on."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).split("\n")[0]


def _more(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""
