"""Text and tokenizers of the embedded reference models: reading, cleaning, encoding, caching.

The text lies outside the project, in the folder named by the environment variable SPIKEFORM_DATA.
"""

from __future__ import annotations

import json
import lzma
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

EOS, PAD = "<|endoftext|>", "<|pad|>"


def data_folder(folder: str | Path | None = None) -> Path:
    """Returns the data folder: the argument, else SPIKEFORM_DATA, else ../shared/data.

    Raises:
        FileNotFoundError: If there are no books in it.
    """
    found = Path(folder or os.environ.get("SPIKEFORM_DATA", "../shared/data"))
    if not (found / "books").is_dir():
        raise FileNotFoundError(f"no folder 'books' in {found}: set SPIKEFORM_DATA or pass --data")
    return found


def read_xz(path: Path) -> str:
    """Returns the text of one xz-compressed UTF-8 file."""
    return lzma.decompress(path.read_bytes()).decode("utf-8")


def detokenise_wikitext(text: str) -> str:
    """Turns WikiText's tokenised lines back into plain text.

    Paragraphs that hold the placeholder `<unk>` are left out: the words behind it are lost, and a model that
    learns to write "<unk>" does not write English. Titles keep their words and lose their equals signs.
    """
    paragraphs = []
    for raw in text.split("\n"):
        line = raw.strip()
        if not line or "<unk>" in line:
            continue
        line = re.sub(r"^(= )+|( =)+$", "", line)
        line = re.sub(r" @(.)@ ", r"\1", line)  # "10 @,@ 000" -> "10,000"; "tactical role @-@ playing"
        line = re.sub(r' " (.*?) "(?= |$)', r' "\1"', line)  # pairs of free-standing quotes
        line = re.sub(r'^" (.*?) "(?= |$)', r'"\1"', line)
        line = re.sub(r" ([.,;:!?%)\]])", r"\1", line)
        line = re.sub(r"([(\[$£]) ", r"\1", line)
        line = re.sub(r" ('(?:s|t|re|ve|ll|d|m)\b)", r"\1", line)
        line = re.sub(r" n't\b", "n't", line)
        line = re.sub(r"(\w) ' (?=\w)", r"\1' ", line)
        # A range of numbers gets a hyphen; any other dash is written as the books write it.
        ranges = re.search(r"\d – \d", line)
        line = re.sub(r" – (?=\d)", "-", line) if ranges else line.replace(" – ", " -- ")
        paragraphs.append(line)
    return "\n\n".join(paragraphs)


def training_documents(data: Path) -> Iterator[str]:
    """Yields the training documents: books, stories, and one long document of encyclopaedia articles."""
    for shard in sorted((data / "books").glob("train-*.txt.xz")):
        yield from read_xz(shard).split("\n\n\n\n")
    yield from json.loads((data / "tinystories" / "tinystories_1000.json").read_text(encoding="utf-8"))
    yield detokenise_wikitext(read_xz(data / "wikitext" / "wikitext103_train_prefix.tokens.xz"))


def held_out_text(data: Path, name: str) -> str:
    """Returns a held-out text as one string.

    Args:
        data: The data folder.
        name: "books" (books/valid.txt.xz as it is) or "wikitext" (WikiText-103 validation, detokenised).
    """
    if name == "books":
        return read_xz(data / "books" / "valid.txt.xz")
    return detokenise_wikitext(read_xz(data / "wikitext" / "wikitext103_valid.tokens.xz"))


def split_paragraphs(document: str) -> list[str]:
    """Splits a document after its blank lines.

    No merge crosses the end of a run of newlines, so the pieces may be encoded apart, on all cores at once,
    and give the ids of the whole.
    """
    return re.findall(r".+?\n{2,}|.+", document, flags=re.DOTALL)


def train_tokenizer(data: Path, vocab_size: int):
    """Trains a byte-level BPE tokenizer on the training documents.

    Returns:
        A PreTrainedTokenizerFast whose bos and eos are one token, with a padding token of its own.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    # GPT-2's own splitting would leave the last newline of a blank line apart: here a blank line is one
    # token.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\n+"), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    paragraphs = (piece for document in training_documents(data) for piece in split_paragraphs(document))
    tokenizer.train_from_iterator(paragraphs, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=EOS,
        eos_token=EOS,
        pad_token=PAD,
        clean_up_tokenization_spaces=False,
    )


def load_tokenizer(data: Path, cache: Path, vocab_size: int):
    """Returns the tokenizer of this vocabulary size, trained once and kept in the cache."""
    from transformers import AutoTokenizer

    folder = cache / f"tokenizer-{vocab_size}"
    if not (folder / "tokenizer.json").is_file():
        train_tokenizer(data, vocab_size).save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


def encode_training(data: Path, cache: Path, vocab_size: int) -> np.ndarray:
    """Returns the training documents as one stream of uint16 token ids, each followed by the eos token.

    The stream is encoded once and kept in the cache.
    """
    path = cache / f"train-{vocab_size}.npy"
    if path.is_file():
        return np.load(path, mmap_mode="r")
    tokenizer = load_tokenizer(data, cache, vocab_size)
    return encode_documents(tokenizer, training_documents(data), tokenizer.eos_token_id, path)


def encode_documents(tokenizer, documents: Iterable[str], end: int, path: Path) -> np.ndarray:
    """Encodes documents as one stream of uint16 token ids, each document followed by a token, and writes it."""
    backend = tokenizer.backend_tokenizer
    stream: list[np.ndarray] = []
    for document in documents:
        for encoding in backend.encode_batch_fast(split_paragraphs(document), add_special_tokens=False):
            stream.append(np.asarray(encoding.ids, dtype=np.uint16))
        stream.append(np.asarray([end], dtype=np.uint16))
    ids = np.concatenate(stream)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.stem}.{os.getpid()}.npy")  # several trainings may share the cache
    np.save(partial, ids)
    partial.replace(path)
    return ids


def encode_held_out(data: Path, tokenizer, name: str) -> tuple[np.ndarray, int]:
    """Returns a held-out text's token ids and its length in UTF-8 bytes."""
    text = held_out_text(data, name)
    ids = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids
    return np.asarray(ids, dtype=np.int64), len(text.encode("utf-8"))
