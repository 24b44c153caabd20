"""What tests of compiled decoding share: a small converted model, and its steps as the pass leaves them."""

from collections import Counter

import torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.lowering import lowerings
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

import spikeform
from spikeform.layers import joined


def converted(method, device, dtype=torch.float32, heads=(2, 1), layers=1, **settings):
    """A LLaMA of random weights, converted."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 128, "num_attention_heads": heads[0], "num_key_value_heads": heads[1]}
    config = LlamaConfig(**sizes, num_hidden_layers=layers, intermediate_size=192, max_position_embeddings=96)
    model = LlamaForCausalLM(config).eval().to(device, dtype)
    ids = torch.randint(64, (2, 24), generator=torch.Generator().manual_seed(1))
    return spikeform.convert(model, getattr(spikeform, method)(**settings), ids)


def operators(graph):
    """How many of each operator of this package a graph has."""
    return Counter(n.target.name().partition("::")[2] for n in graph.nodes if str(n.target).startswith("spikeform"))


def backend(together, seen, count=operators, before=lambda graph: None):
    """For ``torch.compile``: runs graphs as Inductor gets them, put together or not; ``seen`` gets their operators.

    ``before``: changes a graph first.
    """

    def compiled(module, _inputs):
        before(module.graph)
        if together:
            joined.Joined(0)(module.graph)
            module.graph.lint()
            module.recompile()
            assert all(n.target in lowerings for n in module.graph.nodes if str(n.target).startswith("spikeform"))
        seen.append(count(module.graph))
        return make_boxed_func(module.forward)

    as_inductor = {"decompositions": select_decomp_table(), "keep_inference_input_mutations": True}
    return aot_autograd(fw_compiler=compiled, **as_inductor)


def decoded(model, ids, together):
    """Operators, logits and keys of the first layer's cache after two tokens of a compiled step behind five."""
    seen = []
    past = StaticCache(config=model.config, max_cache_len=12)
    model(input_ids=ids[:, :5], past_key_values=past)
    torch.compiler.reset()
    step = torch.compile(model.forward, fullgraph=True, dynamic=False, backend=backend(together, seen))
    logits = [step(input_ids=ids[:, t : t + 1], past_key_values=past).logits for t in (5, 6)]
    (counted,) = seen  # compiled once, for both tokens
    return counted, torch.cat(logits), past.layers[0].keys.clone()
