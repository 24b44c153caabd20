"""The streaming network against one written down here: T dense passes, one after the other, with neurons that remember.

No step is folded into the batch, nothing is shared between steps, every pass has a head of its own, and logits are
averaged. The models that the project makes must say the same, in fp64, where no sum flips a spike.
"""

import copy

import pytest
import torch
from torch import nn

import families
import spikeform
from families import close
from spikeform.layers import SpikingLinear
from spikeform.methods.fas import convert
from spikeform.neurons import StreamingNeuron

OPTIONS = {
    "plain": {},
    "product": {"gated": "product", "per_channel": True, "granularity": "channel", "steps": 3},
    "everywhere": {"sites": "all"},
    "position": {"granularity": "position", "positions": 14},
}
IDS = families.tokens(rows=3, length=12)


class Remembering(nn.Module):
    """Integrate-and-fire that keeps its potential from one call to the next."""

    def __init__(self, found: StreamingNeuron, rows: int) -> None:
        super().__init__()
        self.theta, self.beta = found.threshold.detach() * found.scale.detach(), found.initial.detach()
        self.signed, self.rows, self.v = found.signed, rows, None

    def forward(self, x):
        shape = x.shape
        if x.ndim == 2 and shape[0] != self.rows:
            x = x.view(self.rows, -1, shape[-1])
        theta, beta = (p[: x.shape[-2]] if p.ndim == 2 else p for p in (self.theta, self.beta))
        if self.v is None:
            self.v = torch.zeros_like(x) if self.signed else (beta * theta).expand(x.shape)
        self.v = self.v + x
        if self.signed:
            spikes = (self.v >= (1 - beta) * theta).double() - (self.v <= -(1 - beta) * theta).double()
        else:
            spikes = (self.v >= theta).double()
        self.v = self.v - theta * spikes
        return (theta * spikes).view(shape)


def one_step_model(dense, model, rows):
    """The dense model with remembering neurons where ``model`` has its own."""
    dense = copy.deepcopy(dense).double()
    for name, module in model.named_modules():
        if isinstance(module, SpikingLinear) and module.neuron is not None:
            remembering = Remembering(module.neuron, rows)
            linear = dense.get_submodule(name)
            linear.register_forward_pre_hook(lambda m, args, r=remembering: (r(args[0]),))
        elif isinstance(module, nn.Identity):
            dense.set_submodule(name, nn.Identity())
        elif type(module).__name__ == "SpikingActivation":
            dense.set_submodule(name, Remembering(module.neuron, rows))
    return dense


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("family", families.FAMILIES)
def test_all_steps_at_once_is_one_after_the_other(family, options, dense, streaming, logits):
    model = streaming(family, **options)
    each = one_step_model(dense(family), model, len(IDS))
    steps = [logits(each, IDS) for _ in range(options.get("steps", 4))]
    assert not torch.equal(steps[0], steps[1])  # the neurons do remember
    close(torch.stack(steps).mean(0), logits(model, IDS))


@pytest.mark.parametrize("family", ["gpt2", "llama", "bert"])
def test_rows_and_steps_and_positions_alike(family, dense, streaming, logits):
    """As many sequences as steps as positions: no axis is taken for another."""
    for rows, length in ((4, 4), (1, 4), (4, 1), (1, 1), (2, 8), (16, 4)):
        ids, model = families.tokens(rows, length), streaming(family)
        each = one_step_model(dense(family), model, rows)
        more = {"position_ids": torch.arange(length).expand(rows, -1).clone(), "attention_mask": torch.ones_like(ids)}
        wanted = torch.stack([logits(each, ids) for _ in range(4)]).mean(0)
        close(wanted, logits(model, ids))
        close(wanted, logits(model, ids, **more))


@pytest.mark.parametrize(
    ("family", "options"),
    [(family, {}) for family in families.FAMILIES] + [(f, {"operators": 8}) for f in ("gpt2", "llama", "bert")],
    ids=str,
)
def test_computing_once_what_has_no_time_yet_changes_nothing(family, options, dense, streaming, logits, monkeypatch):
    shared = logits(streaming(family, **options), IDS)
    monkeypatch.setattr(convert, "_before_the_spikes", lambda *args: [])
    model = copy.deepcopy(dense(family)).double()
    config = spikeform.FAS(steps=4, levels=4, **options)
    spikeform.convert(model, config, families.tokens(rows=8, length=24, seed=5))
    model.load_state_dict(streaming(family, **options).state_dict())
    close(shared, logits(model, IDS))


@pytest.mark.parametrize("family", families.FAMILIES)
def test_without_steps_it_is_the_network_of_qcfs_activations(family, dense, streaming, logits):
    def qcfs(module, x):
        theta = module.threshold.detach().double()
        low = -1 if module.signed else 0
        return theta / module.levels * torch.floor(module.levels * (x / theta).clamp(low, 1) + 0.5)

    model = copy.deepcopy(streaming(family, sites="all"))
    spikeform.set_steps(model, 0)
    plain = copy.deepcopy(dense(family)).double()
    for name, module in model.named_modules():
        if isinstance(module, SpikingLinear) and module.neuron is not None:
            linear = plain.get_submodule(name)
            linear.register_forward_pre_hook(lambda m, args, n=module.neuron: (qcfs(n, args[0]),))
        elif isinstance(module, nn.Identity):
            plain.set_submodule(name, nn.Identity())
        elif type(module).__name__ == "SpikingActivation":
            plain.set_submodule(name, nn.Identity())
            plain.get_submodule(name).register_forward_hook(lambda m, a, out, n=module.neuron: qcfs(n, out))
    close(logits(plain, IDS), logits(model, IDS))
