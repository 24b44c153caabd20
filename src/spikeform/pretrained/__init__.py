"""The embedded reference models: small language models that come with the project and need no download.

`CARD.md` beside this file says what they were trained on, how, and what they reach. Each folder is a plain
Hugging Face folder: `AutoModelForCausalLM.from_pretrained(spikeform.pretrained.path("llama"))`. "bert" predicts
masked words (`AutoModelForMaskedLM`), and "bert-sst2" whether a sentence of a film review is negative or positive
(`AutoModelForSequenceClassification`); the others write text, "mamba2" without attention.
"""

from __future__ import annotations

from pathlib import Path

CAUSAL = ("llama", "gpt2", "opt")  # transformers that write
STATE_SPACE = ("mamba2",)
ALL = (*CAUSAL, *STATE_SPACE, "bert", "bert-sst2")
BARE = ("llama", "opt", "mamba2")  # what these names mean without the prefix, too
PREFIX = "pretrained:"
_HERE = Path(__file__).parent


def names() -> list[str]:
    """Returns the names of the embedded models that this installation holds."""
    return [name for name in ALL if (_HERE / name / "config.json").is_file()]


def path(name: str = "llama") -> Path:
    """Returns the folder of an embedded model.

    Args:
        name: One of `names()`.

    Raises:
        ValueError: If there is no such model, or this installation does not hold it.
    """
    here = names()
    if name in here:
        return _HERE / name
    held = f"embedded here: {', '.join(here) or 'none'}"
    if name in ALL:
        raise ValueError(
            f"the reference model {name!r} is not part of this installation ({held}): it lies in the "
            f"project's repository, under src/spikeform/pretrained/{name}"
        )
    raise ValueError(f"no reference model is named {name!r} ({held})")


def resolve(model: str) -> str:
    """Turns the name of an embedded model into its folder, and leaves every other model alone.

    "pretrained:NAME" always means the embedded model. A bare NAME means it too, unless a path of that name
    exists, or the name already means another model elsewhere: "gpt2" alone is OpenAI's GPT-2 on the Hugging
    Face Hub, and "bert" is what everybody calls Google's, so these are only "pretrained:gpt2",
    "pretrained:bert" and "pretrained:bert-sst2".

    Raises:
        ValueError: If the embedded model that is named is not here.
    """
    if model.startswith(PREFIX):
        return str(path(model.removeprefix(PREFIX)))
    if model in BARE and not Path(model).exists():
        return str(path(model))
    return model
