"""Burst trains and integer weights, counted on paper: tiers, widths, effort, stored bits, units, bias current."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from spikeform.energy import CostModel, Counter, energy
from spikeform.energy.codings import activation_bits, comparisons, parts_of, wire_bits
from spikeform.layers import CodedLinear
from spikeform.neurons import GIF
from spikeform.spikes import Burst, SpikeTrain
from spikeform.spikes.trace import Firing, observe
from spikeform.synapses import executor, matmul
from spikeform.synapses.integer import IntegerWeight

K, N, SALIENT = 20, 6, 2  # 10 % of the channels
IDS = torch.randint(0, 50, (1, 7), generator=torch.Generator().manual_seed(2))
TOKENS = IDS.numel()
UNIT = CostModel("unit", 1, 1, significand=16, weight_bytes=2, activation_bytes=2, sram_per_byte=1, dram_per_byte=1)


def weights(bits: int = 4, tiers=(1,), salient: int = 0, ternary: bool = False, columns: int = K) -> IntegerWeight:
    generator = torch.Generator().manual_seed(3)
    steps = torch.ones(columns, dtype=torch.int64)
    steps[:salient] = tiers[-1]
    top = steps if ternary else steps * (2**bits - 1)
    zero = top // 2 if not ternary else top
    codes = (torch.rand(N, columns, generator=generator) * ((2 if ternary else 1) * top + 1)).long() - zero
    tier = (steps > 1).to(torch.uint8) if len(tiers) > 1 else None
    zeros = torch.tensor([t if ternary else t * (2**bits - 1) // 2 for t in tiers], dtype=torch.int16)
    zeros = zeros[:, None].expand(-1, N).contiguous()
    return IntegerWeight(codes.to(torch.int8), torch.full((len(tiers), N), 0.1), zeros, tier, bits, tiers, ternary)


class Toy(nn.Module):
    """A GIF neuron (or real input) before one layer of integer weights."""

    def __init__(self, whole: IntegerWeight, bits: int = 4, steps: int = 2, salient: int = SALIENT, **options) -> None:
        super().__init__()
        columns = whole.shape[1]
        self.embed = nn.Embedding(50, columns)
        self.embed.weight = nn.Parameter(torch.randn(50, columns, generator=torch.Generator().manual_seed(0)))
        neuron = GIF(bits, (columns,), steps=steps, site="layer", **options) if bits < 16 else None
        if neuron is not None:
            times = torch.ones(columns, dtype=torch.uint8)
            times[:salient] = steps
            neuron.set_times(times)
        layer = nn.Linear(columns, N, bias=False)
        layer.neuron = neuron
        self.layer = CodedLinear.from_spiking(layer, whole, site="layer")

    def forward(self, ids: Tensor) -> Tensor:
        return self.layer(self.embed(ids))


def counted(model: nn.Module):
    counter = Counter()
    with torch.no_grad(), counter.watch(model):
        model(IDS)
    return counter


@pytest.mark.parametrize(
    ("model", "per_mac", "one_step"),
    [
        (lambda: Toy(weights()), 16 * 1.1, 16),  # W4A4, 10 % of the channels with two steps
        (lambda: Toy(weights(), steps=4, salient=1), 16 * (1 + 3 * 0.05), 16),
        (lambda: Toy(weights(), form="official"), 16 * 1.1, 16),
        (lambda: Toy(weights(2), bits=8, salient=1), 16 * 1.05, 16),  # W2A8
        (lambda: Toy(weights(2, (1, 2), SALIENT), bits=16), 32 * 1.1, 32),  # W2A16, the weights spike
        (lambda: Toy(weights(4, (1, 2), SALIENT)), 16 * (0.9 + 0.1 * 4), 16),  # the same channels twice
        (lambda: Toy(weights(1, (1, 2), SALIENT, ternary=True), bits=16), 2 * 16 * 1.1, 32),
    ],
)
def test_effort_of_a_mac(model, per_mac, one_step) -> None:
    ace = energy(model(), IDS).ace
    assert ace["macs_per_token"] == K * N
    assert ace["per_mac"] == pytest.approx(
        {"spiking": per_mac, "one step": one_step, "uniform W4A4": 16, "uniform W5A5": 25, "dense fp16": 256}
    )
    assert ace["per_token"]["spiking"] == pytest.approx(per_mac * K * N)
    assert ace["additive_fraction"] == 1


def test_layers_that_multiply_are_not_additive() -> None:
    class Two(Toy):
        def __init__(self) -> None:
            super().__init__(weights())
            from spikeform.layers import SpikingLinear

            self.real = SpikingLinear.from_dense(nn.Linear(N, 5), None)  # real input, real weights

        def forward(self, ids: Tensor) -> Tensor:
            return self.real(super().forward(ids))

    ace = energy(Two(), IDS).ace
    assert ace["additive_fraction"] == pytest.approx(K * N / (K * N + N * 5))
    assert ace["per_token"]["spiking"] == pytest.approx(17.6 * K * N + 256 * N * 5)


@pytest.mark.parametrize("signed", [True, False])
def test_a_gif_layer_by_hand(signed) -> None:
    model = Toy(weights(), signed=signed)
    counter, seen = Counter(), []
    with torch.no_grad(), executor("temporal"), counter.watch(model), observe(lambda e: (counter(e), seen.append(e))):
        model(IDS)
    train = next(e.train for e in seen if isinstance(e, Firing))
    tally, fired = counter.products["layer", "linear"], counter.firings["layer", "identity"]
    spikes = int(train.codes.long().abs().sum())
    assert tally.sent == spikes == fired.sent.spikes == tally.operands[0].spikes
    assert tally.accumulations == spikes * N
    assert fired.comparisons == TOKENS * (K + SALIENT) + spikes  # one a step, one after each spike
    assert fired.sent.parts == (TOKENS * (K - SALIENT), TOKENS * SALIENT)
    assert fired.sent.slots == TOKENS * (K + SALIENT) * 15
    # each output: the row's unit and the weight's scale; a code for zero adds one of each for both tiers
    assert tally.rescales == TOKENS * N * (2 if signed else 4)
    assert tally.corrections == (0 if signed else TOKENS * N * 2)
    # Its rival has its own b bits, and salient channels as many as their levels need.
    assert fired.sent.bits == pytest.approx(0.9 * 4 + 0.1 * 5)
    ops = energy(model, IDS, cost_models=[UNIT]).estimates["unit"]["lines"]
    assert ops["spiking"]["units"] == ops["quantised"]["units"] == tally.rescales
    assert ops["spiking"]["bias_current"] == tally.corrections
    macs = TOKENS * K * N
    assert ops["quantised"]["products"] == pytest.approx(macs * (0.9 * 4 / 16 * 4 / 16 + 0.1 * 5 / 16 * 4 / 16 + 1))
    assert ops["dense"]["products"] == macs * 2


def test_a_rows_units_multiply_once_for_each_unit() -> None:
    apart = counted(Toy(weights(), span="separate")).products["layer", "linear"]
    assert apart.rescales == TOKENS * N * (2 + 2)  # two sums, each of a unit and a scale of its own
    tiers = counted(Toy(weights(4, (1, 2), SALIENT))).products["layer", "linear"]
    assert tiers.rescales == TOKENS * N * (2 + 1)  # two scales, one unit


def test_weights_move_as_many_bits_as_they_are_stored_in() -> None:
    model = Toy(weights(4, (1, 2), SALIENT))
    tally = counted(model).products["layer", "linear"]
    scales = 2 * N * 32
    assert tally.bits == N * ((K - SALIENT) * 4 + SALIENT * 5) + scales
    traffic = energy(model, IDS, cost_models=[UNIT]).estimates["unit"]["memory"]["lines"]
    assert traffic["quantised"]["weights_dram"] == tally.bits / 8
    assert traffic["dense"]["weights_dram"] == K * N * 2  # its own weights
    assert traffic["spiking"]["weights_dram"] == tally.bits_fetched / 8

    silent = Toy(weights())
    with torch.no_grad():
        silent.embed.weight[:, SALIENT:12] = 0  # ten ordinary channels send nothing
    ordinary = counted(silent).products["layer", "linear"]
    assert ordinary.bits_fetched == N * 4 * 10 + N * 32
    assert ordinary.rows_fetched == 10
    assert ordinary.rows_read <= 8 + 2 * SALIENT  # once in every step that a channel has


def test_spiking_weights_by_hand() -> None:
    model = Toy(weights(1, (1, 2), SALIENT, ternary=True), bits=16)
    tally = counted(model).products["layer", "weights"]
    spikes = int(model.layer.weight.long().abs().sum())
    assert (tally.macs, tally.accumulations, tally.inputs) == (TOKENS * K * N, spikes * TOKENS, TOKENS * K)
    assert tally.rescales == TOKENS * N * 2
    stored = N * ((K - SALIENT) * 2 + SALIENT * 3) + 2 * N * 32
    assert (tally.bits, tally.bits_fetched, tally.bits_read) == (stored, stored, stored)
    report = energy(model, IDS, cost_models=[UNIT])
    assert report.spikes_per_token == spikes
    assert report.spikes_per_element == pytest.approx(spikes / (K * N))
    assert report.spike_rate == pytest.approx(spikes / (N * (K + SALIENT)))
    lines, traffic = (report.estimates["unit"][key] for key in ("lines", "memory"))
    assert report.ops["spiking"]["accumulate_activations"] == spikes * TOKENS
    assert lines["spiking"]["accumulate_activations"] == spikes * TOKENS
    assert lines["spiking"]["accumulate_weights"] == lines["spiking"]["accumulate_sums"] == 0
    assert report.ops["dense"]["linear_macs"] == TOKENS * K * N
    # real activations at full width, against 2- and 3-bit weights
    assert lines["quantised"]["products"] == pytest.approx(TOKENS * K * N * (0.9 * 2 / 16 + 0.1 * 3 / 16 + 1))
    assert traffic["lines"]["spiking"]["activations"] == traffic["lines"]["dense"]["activations"] == 2 * TOKENS * K * 2
    assert traffic["lines"]["spiking"]["spikes"] == 0  # its spikes are the weights
    row = next(row for row in report.per_site if row["kind"] == "weights")
    assert row["weight_bits"] == pytest.approx(0.9 * 2 + 0.1 * 3)


def test_zeros_of_a_product_of_trains() -> None:
    def train(codes, zero) -> SpikeTrain:
        codes = torch.tensor(codes, dtype=torch.int8)
        zeros = None if zero is None else torch.full((1, 1, 1), zero)
        return SpikeTrain(codes, torch.ones(1, len(codes), 1), Burst(1, 15), zero=zeros, exact=True)

    a, b = train([[5, 2, 9], [0, 5, 5]], 5), train([[1, 0, 3]] * 4, None)
    mask = torch.tensor([[True, False, True, False], [True] * 4])
    counter = Counter()
    with observe(counter):
        matmul(a, b, transpose_b=True, mask=mask, site="s")
    tally = counter.products["s", "matmul"]
    assert tally.accumulations == 16 * 2 + 10 * 4 + (2 + 1 + 2 + 1) * 4
    assert tally.corrections == 6 + 4 * 3  # a wanted output each, and the sum of B's codes
    assert tally.rescales == 6 + 2 * 6  # the zero, and the units of both rows


@pytest.mark.parametrize(
    ("coding", "signed", "tier", "bits"),
    [
        (Burst(2, 15, (1, 2)), True, 0, 4),  # q - z of an affine grid: its own b bits, whatever the sign
        (Burst(2, 15, (1, 2)), False, 1, 5),
        (Burst(4, 15, (1, 2, 4)), True, 2, 6),
        (Burst(2, 15, (1, 2), residual=True), True, 1, 5),  # 32 levels
        (Burst(1, 255), False, 0, 8),
        (Burst(1, 1), True, 0, 2),  # ternary
        (Burst(2, 1), True, 0, 3),
    ],
)
def test_the_rival_of_a_burst_is_its_own_grid(coding, signed, tier, bits) -> None:
    assert activation_bits(coding, signed, tier) == bits


def test_tiers_of_a_branch_that_broadcasts() -> None:
    coding, branch = Burst(2, 3, (1, 2)), torch.tensor([0, 1, 0])
    codes = torch.tensor([[[3, 6, -1], [0, 4, 0]]])
    spikes = SpikeTrain(codes, torch.ones(2), coding, branch)
    whole = SpikeTrain(codes, torch.ones(2), coding, branch.expand(codes.shape))
    seen = torch.tensor([[[True, True, False], [True, True, True]]])
    for train in (spikes, whole):
        assert parts_of(train) == (4, 2)
        assert parts_of(train, seen) == (3, 2)
    assert comparisons(spikes, (4, 2), 14) == 4 + 2 * 2 + 14
    # Slots of two bits (0..3) and a sign each; or events: 14 spikes by channel and sign, or six steps with a level.
    assert wire_bits(spikes, (4, 2), 14, True) == min((4 + 4) * 2 + 6, 14 * 3)
    assert wire_bits(spikes, (400, 200), 14, True) == 14 * 3
    assert wire_bits(spikes, (400, 200), 14, True, sending=6) == 6 * (3 + 2)
