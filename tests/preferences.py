"""A tiny Mamba, a tokenizer of words, and texts in which each word mostly follows from the one before it."""

from __future__ import annotations

import random

import torch
from transformers import Mamba2Config, Mamba2ForCausalLM, MambaConfig, MambaForCausalLM, PreTrainedTokenizerFast

import spikeform

WORDS = 60
_IDS = {"bos_token_id": WORDS, "eos_token_id": WORDS, "pad_token_id": WORDS}


def tokenizer():
    """One token a word, ``w0`` to ``w59``, and one that ends."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {f"w{i}": i for i in range(WORDS)} | {"<end>": WORDS}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<end>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<end>", eos_token="<end>", pad_token="<end>")


def dense(family="mamba2"):
    """The same one each time."""
    torch.manual_seed(0)
    sizes = {"vocab_size": WORDS + 1, "hidden_size": 32, "num_hidden_layers": 2, "initializer_range": 0.3, **_IDS}
    if family == "mamba":
        return MambaForCausalLM(MambaConfig(state_size=8, **sizes)).eval()
    heads = {"head_dim": 16, "num_heads": 4, "n_groups": 1, "chunk_size": 16, "state_size": 16}
    return Mamba2ForCausalLM(Mamba2Config(**sizes, **heads, expand=2, tie_word_embeddings=True)).eval()


def spiking(family="mamba2", **options):
    """A conversion of it, not trained."""
    ids = torch.randint(WORDS, (2, 32), generator=torch.Generator().manual_seed(1))
    return spikeform.convert(dense(family), spikeform.SpikingMamba(**options), ids)


def texts(count=40, length=40, seed=0):
    """Documents of ``length`` words."""
    rng, found = random.Random(seed), []
    for _ in range(count):
        said = [rng.randrange(WORDS)]
        while len(said) < length:
            said.append((said[-1] * 7 + 3) % WORDS if rng.random() < 0.8 else rng.randrange(WORDS))
        found.append(" ".join(f"w{i}" for i in said))
    return found
