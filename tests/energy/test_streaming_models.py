"""Energy of models converted with FAS: closed forms of what T passes cost, and what runs once."""

import pytest
import torch
from transformers import AutoModelForCausalLM

import spikeform
from families import build, tokens
from spikeform import pretrained
from spikeform.errors import SpikeformError

IDS = tokens(rows=2, length=12)
TOKENS, PAIRS = IDS.numel(), 2 * 12 * 13 // 2
ATTENTION, GATE, DOWN, HEAD = 64 * 64 * 3, 64 * 112, 112 * 64, 64 * 120  # llama's linear layers: q, k, v, o of GQA; …
DENSE = 2 * (ATTENTION + 2 * GATE + DOWN) + HEAD


def spiking(family: str, steps: int = 8, **options):
    options = {"threshold": 2.0, "gated": "product"} | options
    return spikeform.convert(build(family), spikeform.FAS(steps=steps, **options))


def rows_ratio(report) -> float:
    return report.streaming["operations"]["rows_ratio"]


@pytest.mark.parametrize("steps", [1, 4, 8])
def test_block_0_before_its_first_spike_and_the_head_run_once(steps) -> None:
    report = spikeform.energy(spiking("llama", steps), IDS, dense=build("llama"))
    found = report.streaming["operations"]
    once = ATTENTION + 2 * GATE + HEAD
    assert found["dense_macs"] == TOKENS * DENSE
    assert found["mac_slots"] == TOKENS * (once + steps * (DENSE - once))
    assert found["macs"] == TOKENS * (once + steps * (ATTENTION + 2 * GATE))
    assert found["spiking_share"] == 2 * DOWN / DENSE
    assert found["additions"] == report.spikes * 64 == report.ops["spiking"]["accumulate_weights"]
    assert found["events_ratio"] == (found["macs"] + found["additions"]) / found["dense_macs"]
    # two products, four heads of 16; the first block's once
    assert report.streaming["attention"] == {"dense_macs": PAIRS * 256, "macs": PAIRS * 128 * (1 + steps)}
    ops = report.ops
    assert (ops["spiking"]["attention_macs"], ops["dense"]["attention_macs"]) == (
        PAIRS * 128 * (1 + steps),
        PAIRS * 256,
    )
    assert ops["dense"]["gated_multiplications"] == TOKENS * 2 * 112
    assert ops["spiking"]["gated_multiplications"] == TOKENS * 2 * 112 * steps
    norms = TOKENS * 64  # gains: two in each block, and the last, which the streams' mean comes after
    assert ops["dense"]["real_multiplications"] == 5 * norms
    assert ops["spiking"]["real_multiplications"] == (2 + 3 * steps) * norms
    functions = report.streaming["functions"]
    assert functions["dense"] == {"attention": PAIRS * 8, "activation": TOKENS * 224, "norm": 5 * norms}
    assert functions["spiking"]["attention"] == PAIRS * 4 * (1 + steps)


@pytest.mark.parametrize(
    "family", ["gpt2", "opt", "opt_post_norm", "gpt_neox", "phi", "qwen3", "gemma", "bert", "bert_mlm"]
)
def test_every_family(family) -> None:
    report = spikeform.energy(spiking(family), IDS, dense=build(family))
    assert report.protocol["dense_checked"]
    assert 1 < rows_ratio(report) < 8
    attention = report.streaming["attention"]  # of two blocks, the first one's runs once
    assert attention["macs"] == attention["dense_macs"] * (1 + 8) / 2
    assert report.spikes > 0
    assert 0 < report.accumulations_per_mac == pytest.approx(report.spikes_per_element, rel=0.05)
    assert report.estimates["45nm-fp32"]["lines"]["dense"]["attention"] > 0
    paper, runs = (report.accountings[name]["estimates"]["45nm-fp32"] for name in ("papers' convention", "what runs"))
    assert paper["ratio_vs_dense"] < runs["ratio_vs_dense"]


def test_spikes_that_only_gate_replace_no_mac() -> None:
    report = spikeform.energy(spiking("llama", gated="activation"), IDS, dense=build("llama"))
    assert report.spikes > 0
    assert report.accumulations_per_mac == 0
    found = report.streaming["operations"]
    assert (found["spiking_share"], found["additions"]) == (0, 0)
    assert found["events_ratio"] == found["rows_ratio"]
    gated = report.streaming["gated"]
    # no spike, no value: a spike lets through what is not zero in the real factor
    assert gated["elements"] == TOKENS * 2 * 112 * 8 == gated["zeros"] + report.spikes
    assert report.streaming["quantised_bits"] == {"quantised": [4], "quantised_steps": [4]}


def test_spikes_everywhere_leave_the_head_and_attention() -> None:
    report = spikeform.energy(spiking("llama", sites="all"), IDS, dense=build("llama"))
    found = report.streaming["operations"]
    assert found["macs"] == TOKENS * HEAD
    assert found["spiking_share"] == (DENSE - HEAD) / DENSE
    assert rows_ratio(report) == (8 * (DENSE - HEAD) + HEAD) / DENSE
    assert report.streaming["attention"]["macs"] == 8 * PAIRS * 256


def test_few_spike_operators_are_counted_in_both() -> None:
    model = spikeform.convert(build("llama"), spikeform.FAS(steps=4, operators=6, gated="product"), IDS)
    report = spikeform.energy(model, IDS, dense=build("llama"))
    assert report.ops["spiking"]["attention_macs"] == report.ops["dense"]["attention_macs"] == 0
    assert report.ops["dense"]["matmul_macs"] == PAIRS * 256
    assert report.streaming["attention"] == {"dense_macs": PAIRS * 256, "macs": PAIRS * 128 * 5}
    assert report.streaming["quantised_bits"] == {"quantised": [5], "quantised_steps": [4]}


def test_decoding_reads_weights_once_and_a_cache_for_every_stream() -> None:
    found = spikeform.energy(spiking("llama"), IDS).streaming["decoding"]
    assert found["weight_bytes"] == found["dense_weight_bytes"] == DENSE * 4
    assert found["neuron_bytes"] == 2 * 3 * 4  # threshold, scale, initial of two neurons
    assert found["dense_cache_bytes_per_token"] == 2 * 2 * 32 * 4  # layers, keys and values, two heads of 16
    assert found["cache_bytes_per_token"] == (1 + 8) * 2 * 32 * 4  # the first block's attention runs once
    assert spikeform.energy(spiking("bert"), IDS).streaming["decoding"] is None


def test_windows_bound_the_positions_that_are_run() -> None:
    model = spiking("llama", granularity="position", positions=4)
    report = spikeform.energy(model, IDS, window=4)
    assert report.streaming["decoding"]["neuron_bytes"] == 2 * (1 + 2 * 112) * 4  # of one position


def test_state_and_config_are_left_alone(monkeypatch) -> None:
    model = spiking("llama")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    config = model.config.quantization_config
    spikeform.energy(model, IDS)
    assert model.config.quantization_config is config
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    from spikeform.energy import report

    monkeypatch.setattr(report, "price", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        spikeform.energy(model, IDS)
    assert spikeform.layers.streaming.steps_of(model) == 8


def test_errors() -> None:
    with pytest.raises(SpikeformError, match="QCFS network"):
        spikeform.energy(spiking("llama", steps=0), IDS)
    with pytest.raises(SpikeformError, match="not a pair"):
        spikeform.energy(spiking("llama"), IDS, dense=build("gemma"))


def test_the_reference_model_stays_within_its_bars() -> None:
    """Eight passes of the embedded model are at most 5.6 dense ones, and read the weights about once."""
    model = AutoModelForCausalLM.from_pretrained(pretrained.resolve("pretrained:llama"))
    model = spikeform.convert(model, spikeform.FAS(steps=8, threshold=2.0, gated="product"))
    report = spikeform.energy(model, torch.arange(8)[None], cost_models=["45nm-fp32"])
    assert rows_ratio(report) <= 5.6
    assert report.streaming["decoding"]["weight_ratio"] <= 1.5
    assert report.streaming["decoding"]["cache_ratio"] <= 8
