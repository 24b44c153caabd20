"""Products, norms and caches of one decoded row that a compiled graph puts together: what they were apart.

Without a CUDA device the kernels run on Triton's interpreter, in a process of their own; the pass then takes graphs of
the CPU, whose other operators are the compiled library's.
"""

import copy
from collections import Counter

import pytest
import torch
from torch._inductor import config as inductor
from torch._inductor.fx_passes.post_grad import remove_noop_ops
from transformers import OPTConfig, OPTForCausalLM, StaticCache
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

import spikeform
from decoding import backend, converted, decoded
from kernels import DEVICE, INTERPRETED, fused, let_bounds_be_scalars, needs_triton, not_interpreted, on_the_interpreter
from spikeform.layers import joined, joined_cache, nodes
from spikeform.neurons.oat import ROUNDINGS
from spikeform.synapses import dispatch
from spikeform.synapses.fused import pack_nibbles


@pytest.fixture(autouse=True)
def loops(monkeypatch):
    if INTERPRETED:
        let_bounds_be_scalars(monkeypatch)
        monkeypatch.setattr(nodes, "DEVICES", {"cpu"})
        monkeypatch.setattr(nodes, "CHAINED", set())


def random(*shape, seed=0, dtype=torch.float32):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    x.view(-1)[::11] *= 30
    return x.to(DEVICE, dtype)


def test_it_is_an_option_of_the_compiler():
    """Two configs of one model are equal, so that nothing is compiled twice; those of two models are not."""
    model, other = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)
    together, again = (spikeform.compile_config(model).to_dict() for _ in range(2))
    assert isinstance(together["options"]["post_grad_custom_pre_pass"], joined.Joined)
    assert together == again == copy.deepcopy(again) != spikeform.compile_config(model, together=False).to_dict()
    assert together != spikeform.compile_config(other).to_dict()
    assert inductor.post_grad_custom_pre_pass is None
    del together["options"]["guard_filter_fn"]  # which torch.compile takes for itself
    wrapper = torch._TorchCompileInductorWrapper(None, together["options"], False)
    assert isinstance(wrapper.config["post_grad_custom_pre_pass"], joined.Joined)


@fused
@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        ("real", torch.float32),
        ("real", torch.bfloat16),
        ("int8 T=15", torch.bfloat16),
        ("int8 T=7", torch.float32),
        ("nibbles", torch.bfloat16),
        ("gif int8", torch.float32),
    ],
)
def test_one_launch_is_several(kind, dtype):
    from spikeform.synapses.triton import products
    from spikeform.synapses.triton.row import row_gif, row_oat
    from spikeform.synapses.triton.stream import row_product

    inner, sizes = 1152, (17, 3, 8)  # of which none fills a program
    x = random(1, 1, inner, dtype=dtype)
    thresholds = [torch.tensor([1.1 + i, 30.0 + i], device=DEVICE) for i in range(3)]
    scales = [torch.rand(n, device=DEVICE) * 0.01 for n in sizes]
    biases = [random(n, seed=4, dtype=dtype) for n in sizes]
    matrices = [random(n, inner, seed=n) for n in sizes]
    zeros = ()
    if kind == "real":
        weights = [m.to(dtype) for m in matrices]
        shifts = [(torch.arange(inner, device=DEVICE) % 5 - i).to(torch.int8) for i in range(3)]
        codes = row_oat(x, thresholds, shifts, 2**16 - 1, 2**16, 0, 4 // dtype.itemsize)
        sums, scales = (1, 1), ()
        wanted = [
            products.oat_linear(x, w, b, t, s, 2**16 - 1, 2**16, 0, False)
            for w, b, t, s in zip(weights, biases, thresholds, shifts, strict=True)
        ]
    elif kind.startswith("int8"):
        limit = 2 ** int(kind.split("=")[1]) - 1
        weights = [(m * 4).clamp(-127, 127).to(torch.int8) for m in matrices]
        codes = row_oat(x, thresholds, (), limit, limit + 1, 0, 4)
        sums = 2, 1 if limit < 128 else 2
        wanted = [
            products.oat_linear_int(x, w, s, b, t, limit, limit + 1, 0)
            for w, s, b, t in zip(weights, scales, biases, thresholds, strict=True)
        ]
    else:
        packed = kind == "nibbles"
        multiples = [(1.0 + (torch.arange(inner) % (i + 2) > 0)).to(DEVICE) for i in range(3)]
        integers = [(m * 2).clamp(-8, 7).to(torch.int8) for m in matrices]
        weights, small = integers, [None] * 3
        if packed:
            zeros = [(torch.arange(n) % 3 + 6).to(DEVICE, torch.int16) for n in sizes]
            weights = small = [pack_nibbles(w + 8) for w in integers]
        codes = row_gif(x, multiples, 15, 2, packed)
        sums = 1, 1
        wanted = [
            products.gif_linear(x, w, s, p, z, b, m, m, 15, 2)
            for w, s, p, z, b, m in zip(integers, scales, small, zeros or [None] * 3, biases, multiples, strict=True)
        ]
    found = row_product(codes, weights, scales, zeros, biases, None, dtype, [1, 1], *sums)
    assert [y.shape for y in found] == [(1, 1, n) for n in sizes]
    if kind == "real":  # the cut, and with it the order of sums, goes by the size of them all
        assert all(bool(((a - b).abs() <= a.abs() * 2**-6 + 1e-3).all()) for a, b in zip(wanted, found, strict=True))
    else:
        assert all(torch.equal(a, b) for a, b in zip(wanted, found, strict=True))
    residual = random(1, 1, sizes[0], seed=5, dtype=dtype)
    alone = [x[:1] for x in (codes, weights, scales, zeros, biases)]
    (y,) = row_product(*alone, residual, dtype, [1, 1], *sums)
    within = 2**-6 if INTERPRETED and dtype == torch.bfloat16 else 1e-5  # the interpreter cuts what bf16 does not hold
    expected = (wanted[0] + residual).float()
    assert bool(((y.float() - expected).abs() <= (residual.abs() + wanted[0].abs()) * within + 1e-3).all())


@fused
@pytest.mark.parametrize("parts", [1, 4], ids=["values", "bytes"])
@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize(("width", "centred"), [(1100, True), (520, False)])
def test_codes_of_what_is_made(parts, rounding, width, centred):
    from spikeform.neurons.triton.hg import hg_gated
    from spikeform.neurons.triton.norm import hg_norm
    from spikeform.synapses.triton.produced import row_gated, row_norm
    from spikeform.synapses.triton.row import row_oat

    x, other = random(1, 1, width), random(1, 1, width, seed=1)
    weight, bias = random(width, seed=2), random(width, seed=3)
    threshold = torch.tensor([2.0, 40.0], device=DEVICE)
    thresholds = [torch.tensor([1.3 + i, 33.0], device=DEVICE) for i in range(2)]
    index = ROUNDINGS.index(rounding)
    population, bank = (thresholds, (), 2**15 - 1, 2**15, index, parts), (15, True, -32, 32)
    norm = weight, bias if centred else None, 1e-6, centred, 1.0, threshold, 2**12 - 1, 2**12, index, *bank
    apart = row_oat(hg_norm(x, *norm), *population)
    whole = row_norm(x, *norm, *population)
    differ = apart != whole  # a norm whose squares are summed in another order
    assert differ.float().mean() < 0.01
    assert whole.shape == apart.shape
    gate = "silu", *bank, threshold, 2**12 - 1, 2**12, index
    given = slice(
        None, population[-1] * 0 + (width if parts == 1 else 2 * 2 * (width // 4) + 2)
    )  # not what pads a line
    apart = row_oat(hg_gated(x, other, *gate), *population)
    assert torch.equal(apart[:, given], row_gated(x, other, *gate, *population)[:, given])


@fused
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("size", [40, 64])
@pytest.mark.parametrize("heads", [0, 3, 6], ids=["as it is", "turned", "turned, groups"])
@torch.no_grad()
def test_a_token_is_appended(heads, size, dtype):
    from spikeform.layers.triton.append import gif_append, oat_append
    from spikeform.neurons.triton.gif import gif_pack
    from spikeform.neurons.triton.oat import oat_pack

    key = random(2, 1, 3, size, dtype=dtype).transpose(1, 2)  # as a projection leaves it
    value = random(2, 3, 1, size, seed=1, dtype=dtype)
    place = torch.tensor([4], device=DEVICE)

    query = random(2, 1, heads, size, seed=2, dtype=dtype).transpose(1, 2)
    angle = torch.arange(size // 2).repeat(2) * 0.1 + 0.3
    turn = [f(angle).to(DEVICE, dtype).view(1, 1, size) for f in (torch.cos, torch.sin)]
    turned, key_turned = apply_rotary_pos_emb(query, key, *turn) if heads else (None, key)

    def check(append, packed, *how):
        caches = [x.new_full((2, 3, 7, x.shape[3]), 3) for x in packed]
        wanted = [cache.clone().index_copy_(2, place, x) for cache, x in zip(caches, packed, strict=True)]
        given = (query, *(x[None] for x in turn)) if heads else ()
        found = append(*caches, place[0] if heads else place, key, value, *how, *given)
        assert all(torch.equal(a, b) for a, b in zip(wanted, caches, strict=True))
        assert found is turned or torch.equal(found, turned)

    for limit, outlier in ((2**12 - 1, True), (2**16 - 1, False)):
        thresholds = [torch.tensor([t, 31.0][: 1 + outlier], device=DEVICE) for t in (1.1, 2.3)]
        how = limit, limit + 1, 0
        packed = [oat_pack(x, t, *how) for x, t in zip((key_turned, value), thresholds, strict=True)]
        check(oat_append, packed, *thresholds, *how)
    multiples = [(1.0 + (torch.arange(3 * size) % n > 0)).view(3, 1, size).to(DEVICE) for n in (2, 3)]
    packed = [gif_pack(x, m, m, 15, 2) for x, m in zip((key_turned, value), multiples, strict=True)]
    check(gif_append, packed, *multiples, 15, 2, 2)


def test_what_is_no_turn_is_left():
    """Sums of products with numbers, and a place that a number says, are no rotary embedding, and no length."""
    aten, graph = torch.ops.aten, torch.fx.Graph()
    x = graph.placeholder("x")
    halves = [graph.call_function(aten.mul.Tensor, (x, factor)) for factor in (2.0, 3.0)]
    assert joined_cache._turn(graph.call_function(aten.add.Tensor, tuple(halves))) is None
    assert joined_cache._turn(graph.call_function(aten.add.Tensor, (halves[0], 1))) is None
    count = graph.call_function(torch.ops.prims.iota.default, (1,), {"start": 0, "step": 1})
    place = graph.call_function(aten.add.Tensor, (count, 0))
    assert joined_cache._spot(place) is place


@fused
@torch.no_grad()
def test_lengths_move_on():
    from spikeform.layers.triton.append import advance

    lengths = [torch.tensor(n, device=DEVICE) for n in (3, 2**40, 0)]
    advance(lengths, 1)
    assert [int(n) for n in lengths] == [4, 2**40 + 1, 1]


@fused
@torch.no_grad()
def test_a_residual_that_a_norm_sees_flat():
    """OPT flattens its tokens between the sum and the norm: the product still adds."""
    if not dispatch.kernels(DEVICE)[0]:
        pytest.skip(dispatch.kernels(DEVICE)[1])
    sizes = {"vocab_size": 64, "hidden_size": 128, "word_embed_proj_dim": 128, "num_attention_heads": 2}
    config = OPTConfig(**sizes, num_hidden_layers=2, ffn_dim=192, max_position_embeddings=32)
    model = OPTForCausalLM(config).eval().to(DEVICE)
    ids = torch.randint(64, (2, 24), generator=torch.Generator().manual_seed(1))
    model = spikeform.convert(model, spikeform.LAS(steps=8), ids)
    seen = []

    def adds(graph):
        return [n.args[5] is not None for n in graph.nodes if n.target is torch.ops.spikeform.row_product.default]

    # What dropout leaves is removed first, as Inductor does it.
    compiler = backend(True, seen, adds, remove_noop_ops)
    step = torch.compile(model.forward, fullgraph=True, dynamic=False, backend=compiler)
    pasts = [StaticCache(config=model.config, max_cache_len=12) for _ in range(2)]
    for past in pasts:
        model(input_ids=ids[:1, :5].to(DEVICE), past_key_values=past)
    place, seen_by = torch.tensor([[5]], device=DEVICE), torch.ones(1, 12, dtype=torch.int64, device=DEVICE)
    wanted, found = (
        run(ids[:1, 5:6].to(DEVICE), seen_by, position_ids=place, past_key_values=past).logits
        for run, past in zip((model, step), pasts, strict=True)
    )
    assert seen == [[False, True, False, True] * 2]  # q, k, v; o; up; down
    assert torch.allclose(wanted, found, atol=1e-3, rtol=1e-3)
    seen.clear()  # without a place the model works it out: how many rows there are is known when it runs
    try:
        found = step(input_ids=ids[:1, 6:7].to(DEVICE), past_key_values=pasts[1]).logits
    except torch._dynamo.exc.UserError:
        pytest.skip("this version of transformers compiles no model that is given no place")
    wanted = model(input_ids=ids[:1, 6:7].to(DEVICE), position_ids=place + 1, past_key_values=pasts[0]).logits
    assert seen == [[]]
    assert torch.allclose(wanted, found, atol=1e-3, rtol=1e-3)


@fused
@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("LAS", {"steps": 15, "weight_bits": 8}),
        ("LAS", {"steps": 8}),
        ("SpikeLLM", {"pipeline": "rtn", "bits": 4, "weight_bits": 4, "steps": 2, "salient": 0.1}),
    ],
)
@torch.no_grad()
def test_a_compiled_step(method, settings):
    if not dispatch.kernels(DEVICE)[0]:
        pytest.skip(dispatch.kernels(DEVICE)[1])
    model = converted(method, DEVICE, **settings)
    ids = torch.randint(64, (1, 7), generator=torch.Generator().manual_seed(2)).to(DEVICE)
    (apart, *before), (whole, *after) = (decoded(model, ids, together) for together in (False, True))
    assert apart["row_product"] == 0
    assert whole["row_product"] == 4  # q, k, v; o; gate, up; down
    las = {"row_norm": 2, "row_gated": 1, "row_appended": 1, "hg_norm": 1}
    gif = {"row_norm_gif": 2, "row_gated_gif": 1, "row_gif": 1, "gif_appended": 1}
    assert whole == Counter(row_product=4, advance=1, **(las if method == "LAS" else gif))
    assert torch.allclose(before[0], after[0], atol=1e-3, rtol=1e-3)
    assert (before[1] != after[1]).float().mean() < 0.01


@fused
@pytest.mark.parametrize("steps", [1, 2])
@torch.no_grad()
def test_a_compiled_prompt(steps):
    """Many rows, of GIF neurons: as they were apart, but for codes that a last bit of a norm decides."""
    if not dispatch.kernels(DEVICE)[0]:
        pytest.skip(dispatch.kernels(DEVICE)[1])
    salient = {"salient": 0.1} if steps > 1 else {}
    model = converted("SpikeLLM", DEVICE, pipeline="rtn", bits=4, weight_bits=4, steps=steps, **salient)
    ids = torch.randint(64, (1, 70), generator=torch.Generator().manual_seed(2)).to(DEVICE)
    seen, logits, caches = [], [], []
    for together in (False, True):
        torch.compiler.reset()
        run = torch.compile(model.forward, fullgraph=True, dynamic=False, backend=backend(together, seen))
        found = run(input_ids=ids, use_cache=True)
        logits.append(found.logits)
        caches.append([found.past_key_values.layers[0].keys, found.past_key_values.layers[0].values])
    apart, whole = seen
    assert apart["gif_linear"] == 7
    many = {"row_norm_gif": 2, "row_gated_gif": 1, "row_gif": 1, "row_product": 4, "gif_prompt": 1, "mask_tiles": 1}
    assert whole == many
    for before, after in zip(*caches, strict=True):
        assert after.shape == before.shape
        assert (after != before).float().mean() < 0.01
    rows = (logits[0] - logits[1]).abs().amax(-1)[0]
    assert (rows < 1e-4).float().mean() > 0.9


@needs_triton
@not_interpreted
def test_on_the_interpreter():
    on_the_interpreter(__file__)
