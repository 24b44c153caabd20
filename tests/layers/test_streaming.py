"""Time around a model: what goes in and comes out besides logits, training through the streams, other ways to run."""

import copy

import pytest
import torch
from transformers import LlamaConfig, LlamaForSequenceClassification

import families
import spikeform
from families import close, difference
from spikeform.errors import SpikeformError
from spikeform.layers.streaming import average, clock_of, paused, repeat, running, steps_of
from spikeform.neurons import StreamingNeuron

IDS = families.tokens(rows=3, length=10)


def converted(family, wide=True, **options):
    model = families.build(family)
    model = model.double() if wide else model
    config = spikeform.FAS(**{"steps": 4, "levels": 4, **options})
    return spikeform.convert(model, config, families.tokens(rows=6, length=20, seed=5))


def test_streams_of_a_row_lie_side_by_side():
    x = torch.arange(6.0).view(3, 2)
    assert repeat(x, 2).tolist() == [[0, 1], [0, 1], [2, 3], [2, 3], [4, 5], [4, 5]]
    assert torch.equal(average(repeat(x, 5), 5), x)


def test_steps_of_a_model():
    model = converted("gpt2")
    assert steps_of(model) == 4
    with running(model, 9):
        assert steps_of(model) == 9
        with paused(model):
            assert steps_of(model) == 0
    assert steps_of(model) == 4
    with pytest.raises(ZeroDivisionError), running(model, 2):
        raise ZeroDivisionError
    assert steps_of(model) == 4
    dense = families.build("gpt2")
    assert clock_of(dense) is None
    assert steps_of(dense) == 0
    with running(dense, 3):
        assert dense(input_ids=IDS).logits.shape[0] == 3


@pytest.mark.parametrize("family", ["gpt2", "opt", "llama", "bert", "bert_mlm"])
@pytest.mark.parametrize("sites", ["feed_forward", "all"])
def test_hidden_states_and_attentions_are_means_over_the_streams(family, sites):
    model = converted(family, sites=sites)
    model.set_attn_implementation("eager")
    wanted = {"output_hidden_states": True, "output_attentions": True}
    with torch.no_grad():
        found, plain = model(input_ids=IDS, **wanted), model(input_ids=IDS)
        flat = model(input_ids=IDS, return_dict=False, **wanted)
        with running(model, 0):
            quantised = model(input_ids=IDS, **wanted)
    assert torch.equal(found.logits, plain.logits)
    assert len(found.hidden_states) == len(quantised.hidden_states) == 3
    for a, b in zip(found.hidden_states, quantised.hidden_states, strict=True):
        assert a.shape == b.shape == (3, 10, 64)
    for a in found.attentions:
        assert a.shape == (3, 4, 10, 10)
        assert difference(torch.ones(3, 4, 10), a.sum(-1)) < 1e-6  # softmax is in fp32 in some families
    assert torch.equal(found.hidden_states[0], quantised.hidden_states[0])  # before time begins
    if sites == "feed_forward":
        close(quantised.attentions[0], found.attentions[0])
    if family not in ("bert", "bert_mlm"):
        base = getattr(model, model.base_model_prefix)(input_ids=IDS).last_hidden_state
        close(found.hidden_states[-1], base)
        close(found.logits, model.get_output_embeddings()(base))
    assert torch.equal(flat[0], plain.logits)
    assert any(isinstance(x, tuple) and x[0].shape == (3, 10, 64) for x in flat)


@pytest.mark.parametrize("family", ["gpt2", "llama", "bert"])
def test_embeddings_in_place_of_tokens(family):
    model = converted(family)
    with torch.no_grad():
        embedded = model.get_input_embeddings()(IDS)
        close(model(input_ids=IDS).logits, model(inputs_embeds=embedded).logits)


def test_a_classifier_finds_the_last_token_of_each_row():
    config = LlamaConfig(**{**families.build("llama").config.to_dict(), "num_labels": 3, "pad_token_id": 0})
    torch.manual_seed(0)
    model = LlamaForSequenceClassification(config).eval().double()
    spikeform.convert(model, spikeform.FAS(steps=3, sites="all"), IDS)
    ids, mask = IDS.clone(), torch.ones_like(IDS)
    ids[1, 6:], mask[1, 6:] = 0, 0
    with torch.no_grad():
        found = model(input_ids=ids, attention_mask=mask).logits
        close(found[1:2], model(input_ids=IDS[1:2, :6]).logits)
    assert found.shape == (3, 3)


def test_loaded_with_a_device_map(tmp_path):
    model = converted("llama", wide=False, granularity="position", positions=16)
    spikeform.save(model, tmp_path / "out")
    loaded = type(model).from_pretrained(tmp_path / "out", device_map={"": "cpu"})
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=IDS).logits, model(input_ids=IDS).logits)


def test_last_positions_only():
    model = converted("llama")
    with torch.no_grad():
        close(model(input_ids=IDS).logits[:, -2:], model(input_ids=IDS, logits_to_keep=2).logits)


def test_the_loss_is_that_of_the_logits():
    model = converted("gpt2")
    out = model(input_ids=IDS, labels=IDS)
    wanted = torch.nn.functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())
    assert difference(wanted, out.loss) < 1e-5  # transformers computes it in fp32


def gradients(model, ids=IDS, **more):
    model.zero_grad()
    model(input_ids=ids, labels=ids, use_cache=False, **more).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("steps", [0, 4])
@pytest.mark.parametrize("family", ["gpt2", "opt", "llama"])
def test_gradients_reach_everything(family, steps):
    model = spikeform.set_steps(converted(family, sites="all", granularity="position", positions=16), steps)
    for neuron in model.modules():
        if isinstance(neuron, StreamingNeuron):
            neuron.scale.requires_grad_(True)
            neuron.initial.requires_grad_(True)
    found = gradients(model)
    for name, parameter in model.named_parameters():
        if steps == 0 and name.endswith((".scale", ".initial")):
            assert name not in found  # time's own parameters
        else:
            assert float(found[name].abs().sum()) > 0, name
            assert found[name].isfinite().all(), name
            assert found[name].shape == parameter.shape


@pytest.mark.parametrize("family", ["gpt2", "opt", "llama", "gpt_neox"])
@pytest.mark.parametrize("options", [{}, {"granularity": "position", "positions": 16}], ids=["plain", "position"])
def test_transformers_own_gradient_checkpointing(family, options):
    """A block runs again by itself in the backward pass, and finds what it knew of its pass."""
    model = converted(family, **options).train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for name in ("dropout", "attention_dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    wanted = gradients(model)
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable()
    found = gradients(model)
    assert wanted.keys() == found.keys()
    for name, gradient in wanted.items():
        close(gradient, found[name])


def test_compiled_it_is_the_same():
    model = converted("gpt2", steps=0)
    model.transformer.h = model.transformer.h[:1]  # compiling takes seconds
    with torch.no_grad():
        wanted = model(input_ids=IDS, use_cache=False).logits
        compiled = torch.compile(copy.deepcopy(model), backend="eager")
        close(wanted, compiled(input_ids=IDS, use_cache=False).logits)


def test_time_begins_at_the_first_block():
    model = converted("gpt2")
    block = model.transformer.h[1]
    with pytest.raises(SpikeformError, match="run the whole model"):
        block.mlp(torch.zeros(3, 5, 64, dtype=torch.float64))


def test_rows_that_are_no_streams_are_refused():
    """Experts get the tokens that were routed to them, in rows that say nothing of steps."""
    model = converted("llama")
    mlp = model.model.layers[1].mlp
    forward = mlp.forward
    mlp.forward = lambda x: forward(x.flatten(0, 1)[: 3 * 4 * 5]).sum() * torch.ones_like(x)
    with pytest.raises(SpikeformError, match="rows that are no streams"):
        model(input_ids=IDS)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_leaves_thresholds_alone(dtype):
    model = converted("llama", wide=False, granularity="channel", per_channel=True)
    before = {n: p.clone() for n, p in model.named_parameters() if ".neuron." in n}
    moved = copy.deepcopy(model).to(dtype)
    after = {n: p for n, p in moved.named_parameters() if ".neuron." in n}
    assert before
    assert all(after[n].dtype == torch.float32 and torch.equal(after[n], p) for n, p in before.items())
    assert next(moved.parameters()).dtype == dtype
    assert moved(input_ids=IDS).logits.dtype == dtype
    written = moved.generate(IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=4, do_sample=False)
    assert written.shape[0] == 3
