"""A linear layer of integer weights: what it computes, and what it is in a file."""

import copy

import pytest
import torch
import torch.nn.functional as F
from coding import codes_of
from torch import nn

import spikeform
from families import difference
from spikeform.layers import CodedLinear, SpikingLinear
from spikeform.layers.packed import Form
from spikeform.neurons import GIF

FORMS = [Form(4), Form(1), Form(2, (1, 2)), Form(3, (1, 2, 4)), Form(8), Form(1, (1,), True), Form(1, (1, 2, 4), True)]


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def gif(channels, steps=2, seed=0):
    neuron = GIF(4, (channels,), steps=steps, site="site")
    salient = torch.rand(channels, generator=torch.Generator().manual_seed(seed)) < 0.3
    neuron.set_times(torch.where(salient, steps, 1))
    return neuron


def coded(form=FORMS[0], rows=5, columns=21, neuron=True, bias=True):
    dense = nn.Linear(columns, rows, bias=bias)
    layer = SpikingLinear.from_dense(dense, gif(columns) if neuron else None)
    return CodedLinear.from_spiking(layer, codes_of(draw(rows, columns), *form), None if neuron else "site")


@pytest.mark.parametrize("neuron", [True, False])
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_it_is_the_dense_layer_of_its_values(form, neuron):
    layer, x = coded(form, neuron=neuron), draw(3, 4, 21)
    assert isinstance(layer, nn.Linear)
    assert (layer.in_features, layer.out_features) == (21, 5)
    sent = layer.neuron(x.double()).decode() if neuron else x.double()
    rows = torch.zeros(21, dtype=torch.long) if layer.tier is None else layer.tier.long()
    values = layer.weight.double() * layer.scale.double()[rows].T
    wanted = F.linear(sent, values, layer.bias.double())
    with torch.no_grad():
        assert difference(wanted, layer(x.double())) < 1e-12
        out = {name: run(layer, x, name) for name in ("collapsed", "temporal", "event")}
        assert difference(wanted, out["collapsed"]) < 1e-5
        if neuron:
            assert torch.equal(out["temporal"], out["collapsed"])
            assert torch.equal(out["event"], out["collapsed"])
        assert layer(x.bfloat16()).dtype == torch.bfloat16


def run(layer, x, name):
    with spikeform.executor(name):
        return layer(x)


def test_gradients_reach_the_input():
    layer, x = coded(), draw(3, 21).requires_grad_()
    layer(x).square().sum().backward()
    assert x.grad.isfinite().all()
    assert x.grad.abs().sum() > 0


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_packed_and_back(form):
    layer = coded(form)
    codes, zero = layer.weight.clone(), layer.integer_weight().zero.clone()
    file = layer.packed()
    sizes = [21] if layer.tier is None else torch.bincount(layer.tier.long(), minlength=len(form.tiers)).tolist()
    widths = [(layer.integer_weight().levels(r)).bit_length() for r in range(len(form.tiers))]
    assert list(file["weight"].shape) == [1, 5, sum(-(-n * w // 8) for n, w in zip(sizes, widths, strict=True))]
    assert file["weight"].dtype == torch.uint8
    assert set(file) == ({"weight"} if form.ternary else {"weight", "zero"})
    for name, tensor in file.items():
        setattr(layer, name, tensor)
    assert layer.load_packed() == []
    assert torch.equal(layer.weight, codes)
    assert layer.weight.dtype == codes.dtype
    assert torch.equal(layer.integer_weight().zero, zero)


@pytest.mark.parametrize(
    ("form", "zero", "dtype"),
    [
        (Form(8), 0, torch.int8),
        (Form(8), 127, torch.int8),
        (Form(8), 128, torch.uint8),
        (Form(8), 255, torch.uint8),
        (Form(8, (2,)), 256, torch.int16),
    ],
)
def test_zero_points_take_as_little_as_they_can(form, zero, dtype):
    layer = coded(form)
    q = layer.weight + layer.zero[0, :, None]
    layer.zero = torch.full_like(layer.zero, zero)
    layer.weight = q - layer.zero[0, :, None]
    before = layer.weight.clone()
    file = layer.packed()
    assert file["zero"].dtype == dtype
    layer.weight, layer.zero = file["weight"], file["zero"]
    assert layer.load_packed() == []
    assert torch.equal(layer.weight.int(), before.int())
    assert layer.zero.dtype == torch.int16


@pytest.mark.parametrize(("form", "share"), [(Form(4), 0.27), (Form(4, (1, 2)), 0.30), (Form(1, (1,), True), 0.14)])
def test_bytes_of_a_file(form, share):
    layer = coded(form, 192, 192, bias=False)
    if layer.tier is not None:  # as calibrated: one column in ten
        codes = codes_of(draw(192, 192), *form)
        layer = CodedLinear.from_spiking(layer, codes)
        layer.tier = (torch.arange(192) % 10 == 0).to(torch.uint8)
        layer.weight = torch.zeros_like(layer.weight)
    file = {**layer.state_dict(), **layer.packed()}
    assert sum(x.numel() * x.element_size() for x in file.values()) <= share * 192 * 192 * 2


def test_a_cast_rounds_no_scale():
    layer = coded(Form(4, (1, 2)))
    scale = layer.scale.clone()
    for cast in (lambda m: m.to(torch.bfloat16), lambda m: m.half(), lambda m: m.double()):
        moved = cast(copy.deepcopy(layer))
        assert moved.scale.dtype == torch.float32
        assert torch.equal(moved.scale, scale)
        assert moved.weight.dtype == torch.int8
        assert moved.bias.dtype != torch.float32
        assert moved.neuron.times.dtype == torch.uint8


def test_what_is_kept_of_the_weight_follows_it():
    layer, x = coded(Form(4, (1, 2))), draw(2, 21)
    with torch.no_grad():
        before = layer(x)
        assert layer.integer_weight() is layer.integer_weight()
        twin = copy.deepcopy(layer)
        for other in (layer, twin):
            other.weight.mul_(2)
            assert difference(before * 2 - layer.bias, other(x)) < 1e-5
        layer.tier.zero_()
        assert difference(layer(x), twin(x)) > 0.1


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("packed", [True, False])
def test_a_skeleton_takes_a_state_dict(form, packed):
    """From memory (work folders), and as files hold it (trainers that resume)."""
    layer, x = coded(form), draw(2, 21)
    blank = CodedLinear(21, 5, True, gif(21, seed=1), *form)
    assert blank.weight.device.type == "meta"
    assert blank.to(torch.float32).weight.device.type == "meta"
    state = {**layer.state_dict(), **(layer.packed() if packed else {})}
    blank.load_state_dict({name: tensor.clone() for name, tensor in state.items()})
    assert torch.equal(blank.weight, layer.weight)
    assert blank.state_dict().keys() == layer.state_dict().keys()
    with torch.no_grad():
        assert torch.equal(blank(x), layer(x))


def change(name, value):
    def changed(file):
        file[name] = value(file[name])

    return changed


DAMAGE = [
    ("weight", change("weight", lambda x: x[..., :-1].contiguous())),
    ("weight", change("weight", lambda x: x.view(torch.int8))),
    ("weight", change("weight", lambda x: torch.full_like(x, 255))),
    ("weight", change("tier", lambda x: 1 - x)),
    ("tier", change("tier", lambda x: x + 1)),
    ("tier", change("tier", lambda x: x[1:])),
    ("tier", change("tier", lambda x: x.int())),
    ("scale", change("scale", lambda x: x * float("nan"))),
    ("scale", change("scale", lambda x: -x)),
    ("scale", change("scale", lambda x: x[:1])),
    ("zero", change("zero", lambda x: x[:, 1:])),
    ("zero", change("zero", lambda x: x.int())),
]


@pytest.mark.parametrize(("name", "damage"), DAMAGE, ids=range(len(DAMAGE)))
def test_damage_is_named(name, damage):
    layer = coded(Form(4, (1, 2)))
    file = {**layer.state_dict(), **layer.packed()}
    damage(file)
    for key in ("weight", "scale", "zero", "tier"):
        setattr(layer, key, file[key])
    found = layer.load_packed()
    assert len(found) == 1
    assert found[0].startswith(name)
    blank = CodedLinear(21, 5, True, gif(21), 4, (1, 2))
    with pytest.raises(RuntimeError, match=f"{name}[ :]"):
        blank.load_state_dict(file)


def test_errors():
    layer = coded()
    with pytest.raises(ValueError, match=r"here: codes of shape \[5, 21\] for weights of \[5, 20\]"):
        CodedLinear.from_spiking(nn.Linear(20, 5), layer.integer_weight(), "here")
    layer.weight[2, 3] = 100
    with pytest.raises(ValueError, match="codes outside of a grid of 16 levels"):
        layer.packed()
