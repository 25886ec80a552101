"""For pytest --nbval tutorials: which parts of an output may differ between two runs."""

import os
from pathlib import Path

# Two notebooks run at a time. With two threads each, they would wait for each other.
os.environ["OMP_NUM_THREADS"] = "1"


def pytest_configure(config):
    rules = Path(__file__).parents[1] / "tests/nbval_sanitize.cfg"
    config.option.nbval_sanitize_with = str(rules)
    config.option.nbval_cell_timeout = 600.0
