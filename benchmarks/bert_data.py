"""Tokenizer and text of the embedded BERT, and the sentences of SST-2.

The same text as the other reference models read (see reference_data.py), and the training sentences of SST-2
without their labels, so that words of film reviews have a place in the vocabulary.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import reference_data as text

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
REPEATED = 4  # times each sentence of SST-2 is in the text: it is 0.6% of it then
HELD_OUT, LEAST_WORDS = 800, 8


def sst2(data: Path, part: str) -> tuple[list[str], list[int]]:
    """Returns sentences and labels of "train" or of "test", the 872 sentences of the official development set."""
    path = data / "glue" / "SST-2" / ("train.tsv.xz" if part == "train" else "test.tsv")
    lines = (text.read_xz(path) if part == "train" else path.read_text(encoding="utf-8")).split("\n")
    rows = [line.split("\t") for line in lines[1:] if line.strip()]  # after the header: sentence, label
    return [" ".join(sentence.split()) for sentence, _ in rows], [int(label) for _, label in rows]


def spans(sentence: str) -> Iterator[str]:
    """Yields every run of words of a sentence."""
    words = sentence.split()
    for first in range(len(words)):
        for last in range(first + 1, len(words) + 1):
            yield " ".join(words[first:last])


def whole_sentences(phrases: Iterable[str]) -> list[str]:
    """Returns the phrases that lie in no longer one: SST-2 trains on every phrase of a sentence's parse."""
    seen: set[str] = set()
    whole = []
    for phrase in sorted(set(phrases), key=lambda p: (-len(p.split()), p)):
        if phrase not in seen:
            whole.append(phrase)
            seen.update(spans(phrase))
    return whole


def split_sst2(texts: list[str], labels: list[int], seed: int = 0) -> tuple[list[int], list[int]]:
    """Splits SST-2's training set so that the held-out sentences share no phrase with the rest.

    The held-out sentences are whole ones of at least 8 words. What trains is every phrase that is not part of
    a held-out sentence; those of fewer than 4 words ("a good film") train in any case.

    Returns:
        Indices that train, and indices held out.
    """
    whole = [s for s in whole_sentences(texts) if len(s.split()) >= LEAST_WORDS]
    held = set(random.Random(seed).sample(whole, min(HELD_OUT, len(whole) // 4)))
    inside = {span for sentence in held for span in spans(sentence)}
    train = [i for i, t in enumerate(texts) if t not in held and (len(t.split()) < 4 or t not in inside)]
    return train, [i for i, t in enumerate(texts) if t in held]


def training_documents(data: Path) -> Iterator[str]:
    """Yields the training documents: those of the other models, and SST-2's sentences in a few orders."""
    yield from text.training_documents(data)
    sentences = whole_sentences(sst2(data, "train")[0])
    for order in range(REPEATED):
        yield "\n\n".join(random.Random(order).sample(sentences, len(sentences)))


def train_tokenizer(data: Path, vocab_size: int):
    """Trains a lower-casing WordPiece tokenizer on the training documents.

    Returns:
        A PreTrainedTokenizerFast that wraps a sequence in [CLS] … [SEP]. It reads tokenised text as plain
        text: "it 's" is "it's", "do n't" is "don't", and `` and '' are quotes.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Sequence(
        [
            normalizers.Replace(Regex(" n't\\b"), "n't"),
            normalizers.Replace(Regex("``|''"), '"'),
            normalizers.BertNormalizer(lowercase=True),
        ]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size, special_tokens=list(SPECIAL), limit_alphabet=200, show_progress=False
    )
    paragraphs = (piece for document in training_documents(data) for piece in text.split_paragraphs(document))
    tokenizer.train_from_iterator(paragraphs, trainer)
    cls, sep = (tokenizer.token_to_id(token) for token in ("[CLS]", "[SEP]"))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", cls), ("[SEP]", sep)],
    )
    names = {f"{token[1:-1].lower()}_token": token for token in SPECIAL}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **names)


def load_tokenizer(data: Path, cache: Path, vocab_size: int):
    """Returns the tokenizer of this vocabulary size, trained once and kept in the cache."""
    from transformers import PreTrainedTokenizerFast

    folder = cache / f"wordpiece-{vocab_size}"
    if not (folder / "tokenizer.json").is_file():
        train_tokenizer(data, vocab_size).save_pretrained(folder)
    return PreTrainedTokenizerFast.from_pretrained(folder)


def encode_training(data: Path, cache: Path, vocab_size: int) -> np.ndarray:
    """Returns the training documents as one stream of uint16 ids, each followed by [SEP]; kept in the cache."""
    path = cache / f"train-wordpiece-{vocab_size}.npy"
    if path.is_file():
        return np.load(path, mmap_mode="r")
    tokenizer = load_tokenizer(data, cache, vocab_size)
    return text.encode_documents(tokenizer, training_documents(data), tokenizer.sep_token_id, path)


encode_held_out = text.encode_held_out
