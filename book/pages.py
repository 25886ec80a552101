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
RESULTS = ROOT / "results"


# ------------------------------------------------------------------------------------ the API page
VALUE = re.compile(r'    ("\w+"): (.*)')
TERM = re.compile(r"([a-z_]+(?:, [a-z_]+)*): (.*)")


def rst(docstring):
    """ire.py's docstrings are plain text. They hold `code`, indented examples, `name: what it is`
    with indented lines, and under such a name `"value": what it means`."""
    lines = [""]
    in_example = False
    for line in docstring:
        indented = line.startswith("    ")
        begins = indented and not lines[-1]
        in_example = begins or (in_example and (indented or not line))
        if begins:
            lines += [".. code-block:: python", ""]
        lines += [line] if in_example else prose(line, lines[-1])
    return lines


def prose(line, before):
    """A line outside of examples. A name stands after a blank line, a sentence or another name."""
    line = re.sub(r"`([^`]+)`", r"``\1``", line)
    value = VALUE.match(line)
    if value:
        return ["", f"    ``{value[1]}``", f"        {value[2]}"]
    term = TERM.match(line)
    if term and (not before or before.startswith(" ") or before.endswith(".")):
        names = term[1].replace(", ", "``, ``")
        return ["", f"``{names}``", f"    {term[2]}"]
    return ["", line] if line.startswith("Raises ") else [line]


# -------------------------------------------------------------------------------- the results page
TIMES = {  # the columns of a table of times, and their titles
    "ms": "ms",
    "quartiles_ms": "quartiles",
    "over_fused_adamw": "times fused AdamW",
    "extra_bytes_per_parameter": "extra bytes per parameter",
    "tokens_per_second": "tokens per second",
    "of_adamw": "of AdamW",
    "images_per_second": "images per second",
    "of_plain": "of the plain loop",
    "quartiles": "quartiles",
}


def load(name):
    return json.loads((RESULTS / f"{name}.json").read_text())


def cell(value):
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1e3 else f"{value:,.0f}"
    if isinstance(value, list):
        return " to ".join(map(cell, value))
    return "" if value is None else str(value)


def table(rows):
    """Markdown of dicts, a line for each. Their keys are the heads."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    text = [names, ["---"] * len(names)]
    text += [[cell(row.get(name)) for name in names] for row in rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in text)


def source(report):
    """The command, and where it ran."""
    said = report.get("environment", report)
    names = [name for name in ("device", "hardware", "torch", "commit") if name in said]
    where = ", ".join(f"{name} {said[name]}" for name in names)
    where = re.sub(r"\b([0-9a-f]{12})[0-9a-f]{28}\b", r"\1", where)
    return f"`{report['command']}`<br>{where}\n"


def figure(name, what):
    return f"![{what}](../results/{name}.png)\n\n"


def compare(*names):
    rows = []
    gaps = []
    runs = [load(name) for name in names]
    for run in runs:
        adamw, admire = run["adamw"]["val_loss"], run["admire"]["val_loss"]
        gaps.append(admire - adamw)
        row = {"seed": run["adamw"]["seed"], "AdamW": f"{adamw:.4f}", "AdmIRE": f"{admire:.4f}"}
        reached = run["reached_at_step"] or "never"
        row |= {"difference": f"{gaps[-1]:+.4f}", "AdmIRE at AdamW's final loss at step": reached}
        rows.append(row)
    error = statistics.stdev(gaps) / len(gaps) ** 0.5
    rows.append({"seed": "mean", "difference": f"{statistics.mean(gaps):+.4f} ± {error:.4f}"})
    return f"{table(rows)}\n" + "\n".join(map(source, runs))


def sweep(name):
    """The best trial of each optimizer and warm-up."""
    report = load(name)
    best = {}
    for run in sorted(report["runs"], key=lambda run: run["val_loss"]):
        best.setdefault((run["optimizer"], run["warmup"]), run)
    return f"{table([best[key] for key in sorted(best)])}\n{source(report)}"


def times(name):
    """The tables of benchmarks/speed.py; one for each size where there are several."""
    report = load(name)
    text = ""
    for size, found in report.get("sizes", {"": report}).items():
        text += f"{size} parameters\n\n" if size else ""
        lines = []
        for row, values in found["rows"].items():
            shown = {title: values[key] for key, title in TIMES.items() if key in values}
            lines.append({"": row} | shown)
        text += f"{table(lines)}\n"
    return f"{text}{source(report)}"


def speedup(name):
    from report import speedup_table

    report = load(name)
    drawn = figure(name, "Loss against the length of the schedule, and the ablations")
    return f"{drawn}{speedup_table(report)}\n\n{source(report)}"


def cifar_row(name, settings, values, sign=""):
    row = {"": name, "settings": ", ".join(f"{own} {value:g}" for own, value in settings.items())}
    shown = (("test_acc", "test accuracy, %", 2), ("train_loss", "training loss", 4))
    for key, title, digits in (*shown, ("trace", "Tr(H)", 1)):
        mean, error = values[key]
        row[title] = f"{mean:{sign}.{digits}f} ± {error:.{digits}f}"
    return row


def cifar(name):
    report = load(name)
    rows = [cifar_row(own, row["settings"], row) for own, row in report["table"].items()]
    for own, row in report["table"].items():
        if "less_base" in row:
            title = f"{own} minus {own.removesuffix('-ire')}, seed by seed"
            rows.append(cifar_row(title, {}, row["less_base"], "+"))
    drawn = figure(name, "Test accuracy and Tr(H) of SGD, SAM and both with IRE")
    fixed = ", ".join(f"{own} {value}" for own, value in report["settings"].items())
    said = f"{report['pictures']}; {fixed}; mean ± standard error."
    return f"{drawn}{table(rows)}\n{said}\n\n{source(report)}"


def cifar_map(name):
    report = load(name)
    drawn = figure(name, "Tr(H), training loss and accuracy over kappa and gamma")
    said = f"{len(report['runs'])} of {report['planned']} runs; {report['pictures']}."
    return f"{drawn}{said}\n\n{source(report)}"


def cifar_probe(name):
    report = load(name)
    rows = []
    for own, row in report["less_first"].items():
        rows.append(cifar_row(f"{own}, minus the first pictures", {}, row, "+"))
    return f"{table(rows)}\n{source(report)}"


def results(text):
    """The page with each `{{ name file }}` replaced by what this function says of this file."""

    def said(found):
        name, *files = found[1].split()
        return globals()[name](*files)

    text = re.sub(r"{{ (.+?) }}", said, text)
    return text.replace(" ± ", "\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}")


# ------------------------------------------------------------------- the address of the repository
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


def address(root=ROOT):
    return re.search(r"url: (https://\S+)", (root / "book/_config.yml").read_text())[1]


def on_colab(address, name):
    """The line of a notebook that says how to open it on Colab, which opens what is on GitHub."""
    repository = address.removeprefix("https://github.com/")
    if repository == address:
        text = "the repository has no public address yet. "
        text += "Upload it as NAME.zip, then `!unzip -q NAME.zip`."
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
    old = address(root)
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
    """Leaves out Thebe, which defines its constants twice: an error on each page. No button of this
    book starts Thebe."""
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
        sys.exit("pages.py: allowed is one address, such as https://github.com/OWNER/REPOSITORY")
    set_address(sys.argv[1])
