import math

import pytest
import torch

from spikeform.evaluation import perplexity


def by_hand(model, ids, window, stride, first):
    """Sum and count of -log p of every scored token, one forward and one token at a time."""
    total, count = 0.0, 0
    for number, start in enumerate(range(0, len(ids) - window + 1, stride)):
        row = ids[start : start + window]
        with torch.no_grad():
            p = model(row[None]).logits[0].double().softmax(-1)
        for i in range(1 if number == 0 else first, window):
            total -= math.log(p[i - 1, row[i]].item())
            count += 1
    return total, count


@pytest.mark.parametrize("window", [2, 10, 32, 64])
def test_perplexity_is_the_loop_written_by_hand(model, ids, window):
    total, count = by_hand(model, ids, window, window, 1)
    result = perplexity(model, ids, window=window)
    assert result.nats == pytest.approx(total / count, rel=1e-6)
    assert result.perplexity == pytest.approx(math.exp(total / count), rel=1e-5)
    assert result.tokens == count == (331 // window) * (window - 1)
    assert (result.windows, result.window) == (331 // window, window)
    assert result.protocol.startswith(f"gptq: non-overlapping windows of {window} tokens, {window - 1} predictions")
    assert result.stderr > 0


def test_strided_windows_score_each_token_once(model, ids):
    total, count = by_hand(model, ids, 32, 8, 24)
    result = perplexity(model, ids, window=32, stride=8)
    assert result.nats == pytest.approx(total / count, rel=1e-6)
    assert result.tokens == count == 31 + 8 * (result.windows - 1)
    assert "every 8" in result.protocol
    assert not result.protocol.startswith("gptq")


def test_an_incomplete_last_window_is_dropped(model, ids):
    assert perplexity(model, ids[:329], window=32) == perplexity(model, ids[:320], window=32)
    assert perplexity(model, ids[:321], window=32).nats != perplexity(model, ids[1:321], window=32, stride=32).nats


def test_the_first_token_of_a_window_is_context_only(model, ids):
    """With a window of 2 each second token is scored, after the one before it alone."""
    a = ids[:4].clone()
    separate = [perplexity(model, a[i : i + 2], window=2).nats for i in (0, 2)]
    assert perplexity(model, a, window=2).nats == pytest.approx(sum(separate) / 2, rel=1e-6)


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_batch_size_and_shape_do_not_matter(model, ids, batch_size):
    expected = perplexity(model, ids[:320], window=32).nats
    assert perplexity(model, ids[:320], window=32, batch_size=batch_size).nats == pytest.approx(expected, rel=1e-6)
    assert perplexity(model, ids[:320].reshape(10, 32), window=32).nats == expected


def test_dropout_is_off_and_the_mode_restored(model, ids):
    expected = perplexity(model, ids, window=32).nats
    model.config.attention_dropout = 0.5
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    model.train()
    try:
        assert perplexity(model, ids, window=32).nats == expected
        assert model.training
    finally:
        model.eval()


def test_one_window_has_no_standard_error(model, ids):
    assert math.isnan(perplexity(model, ids[:64], window=64).stderr)


def test_to_dict_is_plain(model, ids):
    result = perplexity(model, ids, window=32).to_dict()
    assert set(result) == {"perplexity", "nats", "stderr", "tokens", "windows", "window", "protocol"}
    assert all(isinstance(v, (int, float, str)) for v in result.values())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"window": 65}, "window 65 is longer than the model's context of 64 tokens: pass window=64"),
        ({"ids": torch.arange(31)}, "31 tokens, fewer than one window of 32"),
        ({"ids": torch.zeros(0, dtype=torch.long)}, "ids is empty"),
        ({"ids": torch.zeros(64)}, "integer tensor"),
        ({"ids": [1, 2, 3]}, "integer tensor"),
        ({"ids": torch.full((64,), 257)}, "ids hold 257, outside the model's vocabulary of 257"),
        ({"ids": torch.full((64,), -100)}, "ids hold -100"),
        ({"window": 1}, "predicts nothing"),
        ({"window": True}, "whole number"),
        ({"window": 8.0}, "whole number"),
        ({"stride": 33}, "between 1 and the window"),
        ({"stride": 0}, "between 1 and the window"),
        ({"batch_size": 0}, "batch_size is 0"),
    ],
)
def test_bad_input_is_one_clear_error(model, ids, change, message):
    arguments = {"ids": ids, "window": 32} | change
    with pytest.raises(ValueError, match=message):
        perplexity(model, arguments.pop("ids"), **arguments)
