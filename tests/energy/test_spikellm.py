"""Energy of SpikeLLM models: every spike that is sent is counted, and the effort is what the config says."""

import json

import pytest
import torch

import spikeform
from families import build, tokens
from spikeform.energy import Counter
from spikeform.methods.spikellm import SpikeLLM

IDS = tokens(rows=2, length=16)
TERNARY = {"bits": 16, "weight_bits": 1, "pipeline": "gptq", "weight_form": "ternary"}


def spiking(family: str = "llama", **options):
    return spikeform.convert(build(family), SpikeLLM(**({"pipeline": "rtn"} | options)), IDS)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"signed": False, "steps": 4, "salient": 0.05},
        {"form": "official", "signed": False},
        {"span": "separate"},
        {"key_axis": "channel"},
        TERNARY | {"weight_steps": (1, 2, 4), "weight_salient": (0.1, 0.05)},
    ],
    ids=str,
)
def test_counts_are_the_spikes_sent(family, options) -> None:
    model, counter = spiking(family, **options), Counter()
    with torch.no_grad(), spikeform.executor("temporal"), counter.watch(model):
        model(IDS)
    kinds = {kind for _, kind in counter.products}
    assert kinds == ({"weights"} if options.get("bits") == 16 else {"linear", "matmul"})
    for tally in counter.products.values():
        assert tally.sent == sum(operand.spikes for operand in tally.operands), tally.site
        assert tally.sent > 0
    report = spikeform.energy(model, IDS, dense=build(family))
    assert report.ace["additive_fraction"] == 1
    assert report.ace["macs_per_token"] * IDS.numel() == report.ops["dense"]["linear_macs"]
    data = report.to_dict()
    assert json.loads(json.dumps(data, allow_nan=False)) == data


def test_silence_at_zero_is_worth_most_of_the_additions() -> None:
    signed, released = (spikeform.energy(spiking(signed=value), IDS) for value in (True, False))
    assert signed.accumulations_per_mac < 0.5 * released.accumulations_per_mac
    assert signed.ace == released.ace  # which sees no silence
    assert signed.ops["quantised"]["bias_current_additions"] == 0 < released.ops["spiking"]["bias_current_additions"]


def test_real_attention_is_named() -> None:
    report = spikeform.energy(spiking(**TERNARY), IDS)
    assert any("attention" in line and "not counted" in line for line in report.not_counted)
    assert report.spikes_per_element < 1  # a ternary weight sends one or none
