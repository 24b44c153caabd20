"""Law 2: count() is the number of spikes that the temporal executor really sends, in every product."""

import pytest
import torch

import families
import spikeform
from spikeform.neurons import MT, OAT
from spikeform.spikes import Burst, MultiThreshold, Radix2, SignedDigit, Thermometer
from spikeform.spikes.trace import Product, observe
from spikeform.synapses import hadamard, linear, matmul


def products_of(run):
    products = []
    with (
        spikeform.executor("temporal"),
        observe(lambda e: products.append(e) if isinstance(e, Product) else None),
    ):
        run()
    return products


def check(products):
    spikes = 0
    for event in products:
        assert event.sent is not None
        assert len(event.sent) == len(event.operands)
        for train, sent in zip(event.operands, event.sent, strict=True):
            assert int(train.count().sum()) == int(sent), event.site
            spikes += int(sent)
    assert spikes > 0


@pytest.mark.parametrize("neuron", [MT, OAT])
@pytest.mark.parametrize(
    "coding",
    [Radix2(9), SignedDigit(9), MultiThreshold(9, 2), MultiThreshold(9, 4), Thermometer(9), Burst(3, 15)],
    ids=str,
)
def test_products(coding, neuron):
    generator = torch.Generator().manual_seed(0)
    encode = neuron(coding, (1.0, 8.0)[: neuron.populations])
    a, b = (encode(torch.randn(3, 6, 10, generator=generator)) for _ in range(2))

    def run():
        linear(a, torch.randn(4, 10))
        linear(a, torch.ones(4, 10, dtype=torch.int8))
        matmul(a, b, transpose_b=True)
        hadamard(a, b)

    products = products_of(run)
    assert len(products) == 4
    check(products)


def test_spikes_too_small_for_fp32_are_still_sent():
    """A step's value may round to zero; its spike is a spike all the same."""
    train = MT(Radix2(16), (1e-42,))(torch.full((1, 3), 0.9e-42))
    (event,) = products_of(lambda: hadamard(train, train))
    assert int(event.sent[0]) == int(train.count().sum())


@pytest.mark.parametrize("family", families.FAMILIES)
def test_models(family, spiking, logits):
    check(products_of(lambda: logits(spiking(family))))


@pytest.mark.parametrize("coding", ["signed_digit", "multi_threshold"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_models_in_other_codings(family, coding, spiking, logits):
    options = {"coding": coding}
    check(products_of(lambda: logits(spiking(family, **options))))


def test_a_grouped_model_with_a_cache(spiking):
    """Cached codes are sent again at every step that reads them, and counted so."""
    model, ids = spiking("llama"), families.tokens()
    with torch.no_grad():
        past = model(input_ids=ids[:, :9]).past_key_values
        products = products_of(lambda: model(input_ids=ids[:, 9:12], past_key_values=past))
    check(products)
    scores = next(e for e in products if e.site.endswith(".scores"))
    assert scores.operands[1].shape[-2] == 12
