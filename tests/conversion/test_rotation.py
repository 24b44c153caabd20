"""Rotation: the same function, gains gone, outliers spread, and a skeleton that fits what is saved."""

import copy

import pytest
import torch
import transformers as hf
from safetensors import safe_open
from torch import nn
from transformers import AutoModelForCausalLM

import families
import spikeform
from spikeform import pretrained
from spikeform.conversion.kinds import norm_form
from spikeform.conversion.parts import family_of, final_read
from spikeform.conversion.rotation import _rotated, head_matrix, head_signs, restructure, rotate
from spikeform.errors import ConversionError
from spikeform.layers import SpikingLinear
from spikeform.pretrained.twin import outlier_twin

SIZES = {"vocab_size": families.VOCABULARY, "num_hidden_layers": 2, "num_attention_heads": 4}
ODD = SIZES | {"hidden_size": 48, "intermediate_size": 72}  # 48 = 16 x 3, heads of 12 = 4 x 3
MORE = {
    "odd": lambda: hf.LlamaConfig(**ODD, num_key_value_heads=2, tie_word_embeddings=True),
    "no_biases": lambda: hf.GPTNeoXConfig(**ODD, attention_bias=False),
    "projected": lambda: hf.OPTConfig(**SIZES, hidden_size=48, ffn_dim=72, word_embed_proj_dim=16),
    "plain_norms": lambda: hf.OPTConfig(
        **SIZES, hidden_size=48, ffn_dim=72, word_embed_proj_dim=48, layer_norm_elementwise_affine=False
    ),
}
PRE_NORM = tuple(name for name in families.CAUSAL if name != "opt_post_norm")


def build(name):
    if name in families.FAMILIES:
        return families.build(name)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(MORE[name]()).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


def reads_of(model):
    return [*(read for block in family_of(model).blocks(model) for read in block.reads), final_read(model)]


@torch.no_grad()
def change(dense, rotated):
    """Largest difference of the logits, relative to the largest logit."""
    a, b = (model(input_ids=families.tokens()).logits for model in (dense, rotated))
    return float((a - b).abs().max() / a.abs().max())


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_stream_alone(family, norms_keep_fp64):
    """Without ``values`` the function is the same too; what heads hold is, but for rounding, what they held."""
    dense = families.build(family).double()
    stream, all_of_it = (rotate(copy.deepcopy(dense), seed=1, values=values) for values in (False, True))
    assert change(dense, stream) < 1e-10
    block = next(iter(family_of(stream).blocks(stream)))
    other = next(iter(family_of(all_of_it).blocks(all_of_it)))
    outputs = []
    for model, part in ((stream, block), (all_of_it, other)):
        seen = []
        handle = part.output.register_forward_pre_hook(lambda _m, args, seen=seen: seen.append(args[0]))
        with torch.no_grad():
            model(input_ids=families.tokens())
        handle.remove()
        outputs.append(seen[0])
    plain = []
    part = next(iter(family_of(dense).blocks(dense)))
    part.output.register_forward_pre_hook(lambda _m, args: plain.append(args[0]))
    with torch.no_grad():
        dense(input_ids=families.tokens())
    assert families.difference(plain[0], outputs[0]) < 1e-10
    assert families.difference(plain[0], outputs[1]) > 0.1


@pytest.mark.parametrize("name", [*PRE_NORM, *MORE])
def test_the_same_function(name, norms_keep_fp64):
    dense = build(name).double()
    rotated = rotate(copy.deepcopy(dense), seed=1)
    assert change(dense, rotated) < 1e-10
    for norm, _ in reads_of(rotated):
        offset = 1 if "Gemma" in type(norm).__name__ else 0
        assert torch.equal(norm.weight + offset, torch.ones_like(norm.weight))
        assert getattr(norm, "bias", None) is None
    before, after = reads_of(dense)[0].consumers[0].weight, reads_of(rotated)[0].consumers[0].weight
    assert families.difference(before, after) > 0.5  # and yet no weight is where it was
    assert change(dense, rotate(rotated, seed=2)) < 1e-10  # a rotated model is a model like any other


@pytest.mark.parametrize("name", [*PRE_NORM, *MORE])
def test_rounding_in_fp32(name):
    dense = build(name)
    assert change(dense, rotate(copy.deepcopy(dense))) < 1e-5


@pytest.mark.parametrize("name", pretrained.CAUSAL)
@pytest.mark.parametrize("bound", [1e-5, 1e-10])
def test_embedded_models(name, bound, norms_keep_fp64):
    dense = AutoModelForCausalLM.from_pretrained(pretrained.path(name)).eval()
    dense = dense.double() if bound < 1e-5 else dense
    assert change(dense, rotate(copy.deepcopy(dense))) < bound


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma"])
def test_what_a_twin_does_to_the_norms_folds_away(name):
    dense = families.build(name)
    twin = outlier_twin(dense, kinds=("norm",), scales=(10.0, 30.0, 100.0))
    assert families.difference(reads_of(dense)[0].consumers[0].weight, reads_of(twin)[0].consumers[0].weight) > 0.05
    expected = rotate(dense).state_dict()
    found = rotate(twin).state_dict()
    assert found.keys() == expected.keys()
    assert max(families.difference(expected[key], found[key]) for key in expected if expected[key].any()) < 1e-6


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox"])
def test_outlying_values_are_spread(name):
    """Channels a hundred times larger, and then no larger than the others: per head, as the head's sum allows."""

    def spread(model):
        heads = next(family_of(model).blocks(model)).value
        weight = heads.module.weight.T if type(heads.module).__name__ == "Conv1D" else heads.module.weight
        norms = torch.stack([weight[s : s + heads.size].norm(dim=1) for s in heads.starts])
        return (norms.amax(1) / norms.median(1).values).max()

    twin = outlier_twin(families.build(name), kinds=("value",), scales=(128.0,), channels=2)
    assert spread(twin) > 50
    assert spread(rotate(twin)) < 4


@pytest.mark.parametrize("name", [*PRE_NORM, *MORE])
def test_skeleton(name):
    """restructure on the meta device: the modules, names, shapes and dtypes of the rotated model."""
    real = build(name)
    with torch.device("meta"):
        skeleton = type(real)(copy.deepcopy(real.config))
    rotated = rotate(real)
    assert restructure(skeleton) is skeleton
    assert all(parameter.device.type == "meta" for parameter in skeleton.parameters())
    for model in (skeleton, restructure(copy.deepcopy(rotated))):  # the second time nothing changes
        assert not model.config.tie_word_embeddings
        assert model.all_tied_weights_keys == {}
        assert {k: type(m) for k, m in model.named_modules()} == {k: type(m) for k, m in rotated.named_modules()}
        shapes = {k: (v.shape, v.dtype) for k, v in model.state_dict().items()}
        assert shapes == {k: (v.shape, v.dtype) for k, v in rotated.state_dict().items()}
        assert not any(isinstance(norm, nn.LayerNorm) for norm, _ in reads_of(model))
    assert change(rotated, restructure(copy.deepcopy(rotated))) == 0


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_saving_keeps_head_and_embedding(name, tmp_path):
    dense = AutoModelForCausalLM.from_pretrained(pretrained.path(name))
    head = dense.get_output_embeddings()
    assert head.weight is dense.get_input_embeddings().weight
    rotated = rotate(dense).eval()
    rotated.tie_weights()  # whatever transformers does later, they stay two
    assert head.weight is not rotated.get_input_embeddings().weight
    rotated.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        saved = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    assert torch.equal(saved["lm_head.weight"], head.weight)
    assert ("lm_head.bias" in saved) == (name == "gpt2")
    if name == "llama":  # no new modules: transformers alone can read it
        assert change(rotated, AutoModelForCausalLM.from_pretrained(tmp_path).eval()) == 0


def test_seed():
    dense = families.build("llama")
    first, again, other = (rotate(copy.deepcopy(dense), seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not torch.equal(first["lm_head.weight"], other["lm_head.weight"])


@pytest.mark.parametrize("size", [1, 5, 16, 24, 96])
def test_matrix(size):
    signs = head_signs(size, seed=3)
    assert signs.dtype == torch.int8
    assert signs.abs().eq(1).all()
    assert torch.equal(signs, head_signs(size, seed=3))
    matrix = head_matrix(signs, torch.float64)
    assert torch.allclose(matrix @ matrix.T, torch.eye(size, dtype=torch.float64), atol=1e-13)
    x = torch.randn(7, size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(_rotated(x, signs), x @ matrix, atol=1e-13)


def test_seed_means_the_same_on_every_default_device():
    with torch.device("meta"):
        signs = head_signs(16, seed=3)
    assert torch.equal(signs, head_signs(16, seed=3))
    assert not torch.equal(signs, head_signs(16, seed=4))


GEMMA2 = {"hidden_size": 48, "intermediate_size": 72, "num_key_value_heads": 2, "head_dim": 12}


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: families.build("bert_mlm"), "'bert' cannot be rotated: norms stand in its residual stream"),
        (lambda: families.build("opt_post_norm"), "'opt' cannot be rotated: norms stand in its residual stream"),
        (
            lambda: AutoModelForCausalLM.from_config(hf.Gemma2Config(**SIZES, **GEMMA2)),
            "'gemma2' cannot be rotated: norms stand in its residual stream",
        ),
        (lambda: families.build("llama").model, "LlamaModel cannot be rotated: it has no final norm before an output"),
        (
            lambda: hf.MambaForCausalLM(hf.MambaConfig(vocab_size=8, hidden_size=8, num_hidden_layers=1)),
            "the parts of 'mamba' are not known",
        ),
    ],
)
def test_refuses(model, message):
    model = model()
    before = list(model.state_dict())
    for act in (restructure, rotate):
        with pytest.raises(ConversionError, match=message):
            act(model)
    assert list(model.state_dict()) == before


def test_refuses_a_converted_model():
    model = families.build("gpt2")
    model.transformer.h[1].mlp.c_fc = SpikingLinear.from_dense(model.transformer.h[1].mlp.c_fc, None)
    with pytest.raises(ConversionError, match="SpikingLinear cannot be rotated: rotate the dense model"):
        rotate(model)


def test_torch_rms_norms_are_known():
    """What a rotated LayerNorm has become is a norm to every method."""
    dense = families.build("gpt2")
    model = spikeform.convert(rotate(copy.deepcopy(dense)), spikeform.LAS(steps=16), families.tokens(rows=8))
    assert sum(row.kind == "norm" for row in model.spikeform_report.replaced) == 5
    assert 0 < change(dense, model) < 0.02
    assert norm_form(nn.RMSNorm(4)) == (torch.finfo(torch.float32).eps, False, 0.0)
    assert norm_form(nn.RMSNorm(4, eps=0.5)) == (0.5, False, 0.0)
