import shutil

import pytest
import standin
import torch

import spikeform.checkpoint as checkpoint


@pytest.fixture(scope="session")
def model():
    torch.set_num_threads(1)
    return standin.converted()


@pytest.fixture(scope="session")
def _pristine(model, tmp_path_factory):
    return checkpoint.save(model, tmp_path_factory.mktemp("pristine") / "model", command="spikeform convert")


@pytest.fixture
def saved(_pristine, tmp_path):
    """A good checkpoint that the test may damage."""
    return shutil.copytree(_pristine, tmp_path / "model")


@pytest.fixture
def sharded(model, tmp_path):
    return checkpoint.save(model, tmp_path / "sharded", max_shard_size="100KB")
