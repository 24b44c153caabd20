"""Decoding with the state cache as one compiled graph, by a backend that computes as the graph says."""

import pytest
import torch
from torch._dynamo.utils import counters
from transformers import CompileConfig, DynamicCache, StaticCache

import families
import spikeform
from spikeform.layers.self_attention import SpikingSelfAttention

IDS = families.tokens(rows=2, length=14)


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def model(request):
    config = spikeform.NeuTransformer(spikes="signed", windows=(2, 5, 0), tau=0.0, reset="soft")
    found = spikeform.convert(families.build(request.param), config, families.tokens(rows=8, length=24, seed=5))
    return found.requires_grad_(False)


@pytest.fixture
def compiled(model):
    """A step that is compiled once, or is an error."""
    torch._dynamo.reset()
    counters.clear()
    with torch._dynamo.config.patch(error_on_recompile=True), torch.no_grad():
        yield torch.compile(model.forward, fullgraph=True, dynamic=False, backend="aot_eager")
    torch._dynamo.reset()


def places(cache):
    return [x.data_ptr() for layer in cache.layers for x in (layer.keys, layer.number, layer.recent)]


@pytest.mark.parametrize("chunk", [None, 4], ids=["operator", "operations"])
@pytest.mark.parametrize("static", [True, False], ids=["static", "dynamic"])
def test_all_tokens_are_one_graph(model, compiled, static, chunk):
    for layer in (m for m in model.modules() if isinstance(m, SpikingSelfAttention)):
        layer.chunk = chunk
    cache = StaticCache(config=model.config, max_cache_len=20) if static else DynamicCache()
    for ids in (IDS, IDS.flip(0)):  # the second text after a reset
        whole, past = model(input_ids=ids).logits, DynamicCache()
        cache.reset()
        first = model(input_ids=ids[:, :6], past_key_values=cache).logits
        assert torch.equal(first, model(input_ids=ids[:, :6], past_key_values=past).logits)
        assert cache.is_compileable
        where = places(cache)
        for t in range(6, 14):
            assert int(cache.get_seq_length()) == t
            found = compiled(input_ids=ids[:, t : t + 1], past_key_values=cache).logits
            assert torch.equal(found, model(input_ids=ids[:, t : t + 1], past_key_values=past).logits)
            assert families.difference(found, whole[:, t : t + 1]) < 1e-5
        if ids is IDS:
            before = where
        assert places(cache) == where == before
    assert counters["stats"]["unique_graphs"] == 1
    for layer in (m for m in model.modules() if isinstance(m, SpikingSelfAttention)):
        layer.chunk = None


@torch.no_grad()
def test_generate_compiles_it(model):
    """As transformers does on a GPU by itself; padding on the left is no later graph."""
    config = CompileConfig(fullgraph=True, backend="eager", mode=None)
    config._compile_all_devices = True
    mask = torch.ones(2, 8, dtype=torch.long)
    mask[0, :3] = 0
    how = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    wanted = model.generate(IDS[:, :8], **how)
    torch._dynamo.reset()
    counters.clear()
    for _ in range(2):
        found = model.generate(IDS[:, :8], cache_implementation="static", compile_config=config, **how)
        assert torch.equal(wanted, found)
        assert counters["stats"]["unique_graphs"] == 1
    alone = model.generate(IDS[:1, 3:8], max_new_tokens=6, do_sample=False, eos_token_id=None)
    assert torch.equal(found[:1, 8:], alone[:, 5:])
    torch._dynamo.reset()
