"""The notebooks are stored as they ran, the book builds from them without a warning, and its pages work in a browser."""
import ast
import http.server
import json
import re
import shutil
import subprocess
import sys
import threading
from functools import partial
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import yaml

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "tutorials").glob("*.ipynb"))
ADDRESS = yaml.safe_load((ROOT / "book/_config.yml").read_text())["repository"]["url"]
BOOT = f'''\
# On Colab this fetches the repository, once. Elsewhere there is nothing to fetch.
import os, subprocess, sys

if "google.colab" in sys.modules and not os.path.exists("../ire.py"):
    if not os.path.exists("ire-book"):
        address = "{ADDRESS}"
        subprocess.run(["git", "clone", "--depth=1", address, "ire-book"], check=True)
    os.chdir("ire-book/tutorials")
sys.path.insert(0, os.path.abspath(".."))'''


def cells(path, kind):
    return [c for c in json.loads(path.read_text())["cells"] if c["cell_type"] == kind]


def source(cell):
    return "".join(cell["source"])


# ------------------------------------------------------------------------------------------------------- notebooks
def test_there_are_ten_chapters_and_the_contents_list_them():
    contents = yaml.safe_load((ROOT / "book/_toc.yml").read_text())["parts"][0]["chapters"]
    assert [c["file"] for c in contents] == [f"tutorials/{path.stem}" for path in NOTEBOOKS] and len(NOTEBOOKS) == 10


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_are_stored_as_they_ran(path):
    code = cells(path, "code")
    assert [c["execution_count"] for c in code] == [*range(1, len(code) + 1)]
    outputs = [o for c in code for o in c["outputs"]]
    assert not [o for o in outputs if o["output_type"] == "error" or o.get("name") == "stderr"]
    assert any("image/png" in o.get("data", {}) for o in outputs) and path.stat().st_size < 600_000


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_cells_fit_a_screen_and_the_first_fetches_the_repository(path):
    code, text = [source(c) for c in cells(path, "code")], [source(c) for c in cells(path, "markdown")]
    assert code[0] == BOOT
    for cell in code:
        assert cell.count("\n") < 25 and max(map(len, cell.split("\n"))) <= 88, cell
        assert not re.search(r"^\s*[!%]", cell, re.M), "shell and magic lines do not lex"
    assert [t[:2] for t in text if re.search(r"^# ", t, re.M)] == ["# "] and source(cells(path, "markdown")[0]) == text[0]
    assert any("## Exercise" in t for t in text) and any("<details><summary>" in t for t in text)
    assert not re.search(r"\{(cite|term|ref|doc)[:}]|^:::", "\n".join(text), re.M), "Colab shows roles raw"


def test_the_optimizer_of_chapter_2_has_twenty_lines():
    cell, = [c for c in map(source, cells(ROOT / "tutorials/02_ire_in_twenty_lines.ipynb", "code")) if c.startswith("class ")]
    assert len([line for line in cell.split("\n") if line.strip()]) == 20


def test_the_first_cell_fetches_once_and_only_on_colab(tmp_path):
    origin, colab = tmp_path / "origin", tmp_path / "content"
    (origin / "tutorials").mkdir(parents=True)
    (origin / "tutorials/here").touch()
    (origin / "ire.py").write_text("fetched = True")
    git = ["git", "-C", origin, "-c", "user.name=x", "-c", "user.email=x"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "x"]):
        subprocess.run([*git, *command], check=True)
    colab.mkdir()

    def run(modules, folder):
        code = f"import sys\nfor name in {modules}: sys.modules[name] = sys\n{BOOT}\n" \
               "import ire; print(ire.fetched, os.getcwd())"
        settings = {"GIT_CONFIG_COUNT": "1", "GIT_CONFIG_VALUE_0": ADDRESS,
                    "GIT_CONFIG_KEY_0": f"url.file://{origin}.insteadOf"}
        return subprocess.run([sys.executable, "-c", code], cwd=folder, text=True, capture_output=True,
                              env={"PATH": "/usr/bin:/bin:/usr/local/bin", **settings})

    assert run([], origin / "tutorials").stdout == f"True {origin / 'tutorials'}\n"  # as it is
    assert "No module named 'ire'" in run([], colab).stderr and not list(colab.iterdir())  # nothing is fetched
    first, again = (run(["google.colab"], colab) for _ in range(2))  # a runtime that starts again finds the clone
    assert first.stdout == again.stdout == f"True {colab / 'ire-book/tutorials'}\n"
    assert "Cloning" in first.stderr and not again.stderr


# ----------------------------------------------------------------------------------------------- addresses and works
def texts():
    files = [ROOT / name for name in ("README.md", "CITATION.cff", "pyproject.toml")] + sorted((ROOT / "book").glob("*.md"))
    return {path.name: path.read_text() for path in files} | {
        path.name: "\n".join(map(source, json.loads(path.read_text())["cells"])) for path in NOTEBOOKS}


def test_the_address_of_the_repository_is_the_same_everywhere():
    for name, text in texts().items():
        links = re.findall(r"(https://(?:github|raw\.githubusercontent)\.com/[\w-]+/[\w-]+)([^\s)\"'>]*)", text)
        for address, rest in links:
            assert address.replace("raw.githubusercontent.com", "github.com") == ADDRESS, name
            if rest.startswith("/blob/main/"):
                assert (ROOT / rest.split("#")[0].removeprefix("/blob/main/")).is_file(), (name, rest)


def test_works_that_notebooks_cite_are_in_the_references():
    known = (ROOT / "book/references.bib").read_text()
    for name, text in texts().items():
        for link in re.findall(r"https://(?:arxiv\.org/abs|doi\.org)/[^\s)\"'>}]+", text):
            assert link in known, (name, link)


# --------------------------------------------------------------------------------------------------------- the book
@pytest.fixture(scope="module")
def book(tmp_path_factory):
    out = tmp_path_factory.mktemp("book")
    build = subprocess.run(
        [sys.executable, "-c", "import jupyter_book.cli.main as jb; jb.main()", "build", ".",
         "--config", "book/_config.yml", "--toc", "book/_toc.yml", "-W", "--keep-going",
         "--path-output", out], cwd=ROOT, capture_output=True, text=True)
    assert build.returncode == 0 and (out / "_build/html").is_dir(), \
        "\n".join(re.findall(".*(?:WARNING|ERROR|rror:).*", build.stderr + build.stdout))
    return out / "_build/html"


class Page(HTMLParser):
    def __init__(self, path):
        super().__init__()
        self.ids, self.links, self.loaded, self.data = set(), [], [], []
        self.feed(path.read_text())
        self.text = " ".join(" ".join(self.data).split())

    def handle_starttag(self, tag, attributes):
        a = dict(attributes)
        self.ids |= {a[k] for k in ("id", "name") if a.get(k)}
        if tag == "a" and a.get("href"):
            self.links.append(a["href"])
        if tag in ("img", "script", "link", "source", "iframe"):
            self.loaded += [a[k] for k in ("src", "href") if a.get(k) and a.get("rel") not in ("canonical", "author")]

    def handle_data(self, data):
        self.data.append(data)


def test_links_and_images_resolve_and_nothing_needs_a_network(book):
    pages = {path: Page(path) for path in book.rglob("*.html") if "_static" not in path.parts}
    assert {f"tutorials/{path.stem}.html" for path in NOTEBOOKS} <= {str(path.relative_to(book)) for path in pages}
    for path, page in pages.items():
        for link in page.links + page.loaded:
            url = urlsplit(link)
            if url.scheme or url.netloc:
                assert link not in page.loaded or url.scheme == "data", (path.name, link)
                continue
            target = (path.parent / unquote(url.path)).resolve() if url.path else path
            assert target.is_file(), (path.name, link)
            if url.fragment and target in pages:
                assert unquote(url.fragment) in pages[target].ids, (path.name, link)


def pages():
    sys.path.insert(0, str(ROOT / "book"))
    return __import__("pages")


def test_the_results_page_says_what_the_files_say(book):
    text = Page(book / "book/results.html").text
    for path in (ROOT / "results").glob("compare-tiny-*.json"):
        run = json.loads(path.read_text())
        assert f"{run['adamw']['val_loss']:.4f} {run['admire']['val_loss']:.4f}" in text and run["command"] in text
    for run in json.loads((ROOT / "results/sweep-tiny.json").read_text())["runs"]:
        assert re.search(rf"{run['optimizer']} {run['lr']:g} {run['warmup']} [\d. ]+ {run['val_loss']:.4f}", text), run
    row = json.loads((ROOT / "results/step-cpu.json").read_text())["sizes"]["60M"]["rows"]["IRE, refresh"]
    assert f"IRE, refresh {row['ms']:.4g}" in text
    row = json.loads((ROOT / "results/train-cpu.json").read_text())["rows"]["AdmIRE, full probe"]
    assert f"AdmIRE, full probe {row['tokens_per_second']:,.0f} {row['of_adamw']:.4g}" in text
    for report in filter(None, (pages().load(f"speedup-{row}") for row in ("tiny", "nano"))):
        for run in report["runs"]:
            assert f"{run['steps']} {run['val_loss']:.4f}" in text, run
    for name, row in (pages().load("cifar-jpeg") or {"table": {}})["table"].items():
        assert re.search(rf"{name} [^±]+ {row['test_acc'][0]:.2f} ± {row['test_acc'][1]:.2f}", text), name
    files = "speedup-tiny", "speedup-nano", "cifar-jpeg", "cifar-speed-cpu"
    assert text.count("Not measured yet") == sum(not (ROOT / f"results/{name}.json").exists() for name in files)
    assert "{{" not in text


def test_the_results_page_without_results(tmp_path):
    page = (ROOT / "book/results.md").read_text()
    text = pages().results(page, tmp_path)
    assert text.count(pages().MISSING) == page.count("{{") > 6 and "|" not in text


def test_the_api_page_has_every_public_name(book):
    page = Page(book / "book/api.html")
    public = [node for node in ast.parse((ROOT / "ire.py").read_text()).body if getattr(node, "name", "_")[0] != "_"]
    assert {f"ire.{node.name}" for node in public} | {"ire.IRE.probe", "ire.IRE.step", "ire.SAM.step"} <= page.ids
    for node in public:
        words = re.sub(r"[`\s]+", " ", ast.get_docstring(node) or "").split(". ")[0]
        assert re.sub(r"\W", "", words) in re.sub(r"\W", "", page.text), node.name
    assert "``" not in page.text


CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


@pytest.mark.skipif(not CHROMIUM, reason="needs chromium")
def test_pages_open_without_errors_and_fit_a_phone(book, tmp_path):
    """All pages in frames of 390 pixels, whose widths and formulas a script writes into the title."""
    names = [f"book/{name}" for name in ("intro", "api", "results")] + [f"tutorials/{path.stem}" for path in NOTEBOOKS]
    (book / "phone.html").write_text("<title></title>" + "".join(
        f'<iframe width=390 height=800 src="{name}.html"></iframe>' for name in names) + """<script>
        const count = d => s => d.querySelectorAll(s).length;
        const measure = d => [d.documentElement.scrollWidth, ...[".math", "mjx-container", "mjx-merror"].map(count(d))];
        onload = () => setTimeout(() => document.title = JSON.stringify(
            [...document.querySelectorAll("iframe")].map(frame => measure(frame.contentDocument))), 5000)</script>""")
    handler = partial(http.server.SimpleHTTPRequestHandler, directory=book)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        options = "headless no-sandbox disable-gpu disable-quic no-first-run disable-background-networking disable-sync " \
                  f"disable-component-update user-data-dir={tmp_path} enable-logging=stderr virtual-time-budget=20000 dump-dom"
        address = f"http://127.0.0.1:{server.server_port}/phone.html"
        shown = subprocess.run([CHROMIUM, *(f"--{option}" for option in options.split()), address],
                               capture_output=True, text=True, timeout=120)
        server.shutdown()
    console = [line for line in shown.stderr.splitlines() if "CONSOLE" in line]
    assert not [line for line in console if re.search("Uncaught|rror|Failed|refused", line)]
    measured = json.loads(re.search("<title>(.+)</title>", shown.stdout)[1])
    assert len(measured) == len(names)
    for name, (width, formulas, set_in_type, wrong) in zip(names, measured):
        assert width <= 390 and formulas == set_in_type and not wrong, (name, width, formulas, set_in_type, wrong)
