"""The matrix that mixes the channels of a head."""

import pytest
import torch

from families import difference
from spikeform.layers.rotation import head_matrix, mixing, rotate_heads


@pytest.mark.parametrize("size", [1, 2, 3, 16, 24, 64, 80, 96, 128])
def test_it_is_orthogonal_and_spreads(size):
    signs = torch.where(torch.rand(size, generator=torch.Generator().manual_seed(size)) < 0.5, -1, 1).to(torch.int8)
    matrix = head_matrix(signs, torch.float64)
    assert torch.allclose(matrix @ matrix.T, torch.eye(size, dtype=torch.float64), atol=1e-12)
    assert matrix.abs().max() * size**0.5 < 1.5  # no channel keeps to itself
    x = torch.randn(2, 3, size, dtype=torch.float64)
    assert torch.allclose(rotate_heads(x, signs), x @ matrix)
    q, k = torch.randn(5, size), torch.randn(7, size)
    assert difference(q @ k.T, rotate_heads(q, signs) @ rotate_heads(k, signs).T) < 1e-6


def test_powers_of_two_are_hadamard():
    assert torch.equal(mixing(4, torch.device("cpu"), torch.float64).sign(), torch.tensor(
        [[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]], dtype=torch.float64
    ))  # fmt: skip
    assert rotate_heads(torch.zeros(2, 4, dtype=torch.bfloat16), torch.ones(4)).dtype == torch.float32
