"""NeuTransformer: spiking self-attention is fine-tuned towards the dense model that it came from."""

import copy

import pytest
import torch

import families
import spikeform
from spikeform.errors import ConfigError
from spikeform.layers.self_attention import SpikingSelfAttention
from spikeform.neurons import SignedInteger
from spikeform.neurons.lif import LIF
from spikeform.training import TrainOptions, train
from spikeform.training.losses import distance

FROZEN = {
    "gpt2": ("*wte*", "*wpe*", "*.mlp.*", "*.ln_2.*", "*.ln_f.*"),
    "llama": ("*embed_tokens*", "*lm_head*", "*.mlp.*", "*.post_attention_layernorm.*", "model.norm.*"),
}
TAUGHT = {
    "window": 32,
    "batch_size": 8,
    "steps": 30,
    "learning_rate": 3e-3,
    "ce": 0,
    "distil": 1,
    "hidden": 1,
    "hidden_distance": "cosine",
}


def converted(family, **options):
    model = families.build(family)
    return spikeform.convert(model, spikeform.NeuTransformer(**options), families.tokens(8, 24, seed=5))


def cosine(model, dense, ids):
    with torch.no_grad():
        found, wanted = (m(ids, output_hidden_states=True).hidden_states[-1] for m in (model, dense))
    return float(torch.cosine_similarity(found, wanted, dim=-1).mean())


@pytest.mark.parametrize("surrogate", ["sigmoid", "arctan"])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_attention_comes_closer_and_nothing_else_moves(family, surrogate, ids):
    dense, model = families.build(family), converted(family, surrogate=surrogate)
    before, held = {n: p.detach().clone() for n, p in model.named_parameters()}, ids[3000:4000].view(-1, 50)
    first = cosine(model, dense, held)
    options = TrainOptions(**TAUGHT, freeze=FROZEN[family])
    train(model, ids[:3000], options=options, teacher=copy.deepcopy(dense))
    assert 1 - cosine(model, dense, held) < 0.88 * (1 - first)
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert all("attn" in n or "ln_1" in n or "input_layernorm" in n for n in moved)
    gains = {f"{n}.gain" for n, m in model.named_modules() if isinstance(m, LIF)}
    assert gains <= moved
    for neuron in model.modules():  # what passes attention's spikes on must go on to count them
        if isinstance(neuron, SignedInteger) and not neuron.learns:
            assert neuron.threshold.item() == 1 / 4


def test_layer_by_layer(ids):
    model, seen = converted("gpt2"), []
    layers = [m for m in model.modules() if isinstance(m, SpikingSelfAttention)]

    def before(_module, _args):
        if model.training:
            seen.append([layer.paused for layer in layers])

    handle = model.register_forward_pre_hook(before)
    options = TrainOptions(**TAUGHT | {"steps": 8, "layer_by_layer": 0.5}, freeze=FROZEN["gpt2"])
    train(model, ids[:3000], options=options, teacher=families.build("gpt2"))
    handle.remove()
    assert seen == [[False, True]] * 3 + [[False, False]] * 5
    assert not any(layer.paused for layer in layers)


def test_a_paused_layer_is_the_dense_one():
    dense, model = families.build("gpt2"), converted("gpt2", ffn="none")
    for layer in model.modules():
        if isinstance(layer, SpikingSelfAttention):
            layer.paused = True
    ids = families.tokens()
    with torch.no_grad():
        assert families.difference(dense(ids).logits, model(ids).logits) < 1e-5
        again = copy.deepcopy(model)
        for layer in again.modules():
            if isinstance(layer, SpikingSelfAttention):
                layer.paused = False
        assert not torch.equal(again(ids).logits, model(ids).logits)


def test_distances():
    a, b = torch.tensor([[[3.0, 4.0]]]), torch.tensor([[[6.0, 8.0]]])
    assert float(distance([a], [b], None)) == pytest.approx(0.25)
    assert float(distance([a], [b], None, "cosine")) == pytest.approx(0.0, abs=1e-6)
    assert float(distance([a, -a], [b, b], None, "cosine")) == pytest.approx(1.0)
    with pytest.raises(ConfigError, match="hidden_distance"):
        TrainOptions(hidden_distance="angle")
    with pytest.raises(ConfigError, match="layer_by_layer"):
        TrainOptions(layer_by_layer=1.5)
