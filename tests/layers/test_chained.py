"""What a decoded row meets in a compiled graph, as one operator of the CPU library: what it was apart."""

from collections import Counter

import pytest
import torch
from transformers import StaticCache

from decoding import backend, converted, decoded
from spikeform import native
from spikeform.neurons.oat import ROUNDINGS
from spikeform.synapses.fused import pack_nibbles

OPS = torch.ops.spikeform
REAL = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
pytestmark = pytest.mark.skipif(native.library() is None, reason="the library is not built")
MODELS = [
    ("LAS", {"steps": 15, "weight_bits": 8}),
    ("LAS", {"steps": 7, "weight_bits": 8, "lm_head": True}),
    ("LAS", {"steps": 8}),
    ("SpikeLLM", {"pipeline": "rtn", "bits": 4, "weight_bits": 4, "steps": 2, "salient": 0.1}),
    ("SpikeLLM", {"pipeline": "rtn", "bits": 4, "weight_bits": 4, "steps": 2, "salient": 0.1, "lm_head": "int8"}),
]


@pytest.fixture(params=[1, 3])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def random(*shape, seed=0, dtype=torch.float32):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    x.view(-1)[::11] *= 30
    return x.to(dtype)


@pytest.mark.parametrize("threads", [3], indirect=True)
@REAL
@pytest.mark.parametrize(("method", "settings"), MODELS)
@torch.no_grad()
def test_a_compiled_step(threads, method, settings, dtype):
    model = converted(method, "cpu", dtype, heads=(4, 2), layers=2, **settings)
    ids = torch.randint(64, (1, 7), generator=torch.Generator().manual_seed(2))
    (_, logits, keys), (whole, found, own_keys) = (decoded(model, ids, together) for together in (False, True))
    head = "lm_head" in settings  # behind a slice that Inductor would have removed
    assert whole == Counter(chain=1 + head, advance=1, **({"hg_norm": 1} if method == "LAS" else {}))
    if method == "LAS":  # the same norms, too
        assert torch.equal(logits, found)
        assert torch.equal(keys, own_keys)
    else:
        assert (logits - found).abs().max() <= logits.abs().max() * (1e-5 if dtype == torch.float32 else 2**-6)
        assert (keys != own_keys).float().mean() < 0.01


@torch.no_grad()
def test_a_full_cache_is_an_error():
    model = converted("LAS", "cpu", steps=7)
    past = StaticCache(config=model.config, max_cache_len=6)
    ids = torch.arange(5)[None]
    model(input_ids=ids, past_key_values=past)
    torch.compiler.reset()
    step = torch.compile(model.forward, fullgraph=True, dynamic=False, backend=backend(True, []))
    step(input_ids=ids[:, :1], past_key_values=past)
    before = past.layers[0].keys.clone()
    with pytest.raises(IndexError, match=r"cache of 6 places.*max_cache_len"):
        step(input_ids=ids[:, :1], past_key_values=past)
    assert torch.equal(past.layers[0].keys, before)


@torch.no_grad()
@pytest.mark.parametrize("machine", ["no library"], indirect=True)
def test_nothing_is_put_together_without_the_library(machine):
    model = converted("LAS", "cpu", steps=7, weight_bits=8)
    ids = torch.randint(64, (1, 7), generator=torch.Generator().manual_seed(2))
    (apart, logits, keys), (whole, found, own_keys) = (decoded(model, ids, together) for together in (False, True))
    assert apart == whole
    assert torch.equal(logits, found)
    assert torch.equal(keys, own_keys)


def chained(step, *given):
    """Operators that the pass leaves of a function; what it gives before and after, and its inputs then."""
    seen, found = [], []
    for together in (False, True):
        torch.compiler.reset()
        own = [x.clone() for x in given]
        run = torch.compile(step, fullgraph=True, dynamic=False, backend=backend(together, seen))
        found.append((run(*own), own))
    return seen[1], *found


def check(step, *given, **expected):
    found, wanted, after = chained(step, *given)
    assert found == Counter(expected)
    for a, b in zip(wanted, after, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("machine", [0, 1, 2], indirect=True)
@REAL
@pytest.mark.parametrize("inner", [68, 1152])
@pytest.mark.parametrize("kind", ["fp32", "bf16", "int8 T=15", "int8 T=7", "nibbles", "gif int8"])
@torch.no_grad()
def test_products_of_one_row(machine, threads, kind, inner, dtype):
    """Of widths that no block divides; each with a neuron of its own, two of them alike; biases of either dtype."""
    if kind == "nibbles" and inner % 128:
        pytest.skip("such a layer has no nibbles")
    sizes = 130, 3, 49
    x = random(1, 1, inner, dtype=dtype)
    matrices = [random(n, inner, seed=n) for n in sizes]
    biases = [random(n, seed=4, dtype=d) for n, d in zip(sizes, (dtype, torch.float32, dtype), strict=True)]
    scales = [torch.rand(n) * 0.01 for n in sizes]
    thresholds = [torch.tensor([1.1 + i // 2, 30.0]) for i in range(3)]
    multiples = [(1.0 + (torch.arange(inner) % (i // 2 + 2) > 0)) for i in range(3)]
    if kind in ("fp32", "bf16"):
        shift = (torch.arange(inner) % 5 - 2).to(torch.int8)
        weights = [m.to(getattr(torch, {"fp32": "float32", "bf16": "bfloat16"}[kind])) for m in matrices]

        def product(x, i):
            return OPS.oat_linear(x, weights[i], biases[i], thresholds[i], shift, 2**16 - 1, 2**16, 0, False)
    elif kind.startswith("int8"):
        limit = 2 ** int(kind.split("=")[1]) - 1
        weights = [(m * 4).clamp(-127, 127).to(torch.int8) for m in matrices]

        def product(x, i):
            return OPS.oat_linear_int(x, weights[i], scales[i], biases[i], thresholds[i], limit, limit + 1, 0)
    else:
        weights = [(m * 2).clamp(-8, 7).to(torch.int8) for m in matrices]
        zeros = [(torch.arange(n) % 3 + 6).to(torch.int16) for n in sizes]
        small = [(None, None)] * 3
        if kind == "nibbles":
            small = [(pack_nibbles(w + 8), zero) for w, zero in zip(weights, zeros, strict=True)]

        def product(x, i):
            tables = 30 / multiples[i], multiples[i]
            return OPS.gif_linear(x, weights[i], scales[i], *small[i], biases[i], *tables, 15, 2)

    check(lambda x: [product(x, i) for i in range(3)], x, chain=1)


WEIGHTS = [(random(128, 128, seed=seed) * 2).clamp(-127, 127).to(torch.int8) for seed in range(6)]
SCALE, THRESHOLDS = torch.full((128,), 1e-2), {own: torch.tensor([own, 20.0]) for own in (1.5, 2.0)}


def integer(x, threshold=2.0, seed=0):
    """A product with int8 weights."""
    return OPS.oat_linear_int(x, WEIGHTS[seed], SCALE, None, THRESHOLDS[threshold], 127, 128, 0)


@pytest.mark.parametrize("machine", [0, 1, 2], indirect=True)
@REAL
@pytest.mark.parametrize("rounding", range(len(ROUNDINGS)), ids=ROUNDINGS)
@pytest.mark.parametrize(("centred", "two"), [(True, False), (False, True)])
@torch.no_grad()
def test_norms_gates_and_residuals(machine, threads, centred, two, rounding, dtype):
    bank, threshold = (15, True, -32, 32), torch.tensor([2.0, 40.0][: 1 + two])
    weight, bias = random(128, seed=2), random(128, seed=3, dtype=dtype)
    norm = weight, bias if centred else None, 1e-6, centred, 1.0, threshold, 2**12 - 1, 2**12, rounding, *bank

    def step(x):
        x = x + integer(x)
        y = OPS.hg_norm(x, *norm)
        gated = OPS.hg_gated(integer(y), integer(y, 1.5, 1), "silu", *bank, threshold, 2**12 - 1, 2**12, rounding)
        return x + integer(gated), x

    check(step, random(1, 1, 128, dtype=dtype), chain=1)


@REAL
@torch.no_grad()
def test_what_others_see(threads, dtype):
    """Results, and views of them, that other operators need; several at a time; memory that changes."""

    def step(x, to):
        a = integer(x)
        heads = a.view(1, 1, 2, 64).transpose(1, 2)
        b = integer(a, seed=1)
        other = (heads * 2).transpose(1, 2).reshape(1, 1, 128) + b
        c = integer(other, seed=2)
        d = integer(to, seed=3)
        to.copy_(c)
        return other, heads, b, d, integer(to, seed=4) + integer(x, seed=5)

    check(step, random(1, 1, 128, dtype=dtype), random(1, 1, 128, seed=1, dtype=dtype), chain=3)


@torch.no_grad()
def test_dtypes_and_strides(threads):
    """Rows of two dtypes are two operators; a row that does not lie in one piece is copied first."""

    def step(x, y):
        return integer(integer(x)), integer(integer(y)), integer(torch.cat([x, x], -1)[..., ::2])

    x = random(1, 1, 128)
    found, (wanted, _), (result, _) = chained(step, x, x.bfloat16())
    assert found == Counter(chain=3)
    assert all(torch.equal(a, b) for a, b in zip(wanted, result, strict=True))


@torch.no_grad()
def test_what_is_no_row_stays():
    check(integer, random(1, 2, 128), oat_linear_int=1)


@torch.no_grad()
def test_lengths_move_on():
    lengths = [torch.tensor(n) for n in (3, 2**40, 0)]
    OPS.advance(lengths, 1)
    assert [int(n) for n in lengths] == [4, 2**40 + 1, 1]
