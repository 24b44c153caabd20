"""LIF neurons as kernels: the spikes of the loop in PyTorch bit by bit, and its gradients up to rounding.

Without a CUDA device the same tests run on Triton's interpreter, in a process of their own.
"""

import pytest
import torch

from kernels import DEVICE, fused, needs_triton, not_interpreted, on_the_interpreter
from spikeform.neurons.cpu import lif as plain
from spikeform.neurons.surrogate import SURROGATES

# tau, threshold, hard, signed
RULES = [(2.0, 1.0, True, False), (2.0, 0.5, True, True), (3.0, 0.5, False, True), (1.0, 1.0, False, False)]
RULES += [(0.0, 0.5, False, True)]


def random(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@fused
@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize(("steps", "rows"), [(1, 1), (4, 1), (4, 4), (8, 8)])
def test_the_same_spikes(steps, rows, rule):
    from spikeform.neurons.triton import lif

    current = 2 * random(rows, 2, 3, 5, 37, seed=1)
    for narrow in (False, True):
        found = lif.lif_spikes(current.to(DEVICE), steps, *rule, narrow)
        wanted = plain.lif_spikes(current, steps, *rule, narrow)
        assert found.dtype == wanted.dtype
        assert torch.equal(found.cpu(), wanted)
    assert bool(wanted.any())
    assert bool((wanted < 0).any()) == rule[-1]


@fused
@pytest.mark.parametrize("kind", range(len(SURROGATES)))
@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize(("steps", "rows"), [(4, 1), (3, 3)])
def test_the_same_gradient(steps, rows, rule, kind):
    from spikeform.neurons.triton import lif

    current, grad = 2 * random(rows, 2, 311, seed=2), random(steps, 2, 311, seed=3)
    found = lif.lif_gradient(grad.to(DEVICE), current.to(DEVICE), *rule, kind)
    torch.testing.assert_close(found.cpu(), plain.lif_gradient(grad, current, *rule, kind))


@needs_triton
@not_interpreted
def test_on_the_interpreter():
    on_the_interpreter(__file__)
