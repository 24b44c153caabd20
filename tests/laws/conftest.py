"""Each family is built and converted once; a test that changes a model takes a copy."""

from __future__ import annotations

import copy
from functools import cache

import pytest
import torch

import families
import spikeform
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
def logits():
    return logits_of
