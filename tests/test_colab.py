"""A notebook finds the repository on Colab and elsewhere, and one command sets the address."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import pages

ROOT = Path(__file__).parents[1]

ADDRESS = pages.address()
CELL = pages.FIRST_CELL.format(address=ADDRESS)
SEES = "from toy import valley; import ire; print(ire.fetched, os.getcwd())"


def make_repository(folder):
    """What the cell looks for."""
    for name in ("toy", "tutorials"):
        (folder / name).mkdir(parents=True)
        (folder / name / "valley.py").touch()
    (folder / "ire.py").write_text("fetched = True")
    return folder


def run(folder, code=CELL + "\n" + SEES, modules=(), **settings):
    code = f"import sys\nfor name in {modules}: sys.modules[name] = sys\n{code}"
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        text=True,
        capture_output=True,
        env={"PATH": os.environ["PATH"], **settings},
    )


@pytest.mark.parametrize("modules", ((), ("google.colab",)), ids=("elsewhere", "colab"))
@pytest.mark.parametrize("start", ("beside", "above", "tutorials", "root"))
def test_the_first_cell_finds_an_uploaded_folder(tmp_path, start, modules):
    """It has any name. It lies beside the notebook's folder, or in it; or the notebook is in it."""
    repository = make_repository(tmp_path / "uploaded/ire-main")
    (tmp_path / "uploaded/empty").mkdir()
    starts = {"beside": "empty", "above": "", "tutorials": "ire-main/tutorials", "root": "ire-main"}
    found = run(tmp_path / "uploaded" / starts[start], modules=modules)
    assert found.stdout == f"True {repository / 'tutorials'}\n", found.stderr
    again = run(tmp_path / "uploaded" / starts[start], f"{CELL}\n{CELL}\n{SEES}", modules)
    assert again.stdout == found.stdout


def test_without_the_folder_one_line_says_what_to_do(tmp_path):
    (tmp_path / "empty").mkdir()
    lost = run(tmp_path / "empty")
    assert lost.returncode == 1
    assert lost.stderr == "Upload the repository's folder beside this notebook first.\n"
    assert not [*(tmp_path / "empty").iterdir()]


def test_on_colab_it_fetches_once(tmp_path):
    origin = make_repository(tmp_path / "far/away")
    git = ["git", "-C", origin, "-c", "user.name=x", "-c", "user.email=x"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "x"]):
        subprocess.run([*git, *command], check=True)
    (tmp_path / "content").mkdir()
    fetch = {
        "GIT_CONFIG_COUNT": "1",
        "GIT_CONFIG_KEY_0": f"url.file://{origin}.insteadOf",
        "GIT_CONFIG_VALUE_0": ADDRESS,
    }
    colab = {"modules": ("google.colab",), **fetch}
    first, again = run(tmp_path / "content", **colab), run(tmp_path / "content", **colab)
    (clone,) = (tmp_path / "content").iterdir()
    assert first.stdout == again.stdout == f"True {clone / 'tutorials'}\n"
    assert "Cloning" in first.stderr and not again.stderr
    shutil.rmtree(clone)
    shutil.rmtree(origin)
    lost = run(tmp_path / "content", **colab)
    assert "Upload the repository's folder" in lost.stderr and "Traceback" not in lost.stderr


def test_one_command_sets_the_links_to_colab_and_takes_them_back(tmp_path):
    for name in ("book", "tutorials"):
        shutil.copytree(ROOT / name, tmp_path / name)
    for name in ("README.md", "CITATION.cff", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    kinds = (".ipynb", ".md", ".yml", ".toml", ".cff")
    before = {path: path.read_text() for path in tmp_path.rglob("*") if path.suffix in kinds}
    pages.set_address("https://github.com/somebody/something", tmp_path)
    for path in (tmp_path / "tutorials").glob("*.ipynb"):
        cells = json.loads(path.read_text())["cells"]
        text = next(c for c in cells if c["cell_type"] == "markdown")
        code = next(c for c in cells if c["cell_type"] == "code")
        link = "(https://colab.research.google.com/github/somebody/something/blob/main/tutorials/"
        assert "".join(text["source"]).endswith(f"{link}{path.name}).")
        assert 'address = "https://github.com/somebody/something"\n' in code["source"]
        assert "no public address" not in path.read_text()
    assert ADDRESS not in "".join(path.read_text() for path in before)
    pages.set_address(ADDRESS, tmp_path)
    assert {path: path.read_text() for path in before} == before
