"""`pip install .` gives a module `ire` that needs torch alone."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def test_ire_imports_torch_and_the_standard_library_only():
    tree = ast.parse((ROOT / "ire.py").read_text())
    names = {
        n.name.split(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Import)
        for n in node.names
    }
    names |= {
        node.module.split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)
    }
    assert names - set(sys.stdlib_module_names) == {"torch"}


def test_pyproject_installs_the_one_module():
    project = pytest.importorskip("tomllib").loads((ROOT / "pyproject.toml").read_text())
    assert project["tool"]["setuptools"]["py-modules"] == ["ire"] and project["project"][
        "dependencies"
    ] == ["torch>=2.6"]
