"""Energy of converted models: counts against closed forms and against the temporal executor."""

import json

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import spikeform
from spikeform.energy import Counter, energy
from spikeform.errors import SpikeformError

VOCAB, WIDTH, INNER, HEADS, GROUPS, LAYERS, LENGTH = 100, 64, 96, 4, 2, 2, 10
IDS = torch.randint(1, VOCAB, (2, LENGTH), generator=torch.Generator().manual_seed(3))
THRESHOLDS = {"probability": (0.25, 1.0)} | {
    role: (2.0, 16.0) for role in ("linear", "query", "key", "value", "norm", "up", "act", "lm_head")
}


def llama(seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=WIDTH, intermediate_size=INNER, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, num_key_value_heads=GROUPS, max_position_embeddings=32,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def gpt2(seed: int = 0) -> GPT2LMHeadModel:
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=VOCAB,
        n_embd=WIDTH,
        n_layer=LAYERS,
        n_head=HEADS,
        n_positions=32,
        bos_token_id=0,
        eos_token_id=0,
    )
    return GPT2LMHeadModel(config).eval()


def spiking(make=llama, **options):
    return spikeform.convert(make(), spikeform.LAS(thresholds=THRESHOLDS, **({"steps": 8} | options)), IDS)


def test_macs_are_the_architectures() -> None:
    report = spikeform.energy(spiking(), IDS, dense=llama())
    tokens, size = IDS.numel(), WIDTH // HEADS
    pairs = IDS.shape[0] * LENGTH * (LENGTH + 1) // 2 * HEADS * LAYERS
    ops = report.ops["dense"]
    block = WIDTH * WIDTH * 2 + WIDTH * GROUPS * size * 2 + 3 * WIDTH * INNER
    assert ops["linear_macs"] == tokens * LAYERS * block
    assert ops["matmul_macs"] == pairs * 2 * size
    assert ops["dense_macs"] == tokens * WIDTH * VOCAB  # the output head stays real
    norms = tokens * WIDTH * (2 * LAYERS + 1)
    assert ops["hadamard_macs"] == norms + pairs + tokens * INNER * LAYERS
    assert ops["real_multiplications"] == norms
    assert ops["real_additions"] == 0
    assert report.ops["quantised"]["linear_macs"] == ops["linear_macs"]
    probabilities = [r for r in report.per_site if r.get("function") == "exp"]
    assert sum(row["elements"] for row in probabilities) == pairs  # what the mask hides is not there


@pytest.mark.parametrize("make", [llama, gpt2])
@pytest.mark.parametrize("options", [{}, {"coding": "signed_digit"}, {"coding": "multi_threshold", "levels": 4}])
def test_counts_are_the_spikes_sent(make, options) -> None:
    model, counter = spiking(make, **options), Counter()
    with torch.no_grad(), spikeform.executor("temporal"), counter.watch(model):
        model(IDS)
    kinds = {kind for _, kind in counter.products}
    assert kinds == ({"linear", "matmul", "hadamard"})
    for tally in counter.products.values():
        assert tally.sent == sum(operand.spikes for operand in tally.operands), tally.site
        assert tally.sent > 0


def test_gpt2_macs_and_biases() -> None:
    report = spikeform.energy(spiking(gpt2), IDS, dense=gpt2())
    tokens = IDS.numel()
    assert report.ops["dense"]["linear_macs"] == tokens * LAYERS * 12 * WIDTH * WIDTH
    biases = LAYERS * (3 + 1 + 4 + 1) * WIDTH + (2 * LAYERS + 1) * WIDTH
    assert report.ops["dense"]["real_additions"] == tokens * biases


def test_signed_digit_sends_fewer_spikes_and_a_spiking_head_moves_macs() -> None:
    binary = spikeform.energy(spiking(steps=12), IDS)
    signed = spikeform.energy(spiking(steps=12, coding="signed_digit"), IDS)
    assert signed.spikes < 0.8 * binary.spikes
    head = spikeform.energy(spiking(steps=12, lm_head=True), IDS)
    assert head.ops["dense"]["dense_macs"] == 0
    assert head.ops["dense"]["linear_macs"] == sum(binary.ops["dense"][k] for k in ("linear_macs", "dense_macs"))


def test_what_stays_dense_is_named_and_the_report_is_json() -> None:
    report = spikeform.energy(spiking(softmax=False, norms=False, activations=False), IDS)
    assert any("norm" in line and "left dense" in line for line in report.not_counted)
    assert not any(row.get("function") == "exp" for row in report.per_site)
    data = report.to_dict()
    assert json.loads(json.dumps(data, allow_nan=False)) == data
    assert data["protocol"]["method"]["steps"] == 8


def test_counts_do_not_depend_on_batching() -> None:
    model = spiking()
    one, two = (spikeform.energy(model, IDS, batch_size=n) for n in (1, 2))
    for key in ("accumulate_weights", "accumulate_sums", "comparisons"):
        assert one.ops["spiking"][key] == pytest.approx(two.ops["spiking"][key], rel=1e-3)  # fp rounding flips
    assert one.ops["dense"] == two.ops["dense"]


def test_the_package_and_the_function_answer_one_call() -> None:
    model = spiking()
    assert spikeform.energy(model, IDS).ops == spikeform.energy.energy(model, IDS).ops == energy(model, IDS).ops


def test_a_dense_model_is_an_error() -> None:
    with pytest.raises(SpikeformError, match="convert it first"):
        spikeform.energy(llama(), IDS)
    with pytest.raises(SpikeformError, match="context of 32"):
        spikeform.energy(spiking(), IDS.repeat(1, 4))


def test_inspect_and_raster(tmp_path) -> None:
    model = spiking()
    rows = spikeform.inspect(model)
    functions = {row["function"] for row in rows if row["neuron"]}
    assert {"identity", "exp", "reciprocal", "square", "inverse_sqrt", "silu"} <= functions
    assert {row["site"] for row in rows if row["neuron"] is None} == {"model.embed_tokens", "lm_head"}
    assert all(row["steps"] == 8 for row in rows if row["neuron"])
    drawn = spikeform.raster(model, IDS, site="model.layers.1.mlp.down_proj", path=tmp_path / "r.png")
    assert drawn.channels == INNER
    assert drawn.spikes > 0
    assert (tmp_path / "r.png").stat().st_size > 1000
