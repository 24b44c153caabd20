"""Hand-made networks whose counts can be checked on paper."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from spikeform.neurons import MT, OAT
from spikeform.spikes import Coding, Radix2, SpikeTrain
from spikeform.synapses import hadamard, linear, matmul


class ToyLinear(nn.Module):
    """One spiking linear layer, one dense one, one gain."""

    def __init__(self, coding: Coding) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.embed = nn.Embedding(50, 8)
        self.embed.weight = nn.Parameter(torch.randn(50, 8, generator=generator))
        self.neuron = OAT(coding, (2.0, 8.0), site="layer")
        self.weight_NK = torch.randn(6, 8, generator=generator)
        self.head = nn.Linear(6, 5)
        self.norm = nn.LayerNorm(5)

    def forward(self, ids: Tensor) -> Tensor:
        hidden = linear(self.neuron(self.embed(ids)), self.weight_NK, site="layer")
        return self.norm(self.head(hidden))


class ToyAttention(nn.Module):
    """Causal scores, a softmax whose hidden entries are silent, context; one head."""

    def __init__(self, coding: Coding) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.embed = nn.Embedding(50, 3)
        self.embed.weight = nn.Parameter(torch.randn(50, 3, generator=generator))
        self.neuron = MT(coding, (4.0,), site="a.query")
        self.probability = MT(coding, (1.0,), site="a.probability")

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        length = x.shape[1]
        visible = torch.ones(length, length).tril().bool()
        q, k, v = (self.neuron(x) for _ in range(3))
        scores = matmul(q, k, transpose_b=True, mask=visible, site="a.scores")
        p = self.probability(torch.softmax(scores.masked_fill(~visible, float("-inf")), -1))
        ones = SpikeTrain(torch.ones(p.shape[0], length, 1, dtype=torch.int64), torch.ones(1), Radix2(4))
        scaled = hadamard(p, ones, site="a.softmax")
        return matmul(self.probability(scaled), v, site="a.context")


@pytest.fixture
def toy_linear():
    return ToyLinear


@pytest.fixture
def toy_attention():
    return ToyAttention
