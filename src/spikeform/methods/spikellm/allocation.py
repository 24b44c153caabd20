"""How many steps each channel gets, from its saliency.

`fraction` is the paper's rule as its code has it: a fixed share of each layer's channels gets T steps. The others
are ours. They share out a budget over all layers, one doubling of a channel's steps after the other, by what
it gains over what it costs: a step T times finer leaves ``1 / T^2`` of the squared error, so a doubling from T gains
``3/4 s / T^2`` of a channel of score s, and costs T times what one step of it does. Scores are shares of their
layer's sum (negative ones count as 0). Every doubling gains less than the one before and costs more, so taking
them in order of gain over cost is the optimum of the relaxed problem, short of the last one taken.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from spikeform.errors import CalibrationError, ConfigError

Costs = Mapping[str, float] | Mapping[str, Tensor]
Limits = int | Mapping[str, int]


def fraction(scores: Tensor, salient: float, steps: int) -> Tensor:
    """A fixed share of channels gets ``steps`` steps, all others one.

    With C channels, the threshold is the ``int((1 - salient) C)``-th smallest score, and channels above it are
    salient; those that tie with it are ordinary. Scores of several axes are ranked together.

    Args:
        scores: Any shape; higher is more salient.
        salient: Share of salient channels, 0 to 1.
        steps: Their steps.

    Returns:
        Steps, uint8, the shape of ``scores``.

    Raises:
        CalibrationError: A score is not finite.
        ConfigError: ``salient`` is not from 0 to 1.
    """
    _finite({"scores": scores})
    if not 0 <= salient <= 1:
        raise ConfigError(f"salient must be from 0 to 1, got {salient}")
    ordinary = int(round(1 - salient, 12) * scores.numel())  # 1 - 0.9 is not 0.1 in binary
    times = torch.full_like(scores, steps, dtype=torch.uint8)
    if ordinary:
        times[scores <= scores.flatten().sort().values[ordinary - 1]] = 1
    return times


def budget(scores: Mapping[str, Tensor], costs: Costs, limit: float, steps: Limits) -> dict[str, Tensor]:
    """Steps for the whole model under one limit; every layer's error counts alike.

    Args:
        scores: Saliency of the channels of each site, any shapes.
        costs: What a channel costs in one step, such as the rows of the weights that read it: one number for
            a site, or a tensor that broadcasts to its scores.
        limit: Cost of the result over that of one step everywhere, at least 1; it is not exceeded.
        steps: Largest T, a power of two, for all sites or by site.

    Returns:
        Steps of each site's channels, uint8, powers of two.

    Raises:
        CalibrationError: A score or cost is not finite.
        ConfigError: ``limit`` is below 1, or a T is no power of two.
    """
    return _share_out(scores, costs, limit, steps, dict.fromkeys(scores, 1.0))


def sensitivity(
    scores: Mapping[str, Tensor], errors: Mapping[str, float], costs: Costs, limit: float, steps: Limits
) -> dict[str, Tensor]:
    """As `budget`, with each site's scores weighed by the error that it was measured to make.

    Args:
        scores: As for `budget`.
        errors: What one step everywhere in this site does to an error that all sites share, such as the relative
            error of their block's output, not negative.
        costs: As for `budget`.
        limit: As for `budget`.
        steps: As for `budget`.

    Returns:
        As `budget`.
    """
    return _share_out(scores, costs, limit, steps, errors)


def energy(
    scores: Mapping[str, Tensor], spikes: Mapping[str, Tensor], fan_out: Costs, limit: float, steps: Limits
) -> dict[str, Tensor]:
    """As `budget`, where a channel costs the unit spikes that it is expected to send, times its fan-out.

    Args:
        scores: As for `budget`.
        spikes: Mean drive of each channel in units of one step's threshold, ``mean |x| / Delta``, shapes of
            ``scores``. Not the mean code: channels that are silent at one step fire at finer ones.
        fan_out: Additions that a spike of each site causes.
        limit: Expected additions over those of one step everywhere.
        steps: As for `budget`.

    Returns:
        As `budget`.
    """
    costs = {site: mean.double() * torch.as_tensor(fan_out[site]).to(mean.device) for site, mean in spikes.items()}
    return _share_out(scores, costs, limit, steps, dict.fromkeys(scores, 1.0))


def _share_out(
    scores: Mapping[str, Tensor], costs: Costs, limit: float, steps: Limits, weights: Mapping[str, float]
) -> dict[str, Tensor]:
    if not limit >= 1:
        raise ConfigError(f"budget must be at least 1, the cost of one step for every channel, got {limit}")
    _finite(scores)
    spent, ratios, prices, owners = 0.0, [], [], []
    for index, (site, found) in enumerate(scores.items()):
        most = steps if isinstance(steps, int) else steps[site]
        if most < 1 or most & (most - 1):
            raise ConfigError(f"{site}: steps must be a power of two, got {most}")
        share = found.detach().double().cpu().flatten().clamp(min=0)
        share = share / (float(share.sum()) or 1.0) * weights[site]
        cost = torch.as_tensor(costs[site]).double().cpu().expand(found.shape).flatten()
        _finite({site: cost, f"{site} weighed": share})
        spent += float(cost.sum())
        channel = torch.arange(len(share))
        for doubling in range(most.bit_length() - 1):
            now = 2**doubling
            prices.append(cost * now)
            ratios.append(0.75 * share / now**2 / prices[-1].clamp(min=torch.finfo(torch.float64).tiny))
            owners.append(torch.stack([torch.full_like(channel, index), channel], 1))
    times = {site: torch.ones(found.shape, dtype=torch.uint8) for site, found in scores.items()}
    if ratios:
        ratio, price, owner = torch.cat(ratios), torch.cat(prices), torch.cat(owners)
        order = ratio.argsort(descending=True, stable=True)
        order = order[ratio[order] > 0]
        room = (limit - 1) * spent * (1 + 1e-12)  # a budget that fits exactly does, whatever its roundings
        taken = owner[order[price[order].cumsum(0) <= room]]
        for index, found in enumerate(times.values()):
            doublings = torch.bincount(taken[taken[:, 0] == index, 1], minlength=found.numel())
            found.copy_((2**doublings).view(found.shape))
    return {site: found.to(scores[site].device) for site, found in times.items()}


def _finite(tensors: Mapping[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        if not bool(tensor.isfinite().all()):
            raise CalibrationError(f"{name}: saliency or cost is not finite on the calibration data")
