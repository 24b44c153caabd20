"""Energy of streaming models against hand counts: T passes of the spiking network, one of its rivals."""

import json

import pytest
import torch
from torch import Tensor, nn

from spikeform.energy import CostModel, energy
from spikeform.errors import SpikeformError
from spikeform.layers.streaming import steps_of
from spikeform.neurons import Clock, StreamingNeuron
from spikeform.spikes.trace import Firing, observe
from spikeform.synapses import linear

IDS = torch.randint(0, 50, (3, 8), generator=torch.Generator().manual_seed(2))
TOKENS = IDS.numel()


class Toy(nn.Module):
    """A row of 8 channels T times, spikes into 6, a real linear layer to 5, their mean, a head of 4."""

    def __init__(self, steps: int, signed: bool = False) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.clock = Clock(steps)
        self.embed = nn.Embedding(50, 8)
        self.embed.weight = nn.Parameter(torch.randn(50, 8, generator=generator))
        self.neuron = StreamingNeuron(self.clock, 8, signed=signed, channels=8, site="down")
        self.neuron.threshold.data.fill_(2.0)
        self.weight_NK = torch.randn(6, 8, generator=generator)
        self.real, self.head = nn.Linear(6, 5), nn.Linear(5, 4)

    def forward(self, ids: Tensor) -> Tensor:
        steps = self.clock.steps or 1
        hidden = self.embed(ids).repeat_interleave(steps, 0)
        hidden = self.real(linear(self.neuron(hidden), self.weight_NK, site="down"))
        return self.head(hidden.unflatten(0, (-1, steps)).mean(1))


def sent(model: Toy) -> list[Tensor]:
    """Spikes of each call, ``[T, L, 8]``: rows one by one, as the report runs them."""
    found = []
    with torch.no_grad(), observe(lambda e: found.append(e.train.codes) if isinstance(e, Firing) else None):
        for row in IDS:
            model(row[None])
    return found


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("steps", [1, 4, 8])
def test_operations_by_hand(steps, signed) -> None:
    model = Toy(steps, signed)
    spikes = sum(int(codes.abs().sum()) for codes in sent(model))
    report = energy(model, IDS)
    assert report.spikes == spikes > 0
    assert report.spike_rate == spikes / (TOKENS * 8 * steps)
    assert report.spikes_per_element == report.accumulations_per_mac == spikes / (TOKENS * 8)
    ops = report.ops
    assert ops["spiking"]["accumulate_weights"] == spikes * 6
    assert ops["spiking"]["comparisons"] == TOKENS * 8 * steps
    assert ops["spiking"]["neuron_additions"] == spikes + TOKENS * 8 * steps
    assert ops["spiking"]["dense_macs"] == TOKENS * (30 * steps + 20)
    assert ops["spiking"]["real_additions"] == TOKENS * (5 * steps + 4)  # biases
    assert (ops["dense"]["linear_macs"], ops["dense"]["dense_macs"]) == (TOKENS * 48, TOKENS * 50)
    assert (ops["quantised"]["linear_macs"], ops["quantised"]["quantise"]) == (TOKENS * 48, TOKENS * 8)
    found = report.streaming["operations"]
    assert found["dense_macs"] == TOKENS * 98
    assert found["rows_ratio"] == (78 * steps + 20) / 98
    assert found["events_ratio"] == (TOKENS * (30 * steps + 20) + spikes * 6) / (TOKENS * 98)


@pytest.mark.parametrize(
    ("steps", "signed", "bits"), [(1, False, 1), (1, True, 2), (7, False, 3), (8, False, 4), (8, True, 5)]
)
def test_both_rivals_have_their_own_width(steps, signed, bits) -> None:
    report = energy(Toy(steps, signed), IDS, cost_models=["45nm-fp32"])
    levels = 5 if signed else 4  # of the QCFS network: 17 or 9 levels, whatever the steps
    assert report.streaming["quantised_bits"] == {"quantised": [levels], "quantised_steps": [bits]}
    estimate = report.estimates["45nm-fp32"]
    for network, width in (("quantised", levels), ("quantised_steps", bits)):
        products = estimate["lines"][network]["products"]
        assert products == pytest.approx(TOKENS * 48 * (3.7 * width / 24 + 0.9))
        assert estimate["memory"]["lines"][network]["activations"] == pytest.approx(
            2 * TOKENS * (8 * width / 8 + (6 + 5) * 4) * 12.5
        )
    assert estimate["lines"]["dense"]["products"] == pytest.approx(TOKENS * 48 * 4.6)
    assert estimate["lines"]["dense"]["left_dense"] == pytest.approx(TOKENS * 50 * 4.6)
    assert estimate["ratio_vs_quantised_steps"] == pytest.approx(estimate["spiking"] / estimate["quantised_steps"])


def test_memory_by_hand() -> None:
    steps, model = 4, Toy(4)
    cost = CostModel("m", multiply=1, add=1, significand=8, weight_bytes=2, activation_bytes=4, sram_per_byte=1,
                     dram_per_byte=10)  # fmt: skip
    lines = energy(model, IDS, cost_models=[cost]).estimates["m"]["memory"]["lines"]
    channels = [codes.sum((0, 1)) for codes in sent(model)]  # of each call
    fetched = sum(int((c > 0).sum()) for c in channels)
    read = sum(int(c.clamp(max=steps).sum()) for c in channels)  # a row at most once a step
    calls, left = len(IDS), 50
    assert lines["spiking"]["weights_dram"] == (fetched * 6 + calls * left) * 2 * 10
    assert lines["spiking"]["weights_sram"] == (read * 6 + calls * left) * 2
    assert lines["spiking"]["potentials"] == 2 * TOKENS * 8 * 4
    assert lines["spiking"]["activations"] == 2 * TOKENS * (6 * steps + 5) * 4
    assert lines["dense"]["weights_dram"] == calls * 98 * 2 * 10
    assert lines["dense"]["activations"] == 2 * TOKENS * (8 + 6 + 5) * 4


def test_the_papers_convention_is_labelled_and_apart() -> None:
    report = energy(Toy(8), IDS)
    papers = report.accountings["papers' convention"]
    assert "Not what runs" in papers["label"]
    assert (papers["macs"], papers["steps"], papers["rate"]) == (TOKENS * 98, 8, report.spike_rate)
    fp32 = papers["estimates"]["45nm-fp32"]
    assert fp32["spiking"] == pytest.approx(report.spike_rate * 8 * TOKENS * 98 * 0.9)
    assert fp32["dense"] == pytest.approx(TOKENS * 98 * 4.6)
    runs = report.accountings["what runs"]["estimates"]["45nm-fp32"]
    assert runs["spiking"] == report.estimates["45nm-fp32"]["spiking"] > fp32["spiking"]
    rows = report.summary()
    assert next(row["vs dense"] for row in rows if "accounting" in row) == fp32["ratio_vs_dense"]
    assert all("not what runs" in row["ESTIMATED"] for row in rows if "accounting" in row)
    assert len(rows) == 9


def test_counts_do_not_depend_on_batching_and_the_report_is_json() -> None:
    model = Toy(4)
    one, three = energy(model, IDS), energy(model, IDS, batch_size=3)
    assert (one.ops, one.per_kind, one.streaming) == (three.ops, three.per_kind, three.streaming)
    data = one.to_dict()
    assert json.loads(json.dumps(data, allow_nan=False)) == data
    assert any("T times" in line for line in data["not_counted"])


def test_the_steps_come_back_whatever_happens() -> None:
    class Broken(Toy):
        def forward(self, ids: Tensor) -> Tensor:
            if not self.clock.steps:
                raise RuntimeError("broken")
            return super().forward(ids)

    for model in (Toy(4), Broken(4)):
        if isinstance(model, Broken):
            with pytest.raises(RuntimeError, match="broken"):
                energy(model, IDS)
        else:
            energy(model, IDS)
        assert steps_of(model) == model.clock.steps == 4


def test_the_dense_pair_is_compared_with_one_pass() -> None:
    class Dense(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.layers = nn.Sequential(nn.Embedding(50, 8), nn.Linear(8, 6), nn.Linear(6, width), nn.Linear(width, 4))

        def forward(self, ids: Tensor) -> Tensor:
            return self.layers(ids)

    assert energy(Toy(4), IDS, dense=Dense(5)).protocol["dense_checked"]
    with pytest.raises(SpikeformError, match="not a pair"):
        energy(Toy(4), IDS, dense=Dense(6))


def test_the_qcfs_network_sends_no_spikes() -> None:
    with pytest.raises(SpikeformError, match="at steps=0 the model is the QCFS network"):
        energy(Toy(0), IDS)
