import pytest
import torch


@pytest.fixture(autouse=True)
def _settings():
    """One thread: the tests are small, and two threads on busy cores wait for each other."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
