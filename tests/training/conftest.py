import pytest
import torch


@pytest.fixture(scope="session")
def ids():
    """Token ids of the tiny families with something to learn: each follows from the one before it, mostly."""
    generator = torch.Generator().manual_seed(0)
    jumps = torch.randint(3, 120, (4000,), generator=generator)
    stays = torch.rand(4000, generator=generator) < 0.8
    found = [5]
    for jump, stay in zip(jumps.tolist(), stays.tolist(), strict=True):
        found.append((found[-1] * 7 + 3) % 117 + 3 if stay else jump)
    return torch.tensor(found)
