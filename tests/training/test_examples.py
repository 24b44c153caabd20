import numpy as np
import pytest
import torch

from spikeform.training import TrainingError
from spikeform.training.examples import (
    IGNORED,
    MaskedWindows,
    Sentences,
    Stream,
    Windows,
    held_out_batches,
    keys_of,
    uniform,
)
from spikeform.training.tokens import from_ids


@pytest.fixture
def masking(tokenizer):
    """The tokenizer, with BERT's special tokens."""
    import copy

    masking = copy.deepcopy(tokenizer)
    masking.add_special_tokens({"cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"})
    return masking


def everything(examples):
    numbers = np.arange(examples.count)
    return examples.batch(numbers, np.zeros_like(numbers), keys_of(0, numbers))


def test_windows_predict_the_next_token():
    batch = everything(Windows(from_ids(torch.arange(23)), 5))
    assert batch["input_ids"].tolist() == torch.arange(20).view(4, 5).tolist()
    assert batch["labels"][1].tolist() == [6, 7, 8, 9, IGNORED]


def test_an_epoch_visits_every_window_once_and_the_next_in_another_order():
    stream = Stream(Windows(from_ids(torch.arange(100)), 10), 20, seed=3)
    first, second = (stream.__getitems__(list(range(a, a + 10)))["input_ids"] for a in (0, 10))
    for epoch in (first, second):
        begins = sorted(epoch[:, 0].tolist())
        assert [b - begins[0] for b in begins[:-1]] == list(range(0, 90, 10))
        assert begins[-1] == 90  # moved back so that it ends with the text
        assert torch.equal(epoch - epoch[:, :1], torch.arange(10).expand(10, 10))
    assert first.tolist() != second.tolist()


def test_a_sequence_follows_from_its_number_alone(masking):
    examples = MaskedWindows(from_ids(torch.arange(1, 200)), 20, masking)
    stream = Stream(examples, 60, seed=1)
    whole = stream.__getitems__(list(range(60)))
    for part in ([30, 31], [2, 58], [0]):
        again = Stream(examples, 60, seed=1).__getitems__(part)
        assert all(torch.equal(again[name], whole[name][part]) for name in whole)
    other = Stream(examples, 60, seed=2).__getitems__(list(range(60)))
    assert not torch.equal(other["input_ids"], whole["input_ids"])


def test_masks(masking):
    ids = torch.randint(1, 257, (40_002,), generator=torch.Generator().manual_seed(0))
    batch = everything(MaskedWindows(from_ids(ids), 102, masking))
    inputs, labels = batch["input_ids"], batch["labels"]
    assert (inputs[:, 0] == masking.cls_token_id).all()
    assert (inputs[:, -1] == masking.sep_token_id).all()
    predicted = labels != IGNORED
    assert (predicted.sum(1) == 15).all()
    plain = torch.where(predicted, labels, inputs)[:, 1:-1]
    assert torch.equal(plain.reshape(-1), ids[: plain.numel()])
    shares = [
        (inputs == masking.mask_token_id)[predicted].float().mean(),
        (inputs == labels)[predicted].float().mean(),
    ]
    assert shares[0] == pytest.approx(0.8, abs=0.02)
    assert shares[1] == pytest.approx(0.1, abs=0.02)
    assert predicted.float().mean(0)[1:-1].std() < 0.03  # any place is as likely as another


def test_random_numbers_are_even():
    drawn = uniform(keys_of(5, np.arange(1000)), 100)
    assert drawn.min() >= 0
    assert drawn.max() < 1
    assert drawn.mean() == pytest.approx(0.5, abs=0.005)
    assert np.abs(np.corrcoef(drawn[:, :20].T) - np.eye(20)).max() < 0.15


def test_sentences_are_padded_to_the_longest_of_their_batch(tokenizer):
    examples = Sentences(["ab", "c", "defgh"], [0, 1, 1], tokenizer, 4, 2)
    batch = examples.batch(np.array([1, 0]), np.zeros(2), np.zeros(2))
    assert batch["input_ids"].tolist() == [[tokenizer("c")["input_ids"][0], 0], tokenizer("ab")["input_ids"]]
    assert batch["attention_mask"].tolist() == [[1, 0], [1, 1]]
    assert batch["labels"].tolist() == [1, 0]
    assert everything(examples)["input_ids"].shape == (3, 4)  # cut


def test_held_out_is_read_whole_by_any_number_of_devices():
    examples = Windows(from_ids(torch.arange(70)), 10)
    alone = [b["input_ids"] for b in held_out_batches(examples, 2)]
    parts = [list(held_out_batches(examples, 2, rank, 2)) for rank in range(2)]
    assert [len(part) for part in parts] == [2, 2]
    shared = [b["input_ids"] for pair in zip(*parts, strict=True) for b in pair if b is not None]
    assert torch.equal(torch.cat(alone), torch.cat(shared))
    assert len(list(held_out_batches(Windows(from_ids(torch.arange(20)), 10), 2, 1, 2))) == 1


def test_too_little(tokenizer):
    with pytest.raises(TrainingError, match="9 tokens, fewer than one window of 10"):
        Windows(from_ids(torch.arange(9)), 10)
    with pytest.raises(TrainingError, match="no cls token"):
        MaskedWindows(from_ids(torch.arange(99)), 10, tokenizer)
    with pytest.raises(TrainingError, match="a label 2, but the model knows only 2"):
        Sentences(["a"], [2], tokenizer, 8, 2)
