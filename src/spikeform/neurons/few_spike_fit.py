"""Learning few-spike neurons (C. Stoeckl and W. Maass, Nature Machine Intelligence 3, 2021).

    v(1) = x;   z(t) = 1[v(t) > theta(t)];   v(t+1) = v(t) - h(t) z(t);   y = sum_t d(t) z(t)

theta, h, d are fitted so that ``y(x)`` is close to ``f(x)`` on an interval. Everything is learned in the
normalised coordinates ``u`` in [0, 1] of input and output, all intervals of a bank at once:

1. starts: radix-2 and piecewise linear maps with 1..4 pieces, with and without an offset spike;
2. given the spikes, y is linear in d: exact least squares for d, at every iterate;
3. Adam on theta and h through the triangular surrogate, then random search; the best iterate is kept;
4. the errors reported are those of the rounded fp32 neuron, on points that the fit has not seen.

Suffixes: R intervals, S starts, T steps, N sample points.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from spikeform.neurons.functions import FUNCTIONS
from spikeform.neurons.surrogate import spike
from spikeform.spikes.codings import check_steps

Function = Callable[[Tensor], Tensor]
NEVER = 3.0e38  # a threshold that nothing reaches; finite, so that checkpoints hold finite numbers only
MAX_PIECES = 4
RIDGE = 1e-10
FLAT = 1e-6  # a rise this small beside the value is a constant: one spike
TEST_POINTS = 4096


@dataclass(frozen=True)
class FewSpikeFit:
    """One fitted few-spike neuron and the error it reached.

    Attributes:
        function: Name of the function.
        interval: Left and right end of the input interval.
        theta: Thresholds, fp32 ``[T]``.
        h: Resets, fp32 ``[T]``; each follows its own spike.
        d: Output weights, fp32 ``[T]``.
        max_error: Largest ``|y - f|`` on a fine even grid of the interval, units of f.
        mean_error: Mean ``|y - f|`` there.
        rms_error: Root of the mean ``(y - f)^2`` there.
    """

    function: str
    interval: tuple[float, float]
    theta: Tensor
    h: Tensor
    d: Tensor
    max_error: float
    mean_error: float
    rms_error: float

    def moved(self, scale: float = 1.0, shift: float = 0.0, gain: float = 1.0) -> FewSpikeFit:
        """The neuron of ``gain * f((x - shift) / scale)``, scale > 0: exact, without a new fit."""
        left, right = self.interval
        theta = torch.where(self.theta < NEVER, self.theta.double() * scale + shift, NEVER).float()
        return replace(
            self,
            interval=(left * scale + shift, right * scale + shift),
            theta=theta,
            h=(self.h.double() * scale).float(),
            d=(self.d.double() * gain).float(),
            max_error=self.max_error * abs(gain),
            mean_error=self.mean_error * abs(gain),
            rms_error=self.rms_error * abs(gain),
        )


def few_spike_response(x: Tensor, theta: Tensor, h: Tensor, d: Tensor) -> Tensor:
    """``y(x)`` of the neuron as defined above; ``x`` ``[...]``, the parameters ``[T]``."""
    v, y = x, torch.zeros_like(x)
    for theta_t, h_t, d_t in zip(theta, h, d, strict=True):
        z = (v > theta_t).to(x.dtype)
        v, y = v - h_t * z, y + d_t * z
    return y


def fit_few_spike(
    function: str | Function,
    interval: tuple[float, float],
    steps: int,
    *,
    samples: int = 512,
    iterations: int = 150,
    seed: int = 0,
    density: Function | None = None,
) -> FewSpikeFit:
    """Fit one few-spike neuron to ``function`` on ``interval``; see :func:`fit_few_spike_bank`."""
    fits = fit_few_spike_bank(
        function, [interval], steps, samples=samples, iterations=iterations, seed=seed, density=density
    )
    return fits[0]


def fit_few_spike_bank(
    function: str | Function,
    intervals: Sequence[tuple[float, float]],
    steps: int,
    *,
    samples: int = 512,
    iterations: int = 150,
    seed: int = 0,
    density: Function | None = None,
) -> list[FewSpikeFit]:
    """Fit a few-spike neuron on each interval, all at once. Deterministic for a given seed.

    Args:
        function: A name in :data:`spikeform.neurons.functions.FUNCTIONS`, or an elementwise callable.
        intervals: ``(left, right)`` input intervals, finite, left < right.
        steps: Time steps T, 1 to 16.
        samples: Sample points per interval, at least 2 T.
        iterations: Adam iterations; the random search that follows takes as many.
        seed: Of sample points and search.
        density: Weight of an input ``x`` (its probability density, up to a factor); None for an even one.

    Returns:
        One fit per interval.

    Raises:
        ValueError: Unknown function name, bad steps, interval, samples or iterations, a function that is not
            finite on an interval, or a density that is negative or nowhere positive.
    """
    check_steps(steps)
    name, f = _resolve(function)
    edges = torch.tensor([[float(left), float(right)] for left, right in intervals], dtype=torch.float64)
    if edges.numel() == 0 or not bool(edges.isfinite().all()) or not bool((edges[:, 0] < edges[:, 1]).all()):
        raise ValueError(f"few-spike intervals must be finite with left < right, got {list(intervals)}")
    if samples < 2 * steps or iterations < 0:
        raise ValueError(f"needs samples >= {2 * steps} and iterations >= 0, got {samples} and {iterations}")
    generator = torch.Generator().manual_seed(seed)
    # Stratified points: one at a random place of each cell, so that the finest bits are not aliased.
    jitter = torch.rand(len(edges), samples, generator=generator, dtype=torch.float64)
    u_RN = (torch.arange(samples) + jitter) / samples
    left, width = edges[:, :1], edges[:, 1:] - edges[:, :1]
    # The ends, a few fp32 roundings outside: a threshold must not come to lie on a gate.
    margin = 4e-7 * edges.abs().amax(1, keepdim=True) / width + 1e-6
    u_RN = torch.cat([-margin, u_RN, 1 + margin], 1)
    x_RN = left + width * u_RN.clamp(0, 1)
    y_RN = f(x_RN)
    if not bool(y_RN.isfinite().all()):
        raise ValueError(f"{name} is not finite on all of the intervals {list(intervals)}")
    weight_RN = torch.ones_like(u_RN) if density is None else density(x_RN).double()
    if not bool((weight_RN >= 0).all()) or not bool((weight_RN.sum(1) > 0).all()):
        raise ValueError("the density must not be negative, and must be positive somewhere in each interval")
    weight_RN = weight_RN / weight_RN.sum(1, keepdim=True)
    span = y_RN.amax(1, keepdim=True) - y_RN.amin(1, keepdim=True)
    data = u_RN, y_RN / span.clamp(min=1e-30), weight_RN

    flat = span <= FLAT * y_RN.abs().amax(1, keepdim=True)
    start = _best_start(*data, flat, steps)
    learned = _learn(*data, *start, iterations, generator)

    # What was learned must hold on points that it was not learned on, at the worst of them too.
    u_RM = torch.rand(len(edges), TEST_POINTS, generator=generator, dtype=torch.float64)
    target_RM = f(left + width * u_RM)
    best: Iterate | None = None
    for theta_RT, h_RT in (start, learned):
        d_RT = _solve(_spikes(u_RN, theta_RT, h_RT), y_RN, weight_RN)
        error_RM = (_spikes(u_RM, theta_RT, h_RT) @ d_RT[..., None]).squeeze(-1) - target_RM
        best = _better(best, (error_RM.abs().amax(1), theta_RT, h_RT))
    assert best is not None  # the loop ran
    theta_RT, h_RT = best[1:]
    d_RT = _solve(_spikes(u_RN, theta_RT, h_RT), y_RN, weight_RN)
    # A step that carries nothing must not spike: what is counted is what a synapse receives.
    theta_RT = torch.where(d_RT == 0, NEVER, left + width * theta_RT)
    tables = zip(edges.tolist(), theta_RT.float(), (width * h_RT).float(), d_RT.float(), strict=True)
    return [_measure(name, f, (begin, end), theta_T, h_T, d_T) for (begin, end), theta_T, h_T, d_T in tables]


def _resolve(function: str | Function) -> tuple[str, Function]:
    if callable(function):
        return getattr(function, "__name__", "function"), function
    if function not in FUNCTIONS:
        raise ValueError(f"no function named {function!r}; known: {', '.join(FUNCTIONS)}")
    return function, FUNCTIONS[function]


def _measure(name: str, f: Function, interval: tuple[float, float], theta: Tensor, h: Tensor, d: Tensor) -> FewSpikeFit:
    left, right = interval
    x = torch.linspace(left, right, TEST_POINTS + 1, dtype=torch.float64).float()
    error = (few_spike_response(x, theta, h, d).double() - f(x.double())).abs()
    rms = float(error.square().mean().sqrt())
    return FewSpikeFit(name, interval, theta, h, d, float(error.max()), float(error.mean()), rms)


def _spikes(u_RN: Tensor, theta_RT: Tensor, h_RT: Tensor, slack_RT: Tensor | None = None) -> Tensor:
    """Spike patterns ``[R, N, T]``; with ``slack`` (widths of the surrogate) differentiable."""
    v, steps = u_RN, []
    for t in range(theta_RT.shape[-1]):
        u = v - theta_RT[:, t, None]
        z = (u > 0).to(v.dtype) if slack_RT is None else spike(u / slack_RT[:, t, None], strict=True)
        v = v - h_RT[:, t, None] * z
        steps.append(z)
    return torch.stack(steps, -1)


def _solve(z_RNT: Tensor, y_RN: Tensor, weight_RN: Tensor) -> Tensor:
    """The d that minimises the weighted squared error, given the spikes; 0 for a step that never spikes."""
    weighted = (z_RNT * weight_RN[..., None]).transpose(1, 2)
    gram = weighted @ z_RNT
    used = gram.diagonal(dim1=1, dim2=2) > 0
    gram = gram + torch.diag_embed(torch.where(used, RIDGE, 1.0).to(gram.dtype))
    d = torch.linalg.solve(gram, weighted @ y_RN[..., None]).squeeze(-1)
    return torch.where(used, d, 0.0)


def _loss(z_RNT: Tensor, d_RT: Tensor, y_RN: Tensor, weight_RN: Tensor) -> Tensor:
    error = (z_RNT @ d_RT[..., None]).squeeze(-1) - y_RN
    return (error.square() * weight_RN).sum(1)


def _starts(steps: int) -> list[tuple[list[float], list[float]]]:
    """(theta, h) of piecewise linear maps of [0, 1].

    A piece [a, b] of k bits: ``theta = a + (b-a) 2^-i``, ``h = (b-a) 2^-i``. Pieces go from right to left: an
    input of a right piece ends at that piece's left edge, from where it fires every bit of the pieces below,
    and so gets their whole rise. An offset spike (fires always, resets nothing) carries f at the left end.
    """
    starts = []
    for offset in (1, 0):
        for pieces in range(1, MAX_PIECES + 1):
            bits = steps - offset
            if bits < 2 * pieces and pieces > 1:
                continue
            theta, h = [-1.0] * offset, [0.0] * offset
            for piece in range(pieces - 1, -1, -1):
                count = bits // pieces + (piece < bits % pieces)
                for i in range(1, count + 1):
                    h.append(2.0**-i / pieces)
                    theta.append(piece / pieces + h[-1])
            starts.append((theta, h))
    return starts


def _best_start(u_RN: Tensor, y_RN: Tensor, weight_RN: Tensor, flat_R1: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """The start of least error; where f is flat, a first step that always spikes and others that never do."""
    best = None
    for theta, h in _starts(steps):
        theta_RT = torch.tensor(theta, dtype=u_RN.dtype).expand(len(u_RN), -1)
        h_RT = torch.tensor(h, dtype=u_RN.dtype).expand(len(u_RN), -1)
        z = _spikes(u_RN, theta_RT, h_RT)
        loss = _loss(z, _solve(z, y_RN, weight_RN), y_RN, weight_RN)
        best = _better(best, (loss, theta_RT, h_RT))
    assert best is not None  # a window has at least one start
    constant = torch.tensor([-1.0] + [NEVER] * (steps - 1), dtype=u_RN.dtype)
    return torch.where(flat_R1, constant, best[1]), torch.where(flat_R1, 0.0, best[2])


Iterate = tuple[Tensor, Tensor, Tensor]


def _better(best: Iterate | None, other: Iterate) -> Iterate:
    if best is None:
        return other
    keep = other[0] < best[0]
    return (
        torch.where(keep, other[0], best[0]),
        torch.where(keep[:, None], other[1], best[1]),
        torch.where(keep[:, None], other[2], best[2]),
    )


def _learn(
    u_RN: Tensor,
    y_RN: Tensor,
    weight_RN: Tensor,
    theta_RT: Tensor,
    h_RT: Tensor,
    iterations: int,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """Adam by the surrogate, then random search around the best iterate."""
    # Steps differ in scale by 2^T: each is learned in units of its own reset.
    unit_RT = torch.where(h_RT > 0, h_RT, 0.1).clamp(min=1.0 / u_RN.shape[1])
    best: Iterate | None = None
    moves = torch.zeros(2, *theta_RT.shape, dtype=u_RN.dtype).requires_grad_()
    optimizer = torch.optim.Adam([moves], lr=0.02)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: 1.0 - i / max(iterations, 1))
    for _ in range(iterations):
        theta, h = theta_RT + unit_RT * moves[0], h_RT + unit_RT * moves[1]
        z = _spikes(u_RN, theta, h, unit_RT)
        with torch.no_grad():
            d = _solve(z, y_RN, weight_RN)
        loss = _loss(z, d, y_RN, weight_RN)
        best = _better(best, (loss.detach(), theta.detach(), h.detach()))
        optimizer.zero_grad()
        (loss / loss.detach().clamp(min=1e-20)).sum().backward()
        optimizer.step()
        schedule.step()
    z = _spikes(u_RN, theta_RT, h_RT)
    start = (_loss(z, _solve(z, y_RN, weight_RN), y_RN, weight_RN), theta_RT, h_RT)
    best = _better(best, start)
    for i in range(iterations):
        size = 0.5 * 0.01 ** (i / iterations)
        noise = torch.randn(moves.shape, generator=generator, dtype=u_RN.dtype) * size
        noise = noise * (torch.rand(moves.shape, generator=generator) < 2.0 / theta_RT.shape[1])
        theta, h = best[1] + unit_RT * noise[0], best[2] + unit_RT * noise[1]
        z = _spikes(u_RN, theta, h)
        best = _better(best, (_loss(z, _solve(z, y_RN, weight_RN), y_RN, weight_RN), theta, h))
    return best[1], best[2]
