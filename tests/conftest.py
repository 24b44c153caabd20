"""What all tests share: one thread, no network, the data folder, a tokenizer and a tiny model.

The helper modules of this folder and of tests/checkpoint are importable by name: see pyproject.toml.
"""

import os

# Before torch and the Hugging Face libraries are imported, which read these once.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # waiting threads must not spin: tests run side by side
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"

from importlib import import_module
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

# Results must not depend on the machine, and models this small lose more to a second thread than they gain.
torch.set_num_threads(1)
ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="session")
def data_root():
    """The evaluation data folder, or a skip."""
    folder = Path(os.environ.get("SPIKEFORM_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no evaluation data at {folder}: set SPIKEFORM_DATA")
    return folder


@pytest.fixture(scope="session")
def tokenizer():
    """A tokenizer with a token per byte, and one for begin, end and padding."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<|end|>": 0} | {letter: i + 1 for i, letter in enumerate(letters)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = {"bos_token": "<|end|>", "eos_token": "<|end|>", "pad_token": "<|end|>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


@pytest.fixture(scope="session")
def tiny_llama():
    """Makes a tiny random llama for ``tokenizer``: ``tiny_llama(context=64)``, the same one each time."""

    def make(context: int = 64) -> LlamaForCausalLM:
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=257,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=context,
            initializer_range=0.2,
            bos_token_id=0,
            eos_token_id=0,
            pad_token_id=0,
        )
        return LlamaForCausalLM(config).eval()

    return make


@pytest.fixture(params=["no library", 0, 1, 2])
def machine(request, monkeypatch):
    """Runs a test on PyTorch's operations, and on each instruction set that this machine has."""
    native = import_module("spikeform.native.library")  # the package has a function of this name
    native.function.cache_clear()
    before = native.level()
    if request.param == "no library":
        monkeypatch.setattr(native, "_load", lambda: (None, "none is wanted"))
        native.function.cache_clear()
    elif native.level(request.param) != request.param:
        native.level(before)
        pytest.skip("this machine, or its library, has no such instruction set")
    yield request.param
    monkeypatch.undo()
    native.function.cache_clear()
    native.level(before)
