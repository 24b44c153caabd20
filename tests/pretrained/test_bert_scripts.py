"""What the training scripts of the embedded BERT promise: masks, and a clean split of SST-2."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

TOKENIZER = SimpleNamespace(mask_token_id=4, cls_token_id=2, sep_token_id=3)


@pytest.fixture
def scripts(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(Path(__file__).resolve().parents[2] / "benchmarks"), *sys.path])
    import bert_data
    import bert_masked

    return bert_data, bert_masked


def test_mask(scripts):
    _, masked = scripts
    ids = torch.randint(5, masked.VOCABULARY, (400, masked.WINDOW), generator=torch.Generator().manual_seed(1))
    rows, positions, targets = masked.mask(ids, torch.Generator().manual_seed(0), TOKENIZER)
    plain = torch.nn.functional.pad(ids, (1, 1))
    assert rows[:, 0].eq(2).all()
    assert rows[:, -1].eq(3).all()
    assert all(len(set(row)) == masked.PREDICTED == 19 for row in positions.tolist())
    assert torch.equal(targets, plain.gather(1, positions))
    outside = torch.ones_like(rows, dtype=torch.bool).scatter(1, positions, False)
    outside[:, 0] = outside[:, -1] = False
    assert torch.equal(rows[outside], plain[outside])
    shown = rows.gather(1, positions)
    shares = [(shown == 4).float().mean(), (shown == targets).float().mean()]
    assert shares == [pytest.approx(0.8, abs=0.02), pytest.approx(0.1, abs=0.02)]
    again = masked.mask(ids, torch.Generator().manual_seed(0), TOKENIZER)
    other = masked.mask(ids, torch.Generator().manual_seed(1), TOKENIZER)
    assert torch.equal(again[0], rows)
    assert not torch.equal(other[0], rows)


def test_held_out_rows_keep_their_masks(scripts):
    _, masked = scripts
    torch.manual_seed(0)
    model = masked.build(pad=0).eval()
    ids = torch.randint(5, masked.VOCABULARY, (5 * masked.WINDOW + 7,)).numpy()
    whole = masked.held_out(model, ids, TOKENIZER, "cpu")
    first = masked.held_out(model, ids, TOKENIZER, "cpu", every=5)
    assert (whole["windows"], first["windows"]) == (5, 1)
    assert whole["predicted_tokens"] == 5 * masked.PREDICTED
    assert 8 < whole["nats_per_token"] < 10  # an untrained model: about log 8192 = 9.01
    assert masked.held_out(model, ids, TOKENIZER, "cpu", batch=2) == pytest.approx(whole, rel=1e-4)


@torch.no_grad()
def test_the_head_runs_at_the_predicted_positions_alone(scripts):
    _, masked = scripts
    torch.manual_seed(0)
    model = masked.build(pad=0).eval()
    ids = torch.randint(5, masked.VOCABULARY, (2, masked.WINDOW))
    rows, positions, _ = masked.mask(ids, torch.Generator().manual_seed(0), TOKENIZER)
    everywhere = model(rows).logits
    expected = torch.stack([everywhere[i, positions[i]] for i in range(2)])
    assert torch.allclose(masked.predict(model, rows, positions), expected, atol=1e-5)


def test_whole_sentences(scripts):
    data, _ = scripts
    assert data.whole_sentences(["b c", "a b c d", "d e", "c", "d e"]) == ["a b c d", "d e"]


def test_held_out_sentences_share_no_phrase_with_what_trains(scripts, data_root):
    data, _ = scripts
    texts, labels = data.sst2(data_root, "train")
    train, held = data.split_sst2(texts, labels)
    kept = [texts[i] for i in held]
    assert len(held) >= data.HELD_OUT
    assert all(len(sentence.split()) >= data.LEAST_WORDS for sentence in kept)
    joined = "\n".join(f" {sentence} " for sentence in kept)
    assert not [texts[i] for i in train[::10] if len(texts[i].split()) >= 4 and f" {texts[i]} " in joined]
    assert len(train) > 50_000
    assert data.split_sst2(texts, labels) == (train, held)


def test_test_sentences(scripts, data_root):
    data, _ = scripts
    texts, labels = data.sst2(data_root, "test")
    assert len(texts) == 872
    assert set(labels) == {0, 1}


@pytest.fixture
def finetune(scripts):
    import bert_finetune

    return bert_finetune


def test_batches_hold_sentences_alike_in_length(finetune):
    lengths = torch.randint(3, 60, (210,), generator=torch.Generator().manual_seed(0))
    ids = torch.arange(60).expand(210, -1)
    sentences = finetune.Sentences(ids, lengths, torch.zeros(210, dtype=torch.long))
    first, again = (sentences.epoch(10, torch.Generator().manual_seed(1)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert torch.equal(torch.cat(first).sort().values, torch.arange(210))
    assert sum(int(lengths[rows].max() - lengths[rows].min()) for rows in first) / 21 < 6
    taken, mask, _ = sentences.take(first[0])
    assert taken.shape == mask.shape == (10, int(lengths[first[0]].max()))
    assert torch.equal(mask.sum(1), lengths[first[0]])
    assert len(sentences.epoch(100, torch.Generator())) == 2  # a last part of a batch is left out


def test_a_loss_that_is_no_number_saves_nothing(finetune, tmp_path):
    from transformers import BertConfig, BertForMaskedLM

    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    model = BertForMaskedLM(BertConfig(vocab_size=32, max_position_embeddings=16, **size))
    torch.nn.init.constant_(model.bert.embeddings.LayerNorm.weight, torch.nan)
    model.save_pretrained(tmp_path)
    ids = torch.randint(5, 32, (8, 6))
    part = finetune.Sentences(ids, torch.full((8,), 6), torch.tensor([0, 1] * 4))
    chosen = {"init": tmp_path, "epochs": 1, "steps": 2, "evaluations": 1, "batch_size": 4, "weight_decay": 0.1}
    arguments = SimpleNamespace(**chosen, dropout=0.1, hide=0.1)
    with pytest.raises(SystemExit, match="no number any more at step 2"):
        finetune.run(arguments, TOKENIZER, {"train": part, "held_out": part}, 1e-3, 0, "cpu")
