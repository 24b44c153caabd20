"""Which channels are worth more steps: Optimal Brain Spiking, in exact Gram form, and what it is compared with.

Activations (first order): the mean over positions of ``X o (X W^T W)``, the share of each input channel in the
output's energy; it is signed, and sums to ``mean |X W^T|^2``. Summed over positions it only needs ``X^T X``:

    c_j = sum_k (W^T W)_jk (X^T X)_jk / n

Weights (second order): what removing a weight costs once the later ones have made up for it (Hassibi and Stork
1993; Frantar et al. 2023, arXiv 2210.17323), ``w^2 / U_jj^2`` with U the upper Cholesky factor of the damped
inverse of ``X^T X``, mean over output rows.

All are fp64. A rescaling of channels that leaves the layer's function alone leaves ``linear``, ``key``,
``value`` and ``diagonal`` unchanged.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from spikeform.errors import CalibrationError

_DAMPING_TRIES = 8  # damping grows tenfold each time


def linear(gram: Tensor, weights: Sequence[Tensor], tokens: int) -> Tensor:
    """Saliency of a linear layer's input channels.

    Args:
        gram: ``X^T X`` summed over all positions, ``[K, K]``.
        weights: Of all layers that read this input, ``[N_i, K]`` each: stacked, they share one score.
        tokens: Positions in ``gram``.

    Returns:
        Scores ``[K]``; they may be negative.
    """
    return (_inner(weights) * gram.double()).sum(1) / _count(tokens)


def diagonal(gram: Tensor, weights: Sequence[Tensor], tokens: int) -> Tensor:
    """Saliency without interaction of channels: ``diag(W^T W) mean(x^2)``, ``[K]``. Arguments as for `linear`."""
    squares = torch.stack([weight.double().square().sum(0) for weight in weights]).sum(0)
    return squares * gram.double().diagonal() / _count(tokens)


def key(query_grams: Tensor, key_grams: Tensor, tokens: int, *, interact: bool = True) -> Tensor:
    """Saliency of the channels of keys in ``Q K^T``: mean over positions of ``K o (K Q^T Q)``.

    The two Grams of a sample are multiplied, so samples must stay apart, unlike for linear layers. All pairs
    of positions count, as in the released code, masked ones too.

    Args:
        query_grams: ``Q^T Q`` of each sample and query head, ``[B, H, E, E]``.
        key_grams: ``K^T K`` of each sample and key head, ``[B, G, E, E]``, G a divisor of H.
        tokens: Key positions of all samples.
        interact: Whether channels interact; otherwise ``diag(Q^T Q) diag(K^T K)``, as in `diagonal`.

    Returns:
        Scores ``[G, E]``, summed over the query heads that share a key head.
    """
    heads, groups = query_grams.shape[1], key_grams.shape[1]
    queries = query_grams.double().unflatten(1, (groups, heads // groups)).sum(2)
    keys = key_grams.double()
    if not interact:
        queries, keys = queries.diagonal(dim1=-2, dim2=-1), keys.diagonal(dim1=-2, dim2=-1)
        return (queries * keys).sum(0) / _count(tokens)
    return (queries * keys).sum((0, -1)) / _count(tokens)


def value(squares: Tensor, groups: int, tokens: int) -> Tensor:
    """Saliency of the channels of values in ``O = P V``: ``mean(V o (P^T P V))``, which is the mean of ``O^2``.

    Args:
        squares: ``O^2`` summed over positions, of each query head, ``[H, E]``: the diagonal of the Gram matrix of
            the output projection's input.
        groups: Value heads G, a divisor of H.
        tokens: Positions in ``squares``.

    Returns:
        Scores ``[G, E]``, summed over the query heads that share a value head.
    """
    heads = squares.double().unflatten(0, (groups, len(squares) // groups))
    return heads.sum(1) / _count(tokens)


def weight(weight: Tensor, gram: Tensor, damp: float = 0.01) -> Tensor:
    """Saliency of a weight's input columns: the mean over rows of ``w^2 / U_jj^2``.

    Args:
        weight: ``[N, K]``.
        gram: ``X^T X``, ``[K, K]``.
        damp: Share of the mean diagonal that is added to the diagonal.

    Returns:
        Scores ``[K]``.
    """
    return weight.double().square().mean(0) / inverse_factor(gram, damp)[1].diagonal().square()


def magnitude(peaks: Tensor) -> Tensor:
    """Each channel's largest magnitude on the calibration data, in fp64."""
    return peaks.double()


def random(seed: int, channels: int) -> Tensor:
    """A random ranking of channels, ``[channels]``, the same for a seed on every device."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(channels, generator=generator).double()


def inverse_factor(gram: Tensor, damp: float) -> tuple[Tensor, Tensor]:
    """The damped Gram matrix ``H``, and the upper Cholesky factor U of its inverse, ``H^-1 = U^T U``.

    H is in units of the mean diagonal. A channel that never fired is left to the damping alone: its weights count
    little, and stand by themselves.

    Args:
        gram: ``[K, K]``, symmetric.
        damp: What is added to the diagonal, as a share of its mean, at least 1e-8; raised tenfold while H is not
            positive definite.

    Returns:
        ``(H, U)``, both fp64 ``[K, K]``.

    Raises:
        CalibrationError: The matrix is not finite, or far from positive semidefinite.
    """
    gram = gram.double()
    if not bool(gram.isfinite().all()):
        raise CalibrationError("the Gram matrix of a layer's inputs is not finite on the calibration data")
    gram = gram / (gram.diagonal().mean().clamp(min=0) or 1.0)
    damp = max(damp, 1e-8)
    for _ in range(_DAMPING_TRIES):
        damped = gram.clone()
        damped.diagonal().add_(damp)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not int(failed):
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not int(failed):
                return damped, upper
        damp *= 10
    raise CalibrationError("the Gram matrix of a layer's inputs is far from positive semidefinite")


def _inner(weights: Sequence[Tensor]) -> Tensor:
    """``W^T W`` of the stacked weights, ``[K, K]``."""
    return torch.stack([weight.double().T @ weight.double() for weight in weights]).sum(0)


def _count(tokens: int) -> int:
    if tokens < 1:
        raise CalibrationError("saliency needs at least one position of calibration data")
    return tokens
