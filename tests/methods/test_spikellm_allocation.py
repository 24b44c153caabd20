"""Steps by saliency: the released rule's counts and ties, and what a budget buys."""

import itertools

import pytest
import torch

from spikeform.errors import CalibrationError, ConfigError
from spikeform.methods.spikellm import allocation


def ranked(scores, share, steps):
    """The rule as described: sort, take the threshold of the ordinary quota, ordinary where not above it."""
    values = scores.flatten().tolist()
    quota = int((100 - round(100 * share)) / 100 * len(values))
    threshold = sorted(values)[quota - 1] if quota else float("-inf")
    return torch.tensor([1 if value <= threshold else steps for value in values]).view(scores.shape)


@pytest.mark.parametrize("channels", [(1,), (7,), (4096,), (10, 3), (4, 1, 32)])
@pytest.mark.parametrize("share", [0.0, 0.05, 0.1, 0.3, 0.35, 0.9, 1.0])
def test_fraction_is_the_released_rule(channels, share):
    generator = torch.Generator().manual_seed(len(channels))
    smooth = torch.randn(channels, generator=generator, dtype=torch.float64)
    for scores in (smooth, smooth.round(), torch.zeros(channels)):  # without ties, with many, nothing else
        times = allocation.fraction(scores, share, 2)
        assert times.dtype == torch.uint8
        assert torch.equal(times.long(), ranked(scores, share, 2))
    count = smooth.numel()
    salient = int((allocation.fraction(smooth, share, 4) == 4).sum())
    assert salient == count - int((100 - round(100 * share)) / 100 * count)


def test_fraction_on_a_binary_quota():
    """1 - 0.9 is less than 0.1 in binary, and must not lose a channel."""
    assert int((allocation.fraction(torch.arange(10.0), 0.9, 2) == 1).sum()) == 1


def test_fraction_refuses_scores_that_are_not_finite():
    with pytest.raises(CalibrationError, match="not finite"):
        allocation.fraction(torch.tensor([1.0, float("nan")]), 0.5, 2)
    with pytest.raises(ConfigError, match="salient"):
        allocation.fraction(torch.ones(2), 1.5, 2)


def gain(times, scores):
    share = scores.clamp(min=0) / scores.clamp(min=0).sum()
    return float((share * (1 - 1 / times.double() ** 2)).sum())


@pytest.mark.parametrize("seed", range(5))
def test_budget_is_the_best_of_all_allocations(seed):
    """At every price the greedy meets exactly, no other allocation gains more: all of them tried."""
    generator = torch.Generator().manual_seed(seed)
    scores = {"a": torch.rand(3, generator=generator) ** 6, "b": torch.rand(3, generator=generator) - 0.2}
    cost = {"a": 1.0, "b": 3.0}
    every = [torch.tensor(t) for t in itertools.product((1, 2, 4), repeat=3)]
    everything = [
        (sum(cost[s] * float(t.sum()) for s, t in pair.items()), sum(gain(t, scores[s]) for s, t in pair.items()))
        for pair in ({"a": a, "b": b} for a in every for b in every)
    ]
    least = 12.0
    seen = set()
    for limit in torch.linspace(1, 4, 61).tolist():
        times = allocation.budget(scores, cost, limit, 4)
        spent = sum(cost[site] * float(found.sum()) for site, found in times.items())
        assert spent <= limit * least + 1e-6
        reached = sum(gain(found, scores[site]) for site, found in times.items())
        assert reached >= max(g for c, g in everything if c <= spent) - 1e-9
        seen.add(spent)
    assert len(seen) > 4
    assert int(times["b"][scores["b"] < 0].sum()) == int((scores["b"] < 0).sum())  # negative: never worth a step


def test_limits_by_site_and_shapes():
    scores = {"linear": torch.rand(8), "key": torch.rand(2, 1, 4)}
    times = allocation.budget(scores, {"linear": 5.0, "key": 1.0}, 100.0, {"linear": 8, "key": 2})
    assert times["linear"].tolist() == [8] * 8
    assert times["key"].shape == (2, 1, 4)
    assert times["key"].unique().tolist() == [2]
    nothing = allocation.budget(scores, {"linear": 5.0, "key": 1.0}, 1.0, 4)
    assert all(found.unique().tolist() == [1] for found in nothing.values())


def test_sensitivity_moves_steps_to_the_layer_that_errs():
    generator = torch.Generator().manual_seed(2)
    scores = {site: torch.rand(40, generator=generator) for site in ("a", "b")}
    cost = {"a": 1.0, "b": 1.0}
    share = {
        error: int((allocation.sensitivity(scores, {"a": error, "b": 1.0}, cost, 1.2, 2)["a"] == 2).sum())
        for error in (0.0, 1.0, 100.0)
    }
    assert share[0.0] == 0
    assert 0 < share[1.0] < 16
    assert share[100.0] == 16  # all that the budget allows


def test_energy_prefers_the_channel_that_is_quiet():
    scores = {"a": torch.tensor([1.0, 1.0, 0.9])}
    spikes = {"a": torch.tensor([4.0, 1.0, 0.1])}
    assert allocation.energy(scores, spikes, {"a": 8.0}, 1.02, 2)["a"].tolist() == [1, 1, 2]
    assert allocation.energy(scores, spikes, {"a": 8.0}, 1.3, 2)["a"].tolist() == [1, 2, 2]


def test_limits_and_steps_are_checked():
    scores, cost = {"a": torch.ones(2)}, {"a": 1.0}
    with pytest.raises(ConfigError, match="at least 1"):
        allocation.budget(scores, cost, 0.9, 2)
    with pytest.raises(ConfigError, match="power of two"):
        allocation.budget(scores, cost, 1.1, 3)
    with pytest.raises(CalibrationError, match="not finite"):
        allocation.budget({"a": torch.tensor([float("inf")])}, cost, 1.1, 2)
