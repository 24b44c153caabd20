"""LAS on the trained reference models: what the README promises, on text sampled from the models themselves."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM

import spikeform
from spikeform import pretrained
from spikeform.evaluation import fidelity, sample_ids
from spikeform.pretrained.twin import outlier_twin
from spikeform.spikes import Radix2, SignedDigit
from spikeform.spikes.trace import Firing, observe


@pytest.fixture(scope="module", params=["llama", "gpt2", "opt"])
def reference(request):
    dense = AutoModelForCausalLM.from_pretrained(pretrained.path(request.param)).eval()
    return dense, sample_ids(dense, 2048, seed=3, window=128)


def measure(dense, ids, config):
    spiking = spikeform.convert(copy.deepcopy(dense), config, ids[:8])
    return fidelity(spiking, dense, ids[8:], window=128)


def test_sixteen_steps_are_the_dense_model(reference):
    found = measure(*reference, spikeform.LAS(steps=16))
    assert abs(found.perplexity_ratio - 1) < 5e-4
    assert found.top1_agreement > 0.995
    assert min(found.cosine.values()) > 0.9999


def test_eight_steps_stay_close(reference):
    assert abs(measure(*reference, spikeform.LAS(steps=8)).perplexity_ratio - 1) < 0.02


def test_outlier_twins(reference):
    dense, ids = reference
    twin = outlier_twin(dense)
    assert abs(measure(twin, ids, spikeform.LAS(steps=16)).perplexity_ratio - 1) < 1e-3
    one_scale = measure(twin, ids, spikeform.LAS(steps=8))
    per_channel = measure(twin, ids, spikeform.LAS(steps=8, per_channel=True))
    assert abs(per_channel.perplexity_ratio - 1) < 0.03
    assert per_channel.kl < one_scale.kl


@pytest.fixture(scope="module")
def llama():
    dense = AutoModelForCausalLM.from_pretrained(pretrained.path("llama")).eval()
    return spikeform.convert(dense, spikeform.LAS(steps=16))


def test_signed_digits_send_a_quarter_fewer_spikes_at_equal_codes(llama):
    sent = {"radix2": 0, "signed_digit": 0}

    def count(event):
        if isinstance(event, Firing):
            codes = event.train.integer_codes() if hasattr(event.train, "integer_codes") else event.train.codes
            sent["radix2"] += int(Radix2(16).count(codes).sum())
            sent["signed_digit"] += int(SignedDigit(16).count(codes).sum())

    ids = sample_ids(llama, 256, seed=5, window=128)
    with torch.no_grad(), observe(count):
        llama(ids)
    assert sent["signed_digit"] <= 0.75 * sent["radix2"]


def test_two_hundred_tokens_are_the_full_forwards_argmax(llama):
    prompt = torch.tensor([[llama.config.bos_token_id, 300, 301]])
    out = llama.generate(prompt, max_new_tokens=200, min_new_tokens=200, do_sample=False)
    with torch.no_grad():
        # min_new_tokens forbids the end token, in the full forward as well
        logits = llama(out[:, :-1]).logits
    logits[..., llama.generation_config.eos_token_id] = float("-inf")
    assert out.shape[1] == 203
    assert torch.equal(out[0, 3:], logits.argmax(-1)[0, 2:])
