import json
import math

import pytest
import torch
from torch import nn

from spikeform.energy import CostModel, energy
from spikeform.errors import SpikeformError
from spikeform.spikes import MultiThreshold, Radix2, SignedDigit
from spikeform.synapses import executor

IDS = torch.randint(0, 50, (3, 8), generator=torch.Generator().manual_seed(2))


def test_estimates_follow_from_the_counts(toy_linear) -> None:
    report = energy(toy_linear(Radix2(8)), IDS)
    tokens, spikes = IDS.numel(), report.spikes
    assert report.tokens == tokens
    assert report.spikes_per_token == spikes / tokens
    assert report.spikes_per_element == spikes / (tokens * 8)
    assert report.spike_rate == spikes / (tokens * 8 * 8)
    assert report.accumulations_per_mac == report.spikes_per_element  # one linear layer
    lines = report.estimates["45nm-fp32"]["lines"]
    assert lines["spiking"]["accumulate_weights"] == pytest.approx(spikes * 6 * 0.9)
    comparisons = tokens * 8 * (8 + 1)
    assert lines["spiking"]["neurons"] == pytest.approx((comparisons + spikes) * 0.9)
    assert lines["dense"]["products"] == pytest.approx(tokens * 8 * 6 * 4.6)
    # signed 8-bit codes: 511 levels, 9 bits of a 24-bit multiplier
    assert lines["quantised"]["products"] == pytest.approx(tokens * 8 * 6 * (3.7 * 9 / 24 + 0.9))
    assert lines["quantised"]["quantise"] == pytest.approx(tokens * 8 * 3.7)
    head = tokens * 6 * 5 * 4.6
    assert [lines[name]["left_dense"] for name in ("spiking", "dense", "quantised")] == pytest.approx([head] * 3)
    estimate = report.estimates["45nm-fp32"]
    assert estimate["ratio_vs_dense"] == pytest.approx(estimate["spiking"] / estimate["dense"])
    assert estimate["spiking"] == pytest.approx(sum(lines["spiking"].values()))


def test_memory_by_hand(toy_linear) -> None:
    model = CostModel(
        "m",
        multiply=1,
        add=1,
        significand=8,
        weight_bytes=2,
        activation_bytes=4,
        sram_per_byte=1,
        dram_per_byte=10,
    )
    report = energy(toy_linear(Radix2(8)), IDS[:1, :1], cost_models=[model])
    traffic = report.estimates["m"]["memory"]["lines"]
    head = 30 * 2
    assert traffic["dense"]["weights_dram"] == (8 * 6 * 2 + head) * 10
    assert traffic["dense"]["weights_sram"] == 8 * 6 * 2 + head
    assert traffic["dense"]["activations"] == 2 * 8 * 4
    assert traffic["quantised"]["activations"] == 2 * 8 * 9 / 8
    # one token: a row is read for every spike, and fetched where its channel spikes (all eight do)
    assert traffic["spiking"]["weights_sram"] == report.spikes * 6 * 2 + head
    assert traffic["spiking"]["weights_dram"] == traffic["dense"]["weights_dram"]
    assert traffic["spiking"]["potentials"] == 2 * 8 * 4
    assert traffic["spiking"]["running_sum_codes"] == 0


def test_counts_ignore_batching_and_weight_traffic_does_not(toy_linear) -> None:
    model = toy_linear(Radix2(8))
    one, three = energy(model, IDS), energy(model, IDS, batch_size=3)
    assert one.ops == three.ops
    assert one.per_kind == three.per_kind
    name, line = "45nm-fp32", "weights_dram"
    traffic = [r.estimates[name]["memory"]["lines"]["dense"][line] for r in (one, three)]
    assert traffic[0] == 3 * traffic[1]


def test_windows_cut_rows(toy_attention) -> None:
    model = toy_attention(Radix2(6))
    cut, whole = energy(model, IDS, window=4), energy(model, IDS)
    pairs = [IDS.shape[0] * n for n in (2 * 4 * 5 // 2, 8 * 9 // 2)]
    macs = [r.ops["dense"]["matmul_macs"] for r in (cut, whole)]
    assert macs == [2 * 3 * n for n in pairs]
    assert cut.protocol["window"] == 4


def test_fewer_spikes_cost_less_and_bits_follow_steps(toy_linear) -> None:
    binary, signed = (energy(toy_linear(c(8)), IDS) for c in (Radix2, SignedDigit))
    assert signed.spikes < binary.spikes
    lines = [r.estimates["45nm-int8"]["lines"]["spiking"]["accumulate_weights"] for r in (signed, binary)]
    assert lines[0] < lines[1]
    short = energy(toy_linear(Radix2(4)), IDS)
    assert short.estimates["45nm-int8"]["quantised"] < binary.estimates["45nm-int8"]["quantised"]
    assert short.estimates["45nm-int8"]["lines"]["dense"] == binary.estimates["45nm-int8"]["lines"]["dense"]


def test_multi_level_spikes_have_a_line_of_their_own(toy_linear) -> None:
    report = energy(toy_linear(MultiThreshold(6, 4)), IDS)
    assert report.estimates["45nm-fp32"]["lines"]["spiking"]["multi_level_spikes"] > 0
    assert report.accumulations_per_mac > report.spikes_per_element


def test_report_is_json_and_reproducible(toy_attention) -> None:
    model = toy_attention(Radix2(6))
    report = energy(model, IDS).to_dict()
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    assert report["label"] == "ESTIMATED"
    assert all(estimate["label"] == "ESTIMATED" for estimate in report["estimates"].values())
    assert report == energy(model, IDS).to_dict()
    assert report["break_even"]["spikes_per_element_fp32"] == pytest.approx(4.6 / 0.9)
    assert any("residual" in line for line in report["not_counted"])
    with executor("temporal"):
        temporal = energy(model, IDS).to_dict()
    assert temporal["protocol"]["executor"] == "temporal"
    assert temporal["ops"] == report["ops"]
    assert all("ESTIMATED" in row for row in energy(model, IDS).summary())


def test_dense_pair(toy_linear) -> None:
    class Dense(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.embed, self.up, self.head = nn.Embedding(50, 8), nn.Linear(8, width), nn.Linear(width, 5)

        def forward(self, ids):
            return self.head(self.up(self.embed(ids)))

    spiking = toy_linear(Radix2(8))
    assert energy(spiking, IDS, dense=Dense(6)).protocol["dense_checked"]
    with pytest.raises(SpikeformError, match="not a pair"):
        energy(spiking, IDS, dense=Dense(7))
    with pytest.raises(SpikeformError, match="before conversion"):
        energy(spiking, IDS, dense=toy_linear(Radix2(8)))
    with pytest.raises(SpikeformError, match="convert it first"):
        energy(Dense(6), IDS)


@pytest.mark.parametrize(
    ("ids", "options"),
    [
        (IDS[0], {}),
        (IDS.float(), {}),
        (IDS[:0], {}),
        (IDS, {"batch_size": 0}),
        (IDS, {"window": True}),
        (IDS, {"window": 2.0}),
        (IDS, {"cost_models": ["nope"]}),
    ],
)
def test_bad_input(toy_linear, ids, options) -> None:
    with pytest.raises(SpikeformError):
        energy(toy_linear(Radix2(8)), ids, **options)


def test_context_is_respected(toy_linear) -> None:
    model = toy_linear(Radix2(8))
    model.config = type("Config", (), {"max_position_embeddings": 4})()
    with pytest.raises(SpikeformError, match="window=4"):
        energy(model, IDS)
    assert math.isfinite(energy(model, IDS, window=4).spike_rate)


def test_mode_is_restored(toy_linear) -> None:
    model = toy_linear(Radix2(8)).train()
    energy(model, IDS)
    assert model.training
