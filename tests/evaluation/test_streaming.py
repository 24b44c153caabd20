"""Fidelity of streaming models: a block's output is the mean over its streams."""

import copy

import pytest
import torch
import torch.nn.functional as F

import spikeform
from families import build, tokens
from spikeform.evaluation import classification_agreement, fidelity

STEPS = 3
IDS = tokens(rows=4, length=16).flatten()


def spiking(family: str, **options):
    options = {"steps": STEPS, "threshold": 3.0} | options
    return spikeform.convert(build(family), spikeform.FAS(**options))


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_blocks_are_averaged_over_the_streams(family) -> None:
    model, dense = spiking(family), build(family)
    found = fidelity(model, dense, IDS, window=16, batch_size=2)
    name = next(name for name in found.cosine if name.endswith(".1"))

    def output(network, row):
        seen = []
        handle = network.get_submodule(name).register_forward_hook(
            lambda _m, _i, out: seen.append(out[0] if isinstance(out, tuple) else out)
        )
        with torch.no_grad():
            network(row[None], use_cache=False)
        handle.remove()
        return seen[0].mean(0)  # of a batch of one: over the streams

    rows = IDS.view(-1, 16)
    assert len(output(model, rows[0])) == 16
    by_hand = [F.cosine_similarity(output(dense, row), output(model, row), dim=-1).mean() for row in rows]
    assert found.cosine[name] == pytest.approx(float(torch.stack(by_hand).mean()), abs=1e-5)
    assert found.cosine["final"] < 1
    one = fidelity(model, dense, IDS, window=16, batch_size=1)
    assert one.cosine == pytest.approx(found.cosine, abs=1e-5)
    assert one.perplexity == pytest.approx(found.perplexity, rel=1e-4)


def test_two_states_of_one_model_can_be_compared() -> None:
    model = spiking("llama", steps=16)
    few = copy.deepcopy(model)
    spikeform.set_steps(few, 2)
    found = fidelity(few, model, IDS, window=16)
    assert 0 < found.cosine["model.layers.1"] < 1


def test_classifiers() -> None:
    batches = [{"input_ids": tokens(rows=4), "attention_mask": torch.ones(4, 16, dtype=torch.long)}]
    model, dense = spiking("bert"), build("bert")
    found = classification_agreement(model, dense, batches)
    assert found.examples == 4
    assert found.kl > 0
    with torch.no_grad():
        a, b = (m(**batches[0]).logits.argmax(-1) for m in (model, dense))
    assert found.agreement == (a == b).double().mean().item()
