"""Law 6: nothing is hidden between two calls."""

from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import pytest
import torch

import families
import spikeform
from spikeform.spikes.trace import observe


@pytest.mark.parametrize("family", families.FAMILIES)
def test_calls_do_not_remember(family, spiking, logits):
    model = spiking(family)
    names = dict(model.named_buffers())
    before = {name: buffer.clone() for name, buffer in names.items()}
    first = logits(model)
    assert torch.equal(logits(model), first)
    logits(model, families.tokens(rows=1, length=23, seed=8))
    with spikeform.executor("temporal"), observe(lambda event: None):
        logits(model)
    assert torch.equal(logits(model), first)
    after = dict(model.named_buffers())
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_threads_do_not_meet(spiking, logits):
    """Executor and observer belong to the thread that set them."""
    model, texts = spiking("llama"), [families.tokens(rows=1, length=12, seed=s) for s in range(6)]
    wanted = []
    for index, ids in enumerate(texts):  # what is observed is not fused, and may differ in a last bit
        with observe(lambda told: None) if index % 2 else nullcontext():
            wanted.append(logits(model, ids))

    def work(index):
        seen = []
        if index % 2:
            with observe(seen.append):
                return logits(model, texts[index]), len(seen)
        return logits(model, texts[index]), len(seen)

    with ThreadPoolExecutor(3) as pool:
        for index, (found, seen) in enumerate(pool.map(work, range(6))):
            assert torch.equal(found, wanted[index])
            assert bool(seen) == bool(index % 2)


def test_an_executor_ends_with_its_block(spiking, logits):
    model = spiking("llama")
    before = logits(model)
    with pytest.raises(RuntimeError, match="inside"), spikeform.executor("temporal"):
        raise RuntimeError("inside")
    assert torch.equal(logits(model), before)
    with pytest.raises(ValueError, match="no executor named 'fast'"), spikeform.executor("fast"):
        pass
