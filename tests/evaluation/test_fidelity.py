import copy
import json
import math

import pytest
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)

from spikeform.evaluation import classification_agreement, fidelity, perplexity
from spikeform.evaluation.fidelity import kl_divergence


def perturbed(model, noise, seed=0):
    """A copy whose weights are off by `noise` of their size."""
    generator = torch.Generator().manual_seed(seed)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for p in twin.parameters():
            p.add_(noise * p.std() * torch.randn(p.shape, generator=generator))
    return twin


def test_a_copy_is_perfectly_faithful(model, ids):
    result = fidelity(copy.deepcopy(model), model, ids, window=32)
    assert result.perplexity_ratio == 1
    assert result.perplexity == result.dense_perplexity
    assert result.kl == pytest.approx(0, abs=1e-12)
    assert result.top1_agreement == 1
    assert list(result.cosine) == ["model.layers.0", "model.layers.1", "final"]
    assert list(result.cosine.values()) == pytest.approx([1, 1, 1], abs=1e-6)
    assert (result.tokens, result.windows, result.window) == (310, 10, 32)
    assert json.loads(json.dumps(result.to_dict()))["cosine"] == result.cosine


def test_more_noise_is_less_faithful(model, ids):
    small, large = (fidelity(perturbed(model, noise), model, ids, window=32) for noise in (0.01, 0.1))
    assert 0 < small.kl < large.kl
    assert 1 > small.top1_agreement > large.top1_agreement
    for name in small.cosine:
        assert 1 > small.cosine[name] > large.cosine[name]
    assert small.dense_perplexity == large.dense_perplexity
    assert small.ratio_stderr < large.ratio_stderr


def test_numbers_are_those_of_each_model_alone_and_of_the_loop_by_hand(model, ids):
    twin = perturbed(model, 0.05)
    result = fidelity(twin, model, ids, window=64, batch_size=2)
    own, dense = perplexity(twin, ids, window=64), perplexity(model, ids, window=64)
    assert result.perplexity == pytest.approx(own.perplexity, rel=1e-6)
    assert result.dense_perplexity == pytest.approx(dense.perplexity, rel=1e-6)
    assert result.perplexity_ratio == pytest.approx(own.perplexity / dense.perplexity, rel=1e-6)
    assert (result.tokens, result.windows, result.protocol) == (own.tokens, own.windows, own.protocol)

    kl, same, cosine = [], [], {name: [] for name in result.cosine}
    for start in range(0, 320, 64):
        row = ids[None, start : start + 64]
        with torch.no_grad():
            a, b = (m(row, output_hidden_states=True) for m in (model, twin))
        p, q = a.logits[0, :-1].double().softmax(-1), b.logits[0, :-1].double().softmax(-1)
        kl += (p * (p / q).log()).sum(-1).tolist()
        same += (a.logits[0, :-1].argmax(-1) == b.logits[0, :-1].argmax(-1)).tolist()
        for name, x, y in [
            ("model.layers.0", a.hidden_states[1], b.hidden_states[1]),
            ("final", a.hidden_states[-1], b.hidden_states[-1]),
        ]:
            cosine[name] += torch.cosine_similarity(x[0].double(), y[0].double(), dim=-1).tolist()
    assert result.kl == pytest.approx(sum(kl) / len(kl), rel=1e-6)
    assert result.top1_agreement == pytest.approx(sum(same) / len(same))
    for name in ("model.layers.0", "final"):
        assert result.cosine[name] == pytest.approx(sum(cosine[name]) / 320, abs=1e-6)


def test_expected_log_ratio_on_own_samples_is_kl(model):
    """The reason why sampled data may be measured on: there the log of the ratio estimates the divergence."""
    from spikeform.evaluation import sample_ids

    result = fidelity(perturbed(model, 0.05), model, sample_ids(model, 3200, window=64, batch_size=50), window=64)
    log_ratio, error = math.log(result.perplexity_ratio), result.ratio_stderr / result.perplexity_ratio
    assert abs(log_ratio - result.kl) < 4 * error
    assert log_ratio > 4 * error  # never better than the model that wrote the text


def test_kl_stays_exact_where_float32_does_not(model):
    logits = torch.randn(4, 8192, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3
    log_p = logits.log_softmax(-1)
    log_q = (logits + 1e-4 * torch.randn(4, 8192, generator=torch.Generator().manual_seed(1))).log_softmax(-1)
    expected = [math.fsum((p.exp() * (p - q)).tolist()) for p, q in zip(log_p, log_q, strict=True)]
    assert kl_divergence(log_p, log_q).tolist() == pytest.approx(expected, rel=1e-6)
    impossible = torch.tensor([[0.0, -math.inf]], dtype=torch.float64)
    assert kl_divergence(impossible, impossible.clone()).item() == 0
    assert kl_divergence(torch.tensor([[0.5, 0.5]]).log(), impossible.float()).item() == math.inf


def test_max_tokens_takes_whole_windows_from_the_front(model, ids):
    twin = perturbed(model, 0.05)
    assert fidelity(twin, model, ids, window=32, max_tokens=100) == fidelity(twin, model, ids[:96], window=32)


def test_hooks_are_gone_afterwards(model, ids):
    def hooks():
        return [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in (*model.modules(), *twin.modules())]

    twin = copy.deepcopy(model)
    for m in (model, twin):
        m(ids[None, :8], output_hidden_states=True)  # transformers adds hooks of its own on first use
    before = hooks()
    fidelity(twin, model, ids, window=32)
    assert hooks() == before


FAMILIES = {
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=100, n_embd=64, n_layer=3, n_head=4, n_positions=64)
    ),
    "opt": lambda: OPTForCausalLM(
        OPTConfig(
            vocab_size=100, hidden_size=64, word_embed_proj_dim=32, ffn_dim=96, num_hidden_layers=3,
            num_attention_heads=4, max_position_embeddings=64,
        )
    ),
    "gpt_neox": lambda: GPTNeoXForCausalLM(
        GPTNeoXConfig(
            vocab_size=100, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
            max_position_embeddings=64,
        )
    ),
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_families(family):
    torch.manual_seed(0)
    dense = FAMILIES[family]().eval()
    result = fidelity(perturbed(dense, 0.3), dense, torch.randint(0, 100, (128,)), window=32)
    assert len(result.cosine) == 4
    assert all(0 < value < 0.9999 for value in result.cosine.values())
    assert result.kl > 0


def test_the_same_object_twice_is_an_error(model, ids):
    with pytest.raises(ValueError, match="same object, as convert works in place"):
        fidelity(model, model, ids, window=32)


def test_models_that_do_not_belong_together_are_an_error(model, ids):
    small = FAMILIES["gpt2"]()
    with pytest.raises(ValueError, match="3 decoder blocks, dense 2"):
        fidelity(small, model, ids % 100, window=32)
    other = FAMILIES["opt"]()
    other.set_output_embeddings(torch.nn.Linear(32, 90))
    with pytest.raises(ValueError, match="predicts 90 tokens, dense 100"):
        fidelity(other, small, ids % 90, window=32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"window": 65}, "context of 64 tokens"),
        ({"ids": torch.arange(10)}, "fewer than one window"),
        ({"ids": torch.zeros(0, dtype=torch.long)}, "empty"),
        ({"max_tokens": 31}, "less than one window of 32"),
        ({"batch_size": 0}, "batch_size is 0"),
    ],
)
def test_bad_input_is_one_clear_error(model, ids, change, message):
    arguments = {"ids": ids, "window": 32} | change
    with pytest.raises(ValueError, match=message):
        fidelity(copy.deepcopy(model), model, arguments.pop("ids"), **arguments)


@pytest.fixture
def bert():
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=100, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96,
        max_position_embeddings=64, num_labels=3, initializer_range=0.3,
    )  # fmt: skip
    return BertForSequenceClassification(config).eval()


def batches(labelled=True, count=3):
    generator = torch.Generator().manual_seed(0)
    for _ in range(count):
        batch = {"input_ids": torch.randint(0, 100, (8, 12), generator=generator)}
        batch["attention_mask"] = torch.ones(8, 12, dtype=torch.long)
        if labelled:
            batch["labels"] = torch.randint(0, 3, (8,), generator=generator)
        yield batch


def test_classification(bert):
    same = classification_agreement(copy.deepcopy(bert), bert, batches())
    assert (same.agreement, same.kl, same.examples) == (1, 0, 24)
    assert same.accuracy == same.dense_accuracy
    twin = perturbed(bert, 0.6)
    other = classification_agreement(twin, bert, batches())
    assert 0 < other.agreement < 1
    assert other.kl > 0
    logits = {m: torch.cat([m(b["input_ids"]).logits for b in batches()]) for m in (bert, twin)}
    labels = torch.cat([b["labels"] for b in batches()])
    assert other.agreement == (logits[bert].argmax(-1) == logits[twin].argmax(-1)).double().mean().item()
    assert other.accuracy == (logits[twin].argmax(-1) == labels).double().mean().item()
    assert classification_agreement(twin, bert, batches(labelled=False)).accuracy is None


def test_classification_errors(bert, model):
    with pytest.raises(ValueError, match="same object"):
        classification_agreement(bert, bert, batches())
    with pytest.raises(ValueError, match="batches is empty"):
        classification_agreement(copy.deepcopy(bert), bert, [])
    with pytest.raises(ValueError, match="8 of 16 examples have labels"):
        classification_agreement(copy.deepcopy(bert), bert, [*batches(True, 1), *batches(False, 1)])
    with pytest.raises(ValueError, match="use fidelity"):
        classification_agreement(copy.deepcopy(model), model, batches(False))
    with pytest.raises(ValueError, match="use classification_agreement"):
        fidelity(copy.deepcopy(bert), bert, torch.arange(64), window=32)
