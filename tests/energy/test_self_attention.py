"""Energy of spiking self-attention: counts against loops over literal spikes, both forms, and the formula of papers."""

import json
from functools import cache

import pytest
import torch
from transformers import DynamicCache
from typer.testing import CliRunner

import families
import spikeform
from spikeform.cli import app
from spikeform.energy import CostModel, Counter
from spikeform.energy.attention import NOT_COUNTED
from spikeform.errors import SpikeformError
from spikeform.layers.self_attention import SpikingSelfAttention
from spikeform.spikes.trace import Firing, observe

LENGTH, HEADS, SIZE, LAYERS = 9, 4, 16, 2
IDS = families.tokens(rows=2, length=LENGTH)
TOKENS = IDS.numel()
PAIRS = 2 * HEADS * LENGTH * (LENGTH + 1) // 2  # of one layer
OPTIONS = {
    "default": {},
    "signed": {"spikes": "signed", "reset": "soft", "ffn": "relu_if", "tau": 3.0, "steps": 3, "normalise": False},
    "one_step": {"steps": 1, "ffn": "none", "tau": 1.0},
    "windows": {"windows": [1, 3, 0]},
    "near": {"windows": [2, 4]},
}
CASES = [(family, name) for family in ("gpt2", "llama") for name in OPTIONS]
PRICE = CostModel("mine", multiply=3, add=1, significand=8, weight_bytes=1, activation_bytes=1)


@cache
def spiking(family: str, name: str = "default"):
    config = spikeform.NeuTransformer(**OPTIONS[name])
    return spikeform.convert(families.build(family), config, families.tokens(rows=4, length=20, seed=5))


@cache
def report_of(family: str, name: str = "default"):
    return spikeform.energy(spiking(family, name), IDS, dense=families.build(family), cost_models=["45nm-fp32", PRICE])


def literal(model, ids=IDS, **options) -> dict[str, torch.Tensor]:
    """What each LIF population sent, by site."""
    found = {}

    def listen(event) -> None:
        if isinstance(event, Firing) and event.train.codes.ndim == 5:
            found[event.site] = event.train.codes.int()

    with torch.no_grad(), observe(listen):
        model(ids, **options)
    return found


def windows_of(model) -> tuple[int, ...]:
    """Of each key/value head; 0: none."""
    return next(m.windows for m in model.modules() if isinstance(m, SpikingSelfAttention))


def by_hand(q, k, v, windows=(0,) * HEADS, first=0) -> dict[str, int]:
    """Loops over steps, rows, heads, queries from ``first`` on, and keys."""
    found = dict.fromkeys(("scores", "context", "state", "reads"), 0)
    steps, rows, heads, length, size = q.shape
    groups = k.shape[2]
    for t in range(steps):
        for b in range(rows):
            for g in range(groups):
                for i in range(0 if windows[g] else first, 0 if windows[g] else length):
                    found["state"] += int((k[t, b, g, i] != 0).sum()) * int((v[t, b, g, i] != 0).sum())
            for h in range(heads):
                g = h // (heads // groups)
                for i in range(first, length):
                    query = q[t, b, h, i]
                    found["reads"] += 0 if windows[g] else int((query != 0).sum()) * size
                    for j in range(max(i + 1 - windows[g], 0) if windows[g] else 0, i + 1):
                        met = query * k[t, b, g, j]
                        one = int((met != 0).sum()), int((v[t, b, g, j] != 0).sum()) if int(met.sum()) else 0
                        found["scores"] += one[0]
                        found["context"] += one[1]
                        found["reads"] += sum(one) if windows[g] else 0
    return found


def spikes_of(model, ids=IDS, **options) -> dict[str, tuple[torch.Tensor, ...]]:
    """Literal queries, keys and values by layer."""
    sent = literal(model, ids, **options)
    sites = [m.site for m in model.modules() if isinstance(m, SpikingSelfAttention)]
    return {site: tuple(sent[f"{site}.{name}"] for name in ("query", "key", "value")) for site in sites}


@pytest.mark.parametrize(("family", "name"), CASES)
def test_additions_are_those_of_the_literal_spikes(family, name) -> None:
    report, model = report_of(family, name), spiking(family, name)
    spikes = spikes_of(model)
    assert set(report.attention["layers"]) == set(spikes)
    rows = {row["site"]: row for row in report.per_site if row["kind"] == "attention"}
    for site, found in report.attention["layers"].items():
        wanted = by_hand(*spikes[site], windows_of(model))
        assert found["additions"] == rows[site]["by_product"] == wanted
        assert min(wanted[each] for each in wanted if name != "near" or each != "state") > 0
        assert rows[site]["accumulations"] == wanted["scores"] + wanted["context"]
        assert rows[site]["macs"] == found["macs"] == 2 * PAIRS * SIZE
        assert rows[site]["spikes"] == sum(int(train.abs().sum()) for train in spikes[site])
    assert report.ops["spiking"]["accumulate_sums"] == sum(row["accumulations"] for row in rows.values())
    assert report.ops["spiking"]["running_sum_additions"] == 0
    assert report.ops["dense"]["matmul_macs"] == 2 * PAIRS * SIZE * LAYERS
    assert report.ops["dense"]["softmax_multiplications"] == PAIRS * LAYERS


@pytest.mark.parametrize(("family", "name"), CASES)
def test_neurons_row_factors_and_projections(family, name) -> None:
    report, model = report_of(family, name), spiking(family, name)
    options = model.config.quantization_config
    sent = literal(model)
    neurons = {row["site"]: row for row in report.per_site if row["kind"] == "neuron"}
    leaks = 0
    for site, codes in sent.items():
        row, spikes = neurons[site], int(codes.abs().sum())
        assert (row["spikes"], row["elements"]) == (spikes, codes[0].numel())
        assert row["comparisons"] == codes.numel()
        assert row["spike_rate"] == pytest.approx(spikes / codes.numel())
        counted = spikes if options.spikes == "signed" and site.endswith(".output") else 0
        assert row["additions"] == counted + (0 if options.tau == 1 else codes.numel() + spikes)
        leaks += codes.numel() if options.tau == 3 else 0
    spiking_ops = report.ops["spiking"]
    assert spiking_ops["leaks"] == leaks
    width = HEADS * SIZE
    assert spiking_ops["row_factors"] == (TOKENS * LAYERS * options.steps * width if options.normalise else 0)
    # The projection behind attention receives counts: one addition a spike left in them and output feature.
    behind = [row for row in report.per_site if row["kind"] == "linear" and "attn" in row["site"]]
    assert len(behind) == LAYERS
    for row in behind:
        site = row["site"].rpartition(".")[0]
        assert row["site"] not in neurons  # what it receives was sent by the LIF neurons
        counts = sent[f"{site}.output"].sum(0).abs()
        assert row["accumulations"] == int(counts.sum()) * width > 0
    # Queries, keys and values are projected once, from real numbers, whatever T is.
    projections = sum(row["macs"] for row in report.per_site if row["kind"] == "real" and "attn" in row["site"])
    groups = HEADS if family == "gpt2" else 2
    assert projections == TOKENS * LAYERS * width * (width + 2 * groups * SIZE)
    assert report.protocol["dense_checked"]
    assert "gated_multiplications" in spiking_ops
    assert report.not_counted[: len(NOT_COUNTED)] == NOT_COUNTED
    assert json.loads(json.dumps(report.to_dict(), allow_nan=False)) == report.to_dict()
    assert not report.streaming
    assert not report.accountings


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_prices(family) -> None:
    report = report_of(family)
    found, ops = report.attention["counted"], report.ops
    own = [row for row in report.per_site if row["kind"] == "neuron" and "attn." in row["site"]]
    assert found["comparisons"] == sum(row["comparisons"] for row in own)
    assert found["neuron_additions"] == sum(row["additions"] for row in own)
    assert found["multiplications"] == ops["spiking"]["row_factors"]
    layers = report.attention["layers"].values()
    quadratic, recurrent = (
        sum(layer["additions"][name] for layer in layers for name in names)
        for names in (("scores", "context"), ("state", "reads"))
    )
    mine = found["estimates"]["mine"]
    rest = found["comparisons"] + found["neuron_additions"] + 3 * found["multiplications"]
    assert mine["quadratic"] == quadratic + rest
    assert mine["recurrent"] == recurrent + rest
    assert mine["dense"] == 4 * 2 * PAIRS * SIZE * LAYERS + 3 * PAIRS * LAYERS
    assert mine["reduction_quadratic"] == pytest.approx(1 - mine["quadratic"] / mine["dense"])
    lines = report.estimates["mine"]["lines"]
    assert lines["spiking"]["row_factors"] == 3 * ops["spiking"]["row_factors"]
    assert lines["dense"]["softmax"] == lines["quantised"]["softmax"] == 3 * PAIRS * LAYERS
    assert lines["dense"]["products"] == 4 * (ops["dense"]["linear_macs"] + ops["dense"]["matmul_macs"])
    # T = 4 binary steps are integers of 0 to 4, three bits; a score of heads of 16 is one of 17 values.
    rows = [row for row in report.per_site if row["kind"] == "attention"]
    assert all(row["quantised_bits"] == [3, 3, 3] for row in rows)
    linear = [row for row in report.per_site if row["kind"] == "linear"]
    priced = sum(row["macs"] * (1 + 3 * row["quantised_bits"][0] / 8) for row in linear)
    priced += PAIRS * LAYERS * SIZE * (2 + 3 * (3 * 3 + 5 * 3) / 64)
    assert lines["quantised"]["products"] == pytest.approx(priced)
    assert report.estimates["mine"]["memory"]["lines"]["spiking"]["running_sum_codes"] == 0


@pytest.mark.parametrize(("family", "name"), CASES)
def test_the_papers_formula(family, name) -> None:
    report, model = report_of(family, name), spiking(family, name)
    steps, formula, shares = model.config.quantization_config.steps, report.attention["formula"], []
    for site, trains in spikes_of(model).items():
        rate = sum(int(t.abs().sum()) for t in trains) / sum(t.numel() for t in trains)
        assert report.attention["layers"][site]["rate"] == pytest.approx(rate)
        shares.append(steps * rate)
        for cost, mac, ac in (("45nm-fp32", 4.6, 0.9), ("mine", 4, 1)):
            own = formula["estimates"][cost]
            assert own["layers"][site] == pytest.approx(1 - steps * rate * ac / mac)
    own, macs = formula["estimates"]["45nm-fp32"], 2 * LENGTH**2 * HEADS * SIZE * 2 * LAYERS  # of two rows
    assert own["dense"] == pytest.approx(4.6 * macs)
    assert own["reduction"] == pytest.approx(1 - sum(shares) / LAYERS * 0.9 / 4.6)
    assert own["spiking"] == pytest.approx((1 - own["reduction"]) * own["dense"])
    assert own["steps_times_rate_of_the_paper"] == pytest.approx([1.80, 0.75], abs=0.01)
    assert formula["paper"]["reduction"] == [0.6471, 0.8528]
    assert "ESTIMATED" in formula["label"]
    for left in ("softmax", "LIF", "memory"):
        assert left in formula["label"]


@pytest.mark.parametrize("name", ["default", "windows", "near"])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_decoding_counts_the_recurrence(family, name) -> None:
    model, price, past = spiking(family, name), PRICE, DynamicCache()
    windows = windows_of(model)
    counter = Counter()
    with torch.no_grad(), counter.watch(model):
        model(IDS[:, :6], past_key_values=past, use_cache=True)
    assert {kind for _, kind in counter.products if kind != "linear"} == {"attention"}
    counter = Counter()
    with torch.no_grad(), counter.watch(model):
        for i in range(6, LENGTH):
            model(IDS[:, i : i + 1], past_key_values=past, use_cache=True)
    whole, touched = spikes_of(model), 0
    groups = HEADS if family == "gpt2" else 2
    for site, trains in whole.items():
        wanted = by_hand(*trains, windows, first=6)
        tally, own = counter.products[site, "recurrence"], counter.attentions.tallies[site]
        assert tally.accumulations == wanted["state"] + wanted["reads"]
        assert tally.operands[1].elements == 2 * 3 * groups * SIZE
        assert (own.scores, own.context, own.squares) == (0, 0, 0)
        assert tally.macs == 2 * 2 * HEADS * SIZE * (7 + 8 + 9)  # each token meets all keys so far in a dense network
        assert own.cached == 2 * 2 * groups * SIZE * (6 + 7 + 8)
        local = sum(w > 0 for w in windows)
        far = by_hand(*(x[:, :, -x.shape[2] // groups * (groups - local) :] for x in trains), (0,) * groups, first=6)
        touched += 2 * wanted["state"] + (far["reads"] if local < groups else 0)
        # keys and values of the window before a token, a byte each, in numbers of four bytes
        touched += 3 * 4 * 2 * 2 * SIZE * sum(w - 1 for w in windows if w) // 4
    from spikeform.energy.memory import memory

    lines = memory(counter, price)
    assert lines["spiking"]["attention_cache"] == 4 * touched * price.sram_per_byte
    assert lines["dense"]["attention_cache"] == LAYERS * own.cached * price.sram_per_byte


def test_padding_is_counted_nowhere() -> None:
    model, counter = spiking("gpt2"), Counter()
    mask = torch.ones_like(IDS)
    mask[0, :4] = 0
    with torch.no_grad(), counter.watch(model):
        model(IDS, attention_mask=mask)
    seen = LENGTH * (LENGTH + 1) // 2 + (LENGTH - 4) * (LENGTH - 3) // 2
    spikes = spikes_of(model, attention_mask=mask)
    for site, (q, k, v) in spikes.items():
        for train in (k, v):
            train[:, 0, :, :4] = 0
        assert counter.products[site, "attention"].macs == 2 * seen * HEADS * SIZE
        wanted = by_hand(q, k, v)
        assert counter.products[site, "attention"].accumulations == wanted["scores"] + wanted["context"]


def test_blocks_of_queries_change_nothing(monkeypatch) -> None:
    whole = report_of("llama").attention
    monkeypatch.setattr("spikeform.energy.self_attention._ROWS", 4)
    again = spikeform.energy(spiking("llama"), IDS, cost_models=["45nm-fp32", PRICE], batch_size=2)
    assert again.attention == whole


def test_attention_alone_is_counted_with_its_model() -> None:
    model = spiking("gpt2")
    with torch.no_grad(), pytest.raises(SpikeformError, match=r"inside Counter\.watch"), observe(Counter()):
        model(IDS)


def test_other_models_have_none() -> None:
    report = spikeform.energy(spikeform.convert(families.build("gpt2"), spikeform.LAS(steps=4), IDS), IDS)
    assert report.attention == {}
    assert "row_factors" not in report.ops["spiking"]
    assert "softmax" not in report.estimates["45nm-fp32"]["lines"]["dense"]


def test_the_command(tmp_path) -> None:
    families.build("gpt2").save_pretrained(tmp_path / "dense")
    spikeform.save(spiking("gpt2"), tmp_path / "spiking")
    args = ["energy", str(tmp_path / "spiking"), "--reference", str(tmp_path / "dense"), "--tokens", "24"]
    done = CliRunner().invoke(app, [*args, "--window", "12", "--json"])
    assert done.exit_code == 0, done.output
    document = json.loads(done.stdout)
    assert document["protocol"]["dense_checked"]
    assert document["attention"]["formula"]["paper"]["reduction"] == [0.6471, 0.8528]
    shown = CliRunner().invoke(app, [*args, "--window", "12"]).stdout
    for name, own in document["attention"]["formula"]["estimates"].items():
        counted = document["attention"]["counted"]["estimates"][name]
        line = next(line for line in shown.splitlines() if line.startswith(name) and "%" in line)
        for reduction in (own["reduction"], counted["reduction_quadratic"], counted["reduction_recurrent"]):
            assert f"{reduction:.2%}" in line
    for word in ("ESTIMATED", "64.71% to 85.28%", "leaves out softmax, LIF updates", "transformer.h.1.attn"):
        assert word in " ".join(shown.split())
    inspected = CliRunner().invoke(app, ["inspect", str(tmp_path / "spiking")]).stdout
    assert "8 LIF neuron populations" in inspected
