"""Bursts: capacity, sub-neurons of different numbers of steps, zero-points, and the train in one unit."""

import pytest
import torch

from spikeform.spikes import Burst, Radix2, SpikeTrain


@pytest.mark.parametrize(("levels", "steps"), [(15, 1), (15, 2), (15, 4), (3, 2), (255, 4), (1, 2)])
def test_t2_capacity(levels, steps):
    """``T L`` unit spikes are sent, one more is lost; with the residual ``T (L + 1) - 1``, as the top codes need."""
    plain, residual = Burst(steps, levels), Burst(steps, levels, residual=True)
    for coding, capacity in ((plain, steps * levels), (residual, steps * (levels + 1) - 1)):
        assert coding.limit == capacity
        codes = torch.arange(-capacity, capacity + 1)
        unrolled = coding.unroll(codes)
        assert torch.equal(unrolled.long().sum(0), codes)
        assert torch.equal(coding.count(codes), codes.abs().int())
        assert int(unrolled.abs().max()) == (levels if coding is plain else levels + steps - 1)
        beyond = coding.unroll(torch.tensor([capacity + 1])).long().sum()
        assert int(beyond) == (capacity if coding is plain else steps * levels)
    assert unrolled.dtype == (torch.int8 if levels + steps - 1 < 128 else torch.int16)


def test_a_sub_neuron_keeps_to_its_own_steps():
    for residual in (False, True):
        coding = Burst(4, 3, (1, 2, 4), residual)
        for t in coding.tiers:
            codes = torch.arange(coding.capacity(t) + 1)
            assert not coding.unroll(codes)[t:].any()
            assert torch.equal(coding.unroll(codes).sum(0), codes)
    assert Burst(4, 3, (1, 2, 4)).multiples == (4, 2, 1)
    assert Burst(4, 3, (1, 2, 4), common=False).multiples is None
    assert Burst(4, 3).multiples == (1,)
    for tiers in ((1, 2), (1, 3, 4), (4, 8), (0, 4), [1, 4]):
        with pytest.raises(ValueError, match="tiers must be powers of two"):
            Burst(4, 3, tiers)


def train_of(zero=None, branch=None, codes=None, **options):
    codes = torch.tensor([[5, 6, 0, 3], [-5, 3, 3, 1]]) if codes is None else codes
    branch = torch.tensor([0, 1, 1, 0]) if branch is None else branch
    coding = Burst(2, 3, (1, 2), **options)
    return SpikeTrain(codes, torch.tensor([[[0.5], [2.0]], [[0.25], [1.0]]]), coding, branch, zero=zero, exact=True)


def test_a_branch_of_each_channel_and_a_zero_of_each_token():
    zero = torch.tensor([[[1.0], [2.0]], [[3.0], [0.0]]])
    train = train_of(zero)
    assert train.centred().tolist() == [[4, 3, -3, 2], [-7, 3, 3, -1]]
    assert train.decode().tolist() == [[2.0, 0.75, -0.75, 1.0], [-14.0, 3.0, 3.0, -2.0]]
    whole = SpikeTrain(train.codes, train.quantum, train.coding, train.branch.expand(2, 4), zero=zero)
    assert torch.equal(whole.decode(), train.decode())
    floating = SpikeTrain(train.codes.float(), train.quantum, train.coding, train.branch, zero=zero)
    assert torch.equal(floating.centred(), train.centred().float())


def test_three_sub_neurons_by_channel():
    quantum = torch.tensor([[[4.0]], [[2.0]], [[1.0]]])
    branch = torch.tensor([2, 0, 1, 1], dtype=torch.uint8)
    train = SpikeTrain(torch.tensor([[1, 2, 3, 4]] * 2), quantum, Burst(4, 3, (1, 2, 4)), branch, exact=True)
    assert train.decode().tolist() == [[1.0, 8.0, 6.0, 8.0]] * 2
    integers, unit = train.integers()
    assert integers.tolist() == [[1, 8, 6, 8]] * 2
    assert float(unit) == 1.0


def test_the_zero_is_a_bias_current_of_the_first_step():
    zero = torch.tensor([[[1.0], [2.0]], [[3.0], [0.0]]])
    train = train_of(zero, codes=torch.tensor([[3, 6, 0, 3], [1, 3, 3, 1]]))
    steps = train.steps()
    assert steps.tolist() == [[[2, 0, -3, 2], [-1, 3, 3, -1]], [[0, 3, 0, 0], [0, 0, 0, 0]]]
    assert torch.equal(steps.sum(0), train.centred())
    assert torch.equal(train.step_values().sum(0), train.decode())
    assert torch.equal(train.count(), train.codes.abs().int())  # what is sent, whatever the zero


def test_integers_only_where_there_is_one_unit_and_it_is_asked_for():
    train = train_of()
    integers, unit = train.integers()
    assert integers.tolist() == [[10, 6, 0, 6], [-10, 3, 3, 2]]
    assert unit.tolist() == [[0.25], [1.0]]
    assert torch.equal(integers * unit, train.decode())
    assert train_of(common=False).integers() is None
    inexact = SpikeTrain(train.codes, train.quantum, train.coding, train.branch)
    assert inexact.integers() is None
    by_channel = SpikeTrain(train.codes, torch.tensor([[1.0, 2.0, 3.0, 4.0]]), Radix2(4), exact=True)
    assert by_channel.integers() is None
    scalar = SpikeTrain(train.codes, torch.tensor([0.5]), Radix2(4), exact=True)
    assert torch.equal(scalar.integers()[0], train.codes.to(torch.int8))


def test_map_moves_a_branch_of_each_channel_too():
    train = SpikeTrain(
        torch.arange(8).view(2, 4), torch.tensor([2.0, 1.0]), Burst(2, 7, (1, 2)), torch.tensor([0, 1, 1, 0])
    )
    moved = train.map(lambda t: t.transpose(0, 1))
    assert torch.equal(moved.decode(), train.decode().T)
