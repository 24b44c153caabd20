"""GPTQ on spiking grids: what error feedback, tiers, order and sweeps do to ``|(W - Q) X^T|``."""

from dataclasses import replace

import pytest
import torch

from spikeform.errors import CalibrationError, ConversionError
from spikeform.methods.spikellm import grids, saliency
from spikeform.methods.spikellm.gptq import gptq, partial_binary

ROWS, COLUMNS = 24, 96
FORMS = {
    "affine": {"bits": 3},
    "affine tiers": {"bits": 2, "tiers": (1, 2)},
    "ternary": {"bits": 1, "ternary": True},
    "ternary tiers": {"bits": 1, "ternary": True, "tiers": (1, 2, 4)},
}


@pytest.fixture(scope="module")
def layer():
    """A weight and the Gram matrix of correlated inputs, some of them large."""
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(COLUMNS, COLUMNS, generator=generator) + 2 * torch.randn(COLUMNS, 1, generator=generator)
    x = torch.randn(600, COLUMNS, generator=generator) @ mix.T
    x *= torch.randn(COLUMNS, generator=generator).exp()
    return torch.randn(ROWS, COLUMNS, generator=generator), (x.T @ x).double()


def tiers_of(weight, gram, form):
    """A tenth of the columns on every higher tier, the most salient on the highest."""
    tier = torch.zeros(COLUMNS, dtype=torch.uint8)
    rank = saliency.weight(weight, gram).argsort(descending=True)
    for r in range(1, len(form.get("tiers", (1,)))):
        tier[rank[10 * (r - 1) : 10 * r]] = len(form["tiers"]) - r
    return tier


def error(weight, found, gram):
    difference = (weight - found).double()
    return float(((difference @ gram) * difference).sum())


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_feedback_beats_rounding_and_sweeps_beat_one_pass(layer, form):
    weight, gram = layer
    tier = tiers_of(weight, gram, form)
    rounded = grids.encode(weight, **form, tier=tier, search=True, importance=gram.diagonal())
    errors = [error(weight, rounded.dequantise(), gram)]
    for sweeps in (0, 1, 4):
        coded = gptq(weight, gram, **form, tier=tier, sweeps=sweeps)
        errors.append(error(weight, coded.dequantise(), gram))
        for r in range(len(coded.tiers)):
            q = coded.codes[:, tier == r] + coded.zero[r][:, None]
            assert 0 <= int(q.min()) <= int(q.max()) <= coded.levels(r)
    assert errors[1] < 0.7 * errors[0]
    assert errors[2] < 0.95 * errors[1]
    assert errors[3] <= errors[2]
    damped = saliency.inverse_factor(gram, 0.01)[0]
    for r in range(len(coded.tiers)):  # at the end scales fit the codes: no other ones are better
        for factor in (0.99, 1.01):
            scale = coded.scale.clone()
            scale[r] *= factor
            other = replace(coded, scale=scale).dequantise()
            assert error(weight, other, damped) > error(weight, coded.dequantise(), damped)


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_identity_is_rounding_to_nearest(layer, form):
    weight, gram = layer
    tier = tiers_of(weight, gram, form)
    coded = gptq(weight, torch.eye(COLUMNS), **form, tier=tier, sweeps=0)
    rounded = grids.encode(weight, **form, tier=tier, search=True)
    assert torch.equal(coded.codes, rounded.codes)
    torch.testing.assert_close(coded.scale, rounded.scale)
    assert torch.equal(coded.zero, rounded.zero)


def test_one_pass_is_the_textbook_loop(layer):
    """One tier in its own order: each column's error is made up for by refitting all later ones, solved afresh."""
    weight, gram = layer
    coded = gptq(weight, gram, bits=3, sweeps=0)
    damped = gram / gram.diagonal().mean() + 0.01 * torch.eye(COLUMNS, dtype=torch.float64)
    now = weight.double()
    for j in range(COLUMNS):
        scale, zero = coded.scale[0].double(), coded.zero[0].double()
        q = torch.clamp((now[:, j] / scale).round(), -zero, 7 - zero)
        match = q == coded.codes[:, j]
        assert float(match.double().mean()) > 0.95  # fp32 flips ties near a half
        q = coded.codes[:, j].double()
        change, later = q * scale - now[:, j], slice(j + 1, COLUMNS)
        if j + 1 < COLUMNS:
            now[:, later] -= torch.outer(change, torch.linalg.solve(damped[later, later], damped[later, j]))


@pytest.mark.parametrize("act_order", [False, True])
def test_block_size_changes_nothing(layer, act_order):
    weight, gram = layer
    form = FORMS["ternary tiers"]
    tier = tiers_of(weight, gram, form)
    first, second = (
        gptq(weight, gram, **form, tier=tier, block_size=size, act_order=act_order, sweeps=0) for size in (7, 128)
    )
    assert float((first.codes == second.codes).double().mean()) > 0.99
    assert error(weight, first.dequantise(), gram) == pytest.approx(error(weight, second.dequantise(), gram), rel=0.02)


def test_order_does_not_depend_on_how_columns_are_stored(layer):
    """By falling activation, a permutation of the columns permutes the codes."""
    weight, gram = layer
    form = FORMS["affine tiers"]
    tier = tiers_of(weight, gram, form)
    mixed = torch.randperm(COLUMNS, generator=torch.Generator().manual_seed(1))
    first = gptq(weight, gram, **form, tier=tier, act_order=True, sweeps=0)
    second = gptq(weight[:, mixed], gram[mixed][:, mixed], **form, tier=tier[mixed], act_order=True, sweeps=0)
    assert float((first.codes[:, mixed] == second.codes).double().mean()) > 0.99
    assert torch.equal(first.tier[mixed], second.tier)
    other = gptq(weight, gram, **form, tier=tier, act_order=False, sweeps=0)
    assert not torch.equal(other.codes, first.codes)


@pytest.mark.parametrize("form", ["affine tiers", "ternary tiers"])
def test_salient_columns_beat_random_ones(layer, form):
    weight, gram = layer
    form = FORMS[form]
    tier = tiers_of(weight, gram, form)
    salient = error(weight, gptq(weight, gram, **form, tier=tier).dequantise(), gram)
    for seed in range(4):
        drawn = tier[saliency.random(seed, COLUMNS).long()]
        assert salient < error(weight, gptq(weight, gram, **form, tier=drawn).dequantise(), gram)


def test_partial_binary_entries(layer):
    """No fraction is the 8-bit grid; all of it is two values a row and block; more of it errs more."""
    weight, gram = layer
    fine = partial_binary(weight, gram, 0.0)
    assert error(weight, fine, gram) < 1e-3 * error(weight, torch.zeros_like(weight), gram)
    assert max(len(row.unique()) for row in partial_binary(weight, gram, 1.0)) == 2
    errors = [error(weight, partial_binary(weight, gram, share), gram) for share in (0.0, 0.8, 0.9, 1.0)]
    assert errors == sorted(errors)
    step = (weight.amax(1) - weight.amin(1)) / 255
    found = partial_binary(weight, gram, 0.9, block_size=32)
    off_grid = (found / step[:, None]).frac().abs()
    off_grid = torch.minimum(off_grid, 1 - off_grid) > 1e-3
    assert float(off_grid.double().mean()) == pytest.approx(0.9, abs=0.02)
    with pytest.raises(ConversionError, match="binary_fraction"):
        partial_binary(weight, gram, 1.1)


def test_equal_steps_beat_partial_binary(layer):
    """1.4 weight steps on average: 40 % of the columns with two, or 5.7 % of the entries with eight bits."""
    weight, gram = layer
    tier = (saliency.weight(weight, gram).argsort(descending=True).argsort() < round(0.4 * COLUMNS)).to(torch.uint8)
    spiking = gptq(weight, gram, bits=1, ternary=True, tiers=(1, 2), tier=tier)
    rival = partial_binary(weight, gram, 1 - 0.4 / 7)
    assert error(weight, spiking.dequantise(), gram) < 0.5 * error(weight, rival, gram)


def test_dead_and_singular_inputs(layer):
    """Columns that never fired are rounded to nearest, and move nothing; fewer tokens than columns are no trouble."""
    weight, gram = layer
    gram = gram.clone()
    gram[5], gram[:, 5] = 0, 0
    coded = gptq(weight, gram, bits=4, sweeps=1)
    value = coded.dequantise()
    inside = (weight[:, 5] <= value.amax(1)) & (weight[:, 5] >= value.amin(1))
    assert bool(((value - weight)[:, 5].abs() <= 0.501 * coded.scale[0])[inside].all())
    x = torch.randn(7, COLUMNS, generator=torch.Generator().manual_seed(2))
    few = gptq(weight, x.T @ x, bits=3)
    assert error(weight, few.dequantise(), (x.T @ x).double()) < 0.1 * error(
        weight, grids.encode(weight, bits=3).dequantise(), (x.T @ x).double()
    )
    assert bool(gptq(weight, torch.zeros(COLUMNS, COLUMNS), bits=3).scale.isfinite().all())
    with pytest.raises(CalibrationError, match="not finite"):
        gptq(weight, torch.full((COLUMNS, COLUMNS), float("nan")), bits=3)
    with pytest.raises(ConversionError, match="not finite"):
        gptq(torch.full_like(weight, float("inf")), gram, bits=3)


def test_silent_tiers_and_zero_rows(layer):
    """A row of zeros, and a tier without columns: nothing to solve for, nothing broken."""
    weight, gram = layer
    weight = weight.clone()
    weight[3] = 0
    coded = gptq(weight, gram, bits=1, ternary=True, tiers=(1, 2), tier=torch.zeros(COLUMNS), sweeps=2)
    assert int(coded.codes[3].abs().max()) == 0
    assert bool((coded.scale > 0).all())
    assert coded.zero[:, 3].tolist() == [1, 2]
    alone = gptq(weight, gram, bits=1, ternary=True, sweeps=2)
    assert torch.equal(alone.codes, coded.codes)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_cuda(layer):
    """The same codes but for ties; the tiers may lie on either device."""
    weight, gram = layer
    form = FORMS["ternary tiers"]
    tier = tiers_of(weight, gram, form)
    here = gptq(weight, gram, **form, tier=tier, act_order=True)
    for which in (tier, tier.cuda()):
        there = gptq(weight.cuda(), gram.cuda(), **form, tier=which, act_order=True)
        assert there.codes.is_cuda
        found = error(weight, there.dequantise().cpu(), gram)
        assert found == pytest.approx(error(weight, here.dequantise(), gram), rel=0.1)
    binary = partial_binary(weight.cuda(), gram.cuda(), 0.9).cpu()
    assert error(weight, binary, gram) == pytest.approx(error(weight, partial_binary(weight, gram, 0.9), gram), rel=0.1)
