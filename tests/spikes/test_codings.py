"""Properties of every coding and of the spike train, on random codes of every size."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spikeform.spikes import (
    CODINGS,
    Burst,
    Coding,
    MultiThreshold,
    Radix2,
    SignedDigit,
    SpikeTrain,
    Thermometer,
)
from spikeform.spikes.codings import popcount

settings.register_profile("spikes", max_examples=60, deadline=None, derandomize=True)
settings.load_profile("spikes")

steps_ = st.integers(1, 16)
codings = st.one_of(
    st.builds(Radix2, steps_),
    st.builds(SignedDigit, steps_),
    st.builds(MultiThreshold, steps_, st.sampled_from([1, 2, 4])),
    st.builds(Thermometer, steps_),
    st.builds(Burst, steps_, st.integers(1, 127)),
)
seeds = st.integers(0, 2**31 - 1)


def draw_codes(coding: Coding, seed: int, shape=(7, 5)) -> torch.Tensor:
    """Representable signed codes; the extremes and zero are among them."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, coding.limit + 1, shape, generator=generator, dtype=torch.int32)
    codes.view(-1)[0] = coding.limit
    codes.view(-1)[1] = 0
    sign = torch.randint(0, 2, shape, generator=generator, dtype=torch.int32) * 2 - 1
    return coding.nearest_code(codes) * sign


def weighted(coding: Coding, spikes: torch.Tensor) -> torch.Tensor:
    weights = torch.tensor(coding.weights()).view(-1, *[1] * (spikes.ndim - 1))
    return (spikes.long() * weights).sum(0)


@given(codings, seeds)
def test_unrolled_spikes_sum_to_the_code(coding, seed):
    codes = draw_codes(coding, seed)
    spikes = coding.unroll(codes)
    assert spikes.dtype == torch.int8
    assert spikes.shape == (coding.window, *codes.shape)
    assert len(coding.weights()) == coding.window
    assert torch.equal(weighted(coding, spikes), codes.long())


@given(codings, seeds)
def test_count_is_what_unroll_sends(coding, seed):
    codes = draw_codes(coding, seed)
    spikes = coding.unroll(codes)
    sent = spikes.abs().sum(0) if isinstance(coding, Burst) else (spikes != 0).sum(0)
    assert torch.equal(coding.count(codes).long(), sent.long())
    assert coding.count(codes).dtype == torch.int32


@given(codings, seeds)
def test_sign_is_the_sign_of_the_train(coding, seed):
    codes = draw_codes(coding, seed)
    assert torch.equal(coding.unroll(-codes), -coding.unroll(codes))
    assert torch.equal(coding.count(-codes), coding.count(codes))


@given(codings)
def test_the_limit_is_reached(coding):
    limit = torch.tensor([coding.limit])
    kept = coding.nearest_code(limit)
    if isinstance(coding, MultiThreshold):  # what lies below the last spike stays in the membrane
        assert coding.limit - coding.levels < int(kept) <= coding.limit
    else:
        assert int(kept) == coding.limit
    assert int(weighted(coding, coding.unroll(kept))) == int(kept)
    if isinstance(coding, (Radix2, Thermometer, Burst)) and not isinstance(coding, SignedDigit):
        most = coding.levels if isinstance(coding, Burst) else 1
        assert coding.limit == most * sum(coding.weights())  # every step is full


@pytest.mark.parametrize("steps", range(1, 13))
def test_signed_digit_is_the_non_adjacent_form_and_never_sends_more(steps):
    codes = torch.arange(-(2**steps) + 1, 2**steps)
    spikes = SignedDigit(steps).unroll(codes)
    assert spikes.abs().max() <= 1
    assert not bool(((spikes[1:] != 0) & (spikes[:-1] != 0)).any())
    few, many = SignedDigit(steps).count(codes), Radix2(steps).count(codes)
    assert bool((few <= many).all())
    assert steps < 2 or int(few.sum()) < int(many.sum()) or steps == 2


def test_signed_digit_saves_over_a_quarter_of_sixteen_step_spikes():
    codes = torch.arange(2**16)
    ratio = SignedDigit(16).count(codes).sum() / Radix2(16).count(codes).sum()
    assert 0.72 < float(ratio) < 0.725  # (16/3 + 4/9) / 8


@pytest.mark.parametrize("levels", [1, 2, 4])
@pytest.mark.parametrize("steps", [1, 2, 5, 10])
def test_multi_threshold_is_greedy_idempotent_and_less_than_levels_below(steps, levels):
    coding = MultiThreshold(steps, levels)
    codes = torch.arange(coding.limit + 1)
    kept = coding.nearest_code(codes)
    assert torch.equal(coding.nearest_code(kept), kept)
    assert bool(((codes - kept >= 0) & (codes - kept < levels)).all())
    amplitudes = coding.unroll(kept)
    assert bool(((amplitudes == 0) | ((amplitudes >= levels) & (amplitudes < 2 * levels))).all())


@given(steps_, seeds)
def test_one_level_is_radix2(steps, seed):
    codes = draw_codes(Radix2(steps), seed)
    one = MultiThreshold(steps, 1)
    assert torch.equal(one.nearest_code(codes.abs()), codes.abs())
    assert torch.equal(one.unroll(codes), Radix2(steps).unroll(codes))
    assert (one.limit, one.resolution) == (Radix2(steps).limit, Radix2(steps).resolution)


def test_more_levels_send_fewer_spikes():
    means = []
    for levels in (1, 2, 4):
        coding = MultiThreshold(8, levels)
        codes = coding.nearest_code(torch.arange(coding.limit + 1))
        means.append(float(coding.count(codes).float().mean()))
    assert means[0] > means[1] > means[2]


@given(steps_)
def test_thermometer_spreads_its_spikes_evenly(steps):
    codes = torch.arange(steps + 1)
    running = Thermometer(steps).unroll(codes).long().cumsum(0)
    for t in range(1, steps + 1):
        assert torch.equal(running[t - 1], torch.div(t * codes, steps, rounding_mode="floor"))


@given(st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=30))
def test_popcount(values):
    assert popcount(torch.tensor(values)).tolist() == [value.bit_count() for value in values]


@pytest.mark.parametrize("steps", [0, 65, 1.5, True, "8", None, -1])
@pytest.mark.parametrize("name", CODINGS)
def test_bad_steps_are_refused(name, steps):
    most = 64 if name == "thermometer" else 16
    for bad in (steps, most + 1):
        with pytest.raises(ValueError, match=f"steps must be an integer from 1 to {most}"):
            CODINGS[name](bad)


@pytest.mark.parametrize("levels", [0, 3, 8, True, 2.0])
def test_bad_multi_threshold_levels(levels):
    with pytest.raises(ValueError, match="levels must be 1, 2 or 4"):
        MultiThreshold(4, levels)


@pytest.mark.parametrize("levels", [0, 256, True, 1.5])
def test_bad_burst_levels(levels):
    with pytest.raises(ValueError, match="levels must be an integer from 1 to 255"):
        Burst(4, levels)


@given(codings, seeds, st.sampled_from([torch.int8, torch.int16, torch.int32, torch.int64]))
def test_every_integer_dtype_that_holds_the_codes(coding, seed, dtype):
    if coding.limit > torch.iinfo(dtype).max:
        dtype = torch.int64
    codes = draw_codes(coding, seed)
    narrow = codes.to(dtype)
    assert torch.equal(coding.unroll(narrow), coding.unroll(codes))
    assert torch.equal(coding.count(narrow), coding.count(codes))


@given(codings, seeds)
def test_strided_and_empty_codes(coding, seed):
    codes = draw_codes(coding, seed, (4, 6))
    strided = codes.t()[::2]
    assert torch.equal(coding.unroll(strided), coding.unroll(strided.contiguous()))
    empty = torch.zeros(0, 3, dtype=torch.int32)
    assert coding.unroll(empty).shape == (coding.window, 0, 3)
    assert coding.count(empty).shape == (0, 3)


@given(codings, seeds)
def test_step_values_sum_to_the_decoded_value(coding, seed):
    train = SpikeTrain(draw_codes(coding, seed), torch.tensor([2.0**-9]), coding)
    assert torch.equal(train.step_values().sum(0), train.decode())
    assert torch.equal(train.decode(), train.codes * 2.0**-9)
    floating = SpikeTrain(train.codes.float(), train.quantum, coding)
    assert torch.equal(floating.unroll(), train.unroll())
    assert torch.equal(floating.count(), train.count())


@given(st.integers(1, 5), st.sampled_from(["scalar", "channel", "row"]), seeds)
def test_each_element_is_worth_the_quantum_of_its_branch(populations, kind, seed):
    coding, shape = Radix2(6), (3, 4, 5)
    generator = torch.Generator().manual_seed(seed)
    codes = draw_codes(coding, seed, shape)
    inner = {"scalar": (), "channel": (5,), "row": (4, 1)}[kind]
    quantum = 2.0 ** torch.randint(-6, 6, (populations, *inner), generator=generator)
    branch = torch.randint(0, populations, shape, generator=generator, dtype=torch.uint8)
    train = SpikeTrain(codes, quantum, coding, branch)
    expected = torch.empty(shape)
    for b in range(3):
        for row in range(4):
            for c in range(5):
                table = quantum[int(branch[b, row, c])]
                unit = table if kind == "scalar" else table[c] if kind == "channel" else table[row, 0]
                expected[b, row, c] = codes[b, row, c] * unit
    assert torch.equal(train.decode(), expected)
    assert torch.equal(train.step_values().sum(0), expected)


def test_map_moves_codes_and_branch_together():
    coding = Radix2(4)
    codes = torch.tensor([[1, -2, 3], [4, 5, -6]])
    branch = torch.tensor([[0, 1, 2], [2, 1, 0]])
    train = SpikeTrain(codes, torch.tensor([1.0, 0.5, 0.25]), coding, branch)
    moved = train.map(lambda t: t.transpose(0, 1))
    assert moved.shape == (3, 2)
    assert torch.equal(moved.decode(), train.decode().t())
    assert torch.equal(moved.count(), train.count().t())
    alone = SpikeTrain(codes, torch.ones(1), coding).map(lambda t: t.reshape(-1))
    assert alone.branch is None
    assert alone.shape == (6,)


def test_the_value_has_the_dtype_of_the_quantum():
    codes = torch.tensor([3, -5])
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        train = SpikeTrain(codes, torch.ones(1, dtype=dtype), Radix2(3))
        assert train.decode().dtype == train.step_values().dtype == dtype
