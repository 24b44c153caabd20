"""Weight grids: the affine rule and its gradients, tiers, ternary scales against brute force."""

import pytest
import torch

from spikeform.errors import ConversionError
from spikeform.methods.spikellm import grids


@pytest.fixture
def weight():
    return torch.randn(12, 40, generator=torch.Generator().manual_seed(0))


def spread(weight, bits=2, tiers=(1, 2, 4)):
    return torch.arange(weight.shape[1]) * len(tiers) // weight.shape[1]


@pytest.mark.parametrize("levels", [1, 3, 15, 255])
def test_affine_codes_within_half_a_step(weight, levels):
    q, scale, zero = grids.affine(weight, weight.amin(1), weight.amax(1), levels)
    assert torch.equal(q, q.round())
    assert float(q.min()) >= 0
    assert float(q.max()) <= levels
    value = (q - zero[:, None]) * scale[:, None]
    # The rounded zero-point moves the grid by up to half a step, and the ends by no more than that.
    assert bool(((value - weight).abs() <= scale[:, None] * 1.0001).all())
    if levels == 255:
        assert float((value - weight).abs().median()) < float(scale.max()) / 2


def test_affine_gradients(weight):
    """Rounding passes gradients on, clamping cuts them, scales carry them to the ends, zero-points do not."""
    low, high = (0.5 * weight.amin(1)).requires_grad_(), (0.5 * weight.amax(1)).requires_grad_()
    weight = weight.clone().requires_grad_()
    q, scale, zero = grids.affine(weight, low, high, 15)
    assert not zero.requires_grad
    expected = torch.clamp((weight / scale[:, None]).round() + zero[:, None], 0, 15)
    assert torch.equal(q.detach(), expected.detach())
    (q * scale[:, None].detach()).sum().backward()
    inside = ((weight / scale[:, None]).round() + zero[:, None] == q).detach()
    assert 0 < int(inside.sum()) < inside.numel()
    torch.testing.assert_close(weight.grad, inside.float())
    ratio = -(weight / scale[:, None]).detach()  # d(w / s) s / ds
    torch.testing.assert_close(high.grad, (ratio * inside).sum(1).detach() / 15)
    torch.testing.assert_close(low.grad, -high.grad)


def test_affine_of_rows_without_range():
    weight = torch.tensor([[0.0, 0.0], [3.0, 1.0], [-2.0, -2.0], [1e-39, 0.0]])
    q, scale, zero = grids.affine(weight, weight.amin(1), weight.amax(1), 15)
    torch.testing.assert_close((q - zero[:, None]) * scale[:, None], weight)
    assert scale[0] == 1
    assert zero.tolist() == [0, 0, 15, 0]


@pytest.mark.parametrize("ternary", [False, True])
def test_tiers_have_their_own_grids(weight, ternary):
    tier = spread(weight)
    coded = grids.encode(weight, bits=2, tiers=(1, 2, 4), ternary=ternary, tier=tier)
    value = coded.dequantise()
    for r, steps in enumerate((1, 2, 4)):
        mine = tier == r
        alone = grids.encode(weight[:, mine], bits=2, tiers=(steps,), ternary=ternary)
        torch.testing.assert_close(value[:, mine], alone.dequantise(), rtol=0, atol=0)
        q = coded.codes[:, mine] + coded.zero[r][:, None]
        assert int(q.min()) >= 0
        assert int(q.max()) <= (2 * steps if ternary else 3 * steps) == coded.levels(r)
        if ternary:
            assert coded.codes[:, mine].unique().tolist() == list(range(-steps, steps + 1))
            assert coded.zero[r].unique().tolist() == [steps]
    errors = [float((value - weight)[:, tier == r].square().mean()) for r in range(3)]
    assert errors[0] > 1.7 * errors[1] > 3 * errors[2]


def test_clip_factors_shrink_the_range(weight):
    gamma, beta = torch.full((1, 12), 0.7), torch.full((1, 12), 0.4)
    coded = grids.encode(weight, bits=4, clip=(gamma, beta))
    q, scale, zero = grids.affine(weight, 0.4 * weight.amin(1), 0.7 * weight.amax(1), 15)
    torch.testing.assert_close(coded.dequantise(), (q - zero[:, None]) * scale[:, None], rtol=0, atol=0)
    assert torch.equal(coded.zero[0], zero.to(torch.int16))


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_ternary_scale_against_brute_force(weight, steps):
    """The searched scale is within a percent of the least error over a fine sweep, outliers in the row or none."""
    weight = weight.clone()
    weight[0, 0] = 12.0
    coded = grids.encode(weight, bits=1, tiers=(steps,), ternary=True)
    error = (coded.dequantise() - weight).square().sum(1)
    sweep = torch.linspace(0.02, 1.2, 1500)[:, None, None] * weight.abs().amax(1, keepdim=True) / steps
    codes = (weight / sweep).round().clamp(-steps, steps)
    best = (codes * sweep - weight).square().sum(2).amin(0)
    assert bool((error <= best * 1.03).all())
    assert float(error.sum()) <= float(best.sum()) * 1.01


def test_importance_and_search_lower_what_they_should(weight):
    importance = torch.linspace(-6, 6, 40).exp()
    whole = grids.encode(weight, bits=2).dequantise() - weight
    plain = grids.encode(weight, bits=2, search=True).dequantise() - weight
    weighed = grids.encode(weight, bits=2, search=True, importance=importance).dequantise() - weight
    assert bool((plain.square().sum(1) <= whole.square().sum(1)).all())
    assert float(plain.square().sum()) < 0.9 * float(whole.square().sum())
    assert float((weighed.square() * importance).sum()) < 0.8 * float((plain.square() * importance).sum())


def test_widths_and_empty_tiers(weight):
    assert grids.encode(weight, bits=4, tiers=(1, 2), tier=spread(weight, tiers=(1, 2))).codes.dtype == torch.int8
    assert grids.encode(weight, bits=8).codes.dtype == torch.int16
    empty = torch.zeros(40, dtype=torch.uint8)
    coded = grids.encode(weight, bits=4, tiers=(1, 2), tier=empty)
    torch.testing.assert_close(coded.dequantise(), grids.encode(weight, bits=4).dequantise())
    assert coded.scale.shape == (2, 12)
    assert bool(coded.scale.isfinite().all())


def test_bad_input_is_named(weight):
    broken = weight.clone()
    broken[1, 2] = float("nan")
    with pytest.raises(ConversionError, match="not finite"):
        grids.encode(broken, bits=4)
    for tier in (torch.zeros(3), torch.full((40,), 2)):
        with pytest.raises(ConversionError, match="tier from 0 to 1"):
            grids.encode(weight, bits=4, tiers=(1, 2), tier=tier)
