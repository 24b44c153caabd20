import pytest
import torch

CONTEXT = 64


@pytest.fixture(scope="session")
def data(data_root):
    """The evaluation data folder, or a skip."""
    return data_root


@pytest.fixture(scope="session")
def model(tiny_llama):
    return tiny_llama(CONTEXT)


@pytest.fixture(scope="session")
def wide_model(tiny_llama):
    """One whose context holds any question of the zero-shot tasks, a token per byte."""
    return tiny_llama(context=1024)


@pytest.fixture(scope="session")
def ids():
    return torch.randint(0, 257, (331,), generator=torch.Generator().manual_seed(1))
