"""Energy of state-space models: the mixer's real part by hand, three accountings, both networks by the same rules."""

import json

import pytest
import torch
from transformers import Mamba2Config, Mamba2ForCausalLM, MambaConfig, MambaForCausalLM

import spikeform
from spikeform.energy import CostModel, Counter
from spikeform.energy.models import FP32
from spikeform.energy.state_space import ACCOUNTINGS, Account, accountings, accounts
from spikeform.errors import SpikeformError
from spikeform.layers.state_space import ConvolvedProjection

IDS = torch.randint(1, 60, (2, 12), generator=torch.Generator().manual_seed(4))
TOKENS = IDS.numel()
WIDTH, INNER, STATES, HEADS, RANK, VOCABULARY, LAYERS = 32, 64, 8, 4, 2, 60, 2
IN = {"mamba": 2 * INNER, "mamba2": 2 * INNER + 2 * STATES + HEADS}
CONVOLVED = {"mamba": INNER, "mamba2": INNER + 2 * STATES}
PROJECTIONS = {family: TOKENS * LAYERS * WIDTH * (IN[family] + INNER) for family in IN}
CONVOLUTION = {family: TOKENS * LAYERS * 4 * CONVOLVED[family] for family in IN}
SCAN, HEAD = TOKENS * LAYERS * 3 * INNER * STATES, TOKENS * WIDTH * VOCABULARY
STEP_SIZE = {"mamba": TOKENS * LAYERS * (INNER * (RANK + 2 * STATES) + RANK * INNER), "mamba2": 0}  # x_proj, dt_proj


def build(family: str, device: str = "cpu", **sizes):
    torch.manual_seed(1)
    own = {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "state_size": STATES, "num_hidden_layers": LAYERS} | sizes
    own |= {"tie_word_embeddings": True, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    with torch.device(device):
        if family == "mamba":
            return MambaForCausalLM(MambaConfig(**own)).eval()
        heads = {"num_heads": HEADS, "head_dim": INNER // HEADS, "n_groups": 1, "chunk_size": 8}
        return Mamba2ForCausalLM(Mamba2Config(**{**heads, **own}, expand=2)).eval()


def spiking(family: str, **options):
    return spikeform.convert(build(family), spikeform.SpikingMamba(**options), IDS)


@pytest.mark.parametrize("options", [{}, {"weight_bits": 8}, {"per_channel": True}])
@pytest.mark.parametrize("family", ["mamba", "mamba2"])
def test_the_real_part_by_hand(family, options) -> None:
    report = spikeform.energy(spiking(family, **options), IDS, dense=build(family))
    assert report.protocol["dense_checked"]
    spikes, dense = report.ops["spiking"], report.ops["dense"]
    assert dense["linear_macs"] == PROJECTIONS[family]
    assert spikes["dense_macs"] == dense["dense_macs"] == CONVOLUTION[family] + STEP_SIZE[family] + HEAD
    assert spikes["scan_macs"] == dense["scan_macs"] == SCAN
    assert spikes["gated_multiplications"] == TOKENS * LAYERS * INNER
    biases = CONVOLVED[family] + (INNER if family == "mamba" else 0)
    assert dense["real_additions"] == TOKENS * LAYERS * biases
    gains = LAYERS * (WIDTH + (INNER if family == "mamba2" else 0)) + WIDTH
    assert dense["real_multiplications"] == TOKENS * gains
    lines = report.estimates["45nm-fp32"]["lines"]
    assert lines["spiking"]["scan"] == lines["dense"]["scan"] == pytest.approx(SCAN * 4.6)
    per_layer = [row for row in report.per_site if row["kind"] == "linear"]
    assert sum(row["accumulations"] for row in per_layer) == spikes["accumulate_weights"] > 0
    assert not any("state_space" in line or "unknown" in line for line in report.not_counted)
    assert json.loads(json.dumps(report.to_dict(), allow_nan=False)) == report.to_dict()


@pytest.mark.parametrize("family", ["mamba", "mamba2"])
def test_spikes_into_convolution_and_head_are_counted_once(family) -> None:
    model = spiking(family, conv=True, lm_head=True)
    assert any(isinstance(module, ConvolvedProjection) for module in model.modules())
    report = spikeform.energy(model, IDS, dense=build(family))
    dense = report.ops["dense"]
    assert dense["linear_macs"] == PROJECTIONS[family] + CONVOLUTION[family] + HEAD
    assert dense["dense_macs"] == STEP_SIZE[family]
    found = report.accountings[ACCOUNTINGS[-1]]
    assert found["other_macs"] == STEP_SIZE[family] + SCAN
    assert found["additions"] == report.ops["spiking"]["accumulate_weights"]


@pytest.mark.parametrize("family", ["mamba", "mamba2"])
def test_three_accountings(family) -> None:
    price = CostModel("mine", multiply=2, add=1, significand=8, weight_bytes=1, activation_bytes=1)
    report = spikeform.energy(spiking(family), IDS, cost_models=["45nm-fp32", price])
    assert tuple(report.accountings) == ACCOUNTINGS
    core = CONVOLUTION[family] + STEP_SIZE[family] + SCAN
    for found, other in zip(report.accountings.values(), (0, core, core + HEAD), strict=True):
        assert (found["spiking_macs"], found["other_macs"]) == (PROJECTIONS[family], other)
        assert found["additions"] == report.ops["spiking"]["accumulate_weights"]
        assert "ESTIMATED" in found["label"]
        assert "memory traffic" in found["label"]
        for name, mac, ac in (("45nm-fp32", 4.6, 0.9), ("mine", 3, 1)):
            own = found["estimates"][name]
            rate = sum(
                row["spikes_per_element"][0] * row["macs"] for row in report.per_site if row["kind"] == "linear"
            ) / sum(row["macs"] for row in report.per_site if row["kind"] == "linear")
            assert found["rate"] == pytest.approx(rate)
            total = PROJECTIONS[family] + other
            assert own["times_less"] == pytest.approx(total / (other + rate * ac / mac * PROJECTIONS[family]))
            assert (own["mac"], own["ac"]) == pytest.approx((mac, ac))
            assert own["ratio_vs_dense"] == pytest.approx(1 / own["times_less"])


def test_ends_of_the_formula() -> None:
    silent = Account(1000, 300, 0).estimate(FP32)
    assert silent["spiking"] == FP32.mac * 300
    assert silent["times_less"] == pytest.approx(1300 / 300)
    even = Account(900, 300, 900 * 4.6 / 0.9).estimate(FP32)
    assert even["times_less"] == pytest.approx(1.0)


def test_the_papers_shape_on_the_meta_device() -> None:
    """Mamba2-1.3B, one token: no weight is there."""
    sizes = {"hidden_size": 2048, "num_hidden_layers": 48, "state_size": 128, "head_dim": 64, "num_heads": 64}
    model = build("mamba2", "meta", vocab_size=50288, **sizes)
    counter = Counter(real=True)
    with counter.watch(model), torch.no_grad():
        model(torch.zeros(1, 1, dtype=torch.int64, device="meta"), use_cache=False)
    by_part = {}
    for tallies in (counter.dense, counter.real):
        for name, tally in tallies.items():
            part = name.rpartition(".")[2]
            by_part[part] = by_part.get(part, 0) + tally.macs
    shown = {part: round(macs / 1e6, 1) for part, macs in by_part.items() if macs}
    assert shown == {"in_proj": 836.8, "conv1d": 0.8, "out_proj": 402.7, "mixer": 75.5, "lm_head": 103.0}
    found = accounts(counter, model)
    assert [round(a.other / 1e6, 1) for a in found.values()] == [1239.4, 1315.7, 1418.7]
    # The rate at which each accounting would give the paper's 4.76 (in fp32).
    rates = []
    for account in found.values():
        core = account.other - found[ACCOUNTINGS[0]].other
        total = account.other
        rates.append((total / 4.76 - core) / (total - core) * 4.6 / 0.9)
    assert rates == pytest.approx([1.074, 0.825, 0.49], abs=0.005)


def test_skipped_projections_stay_real() -> None:
    report = spikeform.energy(spiking("mamba2", skip=["*.layers.0.*"]), IDS, dense=build("mamba2"))
    found = report.accountings[ACCOUNTINGS[0]]
    assert found["spiking_macs"] == found["other_macs"] == PROJECTIONS["mamba2"] // 2


def test_ternary_steps_have_two_bits_and_the_rival_as_many_levels() -> None:
    report = spikeform.energy(spiking("mamba2", weight_bits=8), IDS, cost_models=["45nm-fp32"])
    assert report.ace["per_mac"]["spiking"] == 8 * 2 * 4
    linear = [row for row in report.per_site if row["kind"] == "linear"]
    assert all(row["quantised_bits"] == [4] for row in linear)  # -4 .. 4
    unsigned = spikeform.energy(spiking("mamba2", weight_bits=8, spikes="unsigned"), IDS)
    assert unsigned.ace["per_mac"]["spiking"] == 8 * 4
    memory = report.estimates["45nm-fp32"]["memory"]["lines"]["spiking"]
    elements = sum(row["elements"] for row in linear)
    assert memory["spikes"] <= 2 * elements * (4 + 1) / 8 * 12.5  # a bit a step and one sign, or addresses


def test_counts_do_not_depend_on_batching() -> None:
    model = spiking("mamba")
    one, two = (spikeform.energy(model, IDS, batch_size=n) for n in (1, 2))
    assert (one.ops, one.accountings) == (two.ops, two.accountings)


def test_another_parent_is_refused() -> None:
    with pytest.raises(SpikeformError, match="not a pair"):
        spikeform.energy(spiking("mamba2"), IDS, dense=build("mamba2", vocab_size=80))


def test_other_models_have_no_scan() -> None:
    from families import build as attention

    model = spikeform.convert(attention("gpt2"), spikeform.LAS(steps=4), IDS)
    report = spikeform.energy(model, IDS)
    assert report.accountings == {}
    assert "scan_macs" not in report.ops["dense"]
    assert accountings(Counter(), model, [FP32])[ACCOUNTINGS[0]]["rate"] == 0


@pytest.mark.parametrize("family", ["mamba", "mamba2"])
def test_turning_inputs_is_paid_for(family) -> None:
    """log2 of the matrix's size in additions for each value before out_proj, in both networks that code values."""
    report = spikeform.energy(spiking(family, rotate=True), IDS)
    additions = TOKENS * LAYERS * INNER * 6  # INNER is 2^6
    assert report.ops["spiking"]["rotation_additions"] == report.ops["quantised"]["rotation_additions"] == additions
    assert "rotation_additions" not in report.ops["dense"]
    lines = report.estimates["45nm-fp32"]["lines"]
    assert lines["spiking"]["rotation"] == lines["quantised"]["rotation"] == pytest.approx(additions * FP32.add)
    assert "rotation" not in spikeform.energy(spiking(family), IDS).estimates["45nm-fp32"]["lines"]["spiking"]
