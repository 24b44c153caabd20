"""Laws 1 and 2 for SpikeLLM: whole models are the same bits in every executor, and every spike counted is sent.

All products are of integers, so nothing is left to the order of sums. Real inputs of spiking weights, and real
weights, do sum reals: there fp32 models agree to the order of sums, and fp64 models to 1e-9.
"""

import copy

import pytest
import torch

import families
import spikeform
from families import close, difference
from spikeform.layers import CodedLinear
from spikeform.spikes.trace import Product, observe
from spikeform.synapses import EXECUTORS

TERNARY = {"pipeline": "gptq", "weight_form": "ternary", "weight_steps": (1, 2, 4), "weight_salient": (0.2, 0.1)}
INTEGER = {
    "official": {"form": "official"},
    "unsigned": {"signed": False},
    "official unsigned": {"form": "official", "signed": False},
    "separate": {"span": "separate"},
    "channel": {"key_axis": "channel"},
    "channel unsigned": {"key_axis": "channel", "signed": False},
    "8 bits": {"bits": 8, "weight_bits": 8},
    "T=4": {"steps": 4, "salient": 0.05},
    "T=8 of 8 bits unsigned": {"bits": 8, "steps": 8, "signed": False},
    "rotate": {"rotate": True},
    "ternary": TERNARY,
    "gptq": {"pipeline": "gptq"},
    "tiers": {"pipeline": "rtn", "weight_steps": (1, 4), "weight_salient": (0.2,), "weight_bits": 3},
    "dense attention": {"attention": False},
}
REAL = {
    "real weights": {"weight_bits": 16},
    "partly binary": {
        "pipeline": "gptq",
        "weight_form": "partial_binary",
        "weight_steps": (1, 8),
        "weight_salient": (0.1,),
    },
    "real inputs": {"bits": 16, "weight_steps": (1, 2), "weight_salient": (0.2,)},
    "ternary weights": {**TERNARY, "bits": 16},
}
FEW = ["llama", "gpt2", "opt"]


def by_executor(model, logits, **more):
    found = {}
    for name in EXECUTORS:
        with spikeform.executor(name):
            found[name] = logits(model, **more)
    return found


@pytest.mark.parametrize(
    ("family", "options"),
    [(family, {}) for family in families.FAMILIES] + [(f, o) for f in FEW for o in INTEGER.values()],
    ids=lambda x: x if isinstance(x, str) else ",".join(x) or "default",
)
def test_bit_for_bit(family, options, saliency, logits):
    model = saliency(family, **options)
    coded = [m for m in model.modules() if isinstance(m, CodedLinear)]
    assert coded
    assert not any(m.weight.is_floating_point() for m in coded)
    found = by_executor(model, logits)
    assert found["collapsed"].dtype == torch.float32
    assert found["collapsed"].std() > 0
    assert all(torch.equal(found["collapsed"], other) for other in found.values())


@pytest.mark.parametrize("options", REAL.values(), ids=REAL)
@pytest.mark.parametrize("family", FEW)
def test_real_numbers_to_summation_order(family, options, saliency, logits):
    model = saliency(family, **options)
    found = by_executor(model, logits)
    assert all(difference(found["collapsed"], other) < 1e-2 for other in found.values())  # codes may flip
    found = by_executor(copy.deepcopy(model).double(), logits)
    for other in found.values():
        close(found["collapsed"], other)


@pytest.mark.parametrize("options", [{}, {"signed": False}], ids=["signed", "unsigned"])
def test_with_a_cache_and_padding_too(options, saliency):
    model, ids = saliency("llama", **options), families.tokens(rows=2, length=10)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    found = []
    for name in EXECUTORS:
        with spikeform.executor(name), torch.no_grad():
            first = model(input_ids=ids[:, :8], attention_mask=mask[:, :8], use_cache=True)
            then = model(input_ids=ids[:, 8:], attention_mask=mask, past_key_values=first.past_key_values)
            found.append(torch.cat([first.logits, then.logits], 1))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


# Law 2 -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def products_of(model, ids, **more):
    products = []
    with (
        spikeform.executor("temporal"),
        observe(lambda event: products.append(event) if isinstance(event, Product) else None),
    ):
        model(input_ids=ids, **more)
    return products


def check(products):
    total = 0
    for event in products:
        assert event.sent is not None, event.site
        for train, sent in zip(event.operands, event.sent, strict=True):
            assert int(train.count().sum()) == int(sent), event.site
            total += int(sent)
    assert total > 0


@pytest.mark.parametrize(
    ("family", "options"),
    [(f, {}) for f in families.FAMILIES] + [("llama", o) for o in (INTEGER | REAL).values()],
    ids=lambda x: x if isinstance(x, str) else ",".join(x) or "default",
)
def test_what_is_counted_is_sent(family, options, saliency):
    model = saliency(family, **options)
    products = products_of(model, families.tokens())
    check(products)
    sites = {event.site for event in products}
    for row in model.spikeform_report.replaced:
        wanted = [row.name] if row.kind == "linear" else [f"{row.name}.scores", f"{row.name}.context"]
        real = options.get("bits") == 16 and not options.get("weight_steps")
        assert real or sites.issuperset(wanted), row


@torch.no_grad()
def test_cached_spikes_are_sent_again(saliency):
    model, ids = saliency("llama", signed=False), families.tokens()
    past = model(input_ids=ids[:, :9]).past_key_values
    products = products_of(model, ids[:, 9:12], past_key_values=past)
    check(products)
    scores = next(e for e in products if e.site.endswith(".scores"))
    assert scores.operands[1].shape[-2] == 12


def test_signed_spikes_are_far_fewer(saliency):
    """Zero is silent; the unsigned code has it in the middle. The values carried are the same."""
    sent = []
    for signed in (True, False):
        products = products_of(saliency("opt", signed=signed), families.tokens())
        sent.append(sum(int(e.operands[0].count().sum()) for e in products if e.kind == "linear"))
    assert sent[0] < 0.5 * sent[1], sent
