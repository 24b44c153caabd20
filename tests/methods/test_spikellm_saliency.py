"""Saliency from Gram matrices equals the position-wise form, and no equivalent transformation changes it."""

import pytest
import torch

from spikeform.errors import CalibrationError
from spikeform.methods.spikellm import saliency

TOKENS, CHANNELS, ROWS = 37, 24, 15


@pytest.fixture
def layer():
    generator = torch.Generator().manual_seed(3)
    common = torch.randn(TOKENS, 1, generator=generator, dtype=torch.float64)  # correlates the channels
    x = torch.randn(TOKENS, CHANNELS, generator=generator, dtype=torch.float64) + 3 * common
    weights = [torch.randn(rows, CHANNELS, generator=generator, dtype=torch.float64) for rows in (ROWS, 4)]
    return x, weights


def same(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12 * float(expected.abs().max()))


def test_linear_equals_the_mean_over_positions(layer):
    x, weights = layer
    stacked = torch.cat(weights)
    direct = (x * (x @ stacked.T @ stacked)).mean(0)
    found = saliency.linear(x.T @ x, weights, TOKENS)
    same(found, direct)
    assert bool((direct < 0).any())  # the mean is signed
    same(found.sum(), (x @ stacked.T).square().sum(1).mean())


def test_linear_and_diagonal_ignore_a_rescaling_of_channels(layer):
    x, weights = layer
    scale = torch.linspace(-3, 3, CHANNELS, dtype=torch.float64).exp()
    moved, scaled = x / scale, [weight * scale for weight in weights]
    for rule in (saliency.linear, saliency.diagonal):
        same(rule(moved.T @ moved, scaled, TOKENS), rule(x.T @ x, weights, TOKENS))
    same(saliency.diagonal(x.T @ x, weights, TOKENS), torch.cat(weights).square().sum(0) * x.square().mean(0))


def test_weight_is_the_cost_of_removing_it(layer):
    """Column j's score is the error that is left when later columns make up for the loss of w_j, by brute force."""
    x, (weight, _) = layer
    gram = x.T @ x
    gram = gram / gram.diagonal().mean() + 0.01 * torch.eye(CHANNELS, dtype=torch.float64)
    for j in (0, 11, CHANNELS - 1):
        rest = torch.zeros(ROWS, CHANNELS, dtype=torch.float64)
        rest[:, j] = -weight[:, j]
        later = slice(j + 1, CHANNELS)
        if j + 1 < CHANNELS:
            rest[:, later] = torch.linalg.solve(gram[later, later], gram[later, j]) * weight[:, j : j + 1]
        cost = ((rest @ gram) * rest).sum(1).mean()
        same(saliency.weight(weight, x.T @ x, 0.01)[j], cost)


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_key_and_value_equal_the_mean_over_positions(groups):
    generator = torch.Generator().manual_seed(groups)
    batch, heads, length, size = 3, 4, 11, 6
    q = torch.randn(batch, heads, length, size, generator=generator, dtype=torch.float64)
    k, v = torch.randn(2, batch, groups, length, size, generator=generator, dtype=torch.float64)
    p = torch.randn(batch, heads, length, length, generator=generator, dtype=torch.float64).softmax(-1)
    k_all, v_all = (t.repeat_interleave(heads // groups, 1) for t in (k, v))
    tokens = batch * length

    direct = (k_all * (k_all @ (q.mT @ q))).mean((0, 2)).unflatten(0, (groups, -1)).sum(1)
    same(saliency.key(q.mT @ q, k.mT @ k, tokens), direct)
    scale = torch.linspace(0.1, 9, size, dtype=torch.float64)
    q_scaled, k_scaled = q * scale, k / scale
    same(saliency.key(q_scaled.mT @ q_scaled, k_scaled.mT @ k_scaled, tokens), direct)
    alone = (k_all.square() * q.square().sum(2, keepdim=True)).mean((0, 2)).unflatten(0, (groups, -1)).sum(1)
    same(saliency.key(q.mT @ q, k.mT @ k, tokens, interact=False), alone)

    direct = (v_all * (p.mT @ p @ v_all)).mean((0, 2)).unflatten(0, (groups, -1)).sum(1)
    same(saliency.value((p @ v_all).square().sum((0, 2)), groups, tokens), direct)


def test_random_is_a_ranking_by_seed():
    first = saliency.random(7, 100)
    assert sorted(first.tolist()) == list(range(100))
    assert torch.equal(first, saliency.random(7, 100))
    assert not torch.equal(first, saliency.random(8, 100))


def test_factor_of_singular_and_dead_channels():
    """Few positions and silent channels: damping alone keeps the factor, and is raised where it has to be."""
    x = torch.randn(5, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x[:, 4] = 0
    for damp in (0.01, 0.0):
        damped, upper = saliency.inverse_factor(x.T @ x, damp)
        torch.testing.assert_close(upper.T @ upper @ damped, torch.eye(12, dtype=torch.float64), rtol=0, atol=1e-7)
        assert torch.equal(upper, upper.triu())
        assert float(damped[4, 4]) == pytest.approx(max(damp, 1e-8))
    damped, _ = saliency.inverse_factor(torch.zeros(3, 3), 0.01)
    same(damped, 0.01 * torch.eye(3, dtype=torch.float64))
    for bad in (float("nan"), float("inf")):
        with pytest.raises(CalibrationError, match="not finite"):
            saliency.inverse_factor(torch.full((2, 2), bad), 0.01)
    with pytest.raises(CalibrationError, match="far from positive"):
        saliency.inverse_factor(torch.tensor([[1.0, 1e9], [1e9, 1.0]]), 0.01)
    with pytest.raises(CalibrationError, match="at least one position"):
        saliency.linear(torch.eye(2), [torch.eye(2)], 0)
