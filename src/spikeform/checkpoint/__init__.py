"""Checkpoints: a converted model on disk, saved whole or not at all, and never read without being checked.

A checkpoint is an ordinary Hugging Face folder plus one file, ``spikeform.json``, that says what the folder
must hold:

    save(model, path, tokenizer)     write beside ``path``, check, then put it in place in one step
    verify(path)                     compare every file and every tensor with the manifest
    load(path)                       verify, then load with no key missing, unexpected or misshapen

``model.save_pretrained(path)`` works too and loads through AutoModel; it is not atomic and has no manifest,
so ``verify`` can only check there what the folder says of itself (see ``verify``).
"""

from spikeform.checkpoint.atomic import recover
from spikeform.checkpoint.loading import load
from spikeform.checkpoint.manifest import FORMAT_VERSION, MANIFEST_NAME, Manifest, read_manifest
from spikeform.checkpoint.paths import assert_model_path, is_converted
from spikeform.checkpoint.saving import save
from spikeform.checkpoint.verification import VerifyReport, verify

__all__ = [
    "FORMAT_VERSION",
    "MANIFEST_NAME",
    "Manifest",
    "VerifyReport",
    "assert_model_path",
    "is_converted",
    "load",
    "read_manifest",
    "recover",
    "save",
    "verify",
]
