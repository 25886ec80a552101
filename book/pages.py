"""What the book computes while Sphinx builds it: ire.py's docstrings as reStructuredText, and
results/*.json as tables. As a script it sets the repository's address, in book/_config.yml and
wherever it is used, and renews the first cells of each notebook, with its link to Colab:

    python book/pages.py https://github.com/OWNER/REPOSITORY
"""

import json
import re
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
MISSING = "Not measured yet.\n"


def rst(docstring):
    """ire.py's docstrings are plain text: `code`, `name: what it is` with indented lines and, under
    such a name, `"value": what it means`; and indented examples."""
    lines = []
    example = False
    for line in docstring:
        indented = line.startswith("    ")
        if indented and lines and not lines[-1]:
            lines += [".. code-block:: python", ""]
            example = True
        example = example and (indented or not line)
        lines += [line] if example else prose(line, lines[-1] if lines else "")
    return lines


def prose(line, before):
    """A line outside of examples. A term stands after a blank line, a sentence or another term."""
    line = re.sub(r"(?<!`)`([^`]+)`(?!`)", r"``\1``", line)
    value = re.match(r'    ("[a-z]+"): (.*)', line)
    if value:  # of the argument above
        return ["", f"    ``{value[1]}``", f"        {value[2]}"]
    term = re.match(r"([a-z_]+(?:, [a-z_]+)*): (.*)", line)
    if term and (before[:1] in ("", " ") or before.endswith(".")):
        names = term[1].replace(", ", "``, ``")
        blank = [] if before[:1] in ("", " ") else [""]
        return [*blank, f"``{names}``", f"    {term[2]}"]
    value = re.match(r'    ("\w+"): (.*)', line)
    if value:
        return ["", f"    ``{value[1]}``", f"        {value[2]}"]
    return ["", line] if line.startswith("Raises ") else [line]


def load(name, folder=None):
    """A file of results; without it there is nothing to say, see results()."""
    return json.loads(((folder or ROOT / "results") / f"{name}.json").read_text())


def cell(value):
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1e3 else f"{value:,.0f}"
    if isinstance(value, list):
        return " to ".join(map(cell, value))
    return "" if value is None else str(value)


def table(rows):
    """Markdown of flat dicts; nested values are left out."""
    names = list(
        dict.fromkeys(n for row in rows for n, value in row.items() if not isinstance(value, dict))
    )
    text = [names, ["---"] * len(names), *([cell(row.get(n)) for n in names] for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in text)


def source(report):
    """The command and where it ran."""
    where = report.get("environment") or {
        k: report[k] for k in ("hardware", "torch", "commit") if k in report
    }
    where = ", ".join(f"{name} {value}" for name, value in where.items())
    where = re.sub(r"\b([0-9a-f]{12})[0-9a-f]{28}\b", r"\1", where)
    return f"`{report['command']}`<br>{where}\n" if "command" in report else ""


def folded(title, text):
    return f"````{{dropdown}} {title}\n{text}````\n"


def compare(folder):
    paths = sorted((folder or ROOT / "results").glob("compare-tiny-*.json"))
    if not paths:
        raise FileNotFoundError
    runs = [load(path.stem, folder) for path in paths]
    rows = []
    gaps = []
    for run in runs:
        adamw, admire = run["adamw"], run["admire"]
        gaps.append(admire["val_loss"] - adamw["val_loss"])
        row = {"seed": adamw["seed"], "AdamW": f"{adamw['val_loss']:.4f}"}
        row |= {"AdmIRE": f"{admire['val_loss']:.4f}", "difference": f"{gaps[-1]:+.4f}"}
        row["step at which AdmIRE was at AdamW's final loss"] = (
            f"{run['reached_at_step'] or 'never'}"
        )
        rows.append(row)
    measured = ("val_loss", "seconds", "tokens_per_second", "seed")
    settings = []
    for name in ("adamw", "admire"):
        settings.append({k: v for k, v in runs[0][name].items() if k not in measured})
    if len(runs) > 1:
        error = statistics.stdev(gaps) / len(gaps) ** 0.5
        rows.append({"seed": "mean", "difference": f"{statistics.mean(gaps):+.4f} ± {error:.4f}"})
    return f"{table(rows)}\n{table(settings)}\n" + "\n".join(map(source, runs))


def sweep(folder):
    report = load("sweep-tiny", folder)
    runs = sorted(report["runs"], key=lambda run: run["val_loss"])
    best = {}
    for run in runs:
        best.setdefault((run["optimizer"], run["warmup"]), run)
    rows = [best[key] for key in sorted(best)]
    rows = [{**row, "val_loss": f"{row['val_loss']:.4f}"} for row in rows]
    every = table([{**run, "val_loss": f"{run['val_loss']:.4f}"} for run in runs])
    return f"{table(rows)}\n{source(report)}\n{folded(f'All {len(runs)} trials', every)}"


def step(folder, name="step-cpu"):
    report = load(name, folder)
    text = source(report)
    for size, measured in report["sizes"].items():
        rows = [
            {
                "": name,
                "ms": row["ms"],
                "quartiles": row["quartiles_ms"],
                "times fused AdamW": row["over_fused_adamw"],
                "extra bytes a parameter": row["extra_bytes_per_parameter"],
            }
            for name, row in measured["rows"].items()
        ]
        text += "\n" + (
            table(rows)
            if size == [*report["sizes"]][-1]
            else folded(f"{size} parameters", table(rows))
        )
    return text


def step_kept(folder):
    return step(folder, "step-cpu-kept")


def train(folder):
    report = load("train-cpu", folder)
    rows = [
        {
            "": name,
            "tokens a second": row["tokens_per_second"],
            "of AdamW": row["of_adamw"],
            "quartiles": row["quartiles"],
        }
        for name, row in report["rows"].items()
    ]
    return f"{table(rows)}\n{source(report)}"


def figure(name, folder, what):
    return (
        f"![{what}](../results/{name}.png)\n\n"
        if ((folder or ROOT / "results") / f"{name}.png").exists()
        else ""
    )


def speedup(folder, row="tiny"):
    report = load(f"speedup-{row}", folder)
    from report import speedup_table

    names = (
        "optimizer",
        "ablation",
        "lr",
        "warmup_fraction",
        "beta2",
        "weight_decay",
        "ratio",
        "kappa",
        "gamma",
        "interval",
        "curvature",
        "seed",
        "steps",
    )
    runs = [
        {**{n: run[n] for n in names}, "val_loss": f"{run['val_loss']:.4f}"}
        for run in report["runs"]
    ]
    return (
        figure(
            f"speedup-{row}", folder, "Loss against the length of the schedule, and the ablations"
        )
        + f"{speedup_table(report)}\n\n{source(report)}\n"
        + folded(f"All {len(runs)} runs", table(runs))
    )


def speedup_nano(folder):
    return speedup(folder, "nano")


def flatness(folder):
    """The study results/map.json."""
    report = load("map", folder)
    from report import source as ran
    from report import table as summary

    what = "The gain of each form over the length of the run and the size of the batch"
    forms = "The other forms"
    drawn = figure("map", folder, what) + figure("map-forms", folder, forms)
    return f"{drawn}{summary(report)}\n\n{ran(report)}"


def typed(settings):
    return ", ".join(f"{name} {value:g}" for name, value in settings.items())


def cifar_row(name, settings, values, sign=""):
    row = {"": name, "settings": typed(settings)}
    shown = (("test_acc", "test accuracy, %", 2), ("train_loss", "training loss", 4))
    for key, title, digits in (*shown, ("trace", "Tr(H)", 1)):
        mean, error = values[key]
        row[title] = f"{mean:{sign}.{digits}f} ± {error:.{digits}f}"
    return row


def cifar(folder, name="cifar-jpeg"):
    report = load(name, folder)
    rows = [cifar_row(own, row["settings"], row) for own, row in report["table"].items()]
    for own, row in report["table"].items():
        if "less_base" in row:
            title = f"{own} less {own.removesuffix('-ire')}, seed by seed"
            rows.append(cifar_row(title, {}, row["less_base"], "+"))
    names = ("optimizer", "settings", "seed", "val_acc", "test_acc", "train_loss", "trace")
    runs = []
    for run in report["runs"]:
        runs.append({n: run.get(n) for n in names} | {"settings": typed(run["settings"])})
    what = ", ".join(f"{own} {value}" for own, value in report["settings"].items())
    drawn = figure(name, folder, "Test accuracy and Tr(H) of SGD, SAM and both with IRE")
    said = f"{report['pictures']}; {what}; mean ± standard error."
    every = folded(f"All {len(runs)} runs", table(runs))
    return f"{drawn}{table(rows)}\n{said}\n\n{source(report)}\n{every}"


def cifar_quick(folder):
    return cifar(folder, "cifar-quick")


def cifar_map(folder):
    report = load("cifar-map", folder)
    rows = []
    for run in report["runs"]:
        row = run["settings"] | {"seed": run["seed"]}
        names = ("trace", "train_loss", "test_acc")
        rows.append(row | {name: run.get(name, "diverged") for name in names})
    drawn = figure("cifar-map", folder, "Tr(H), training loss and accuracy over kappa and gamma")
    said = f"{len(rows)} of {report['planned']} runs; {report['pictures']}."
    every = folded(f"All {len(rows)} runs", table(rows))
    return f"{drawn}{said}\n\n{source(report)}\n{every}"


def cifar_probe(folder):
    report = load("cifar-probe", folder)
    rows = [
        cifar_row(f"{name}, less the first ones'", {}, row, "+")
        for name, row in report["less_first"].items()
    ]
    return f"{table(rows)}\n{source(report)}"


SOURCES = {  # of the mask: the row of `compared` in the Fisher, second moment and random column
    "from the warm-up's end": ("AdmIRE", "second moment", "random mask"),
    "from step 0": ("on from step 0", "second moment from step 0", "random mask from step 0"),
    "from step 0 and tuned so": (
        "AdmIRE from step 0, tuned so",
        "second moment from step 0, those settings",
        "random mask from step 0, tuned so",
    ),
    "2000 steps, from the warm-up's end": ("AdmIRE, long", "", ""),
    "2000 steps, from step 0": (
        "AdmIRE from step 0, long",
        "second moment from step 0, long",
        "random mask from step 0, long",
    ),
}
CONTROLS = {
    "other draws of the labels in the probes": "AdmIRE again",
    "longer steps along the sharp coordinates": "inverted mask",
    "longer steps along all coordinates": "all coordinates",
    "AdamW whose lr jumps by the mean of IRE's factors": "lr jumps by the mean",
    "AdamW with the settings of twice the trials": "AdamW, twice the trials",
    "AdamW with twice the steps": "AdamW, 2 times the steps",
    "Muon": "Muon",
    "Muon with IRE": "Muon with IRE",
    "Muon at the latter's settings, random mask": "Muon with a random mask",
    "Muon at the latter's settings, no mask": "Muon at those settings, no mask",
}


def gap(report, name):
    row = report["compared"].get(name)
    if not row:
        return "not measured yet"
    return f"{row['minus_adamw']:+.3f} ± {row['minus_adamw_stderr']:.3f}"


def controls(folder):
    """Loss minus AdamW's, seed by seed: by the source of the mask, and with other longer steps."""
    report = load("speedup-tiny", folder)
    rows = []
    for title, names in SOURCES.items():
        cells = zip(("Fisher probe", "second moment", "random"), names, strict=True)
        rows.append({"IRE on": title} | {column: gap(report, name) for column, name in cells})
    others = [{"": title, "difference": gap(report, name)} for title, name in CONTROLS.items()]
    return f"{table(rows)}\n{table(others)}"


def cifar_speed(folder):
    report = load("cifar-speed-cpu", folder)
    rows = [
        {
            "": name,
            "images a second": row["images_per_second"],
            "of the plain loop": row["of_plain"],
            "quartiles": row["quartiles"],
            "share of the loader": row["loader_share"],
        }
        for name, row in report["rows"].items()
    ]
    return f"{table(rows)}\n{source(report)}"


def results(text, folder=None):
    """The page with each `{{ name }}` replaced by what the function `name` says."""

    def said(found):
        try:
            return globals()[found[1]](folder)
        except FileNotFoundError:
            return MISSING

    text = re.sub(r"{{ (\w+) }}", said, text)
    return text.replace(" ± ", "\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}")


CONFIG = ROOT / "book/_config.yml"
PLACEHOLDER = "example.org"  # reserved: nobody can register it
FIRST_CELL = """\
# @title Colab only
# Fetches the repository, unless its folder is here already.
import os
import subprocess
import sys
from glob import glob

address = "{address}"
near = "../toy", "toy", "*/toy", "../*/toy"
found = [path for toy in near for path in glob(toy + "/valley.py")]
if not found and "google.colab" in sys.modules:
    subprocess.run(["git", "clone", "--depth=1", address])
    found = glob("*/toy/valley.py")
if not found:
    raise SystemExit("Upload the repository's folder beside this notebook first.")
os.chdir(os.path.dirname(found[0]) + "/../tutorials")
sys.path.insert(0, os.path.abspath(".."))"""
FOLDED = {
    "cellView": "form",
    "mystnb": {"code_prompt_hide": "Colab only", "code_prompt_show": "Colab only"},
    "tags": ["hide-cell"],
}


def address():
    return re.search(r"url: (https://\S+)", CONFIG.read_text())[1]


def on_colab(address, name):
    """The line of a notebook that says how to open it on Colab, which opens what is on GitHub."""
    repository = address.removeprefix("https://github.com/")
    if repository == address:
        text = "the repository has no public address yet, so upload its folder first."
    else:
        colab = "https://colab.research.google.com/github"
        text = f"[open this chapter]({colab}/{repository}/blob/main/tutorials/{name})."
    return f"*On Colab:* {text}"


def renew(cells, address, name):
    """The line about Colab at the end of the first text, and the first cell of code."""
    first = {cell["cell_type"]: cell for cell in reversed(cells)}
    text = "".join(first["markdown"]["source"]).split("\n*On Colab:*")[0].rstrip()
    text += f"\n\n{on_colab(address, name)}"
    first["markdown"]["source"] = text.splitlines(keepends=True)
    first["code"]["metadata"] = FOLDED
    first["code"]["source"] = FIRST_CELL.format(address=address).splitlines(keepends=True)


def set_address(new, root=ROOT):
    """Writes the address wherever the old one stands, and the first cells of each notebook."""
    old = re.search(r"url: (https://\S+)", (root / "book/_config.yml").read_text())[1]
    files = [root / name for name in ("README.md", "CITATION.cff", "pyproject.toml")]
    files += [root / "book/_config.yml", *(root / "book").glob("*.md")]
    for path in files:
        path.write_text(path.read_text().replace(old, new))
    for path in (root / "tutorials").glob("*.ipynb"):
        notebook = json.loads(path.read_text().replace(old, new))
        renew(notebook["cells"], new, path.name)
        path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n")


def on_config(app, config):
    """Without an address there is nothing that buttons could lead to."""
    if PLACEHOLDER in address():
        options = dict(config.html_theme_options, launch_buttons={})
        for name in ("repository_url", "use_repository_button", "use_issues_button"):
            options.pop(name, None)
        config.html_theme_options = options


def on_docstring(app, what, name, obj, options, lines):
    lines[:] = rst(lines)


def on_read(app, docname, text):
    if docname == "book/results":
        text[0] = results(text[0])


def on_page(app, name, template, context, doctree):
    """Thebe, which no button of this book starts, defines its constants twice: an error on each
    page."""
    scripts = context["script_files"]
    context["script_files"] = [x for x in scripts if "thebe" not in f"{x} {vars(x)}".lower()]


def on_env(app, env, names):
    """The results page is read each time, as results/ may have changed."""
    if "book/results" not in names:
        names.append("book/results")


def setup(app):
    app.connect("config-inited", on_config)
    app.connect("html-page-context", on_page)
    app.connect("autodoc-process-docstring", on_docstring)
    app.connect("source-read", on_read)
    app.connect("env-before-read-docs", on_env)
    return {"parallel_read_safe": True}


if __name__ == "__main__":
    if len(sys.argv) != 2 or not re.fullmatch(r"https://\S+[^\s/]", sys.argv[1]):
        sys.exit(f"address: {sys.argv[1:]}, want one such as https://github.com/OWNER/REPOSITORY")
    set_address(sys.argv[1])
