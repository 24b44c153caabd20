"""What is minimised: each term against its formula, and nothing where student and teacher agree."""

import pytest
import torch

import families
from spikeform.training import TrainingError, TrainOptions, losses
from spikeform.training.losses import Objective, after_blocks, distance, divergence

ALL = {"ce": 0, "distil": 1, "hidden": 1, "reverse": 0.3, "temperature": 2}


def a_batch(rows=2):
    ids = families.tokens(rows, 16)
    return {"input_ids": ids, "labels": torch.cat([ids[:, 1:], torch.full((rows, 1), -100)], 1)}


@pytest.mark.parametrize("family", ["mamba2", "mamba", "llama"])
def test_nothing_is_left_between_equal_models(family):
    student, teacher = families.build(family).train(), families.build(family)
    assert Objective(TrainOptions(**ALL), {"use_cache": False}, student, teacher)(student, a_batch()) == 0
    other = families.build(family, seed=1)
    assert Objective(TrainOptions(**ALL), {"use_cache": False}, other, teacher)(other, a_batch()) > 0.1


def test_terms_add_up():
    student, teacher, batch = families.build("mamba2"), families.build("mamba2", seed=1), a_batch()

    def loss(**weights):
        return Objective(TrainOptions(**({"ce": 0} | weights)), {}, student, teacher)(student, batch)

    parts = 0.5 * loss(ce=1) + 2 * loss(distil=1) + 3 * loss(hidden=1)
    assert torch.allclose(loss(ce=0.5, distil=2, hidden=3), parts)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("reverse", [0.0, 0.25, 1.0])
def test_divergence(temperature, reverse, monkeypatch):
    monkeypatch.setattr(losses, "ELEMENTS", 60)  # three rows at once
    torch.manual_seed(0)
    wanted, logits, here = torch.randn(10, 20), torch.randn(10, 20, requires_grad=True), torch.arange(10) % 4 > 0
    p, q = (x[here].double().div(temperature).log_softmax(-1) for x in (wanted, logits))
    forwards, back = ((a.exp() * (a - b)).sum(-1).mean() for a, b in ((p, q), (q, p)))
    expected = temperature**2 * ((1 - reverse) * forwards + reverse * back)
    found = divergence(wanted, logits, here, temperature, reverse)
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    (ours,), (theirs,) = (torch.autograd.grad(x, logits) for x in (found, expected))
    assert torch.allclose(ours, theirs, atol=1e-6)
    assert not ours[~here].any()


def test_distance_leaves_padding_out():
    torch.manual_seed(0)
    found, wanted = torch.randn(2, 3, 5, 8).unbind(), torch.randn(2, 3, 5, 8).unbind()
    mask = torch.ones(3, 5, dtype=torch.long)
    mask[1, :2] = 0
    ratios = [(h - t).norm(dim=-1) ** 2 / t.norm(dim=-1) ** 2 for h, t in zip(found, wanted, strict=True)]
    expected = torch.stack([r[mask.bool()].mean() for r in ratios]).mean()
    assert torch.allclose(distance(found, wanted, mask), expected)
    assert torch.allclose(distance(found, wanted, None), torch.stack(ratios).mean())


@pytest.mark.parametrize(("family", "blocks"), [("mamba2", "backbone.layers"), ("mamba", "backbone.layers")])
def test_residual_streams_are_what_the_blocks_hand_on(family, blocks):
    model, seen = families.build(family), []
    for block in model.get_submodule(blocks):
        block.register_forward_hook(lambda module, args, out: seen.append(out))
    with torch.no_grad():
        told = model(families.tokens(), output_hidden_states=True).hidden_states[after_blocks(model)]
    assert len(told) == len(seen) == 2
    assert all(torch.equal(a, b) for a, b in zip(told, seen, strict=True))


def test_residual_streams_of_attention_models_leave_the_embedding_out():
    model, seen = families.build("llama"), []
    for block in model.model.layers:
        block.register_forward_hook(lambda module, args, out: seen.append(out))
    with torch.no_grad():
        told = model(families.tokens(), output_hidden_states=True).hidden_states[after_blocks(model)]
        assert torch.equal(told[0], seen[0])
        assert torch.equal(told[1], model.model.norm(seen[1]))


def test_models_of_other_sizes_are_refused():
    with pytest.raises(TrainingError, match="predicts 9 tokens, the model 8"):
        divergence(torch.zeros(2, 9), torch.zeros(2, 8), torch.ones(2, dtype=torch.bool), 1.0, 0.0)
    with pytest.raises(TrainingError, match="1 blocks of width 8, the model 2 of 8"):
        distance(torch.zeros(2, 1, 3, 8).unbind(), torch.zeros(1, 1, 3, 8).unbind(), None)
