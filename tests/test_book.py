"""The notebooks are stored as they ran, the book builds from them without a warning, and its pages
work in a browser."""

import ast
import contextlib
import html
import http.server
import json
import math
import os
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
import torch
import yaml

import pages
from toy import valley

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "tutorials").glob("*.ipynb"))

ADDRESS = pages.address()
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


def cells(path, kind):
    return [c for c in json.loads(path.read_text())["cells"] if c["cell_type"] == kind]


def source(cell):
    return "".join(cell["source"])


# ---------------------------------------------------------------------------------------- notebooks
def test_the_contents_list_every_chapter_once():
    parts = yaml.safe_load((ROOT / "book/_toc.yml").read_text())["parts"]
    files = [c["file"] for part in parts for c in part["chapters"]]
    chapters = [file for file in files if file.startswith("tutorials/")]
    assert sorted(chapters) == [f"tutorials/{path.stem}" for path in NOTEBOOKS]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_are_stored_as_they_ran(path):
    code = cells(path, "code")
    assert [c["execution_count"] for c in code] == [*range(1, len(code) + 1)]
    outputs = [o for c in code for o in c["outputs"]]
    assert not [o for o in outputs if o["output_type"] == "error" or o.get("name") == "stderr"]
    assert any("image/png" in o.get("data", {}) for o in outputs) and path.stat().st_size < 600_000


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_cells_fit_a_screen(path):
    code = [source(c) for c in cells(path, "code")]
    text = [source(c) for c in cells(path, "markdown")]
    for cell in code[1:]:  # the first is folded, and the same in all
        assert cell.count("\n") < 25 and max(map(len, cell.split("\n"))) <= 88, cell
        assert not re.search(r"^\s*[!%]", cell, re.M), "shell and magic lines do not lex"
    assert [t[:2] for t in text if re.search(r"^# ", t, re.M)] == ["# "]
    assert text[0].startswith("# ")
    assert any("## Exercise" in t for t in text) and any("<details><summary>" in t for t in text)
    assert not re.search(r"\{(cite|term|ref|doc)[:}]|^:::", "\n".join(text), re.M), (
        "Colab shows roles raw"
    )


def test_the_optimizer_of_chapter_2_has_twenty_lines():
    code = map(source, cells(ROOT / "tutorials/02_ire_in_twenty_lines.ipynb", "code"))
    (cell,) = [c for c in code if c.startswith("class ")]
    assert len([line for line in cell.split("\n") if line.strip()]) == 20


SLIDERS = """
import sys, types
import ipywidgets.widgets.interaction as interaction

shown = []
interaction.display = lambda *what, **_: shown.extend(what)
sys.modules["google.colab"] = types.ModuleType("google.colab")
"""


@pytest.mark.slow
def test_chapter_1_has_sliders_on_colab():
    """Without a kernel: what would be displayed is caught."""
    code = [source(c) for c in cells(NOTEBOOKS[0], "code")]
    (play,) = [c for c in code if "interact(" in c]
    script = [SLIDERS, *code[: code.index(play) + 1], "print([type(x).__name__ for x in shown])"]
    run = subprocess.run(
        [sys.executable, "-c", "\n".join(script)],
        cwd=ROOT / "tutorials",
        env={**os.environ, "MPLBACKEND": "agg"},
        text=True,
        capture_output=True,
    )
    assert run.stdout.splitlines()[-1] == "['interactive']", run.stderr


# ------------------------------------------------------------------------------ addresses and works
def texts():
    files = [ROOT / name for name in ("README.md", "CITATION.cff", "pyproject.toml")] + sorted(
        (ROOT / "book").glob("*.md")
    )
    return {path.name: path.read_text() for path in files} | {
        path.name: "\n".join(map(source, json.loads(path.read_text())["cells"]))
        for path in NOTEBOOKS
    }


def test_the_address_of_the_repository_is_the_same_everywhere():
    host = urlsplit(ADDRESS).netloc.removeprefix("www.")
    for name, text in texts().items():
        for address in re.findall(rf"https?://{re.escape(host)}/[^\s)\"'>`]*", text):
            assert address.startswith(ADDRESS), (name, address)
            file = address.removeprefix(ADDRESS).removeprefix("/blob/main/").split("#")[0]
            assert file in ("", address.removeprefix(ADDRESS)) or (ROOT / file).is_file(), name
        assert "github.com/ire-optimizer" not in text, name  # a stranger could register it


def test_works_that_notebooks_cite_are_in_the_references():
    known = (ROOT / "book/references.bib").read_text()
    for name, text in texts().items():
        for link in re.findall(r"https://(?:arxiv\.org/abs|doi\.org)/[^\s)\"'>}]+", text):
            assert link in known, (name, link)


# ----------------------------------------------------------------------------------------- the book
@pytest.fixture(scope="module")
def book(tmp_path_factory):
    out = tmp_path_factory.mktemp("book")
    book = [sys.executable, "-c", "import jupyter_book.cli.main as jb; jb.main()"]
    flags = "--config book/_config.yml --toc book/_toc.yml -W --keep-going --path-output"
    command = [*book, "build", ".", *flags.split(), out]
    build = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert build.returncode == 0 and (out / "_build/html").is_dir(), "\n".join(
        re.findall(".*(?:WARNING|ERROR|rror:).*", build.stderr + build.stdout)
    )
    return out / "_build/html"


class Page(HTMLParser):
    def __init__(self, path):
        super().__init__()
        self.ids = set()
        self.links = []
        self.loaded = []
        self.data = []
        self.feed(path.read_text())
        self.text = " ".join(" ".join(self.data).split())

    def handle_starttag(self, tag, attributes):
        a = dict(attributes)
        self.ids |= {a[k] for k in ("id", "name") if a.get(k)}
        if tag == "a" and a.get("href"):
            self.links.append(a["href"])
        if tag in ("img", "script", "link", "source", "iframe"):
            self.loaded += [
                a[k]
                for k in ("src", "href")
                if a.get(k) and a.get("rel") not in ("canonical", "author")
            ]

    def handle_data(self, data):
        self.data.append(data)


def test_links_and_images_resolve_and_nothing_needs_a_network(book):
    shown = {path: Page(path) for path in book.rglob("*.html") if "_static" not in path.parts}
    for path, page in shown.items():
        for link in page.links + page.loaded:
            url = urlsplit(link)
            if url.scheme or url.netloc:
                assert link not in page.loaded or url.scheme == "data", (path.name, link)
                continue
            target = (path.parent / unquote(url.path)).resolve() if url.path else path
            assert target.is_file(), (path.name, link)
            if url.fragment and target in shown:
                assert unquote(url.fragment) in shown[target].ids, (path.name, link)


def test_the_results_page_says_what_the_files_say(book):
    """The command of each file, and for some files the numbers as they are shown."""
    text = Page(book / "book/results.html").text
    assert "{{" not in text
    for name in "speedup-tiny speedup-nano sweep-tiny step-cpu train-cpu cifar-map".split():
        assert " ".join(pages.load(name)["command"].split()) in text, name
    for name, row in pages.load("speedup-tiny")["compared"].items():
        assert f"{name} {row['steps']} {len(row['seeds'])} {row['loss']:.4f}" in text, name
    for name, row in pages.load("cifar-quick")["table"].items():
        mean, error = row["test_acc"]
        assert re.search(rf"{name} [^±]+ {mean:.2f} ± {error:.2f}", text), name


def test_the_api_page_has_every_public_name(book):
    page = Page(book / "book/api.html")
    public = [
        node
        for node in ast.parse((ROOT / "ire.py").read_text()).body
        if getattr(node, "name", "_")[0] != "_"
    ]
    names = {f"ire.{node.name}" for node in public}
    assert names | {"ire.IRE.probe", "ire.IRE.step", "ire.SAM.step"} <= page.ids
    for node in public:
        words = re.sub(r"[`\s]+", " ", ast.get_docstring(node) or "").split(". ")[0]
        assert re.sub(r"\W", "", words) in re.sub(r"\W", "", page.text), node.name
    assert "``" not in page.text


@contextlib.contextmanager
def served(folder):
    handler = partial(http.server.SimpleHTTPRequestHandler, directory=folder)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def browse(folder, page, profile):
    """Opens a page in Chromium; what a script has written into its title, from JSON. Nothing may be
    wrong on the console."""
    options = (
        "headless no-sandbox disable-gpu disable-quic no-first-run disable-background-networking "
        "disable-sync disable-component-update enable-logging=stderr virtual-time-budget=20000 "
        f"dump-dom user-data-dir={profile}"
    )
    flags = [f"--{option}" for option in options.split()]
    with served(folder) as address:
        command = [CHROMIUM, *flags, f"{address}/{page}"]
        shown = subprocess.run(command, capture_output=True, text=True, timeout=120)
    console = [line for line in shown.stderr.splitlines() if "CONSOLE" in line]
    assert not [line for line in console if re.search("Uncaught|rror|Failed|refused", line)]
    return json.loads(html.unescape(re.search("<title>(.+)</title>", shown.stdout)[1]))


PHONE = """<script>
    const count = d => s => d.querySelectorAll(s).length;
    const math = [".math", "mjx-container", "mjx-merror"];
    const measure = d => [d.documentElement.scrollWidth, ...math.map(count(d))];
    onload = () => setTimeout(() => document.title = JSON.stringify(
        [...document.querySelectorAll("iframe")].map(f => measure(f.contentDocument))), 5000)
</script>"""


@pytest.mark.skipif(not CHROMIUM, reason="needs chromium")
@pytest.mark.slow
def test_pages_open_without_errors_and_fit_a_phone(book, tmp_path):
    """All pages in frames of 390 pixels; a script writes what it measures into the title."""
    names = [f"book/{name}" for name in ("intro", "claims", "api", "results")]
    names += [f"tutorials/{path.stem}" for path in NOTEBOOKS]
    frames = [f'<iframe width=390 height=800 src="{name}.html"></iframe>' for name in names]
    (book / "phone.html").write_text("<title></title>" + "".join(frames) + PHONE)
    measured = browse(book, "phone.html", tmp_path)
    assert len(measured) == len(names)
    for name, (width, formulas, set_in_type, wrong) in zip(names, measured):
        assert width <= 390 and formulas == set_in_type and not wrong, (name, width, wrong)


# --------------------------------------------------------------------------------------- the valley
RUNS = [  # loss, start, eta, kappa: stable ones, and ones beyond each limit
    ("valley", (1, 0.01), 1, 0),
    ("valley", (1, 0.01), 1, 900),
    ("valley", (1, 0.01), 2, 0),
    ("valley", (1, 0.01), 1, 20000),
    ("quadratic", (1, 0.5), 0.9, 20),
    ("quadratic", (1, 0.5), 0.9, 60),
    ("quadratic", (-0.7, 0.3), 1.1, 0),
    ("curved", (0.9, 0.8), 0.5, 2),
    ("curved", (0.9, 0.8), 0.5, 6),
    ("curved", (1, -0.3), 0.5, 1),  # both coordinates are equally flat at the start
]


@pytest.mark.skipif(not CHROMIUM, reason="needs chromium")
def test_the_valley_computes_what_the_toy_computes(tmp_path):
    shutil.copy(ROOT / "book/_static/valley.js", tmp_path)
    (tmp_path / "page.html").write_text(f"""<title></title><script src="valley.js"></script>
        <script>document.title = JSON.stringify({json.dumps(RUNS)}.map(x => run(...x)))</script>""")
    lengths = set()
    for (loss, start, eta, kappa), path in zip(RUNS, browse(tmp_path, "page.html", tmp_path / "c")):
        toy = valley.descend(eta, kappa, start, valley.LOSSES[loss])
        here = torch.tensor(path, dtype=torch.float64)
        assert here.shape == toy.shape, (loss, start, eta, kappa)
        torch.testing.assert_close(here, toy, rtol=1e-9, atol=1e-9)
        lengths.add(len(toy) > valley.STEPS)
    assert lengths == {True, False}  # some diverge


PLAY = """<title></title><iframe id=f width=390 height=800 src="book/intro.html"></iframe><script>
    f.onload = () => setTimeout(() => {
        const d = f.contentDocument, W = f.contentWindow, log = [];
        const find = s => d.querySelector(".ire-valley " + s);
        const map = find("canvas.map");
        const text = s => find(s).textContent.replace(/\\s+/g, " ");
        const red = s => find(s + " + .ire-scale").style.getPropertyValue("--limit");
        const note = () => log.push([
            text("label") + text("label + label"), text(".ire-note"), text(".ire-legend"),
            (find("[aria-pressed=true]") || {}).textContent, parseFloat(red(".eta")),
            parseFloat(red(".kappa"))]);
        const pointer = (type, x, y, buttons) => {
            const r = map.getBoundingClientRect();
            map.dispatchEvent(new W.PointerEvent(type, {bubbles: true, pointerType: "touch",
                clientX: r.left + 50 + x * (r.width - 60), buttons,
                clientY: r.top + 24 + y * (r.height - 62)}));
        };
        const set = (name, value) => {
            const slider = find("input." + name);
            slider.value = value;
            slider.dispatchEvent(new W.Event("input"));
            note();
        };
        note();
        for (const button of d.querySelectorAll(".ire-valley button")) {
            button.click();
            note();
        }
        d.querySelector(".ire-valley button").click();
        set("eta", 1.5);
        set("eta", 2.5);
        find("button").click();
        set("kappa", 4.5);
        find("button").click();
        pointer("pointerdown", 0.9, 0.4, 1); pointer("pointermove", 0.75, 0.25, 1); note();
        pointer("pointermove", 0.2, 0.2, 0); note();  // no longer held
        map.dispatchEvent(new W.KeyboardEvent("keydown", {key: "ArrowLeft"})); note();
        log.push(W.getComputedStyle(find("figure")).display);
        document.title = JSON.stringify(log);
    }, 3000)</script>"""


@pytest.mark.skipif(not CHROMIUM, reason="needs chromium")
def test_the_valley_tells_its_story_and_follows_pointer_keys_and_sliders(book, tmp_path):
    (book / "play.html").write_text(PLAY)
    first, *scenes, eta, more, kappa, dragged, held, key, figure = browse(
        book, "play.html", tmp_path
    )
    stalls, moves, far, quadratic, curved = scenes
    assert figure == "none"  # the figure that stands there without JavaScript
    assert first == moves and moves[3] == "IRE moves on"
    assert re.findall(r"u ends at ([\d.]+)", moves[2]) == ["0.993", "0.928", "0.743", "0.010"]
    assert "1, at its limit 1 " in stalls[0] and moves[4] == 100 * 1 / 2.5  # red from there on
    assert "9000, under its limit 19999 " in moves[0]
    assert "20000, over its limit 19999 " in far[0] and "diverges in 10 steps" in far[2]
    assert far[5] == pytest.approx(100 * math.log10(20000) / 4.5)
    assert re.findall(r"after (\d+) steps", quadratic[2]) == ["126", "18"]
    assert re.findall(r"after (\d+) steps", curved[2]) == ["4", "93"] and "IRE loses" in curved[1]
    assert "1.5, over its limit 1 " in eta[0] and "thrown to a flatter place" in eta[1]
    assert eta[3] is None  # no button is pressed any more
    assert more[2].startswith("● gradient descent: diverges") and "thrown" not in more[1]
    assert "IRE, κ = 31622: diverges" in kappa[2]
    assert dragged[4] == pytest.approx(100 * 2 / (1 + 0.8**2) / 2.5)  # the start is (0.8, 0.016)
    assert "its limit 7812 " in dragged[0] and held == dragged
    assert key[4] == pytest.approx(100 * 2 / (1 + 0.768**2) / 2.5) and key[5] == dragged[5]
