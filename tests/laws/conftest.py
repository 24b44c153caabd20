"""Each family is built and converted once; a test that changes a model takes a copy."""

from __future__ import annotations

import copy
from functools import cache

import pytest
import torch

import families
import spikeform
from spikeform.neurons import StreamingNeuron
from spikeform.pretrained.twin import outlier_twin


@cache
def dense_of(family: str):
    return families.build(family)


@cache
def twin_of(family: str):
    """The outlier twin, its channels 16 to 256 times larger."""
    return outlier_twin(dense_of(family), scales=(16.0, 64.0, 256.0))


@cache
def spiking_of(family: str, twin: bool = False, **options):
    """A converted copy, calibrated on a few random sequences."""
    model = copy.deepcopy(twin_of(family) if twin else dense_of(family))
    calibration = families.tokens(rows=16, length=24, seed=5)
    return spikeform.convert(model, spikeform.LAS(**{"steps": 16, **options}), calibration)


@cache
def saliency_of(family: str, twin: bool = False, **options):
    """A copy converted with SpikeLLM on four short sequences; with options, untrained unless they say epochs."""
    model = copy.deepcopy(twin_of(family) if twin else dense_of(family))
    config = spikeform.SpikeLLM(**{"epochs": 0 if options else 1, **options})
    return spikeform.convert(model, config, families.tokens(rows=4, length=24, seed=5))


@cache
def streaming_of(family: str, wide: bool = True, **options):
    """A copy converted with FAS, in fp64 unless told otherwise; what calibration finds is drawn at random."""
    model = copy.deepcopy(dense_of(family))
    model = model.double() if wide else model
    options = {"steps": 4, "levels": 4, **options}
    spikeform.convert(model, spikeform.FAS(**options), families.tokens(rows=8, length=24, seed=5))
    return scattered(model)


@torch.no_grad()
def scattered(model, seed: int = 0):
    """``model``, its IF thresholds and initial potentials as uneven as calibration may leave them."""
    generator = torch.Generator().manual_seed(seed)
    for neuron in model.modules():
        if isinstance(neuron, StreamingNeuron):
            neuron.scale.copy_(0.7 + 0.6 * torch.rand(neuron.scale.shape, generator=generator))
            neuron.initial.copy_(0.2 + 0.6 * torch.rand(neuron.initial.shape, generator=generator))
    return model


@torch.no_grad()
def logits_of(model, ids=None, **more):
    return model(input_ids=families.tokens() if ids is None else ids, **more).logits


@pytest.fixture(scope="session")
def dense():
    return dense_of


@pytest.fixture(scope="session")
def twin():
    return twin_of


@pytest.fixture(scope="session")
def spiking():
    return spiking_of


@pytest.fixture(scope="session")
def saliency():
    return saliency_of


@pytest.fixture(scope="session")
def streaming():
    return streaming_of


@pytest.fixture(scope="session")
def logits():
    return logits_of
