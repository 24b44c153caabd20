"""Law 1: the three executors have one meaning: bit for bit with integer weights, else to summation order.

What "to summation order" comes to in a whole model: a sum that differs in its last bit may fall on the other
side of a threshold of the next layer, and then a code differs by one unit. In fp32 at T = 16 that leaves the
logits of these models apart by 1.5e-5 to 4.5e-5 relative (measured, temporal against collapsed), as much as
the conversion itself costs at T = 16. In fp64 the sums agree to 1e-16, no code flips, and the models agree too.
"""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import families
import spikeform
from families import difference
from spikeform.neurons import MT, OAT, FixedPointHG
from spikeform.spikes import Burst, MultiThreshold, Radix2, SignedDigit, SpikeTrain, Thermometer
from spikeform.spikes.trace import Product, observe
from spikeform.synapses import EXECUTORS, hadamard, linear, matmul

CODINGS = [
    *(kind(steps) for kind in (Radix2, SignedDigit, Thermometer) for steps in (1, 5, 16)),
    *(MultiThreshold(steps, levels) for steps in (1, 7, 16) for levels in (2, 4)),
    Burst(4, 15),
    Burst(16, 127),
]


def neuron(coding, gated):
    return OAT(coding, (1.0, 9.0)) if gated else MT(coding, (2.0,))


def by_executor(product):
    results = {}
    for name in EXECUTORS:
        with spikeform.executor(name):
            results[name] = product()
    return results


@pytest.mark.parametrize("gated", [False, True], ids=["mt", "oat"])
@pytest.mark.parametrize("coding", CODINGS, ids=str)
def test_integer_weights_bit_for_bit(coding, gated):
    generator = torch.Generator().manual_seed(coding.steps)
    train = neuron(coding, gated)(4 * torch.randn(3, 5, 70, generator=generator))
    weight = torch.randint(-128, 128, (11, 70), generator=generator, dtype=torch.int8)
    bias = torch.randn(11, generator=generator)
    results = by_executor(lambda: linear(train, weight, bias))
    assert all(torch.equal(results["collapsed"], other) for other in results.values())
    real = train.decode().double() @ weight.double().T + bias.double()
    assert difference(real, results["collapsed"]) < 1e-6
    assert results["collapsed"].norm() > 0


@pytest.mark.parametrize("gated", [False, True], ids=["mt", "oat"])
@pytest.mark.parametrize("coding", CODINGS, ids=str)
def test_real_weights_and_two_trains_to_summation_order(coding, gated):
    generator = torch.Generator().manual_seed(coding.steps)
    encode = neuron(coding, gated)
    a, b = (encode(3 * torch.randn(2, 2, 9, 33, generator=generator)) for _ in range(2))
    weight = torch.randn(11, 33, generator=generator)
    for product in (
        lambda: linear(a, weight),
        lambda: matmul(a, b, transpose_b=True),
        lambda: matmul(a, b.map(lambda x: x.transpose(-1, -2))),
        lambda: hadamard(a, b),
    ):
        results = by_executor(product)
        assert difference(results["collapsed"], results["temporal"]) <= 1e-5
        assert difference(results["collapsed"], results["event"]) <= 1e-5


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    st.sampled_from([Radix2, SignedDigit]),
    st.integers(1, 16),
    st.sampled_from(["exp", "square", "gelu", "silu", "reciprocal", "inverse_sqrt"]),
    st.integers(0, 2**31 - 1),
)
def test_hierarchically_gated_trains_too(kind, steps, function, seed):
    generator = torch.Generator().manual_seed(seed)
    train = FixedPointHG(function, kind(steps))(torch.rand(4, 12, generator=generator) * 6 + 0.01)
    other = MT(kind(steps), (2.0,))(torch.randn(4, 12, generator=generator))
    weight = torch.randn(5, 12, generator=generator)
    for product in (
        lambda: linear(train, weight),
        lambda: hadamard(train, other),
        lambda: matmul(train, other, transpose_b=True),
    ):
        results = by_executor(product)
        scale = results["collapsed"].abs().max().clamp(min=1e-12)
        assert float((results["collapsed"] - results["temporal"]).abs().max() / scale) <= 1e-5
        assert float((results["collapsed"] - results["event"]).abs().max() / scale) <= 1e-5


@pytest.mark.parametrize(("family", "twin"), families.ALL)
def test_whole_model(family, twin, spiking, logits):
    model = spiking(family, twin)
    results = by_executor(lambda: logits(model))
    assert difference(results["collapsed"], results["temporal"]) < 2e-4  # flips; see above
    assert difference(results["collapsed"], results["event"]) < 2e-4
    wide = copy.deepcopy(model).double()
    results = by_executor(lambda: logits(wide))
    assert results["collapsed"].dtype == torch.float64
    assert difference(results["collapsed"], results["temporal"]) <= 1e-9
    assert difference(results["collapsed"], results["event"]) <= 1e-9


@pytest.mark.parametrize("family", families.FAMILIES)
def test_each_product_of_a_model_in_fp32(family, spiking, logits):
    """Given the same trains, no product of a real model is further than 1e-5 from its temporal form."""
    products, model = [], spiking(family)  # converted before: calibration is not what is observed
    with observe(lambda event: products.append(event) if isinstance(event, Product) else None):
        logits(model)
    kinds = {"linear": 0, "matmul": 0, "hadamard": 0}
    for event in products:
        if event.kind == "linear":
            weight = torch.randn(7, event.operands[0].shape[-1], generator=torch.Generator().manual_seed(0))
            results = by_executor(lambda train=event.operands[0], weight=weight: linear(train, weight))
        elif event.kind == "matmul":
            results = by_executor(lambda e=event: matmul(*e.operands, transpose_b=e.transposed))
        else:
            results = by_executor(lambda e=event: hadamard(*e.operands))
        kinds[event.kind] += 1
        assert difference(results["collapsed"], results["temporal"]) <= 1e-5, event.site
        assert difference(results["collapsed"], results["event"]) <= 1e-5, event.site
    assert all(kinds.values())


def test_a_train_of_an_unfolded_channel_shift_refuses_integer_weights():
    """Its quantum differs by channel, so codes of two channels must not be added."""
    train = SpikeTrain(torch.ones(2, 3), torch.tensor([[1.0, 2.0, 4.0]]), Radix2(4))
    for name in EXECUTORS:
        with spikeform.executor(name), pytest.raises(ValueError, match="fold the channel shifts"):
            linear(train, torch.ones(5, 3, dtype=torch.int8))
    assert torch.equal(linear(train, torch.eye(3)), torch.tensor([[1.0, 2.0, 4.0]] * 2))
