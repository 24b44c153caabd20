"""Scales for given codes and codes for given scales: each step is the exact minimum that it claims to be."""

import pytest
import torch

from spikeform.methods.spikellm import grids
from spikeform.methods.spikellm.descent import go_over, solve_scales

ROWS, COLUMNS = 8, 60
SPANS = [(0, 20), (20, 45), (45, 60)]


@pytest.fixture(params=[True, False], ids=["ternary", "affine"])
def state(request):
    """A weight coded to nearest in three tiers, and a Gram matrix of correlated inputs."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(ROWS, COLUMNS, generator=generator)
    x = torch.randn(200, COLUMNS, generator=generator) + torch.randn(200, 1, generator=generator)
    grid = grids.Grid.blank(weight, grids.levels_of(2, (1, 2, 4), request.param), request.param)
    codes = torch.empty_like(weight)
    for r, (start, end) in enumerate(SPANS):
        grid.fit(r, weight[:, start:end])
        codes[:, start:end] = grid.codes(weight[:, start:end], r)
    return weight, codes, grid, x.T @ x


def error(weight, codes, grid, gram):
    """Of each row."""
    value = torch.cat([codes[:, a:b] * grid.scale[r][:, None] for r, (a, b) in enumerate(SPANS)], 1)
    difference = (value - weight).double()
    return ((difference @ gram.double()) * difference).sum(1)


def test_no_other_scales_are_better(state):
    weight, codes, grid, gram = state
    before, kept = error(weight, codes, grid, gram), codes.clone()
    solve_scales(weight, codes, grid, SPANS, gram)
    least = error(weight, codes, grid, gram)
    assert torch.equal(codes, kept)
    assert bool((least <= before).all())
    assert float(least.sum()) < 0.95 * float(before.sum())
    for r in range(len(SPANS)):
        for factor in (0.99, 1.01):
            moved = grids.Grid(grid.scale.clone(), grid.zero, grid.levels, grid.symmetric)
            moved.scale[r] *= factor
            assert bool((error(weight, codes, moved, gram) > least).all())


def test_scales_without_codes_are_kept(state):
    """A row whose codes are all 0 in a tier has nothing to solve there, and still gets its other scales."""
    weight, codes, grid, gram = state
    start, end = SPANS[1]
    codes[2, start:end] = 0
    before, kept = error(weight, codes, grid, gram)[2], grid.scale.clone()
    solve_scales(weight, codes, grid, SPANS, gram)
    assert grid.scale[1, 2] == kept[1, 2]
    assert grid.scale[0, 2] != kept[0, 2]
    assert float(error(weight, codes, grid, gram)[2]) < float(before)
    codes[:] = -codes  # the best scales of flipped codes are negative: refused
    kept = grid.scale.clone()
    solve_scales(weight, codes, grid, SPANS, gram)
    assert torch.equal(grid.scale, kept)


@pytest.mark.parametrize("block_size", [1, 7, 128])
def test_codes_settle_where_no_single_one_helps(state, block_size):
    """Rounds never raise the error; at rest, one step more or less in any one code would."""
    weight, codes, grid, gram = state
    errors = [error(weight, codes, grid, gram)]
    for _ in range(30):
        go_over(weight, codes, grid, SPANS, gram, block_size)
        errors.append(error(weight, codes, grid, gram))
        assert bool((errors[-1] <= errors[-2] * (1 + 1e-5)).all())
    assert float(errors[1].sum()) < 0.7 * float(errors[0].sum())
    for r, (start, end) in enumerate(SPANS):
        for j in range(start, end):
            for step in (-1, 1):
                other = codes.clone()
                other[:, j] += step
                q = other[:, j] + grid.zero[r]
                allowed = (q >= 0) & (q <= grid.levels[r])
                assert bool((error(weight, other, grid, gram) >= errors[-1] * (1 - 1e-5))[allowed].all())
