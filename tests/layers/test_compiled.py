"""A compiled model that is not looked at before each call: the same tokens, and far fewer guards."""

from typing import Any

import torch
from torch._dynamo.eval_frame import _debug_get_cache_entry_list
from transformers import CompileConfig, StaticCache

import families
import spikeform

COARSE = spikeform.LAS(steps=3)


def converted():
    return spikeform.convert(families.build("llama"), spikeform.LAS(steps=8), families.tokens(rows=2, length=16))


def guards(model, config):
    """Compiled by a backend that computes as the graph says: logits of a step, and lines of what is looked at."""
    torch._dynamo.reset()
    ids, cache = families.tokens(rows=1, length=6), StaticCache(config=model.config, max_cache_len=8)
    model(input_ids=ids[:, :5], past_key_values=cache)
    filters = {k: v for k, v in (config.options or {}).items() if k == "guard_filter_fn"}
    step = torch.compile(model.forward, fullgraph=config.fullgraph, dynamic=False, backend="eager", options=filters)
    logits = step(input_ids=ids[:, 5:], past_key_values=cache).logits
    (entry,) = _debug_get_cache_entry_list(model.forward)
    return logits, str(entry.guard_manager).count("\n")


@torch.no_grad()
def test_less_is_looked_at_and_the_step_is_the_same():
    model = converted()
    plain, all_of_them = guards(model, CompileConfig(fullgraph=True))
    found, few = guards(model, spikeform.compile_config(model))
    assert torch.equal(plain, found)
    assert few < all_of_them / 3


@torch.no_grad()
def test_generate_takes_it():
    model: Any = converted()
    ids = families.tokens(rows=1, length=6)
    config = spikeform.compile_config(model)
    assert config.to_dict()["fullgraph"] is True
    assert config.mode is None
    wanted = model.generate(ids, max_new_tokens=6, do_sample=False, cache_implementation="static", disable_compile=True)
    config._compile_all_devices, config.backend = True, "eager"
    config.options = {"guard_filter_fn": config.options["guard_filter_fn"]}
    torch._dynamo.reset()
    counter = torch._dynamo.utils.counters
    counter.clear()
    found = model.generate(ids, max_new_tokens=6, do_sample=False, cache_implementation="static", compile_config=config)
    assert torch.equal(wanted, found)
    assert counter["stats"]["unique_graphs"] == 1


@torch.no_grad()
def test_models_of_one_process_are_kept_apart():
    """The dense model and two spiking ones, each with its cache, in turns: no guard tells them apart."""
    models: list[Any] = [families.build("llama"), converted(), spikeform.convert(families.build("llama"), COARSE)]
    ids = families.tokens(rows=1, length=8)
    torch._dynamo.reset()
    caches = [StaticCache(config=model.config, max_cache_len=8) for model in models]
    steps = [torch.compile(model.forward, **spikeform.compile_config(model).to_dict()) for model in models]
    for model, cache in zip(models, caches, strict=True):
        model(input_ids=ids[:, :5], past_key_values=cache)
    for at in (5, 6, 7):
        for model, cache, step in zip(models, caches, steps, strict=True):
            found = step(input_ids=ids[:, at : at + 1], past_key_values=cache).logits
            wanted = model(input_ids=ids[:, : at + 1]).logits[:, -1:]
            assert torch.allclose(found, wanted, atol=2e-2 if model is models[2] else 1e-3), (at, model.config)
