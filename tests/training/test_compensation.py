"""The continuous path beside the spikes: there while a model trains, and nowhere else."""

import pytest
import torch

import families
import spikeform
from spikeform.training import TrainOptions, train
from spikeform.training.compensation import weight_at
from spikeform.training.neurons import trainable


def converted(**options):
    return spikeform.convert(families.build("mamba2"), spikeform.SpikingMamba(**options), families.tokens(4, 32))


def gradients(model, options):
    """Logits of a training pass with the weight that the first step has, and the gradients."""
    with trainable(model, options) as path:
        if path is not None:
            path.weight = weight_at(options, 0, 10)
        model.train()
        logits = model(families.tokens()).logits
        logits.square().mean().backward()
        return logits.detach(), {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("per_channel", [False, True])
def test_grad_changes_no_forward_pass(per_channel):
    model = converted(per_channel=per_channel)
    logits, added = gradients(model, TrainOptions(compensation="grad"))
    plain, without = gradients(model, TrainOptions())
    with trainable(model, TrainOptions()), torch.no_grad(), spikeform.executor("collapsed"):
        assert torch.equal(model.eval()(families.tokens()).logits, logits)
    assert torch.equal(plain, logits)
    name = "backbone.layers.0.norm.weight"
    assert not torch.allclose(added[name], without[name], rtol=1e-3)


def test_grad_reaches_beyond_the_range():
    model = converted(steps=1, threshold=1e-3)  # all is beyond
    smooth = TrainOptions(compensation="grad", compensation_smooth="identity")
    plain, added = (gradients(model, o)[1]["backbone.layers.0.norm.weight"] for o in (TrainOptions(), smooth))
    assert not plain.count_nonzero() > 2  # inputs that happen to be almost zero
    assert added.all()


def test_mix_changes_the_forward_pass():
    model = converted()
    a, b = (gradients(model, TrainOptions(compensation=mode))[0] for mode in ("mix", "none"))
    assert not torch.allclose(a, b)


@pytest.mark.parametrize("rank", [0, 4])
def test_add_begins_with_nothing_and_learns(rank):
    model = converted()
    options = TrainOptions(compensation="add", compensation_rank=rank)
    logits, found = gradients(model, options)
    assert torch.equal(logits, gradients(model, TrainOptions())[0])
    added = {name: gradient for name, gradient in found.items() if "compensation" in name}
    assert len(added) == 4 * (2 if rank else 1)
    assert any(gradient.any() for gradient in added.values())
    with trainable(model, options):
        layer = model.backbone.layers[0].mixer.in_proj
        last = [p for name, p in layer.named_parameters() if "compensation" in name][-1]
        with torch.no_grad():
            last += 1
            assert not torch.allclose(model.train()(families.tokens()).logits, logits)
            assert torch.allclose(model.eval()(families.tokens()).logits, logits, atol=1e-4)


@pytest.mark.parametrize("mode", ["grad", "mix", "add"])
def test_nothing_is_left(mode):
    model = converted(per_channel=True)
    before, names = dict(model.state_dict()), [name for name, _ in model.named_modules()]
    hooks = [len(module._forward_hooks) for module in model.modules()]
    with pytest.raises(RuntimeError, match="stop"), trainable(model, TrainOptions(compensation=mode)):
        raise RuntimeError("stop")
    assert [name for name, _ in model.named_modules()] == names
    assert [len(module._forward_hooks) for module in model.modules()] == hooks
    assert {getattr(module, "compensation", None) for module in model.modules()} == {None}
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.allclose(after[name], before[name], rtol=1e-6) for name in after)


def test_the_weight_follows_from_the_step():
    assert {weight_at(TrainOptions(compensation="grad", compensation_weight=0.3), step, 10) for step in (0, 9)} == {0.3}
    falling = TrainOptions(compensation="mix", compensation_weight=0.5, compensation_share=0.8)
    assert [weight_at(falling, step, 10) for step in (0, 4, 8, 9)] == [0.5, 0.25, 0, 0]


def test_the_weight_falls_while_the_model_trains(ids):
    model, seen = converted(), []
    neuron = model.backbone.layers[1].mixer.out_proj.neuron
    options = TrainOptions(window=16, batch_size=2, steps=5, accumulate=2, compensation="mix")
    train(model, ids, options=options, progress=lambda point: seen.append(neuron.compensation.weight))
    assert seen == pytest.approx([0.5, 0.375, 0.25, 0.125, 0])
