import os

# The suite is of the CPU, also where there is a GPU; test_cuda.py wants DEVICE=cuda.
if os.environ.get("DEVICE") != "cuda":
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.environ["OMP_NUM_THREADS"] = "1"  # of the scripts that tests start, two at a time

from pathlib import Path

import pytest
import torch
from scripts import TEXT


@pytest.fixture(autouse=True)
def _settings():
    """One thread: the tests are small, and two threads on busy cores wait for each other."""
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """The working folder: an empty one, but for a text."""
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_bytes(TEXT)
    return tmp_path
