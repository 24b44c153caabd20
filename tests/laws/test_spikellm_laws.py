"""Laws 5, 6 and 7 for SpikeLLM: more is never worse, nothing is hidden between calls, and the report says what is."""

import copy
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import pytest
import torch
from torch import nn

import families
import spikeform
from families import difference
from spikeform.errors import ConversionError
from spikeform.layers import CodedLinear, SpikingAttention, SpikingLinear
from spikeform.neurons import GIF
from spikeform.spikes.trace import observe

IDS = families.tokens(rows=6, length=20, seed=3)
FEW = ("gpt2", "opt", "llama", "phi")


# Law 5 -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def error(dense, saliency, logits):
    """Mean relative error of the logits over a few families."""

    def measure(**options):
        found = [difference(logits(dense(f), IDS), logits(saliency(f, **options), IDS)) for f in FEW]
        return sum(found) / len(found)

    return measure


def test_more_steps_are_never_worse(error):
    """For all channels; measured 0.16, 0.11, 0.09, 0.09: keys and values have two steps at most, weights four bits."""
    found = [error(salient=1.0, steps=steps) for steps in (1, 2, 4, 8)]
    assert all(later <= 1.02 * earlier for earlier, later in pairwise(found)), found
    assert found[2] < 0.8 * found[0], found


def test_more_salient_channels_are_never_worse(error):
    found = [error(salient=share) for share in (0.0, 0.1, 0.5, 1.0)]
    assert all(later <= 1.05 * earlier for earlier, later in pairwise(found)), found


def test_more_bits_are_never_worse_and_reach_the_dense_model(error):
    found = [error(bits=bits, weight_bits=bits) for bits in (3, 4, 6, 8)]
    assert all(later < 0.6 * earlier for earlier, later in pairwise(found)), found
    assert found[-1] < 0.02, found
    assert error(bits=8, weight_bits=16, steps=8, salient=1.0) < 0.7 * found[-1]  # queries have one step, keys two


def test_more_weight_steps_are_never_worse(error):
    base = {"bits": 8, "weight_bits": 2, "pipeline": "rtn"}
    tiers = [((1,), ()), ((1, 2), (0.3,)), ((1, 2, 4), (0.3, 0.3))]
    found = [error(**base, weight_steps=steps, weight_salient=shares) for steps, shares in tiers]
    assert all(later < earlier for earlier, later in pairwise(found)), found
    assert error(**base | {"weight_form": "ternary", "weight_steps": (8,)}) < error(**base | {"weight_form": "ternary"})


# Law 6 -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "options"),
    [(f, {}) for f in families.FAMILIES]
    + [("llama", o) for o in ({"signed": False}, {"key_axis": "channel"}, {"rotate": True}, {"span": "separate"})],
    ids=str,
)
def test_calls_do_not_remember(family, options, saliency, logits):
    model = saliency(family, **options)
    names = dict(model.named_buffers())
    before = {name: buffer.clone() for name, buffer in names.items()}
    first = logits(model)
    assert torch.equal(logits(model), first)
    logits(model, families.tokens(rows=1, length=23, seed=8))
    with spikeform.executor("temporal"), observe(lambda event: None):
        logits(model)
    assert torch.equal(logits(model), first)
    after = dict(model.named_buffers())
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_threads_do_not_meet(saliency, logits):
    model = copy.deepcopy(saliency("llama"))  # whose tables nobody has asked for yet
    texts = [families.tokens(rows=1, length=12, seed=s) for s in range(6)]
    wanted = [logits(saliency("llama"), ids) for ids in texts]
    with ThreadPoolExecutor(3) as pool:
        for found, right in zip(pool.map(lambda ids: logits(model, ids), texts), wanted, strict=True):
            assert torch.equal(found, right)


def test_a_neuron_follows_its_steps():
    """However often they change: what a neuron keeps about them must never be that of an earlier tensor.

    The tensors here come and go, and a new one may well be given the address of one that is gone.
    """
    x = torch.randn(2, 8)
    neuron = GIF(4, (8,), steps=4)
    unset = neuron.times
    for _ in range(20):
        for steps in (1, 2, 4):
            neuron.set_times(torch.full_like(unset, steps))
            assert float(neuron(x).codes.abs().max()) <= 15 * steps
            assert torch.equal(neuron.tables().top, torch.full((8,), 15.0 * steps)), steps
            neuron.times = unset


def test_a_weight_follows_its_codes(saliency, logits):
    model = copy.deepcopy(saliency("gpt2", weight_steps=(1, 2), weight_salient=(0.2,)))
    before = logits(model)
    layer = next(m for m in model.modules() if isinstance(m, CodedLinear))
    with torch.no_grad():
        layer.weight[0] = 0
        changed = logits(model)
        assert not torch.equal(changed, before)
        layer.scale *= 2
        assert not torch.equal(logits(model), changed)


# Law 7 -----------------------------------------------------------------------------------------------------------

EXPECTED = {
    "gpt2": (8, 2),
    "opt": (12, 2),
    "opt_post_norm": (12, 2),
    "gpt_neox": (8, 2),
    "phi": (12, 2),
    "phi_qk_norm": (12, 2),
    "bert": (12, 2),
    "bert_mlm": (12, 2),
}


@pytest.mark.parametrize("family", families.FAMILIES)
def test_every_linear_and_attention_of_a_block_spikes(family, saliency):
    model = saliency(family)
    report = model.spikeform_report
    kinds = [row.kind for row in report.replaced]
    assert (kinds.count("linear"), kinds.count("attention")) == EXPECTED.get(family, (14, 2))
    assert len(kinds) == sum(EXPECTED.get(family, (14, 2)))
    assert all(row.reason for row in report.rows)
    assert {row.replaced_by for row in report.replaced} == {"CodedLinear", "SpikingAttention"}
    for row in report.replaced:
        module = model.get_submodule(row.name)
        assert type(module if row.kind == "linear" else module.spiking).__name__ == row.replaced_by
    # What the report says is what is there: no linear layer that it does not name.
    named = {row.name for row in report.rows}
    assert all(n in named for n, m in model.named_modules() if isinstance(m, nn.Linear))
    spiking = {n for n, m in model.named_modules() if isinstance(m, SpikingLinear)}
    assert spiking == {row.name for row in report.replaced if row.kind == "linear"}
    outside = [row for row in report.dense if row.kind == "linear"]
    assert all("outside the blocks" in row.reason for row in outside)
    blocks = report.calibration["blocks"]
    assert len(blocks) == 2
    assert all(0 < block["error"] < 1 and 1.05 < block["steps"] < 1.15 for block in blocks)
    assert "modules spike" in report.summary()


def test_rows_of_other_weights(saliency):
    for options, kind in (
        ({"weight_bits": 16}, "SpikingLinear"),
        (
            {"pipeline": "gptq", "weight_form": "partial_binary", "weight_steps": (1, 8), "weight_salient": (0.1,)},
            "SpikingLinear",
        ),
        ({"bits": 16}, "CodedLinear"),
    ):
        report = saliency("llama", **options).spikeform_report
        assert {row.replaced_by for row in report.replaced if row.kind == "linear"} == {kind}
        attention = [row for row in report.rows if row.kind == "attention"]
        assert all(bool(row.replaced_by) == (options.get("bits") != 16) for row in attention)


def test_skipped_modules_stay_as_they_are(dense, logits):
    model = copy.deepcopy(dense("llama"))
    skip = ("*.layers.0.*", "*.q_proj", "model.layers.1.self_attn")
    spikeform.convert(model, spikeform.SpikeLLM(epochs=1, skip=skip), families.tokens(rows=2, length=12))
    before = dict(dense("llama").model.layers[0].named_parameters())
    assert all(torch.equal(p, before[n]) for n, p in model.model.layers[0].named_parameters())
    assert not any(isinstance(m, SpikingAttention | SpikingLinear) for m in model.model.layers[0].modules())
    rows = {row.name: row for row in model.spikeform_report.rows}
    assert "named in skip" in rows["model.layers.1.self_attn.q_proj"].reason
    assert "named in skip" in rows["model.layers.1.self_attn"].reason
    assert rows["model.layers.1.self_attn.k_proj"].replaced_by == "CodedLinear"
    assert difference(logits(dense("llama")), logits(model)) < 0.5


@pytest.mark.parametrize("skip", [("*",), ("*.layers.*",), ("*_proj",)])
def test_replacing_nothing_is_an_error(skip, dense):
    with pytest.raises(ConversionError, match="nothing in LlamaForCausalLM could be converted"):
        spikeform.convert(copy.deepcopy(dense("llama")), spikeform.SpikeLLM(skip=skip), families.tokens())
