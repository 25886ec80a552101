"""For pytest --nbval tutorials: which parts of an output may differ between two runs."""

from pathlib import Path


def pytest_configure(config):
    rules = Path(__file__).parents[1] / "tests/nbval_sanitize.cfg"
    config.option.nbval_sanitize_with = str(rules)
    config.option.nbval_cell_timeout = 600.0
