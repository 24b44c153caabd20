import os
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

CONTEXT = 64
torch.set_num_threads(1)  # models this small lose more to a second thread than they gain


@pytest.fixture(scope="session")
def data():
    """The evaluation data folder, or a skip."""
    folder = Path(os.environ.get("SPIKEFORM_DATA", Path(__file__).parents[3] / "shared" / "data"))
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


def tiny_llama(context: int = CONTEXT) -> LlamaForCausalLM:
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


@pytest.fixture(scope="session")
def model():
    return tiny_llama()


@pytest.fixture(scope="session")
def wide_model():
    """One whose context holds any question of the zero-shot tasks, a token per byte."""
    return tiny_llama(context=1024)


@pytest.fixture(scope="session")
def ids():
    return torch.randint(0, 257, (331,), generator=torch.Generator().manual_seed(1))
